"""Odd and hostile pictures: each becomes RGB or an error that says what to do."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.sources import images
from pipeline.sources.images import ImageError, decode, fit


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def test_zero_bytes() -> None:
    with pytest.raises(ImageError, match=r"empty file \(0 bytes\): replace it, then run retry"):
        decode(b"")


def test_a_file_that_is_no_picture() -> None:
    with pytest.raises(ImageError, match="not a picture in any of JPEG"):
        decode(b"just text, called .jpg")


def test_a_truncated_jpeg() -> None:
    data = encode(Image.effect_noise((200, 200), 80).convert("RGB"), "JPEG")
    with pytest.raises(ImageError, match="damaged JPEG"):
        decode(data[: len(data) // 2])


def test_a_truncated_png() -> None:
    data = encode(Image.effect_noise((200, 200), 80).convert("RGB"), "PNG")
    with pytest.raises(ImageError, match="damaged"):
        decode(data[: len(data) // 2])


def test_cmyk_keeps_its_colours() -> None:
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    pixel = decode(data).getpixel((4, 4))
    assert pixel[0] > 200 and max(pixel[1:]) < 60, pixel


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    grey = np.asarray(decode(encode(Image.fromarray(ramp), "PNG")))[..., 0].ravel()
    assert grey[0] == 0 and grey[-1] == 255
    assert np.abs(grey.astype(int) - np.arange(256)).max() <= 1


def test_a_palette_with_transparency_lies_on_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    data = encode(image, "PNG", transparency=0)
    assert decode(data).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encode(image, "PNG")).getpixel((0, 0)) == (255, 0, 0)


def test_half_transparent_pixels_blend_with_white() -> None:
    data = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")
    assert decode(data).getpixel((0, 0)) == (127, 127, 127)


def test_of_an_animated_gif_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((4, 4)) == (255, 0, 0)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(image, "JPEG", exif=exif.tobytes())).size == (10, 20)


def test_a_bomb_of_30000_by_30000_is_refused_on_its_header() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ImageError, match=r"too large"):
        decode(bomb)
    with pytest.raises(ImageError, match=r"too large"):
        decode(bomb, max_pixels=10**8)


def test_the_pixel_limit_is_a_setting() -> None:
    data = encode(Image.new("RGB", (100, 100)), "PNG")
    with pytest.raises(ImageError, match="100 x 100 pixels, limit 9999: shrink it or raise --max-pixels"):
        decode(data, max_pixels=9999)
    assert decode(data, max_pixels=10_000).size == (100, 100)


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 480), (64, 48)), ((1, 1000), (1, 64)), ((30, 20), (30, 20))]
)
def test_fit_shrinks_the_longer_edge_and_never_enlarges(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fit(Image.new("RGB", size), 64).size == expected


def test_jpegs_decode_small_when_small_is_enough() -> None:
    data = encode(Image.new("RGB", (800, 800), "green"), "JPEG")
    assert decode(data, shrink_to=100).size == (100, 100)
    assert decode(data, shrink_to=801).size == (800, 800)


def test_random_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    whole = encode(Image.effect_noise((32, 32), 50).convert("RGB"), "JPEG")
    for kind in ("PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        for _ in range(30):
            data = bytearray(encode(Image.effect_noise((32, 32), 50).convert("RGB"), kind))
            for place in rng.integers(0, len(data), 6):
                data[place] = rng.integers(256)
            try:
                assert decode(bytes(data)).mode == "RGB"
            except ImageError as error:
                assert len(str(error)) > 10
    assert decode(whole).size == (32, 32)
    assert set(images.EXTENSIONS) >= {".jpg", ".png", ".webp"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_all_eight_orientations_are_turned_as_pillow_turns_them(turn: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels = np.random.default_rng(turn).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(pixels), kind, exif=exif.tobytes(), **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))
