"""Draw one sampled scene with NumPy as a small noisy photograph-like picture.

Nothing to run here; `render.py` is the command, `picture_of` the function to call.
One picture of about 100 pixels a side costs two to three milliseconds of one core.
"""

from __future__ import annotations

import colorsys
import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scene import REACH, Scene, Thing, sample_scene

Array = NDArray[np.float32]

HUES = {  # name: (hue in degrees, saturation, value)
    "red": (0, 0.92, 0.92),
    "orange": (27, 0.95, 1.0),
    "yellow": (55, 0.9, 1.0),
    "green": (125, 0.85, 0.72),
    "cyan": (181, 0.85, 0.92),
    "blue": (224, 0.88, 0.95),
    "purple": (276, 0.8, 0.75),
    "pink": (325, 0.5, 1.0),
}
BACKGROUNDS = {
    "dark gray": (0, 0.0, 0.28),
    "dark green": (130, 0.55, 0.30),
    "dark blue": (220, 0.6, 0.36),
    "dark brown": (25, 0.6, 0.32),
    "light gray": (0, 0.0, 0.80),
    "light green": (115, 0.28, 0.84),
    "light blue": (208, 0.28, 0.88),
    "light brown": (32, 0.36, 0.84),
}


def picture_of(scene: Scene) -> Image.Image:
    """The finished picture, before JPEG."""
    rng = np.random.default_rng(scene.seed)
    canvas = _background(scene, rng)
    behind_first = (
        (scene.second, scene.first) if scene.arrangement == "nested" else (scene.first, scene.second)
    )
    for thing in (*behind_first, *scene.distractors):
        _paint(canvas, thing, rng, halo=thing is scene.first and scene.arrangement == "nested")
    canvas *= _light(scene, rng)[..., None]
    canvas += rng.uniform(0.008, 0.028) * rng.standard_normal(canvas.shape, np.float32)
    return Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))


def jpeg_of(scene: Scene) -> bytes:
    """The picture as JPEG, its quality part of the scene's own chance."""
    buffer = io.BytesIO()
    picture_of(scene).save(buffer, "JPEG", quality=70 + scene.seed % 26)
    return buffer.getvalue()


def write_picture(job: tuple[int, str, str, int, str]) -> tuple[str, Scene]:
    """Render one (seed, split, label, index, root) into its file; returns the path below root and the
    scene."""
    seed, split, label, index, root = job
    scene = sample_scene(seed, split, label, index)
    path = f"{split}/{label}/{index:05d}.jpg"
    (Path(root) / path).write_bytes(jpeg_of(scene))
    return path, scene


def thumbnail_of(job: tuple[int, str, str, int, int]) -> tuple[bytes, Scene]:
    """One (seed, split, label, index, side) as the raw RGB bytes of a square thumbnail, and its scene."""
    seed, split, label, index, side = job
    scene = sample_scene(seed, split, label, index)
    with Image.open(io.BytesIO(jpeg_of(scene))) as picture:
        small = picture.resize((side, side), Image.Resampling.BICUBIC)
    return small.tobytes(), scene


def _rgb(spec: tuple[float, float, float], rng: np.random.Generator) -> Array:
    """A shade of a named colour: some degrees of hue, some percent of saturation and value."""
    hue, saturation, value = spec
    hue, value = (hue + rng.uniform(-5, 5)) / 360 % 1, value * rng.uniform(0.94, 1.06)
    return np.array(
        colorsys.hsv_to_rgb(hue, min(1, saturation * rng.uniform(0.9, 1.08)), min(1, value)), np.float32
    )


def _grid(scene: Scene) -> tuple[Array, Array]:
    unit = min(scene.width, scene.height)
    y, x = np.mgrid[0 : scene.height, 0 : scene.width].astype(np.float32)
    return (x + 0.5) / unit, (y + 0.5) / unit


def _background(scene: Scene, rng: np.random.Generator) -> Array:
    """A field of one colour whose value swings in the way the background's kind says."""
    colour = _rgb(BACKGROUNDS[scene.background_colour], rng)
    swing = 0.10 if scene.background_colour.startswith("light") else 0.075
    x, y = _grid(scene)
    angle = rng.uniform(0, 2 * math.pi)
    along = (x - x.mean()) * math.cos(angle) + (y - y.mean()) * math.sin(angle)
    if scene.background_kind == "gradient":
        field = along / np.abs(along).max() * 1.6
    elif scene.background_kind == "striped":
        field = (
            np.sin(along * (2 * math.pi / rng.uniform(0.13, 0.19)) + rng.uniform(0, 6)).clip(-0.35, 0.35)
            / 0.35
        )
    elif scene.background_kind == "grainy":
        cells = rng.uniform(-1.6, 1.6, (math.ceil(y.max() / 0.045) + 1, math.ceil(x.max() / 0.045) + 1))
        field = cells[(y / 0.045).astype(int), (x / 0.045).astype(int)]
    else:
        field = np.zeros_like(along)
    return (colour * (1 + (field * swing / colour.max())[..., None])).astype(np.float32)


