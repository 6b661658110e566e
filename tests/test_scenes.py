"""What a class of the drawn scenes says is what is drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "scenes"))
import scene


def test_a_kind_is_the_colour_and_shape_of_what_lies_inside() -> None:
    for label in scene.KINDS:
        for index in range(5):
            drawn = scene.sample_scene(0, "train", label, index)
            assert f"{drawn.first.colour}-{drawn.first.shape}" == drawn.label == label
            assert drawn.arrangement == "nested"
            said = scene.caption_of(drawn).partition(" inside ")[0]
            assert drawn.first.colour in said and drawn.first.shape in said


def test_all_else_of_a_kind_is_chance() -> None:
    drawn = [scene.sample_scene(0, "train", "red-star", index) for index in range(400)]
    seen = {
        "outer shapes": {each.second.shape for each in drawn},
        "outer colours": {each.second.colour for each in drawn},
        "textures": {each.first.texture for each in drawn},
        "backgrounds": {each.background_colour for each in drawn},
        "shared": {scene.attributes_of(each)["shared"] for each in drawn},
    }
    options = (scene.SHAPES, scene.COLOURS, scene.TEXTURES, scene.BACKGROUND_COLOURS, scene.SHARED)
    for (name, found), possible in zip(seen.items(), options, strict=True):
        assert found == set(possible), name


@pytest.mark.parametrize("label", scene.RELATION_CLASSES)
def test_a_relation_is_what_the_two_share_and_how_they_lie(label: str) -> None:
    for index in range(5):
        drawn = scene.sample_scene(0, "train", label, index)
        one, two = drawn.first, drawn.second
        equal = {
            "shape": one.shape == two.shape,
            "colour": one.colour == two.colour,
            "texture": one.texture == two.texture,
        }
        told = scene.attributes_of(drawn)
        assert [name for name, same in equal.items() if same] == [
            name for name in equal if name == told["shared"]
        ]
        assert label.endswith(told["arrangement"])
