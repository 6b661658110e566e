"""Say what is in a synthetic scene: its class, its objects, their places and the English sentence that is
true of it.

Nothing to run here; `render.py` draws these scenes and `train_captioner.py` learns to describe them.
One scene takes about a tenth of a millisecond, and needs NumPy only.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUND_COLOURS = tuple(
    f"{shade} {hue}" for shade in ("dark", "light") for hue in ("gray", "green", "blue", "brown")
)
BACKGROUND_KINDS = ("plain", "gradient", "striped", "grainy")
SHARED = ("shape", "colour", "texture", "nothing")
RELATIONS = {"side-by-side": "left of", "stacked": "above", "nested": "inside"}
RELATION_CLASSES = tuple(
    f"{'all-different' if shared == 'nothing' else 'same-' + shared}-{arrangement}"
    for shared in SHARED
    for arrangement in RELATIONS
)
# A kind is the colour and the shape of what lies inside another object; all else is chance.
KIND_COLOURS = ("red", "yellow", "green", "blue")
KINDS = tuple(f"{colour}-{shape}" for colour in KIND_COLOURS for shape in SHAPES)
TASKS = {"kinds": KINDS, "relations": RELATION_CLASSES}

# Diameters in units of the image's shorter side. The gaps between the ranges keep the words decidable at 64
# pixels.
SIZES = {
    "tiny": (0.16, 0.18),
    "small": (0.26, 0.29),
    "medium": (0.345, 0.375),
    "large": (0.45, 0.48),
    "huge": (0.80, 0.86),
}
NESTED_LARGE = (0.60, 0.65)  # a large object that holds another one needs a little more room
# Only these still show their texture around what they hold when merely large.
ROOMY = (
    "circle",
    "square",
    "heart",
)
# How far a shape's corners reach beyond its nominal radius: corners carry little area, so they may stick out.
REACH = {
    "circle": 1.0,
    "square": 1.1,
    "triangle": 1.16,
    "star": 1.1,
    "cross": 1.06,
    "ring": 1.0,
    "heart": 1.0,
}
PLACES = ("top left", "top", "top right", "left", "", "right", "bottom left", "bottom", "bottom right")


@dataclass(frozen=True)
class Thing:
    """One object: what it is called, and where it lies (lengths in units of the shorter side)."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    diameter: float
    angle: float  # radians
    place: str = ""  # named for distractors only

    @property
    def reach(self) -> float:
        """The radius of the circle that holds the whole object."""
        return self.diameter / 2 * REACH[self.shape]


@dataclass(frozen=True)
class Scene:
    """Everything a drawing needs; `first` is the left, the upper or the inner one of the two main objects."""

    label: str
    relation_class: str  # what the two main objects share, and how they are arranged; a label or chance
    width: int
    height: int
    first: Thing
    second: Thing
    distractors: tuple[Thing, ...]
    background_colour: str
    background_kind: str
    light_level: str
    light_angle: float
    seed: int  # of the drawing's own noise

    @property
    def arrangement(self) -> str:
        return next(name for name in RELATIONS if self.relation_class.endswith(name))