def _light(scene: Scene, rng: np.random.Generator) -> Array:
    """How bright every pixel is lit: a level, and a slight fall-off away from the lamp."""
    x, y = _grid(scene)
    slope = (x - x.mean()) * math.cos(scene.light_angle) + (y - y.mean()) * math.sin(scene.light_angle)
    level = rng.uniform(0.98, 1.08) if scene.light_level == "bright" else rng.uniform(0.76, 0.86)
    return (level * (1 + slope * rng.uniform(0.04, 0.14))).astype(np.float32)


def _paint(canvas: Array, thing: Thing, rng: np.random.Generator, halo: bool) -> None:
    """Lay one object over the canvas: an edge darker than itself, then its textured body."""
    unit = min(canvas.shape[:2])
    radius = thing.diameter / 2 * unit
    reach = radius * REACH[thing.shape] + 6
    x0, x1 = max(0, int(thing.x * unit - reach)), min(canvas.shape[1], int(thing.x * unit + reach) + 1)
    y0, y1 = max(0, int(thing.y * unit - reach)), min(canvas.shape[0], int(thing.y * unit + reach) + 1)
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    dx, dy = x + 0.5 - thing.x * unit, y + 0.5 - thing.y * unit
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    # Distances in pixels, negative inside; they are what makes the edges smooth without supersampling.
    distance = SIGNED[thing.shape]((dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius) * radius
    colour = _rgb(HUES[thing.colour], rng)
    body = colour * (1 - 0.65 * _marks(thing, dx, dy, unit, rng))[..., None]
    window, edge = canvas[y0:y1, x0:x1], 0.012 * unit
    if halo:  # an object within another of its own colour would vanish without a pale rim
        _blend(window, np.full(3, 0.97, np.float32), distance - 0.03 * unit)
    _blend(window, colour * 0.25, distance)
    _blend(window, body, distance + edge)


def _blend(window: Array, colour: Array, distance: Array) -> None:
    cover = (0.5 - distance).clip(0, 1)[..., None]
    window += (colour - window) * cover


def _marks(thing: Thing, dx: Array, dy: Array, unit: int, rng: np.random.Generator) -> Array:
    """Where the texture darkens the body, 0 to 1; bigger objects wear wider marks."""
    angle, pitch = rng.uniform(0, math.pi), (0.052 + 0.12 * thing.diameter) * unit * rng.uniform(0.95, 1.05)
    u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    if thing.texture == "striped":
        return (np.sin(u * (2 * math.pi / pitch)) * pitch / 5 + 0.5).clip(0, 1)
    if thing.texture == "dotted":
        u, v = (u / pitch) % 1 - 0.5, (v / pitch) % 1 - 0.5
        return ((0.33 - np.sqrt(u * u + v * v)) * pitch + 0.5).clip(0, 1)
    if thing.texture == "checkered":
        wave = math.pi / (pitch * 0.72)
        return (np.sin(u * wave) * np.sin(v * wave) * pitch / 2.5 + 0.5).clip(0, 1)
    return np.zeros_like(dx)


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - 1


def _square(x: Array, y: Array) -> Array:
    return np.maximum(abs(x), abs(y)) - 0.78


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(y, np.maximum(0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y)) - 0.58


def _star(x: Array, y: Array) -> Array:
    """Fold the plane into one tenth of the star, then measure to the single edge left there."""
    fifth = 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    radius = np.sqrt(x * x + y * y)
    tip, notch = (1.1, 0.0), (0.52 * math.cos(fifth / 2), 0.52 * math.sin(fifth / 2))
    normal = (notch[1] - tip[1], tip[0] - notch[0])
    length = math.hypot(*normal)
    return ((radius * np.cos(angle) - tip[0]) * normal[0] + radius * np.sin(angle) * normal[1]) / length


def _cross(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    return np.minimum(np.maximum(x - 0.36, y - 1), np.maximum(y - 0.36, x - 1))


def _ring(x: Array, y: Array) -> Array:
    radius = np.sqrt(x * x + y * y)
    return np.maximum(radius - 1, 0.45 - radius)


def _heart(x: Array, y: Array) -> Array:
    """A square on its corner with a half disc on each of its two upper sides."""
    half, y = 0.56, 0.08 - y
    u, v = (x + y) * 0.7071, (y - x) * 0.7071
    discs = np.minimum(np.hypot(u - half, v), np.hypot(u, v - half)) - half
    return np.minimum(np.maximum(abs(u), abs(v)) - half, discs)


SIGNED = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
}
