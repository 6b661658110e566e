"""One untrusted picture: decode it to RGB within limits, shrink it. Used by ingest, by captioning and by
training.

Every oddity that people's folders hold has a rule here: EXIF rotation is applied, transparency lies on white,
16-bit greys are scaled (not clipped), CMYK and palettes are converted, of an animation the first frame
counts. What cannot be read raises `ImageError`, whose text says what, why and the mend, and becomes the
`error` of the row.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
DEFAULT_MAX_PIXELS = 178_956_970
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A picture that cannot be used; the text goes into the row's `error`."""


def decode(
    image_bytes: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, shrink_to: int | None = None
) -> Image.Image:
    """Decodes a picture to RGB.

    Args:
        image_bytes: an encoded file in one of FORMATS.
        max_pixels: limit on width x height, checked on the header, before any pixel is decoded.
        shrink_to: edge length in pixels that the caller needs at least; lets JPEG decode at 1/2, 1/4 or 1/8
            size.

    Raises:
        ImageError: empty, of no known format, too large, or damaged.
    """
    if not image_bytes:
        message = "empty file (0 bytes): replace it, then run retry, or go on without it (--max-failure-rate)"
        raise ImageError(message)
    with warnings.catch_warnings():
        # Pillow warns of large pictures and odd EXIF; the limit below is ours.
        warnings.simplefilter("ignore")
        picture = _open(image_bytes)
        width, height = picture.size
        if width < 1 or height < 1:
            message = f"damaged header ({width} x {height} pixels): replace it, then run retry"
            raise ImageError(message)
        if width * height > max_pixels:
            message = (
                f"too large: {width} x {height} pixels, limit {max_pixels}: shrink it or raise --max-pixels"
            )
            raise ImageError(message)
        try:
            if shrink_to is not None and picture.format == "JPEG":
                picture.draft("RGB", (shrink_to, shrink_to))
            picture.load()
            return _to_rgb(_upright(picture))
        except ImageError:
            raise
        except (
            Exception
        ) as error:  # decoders raise whatever the bytes provoke; none of it is more than this one picture
            message = f"damaged {picture.format} ({_said(error)}): replace it, then run retry"
            raise ImageError(message) from None


def fit(picture: Image.Image, max_edge: int) -> Image.Image:
    """The picture, shrunk so that its longer edge has at most `max_edge` pixels; small ones stay as they
    are."""
    scale = max_edge / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def decode_to_fit(image_bytes: bytes, max_edge: int, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """`decode` and `fit` in one, for the captioner: a large JPEG is decoded at a fraction of its size.

    The fraction leaves at least twice `max_edge`, so that the picture shrinks once by averaging and not twice
    in a row.
    """
    return fit(decode(image_bytes, max_pixels=max_pixels, shrink_to=2 * max_edge), max_edge)


def jpeg(picture: Image.Image) -> bytes:
    """An RGB picture as a JPEG of quality 95, without further loss of colour resolution: what `--max-edge`
    packs."""
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=95, subsampling=0)
    return sink.getvalue()


def _open(image_bytes: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(image_bytes), formats=FORMATS)
    except UnidentifiedImageError:
        message = (
            f"not a picture in any of {', '.join(FORMATS)}: replace it, then run retry, or go on without it "
            "(--max-failure-rate)"
        )
        raise ImageError(message) from None
    except Image.DecompressionBombError as error:
        message = f"too large: {error}: shrink it"
        raise ImageError(message) from None
    except Exception as error:  # as above: a header can provoke anything, MemoryError too
        message = f"damaged header ({_said(error)}): replace it, then run retry"
        raise ImageError(message) from None


def _said(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "or more than this machine's memory holds"
    return (str(error) or type(error).__name__)[:300]


def _upright(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF turns it; where EXIF is damaged it stays as it lies, as in every viewer.

    Not Pillow's `exif_transpose`, which also writes the EXIF anew, and fails where that cannot be done.
    """
    # Looking for an orientation takes as long as decoding a small JPEG, and most say nothing of one.
    if picture.format == "JPEG" and not picture.info.keys() & {"exif", "xmp"}:
        return picture
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever the damage provokes: the pixels are whole
        return picture
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow's own conversion clips at 255, which turns a 16-bit photograph white.
        grey = np.asarray(picture).astype(np.uint32)
        return Image.fromarray((np.minimum(grey, 65535) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        message = "floating-point TIFF: its range is unknown; convert it to 8 or 16 bits, then run retry"
        raise ImageError(message)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")