def generator_for(seed: int, split: str, label: str, index: int) -> np.random.Generator:
    """A generator of this image's own, so that order, count and worker never change a picture."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), zlib.crc32(label.encode()), index])


def sample_scene(seed: int, split: str, label: str, index: int) -> Scene:
    """The scene that belongs to these four values, always the same one; `label` is of any task."""
    rng = generator_for(seed, split, label, index)
    relation_class, colour, shape = label, "", ""
    if label in KINDS:
        relation_class = _pick(rng, tuple(name for name in RELATION_CLASSES if name.endswith("nested")))
        colour, _, shape = label.partition("-")
    short, aspect = rng.uniform(80, 108), rng.uniform(1, 4 / 3)
    sides = [round(short), round(short * aspect)]
    width, height = sides if rng.random() < 0.5 else sides[::-1]
    room = (width / min(sides), height / min(sides))
    first, second = _main_pair(rng, relation_class, room, colour, shape)
    return Scene(
        label=label,
        relation_class=relation_class,
        width=width,
        height=height,
        first=first,
        second=second,
        distractors=_distractors(rng, (first, second), room),
        background_colour=_pick(rng, BACKGROUND_COLOURS),
        background_kind=_pick(rng, BACKGROUND_KINDS),
        light_level=_pick(rng, ("bright", "dim")),
        light_angle=float(rng.uniform(0, 2 * math.pi)),
        seed=int(rng.integers(2**31)),
    )


def caption_of(scene: Scene) -> str:
    """The true sentence: both main objects, their relation, the background, then the distractors in reading
    order."""
    relation = RELATIONS[scene.arrangement]
    text = f"{_phrase(scene.first)} {relation} {_phrase(scene.second)}"
    text += f" on a {scene.background_colour} {scene.background_kind} background"
    extras = [f"a tiny {thing.colour} {thing.shape} at the {thing.place}" for thing in scene.distractors]
    return text + (", with " + " and ".join(extras) if extras else "") + "."


def attributes_of(scene: Scene) -> dict[str, Any]:
    """The same truth in fields, for whoever would rather count than read."""
    return {
        "arrangement": scene.arrangement,
        "shared": next(
            (name for name in SHARED if scene.relation_class.startswith(f"same-{name}")), "nothing"
        ),
        "relation": RELATIONS[scene.arrangement],
        "first": _fields(scene.first),
        "second": _fields(scene.second),
        "background": {"colour": scene.background_colour, "kind": scene.background_kind},
        "distractors": [{"colour": t.colour, "shape": t.shape, "place": t.place} for t in scene.distractors],
        "lighting": {"level": scene.light_level, "degrees": round(math.degrees(scene.light_angle))},
    }


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _phrase(thing: Thing) -> str:
    return f"a {thing.size} {thing.colour} {thing.texture} {thing.shape}"


def _fields(thing: Thing) -> dict[str, str]:
    return {"size": thing.size, "colour": thing.colour, "texture": thing.texture, "shape": thing.shape}


def _two(rng: np.random.Generator, options: tuple[str, ...], same: bool, first: str = "") -> tuple[str, str]:
    one = first or _pick(rng, options)
    return one, one if same else _pick(rng, tuple(o for o in options if o != one))


def _main_pair(
    rng: np.random.Generator, relation: str, room: tuple[float, float], colour: str, shape: str
) -> tuple[Thing, Thing]:
    """The main objects of a relation class; the first has the colour and shape that are named."""
    shapes = _two(rng, SHAPES, relation.startswith("same-shape"), shape)
    colours = _two(rng, COLOURS, relation.startswith("same-colour"), colour)
    textures = _two(rng, TEXTURES, relation.startswith("same-texture"))
    place = _nested if relation.endswith("nested") else _beside
    sizes, diameters, centres = place(rng, shapes, room, stacked=relation.endswith("stacked"))
    first, second = (
        Thing(
            shapes[i],
            colours[i],
            textures[i],
            sizes[i],
            *centres[i],
            diameters[i],
            float(rng.uniform(-0.3, 0.3)),
        )
        for i in (0, 1)
    )
    return first, second


Placement = tuple[tuple[str, str], tuple[float, float], tuple[tuple[float, float], tuple[float, float]]]


def _nested(
    rng: np.random.Generator, shapes: tuple[str, str], room: tuple[float, float], stacked: bool
) -> Placement:
    """The second holds the first: centred in it, since half the shapes have no spare room off their
    middle."""
    outer = _pick(rng, ("large", "huge")) if shapes[1] in ROOMY else "huge"
    inner = "small" if outer == "large" else _pick(rng, ("small", "medium"))
    diameter = float(rng.uniform(*(NESTED_LARGE if outer == "large" else SIZES["huge"])))
    reach = diameter / 2 * REACH[shapes[1]]
    x, y = (
        float(np.clip(side / 2 + rng.normal(0, 0.08), min(reach, side / 2), max(side - reach, side / 2)))
        for side in room
    )
    return (inner, outer), (float(rng.uniform(*SIZES[inner])), diameter), ((x, y), (x, y))


def _beside(
    rng: np.random.Generator, shapes: tuple[str, str], room: tuple[float, float], stacked: bool
) -> Placement:
    """Two objects along one axis with a gap, somewhere in the room; sizes that do not fit are drawn again."""
    along, across = (room[1], room[0]) if stacked else room
    while True:
        sizes = (_pick(rng, ("small", "medium", "large")), _pick(rng, ("small", "medium", "large")))
        diameters = tuple(float(rng.uniform(*SIZES[size])) for size in sizes)
        reach = [d / 2 * REACH[shape] for d, shape in zip(diameters, shapes, strict=True)]
        spare = along - 2 * sum(reach) - 0.03
        if spare > 0.03:
            break
    gap = 0.03 + rng.uniform(0, min(spare, 0.2))
    start = rng.uniform(0.3, 0.7) * (along - 2 * sum(reach) - gap)
    places = (start + reach[0], start + 2 * reach[0] + gap + reach[1])
    middle = across / 2 + rng.uniform(-0.1, 0.1)
    sides = [float(np.clip(middle + rng.uniform(-0.06, 0.06), r, across - r)) for r in reach]
    pairs = [(side, place) if stacked else (place, side) for side, place in zip(sides, places, strict=True)]
    return (
        sizes,
        diameters,
        ((float(pairs[0][0]), float(pairs[0][1])), (float(pairs[1][0]), float(pairs[1][1]))),
    )


def _distractors(
    rng: np.random.Generator, mains: tuple[Thing, Thing], room: tuple[float, float]
) -> tuple[Thing, ...]:
    """Up to two tiny plain objects, each in its own ninth of the picture and clear of everything else."""
    wanted, found = int(rng.integers(3)), []
    for cell in (int(c) for c in rng.permutation(9)):
        if len(found) == wanted or not PLACES[cell]:
            continue
        shape, diameter = _pick(rng, SHAPES), float(rng.uniform(*SIZES["tiny"]))
        x, y = (
            _in_ninth(rng, side, third, diameter * 0.6)
            for side, third in zip(room, (cell % 3, cell // 3), strict=True)
        )
        thing = Thing(
            shape,
            _pick(rng, COLOURS),
            "plain",
            "tiny",
            x,
            y,
            diameter,
            float(rng.uniform(-0.3, 0.3)),
            PLACES[cell],
        )
        if all(
            math.dist((x, y), (other.x, other.y)) > thing.reach + other.reach + 0.025
            for other in (*mains, *found)
        ):
            found.append(thing)
    return tuple(sorted(found, key=lambda thing: PLACES.index(thing.place)))


def _in_ninth(rng: np.random.Generator, side: float, third: int, margin: float) -> float:
    """A coordinate in one third of a side; the outer thirds hug the border, where there is room."""
    if third == 1:
        return float(side / 2 + rng.uniform(-0.08, 0.08))
    offset = margin + rng.uniform(0, 0.08)
    return float(offset if third == 0 else side - offset)
