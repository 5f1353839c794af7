"""Configs: changes are laid over defaults, and what is wrong is said in one sentence."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from pipeline.config import Config, merge, parse_config
from pipeline.errors import UsageError


class Circle(Config):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


class Square(Config):
    kind: Literal["square"] = "square"
    side: float


class Pen(Config):
    width: int = 1
    colour: str = "black"


class Frame(Config):
    pen: Pen = Pen(width=9)
    depth: int = 2


class Drawing(Config):
    pen: Pen = Pen(width=3, colour="red")
    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle(radius=2.0)
    frame: Frame | None = None


def test_a_change_leaves_its_neighbours_alone() -> None:
    drawing = parse_config(Drawing, {"pen": {"width": 5}, "shape": {"radius": 7.0}}, where="here")
    assert drawing == Drawing(pen=Pen(width=5, colour="red"), shape=Circle(radius=7.0))


def test_naming_the_kind_starts_afresh() -> None:
    assert parse_config(Drawing, {"shape": {"kind": "circle"}}, where="here").shape == Circle(radius=1.0)
    assert parse_config(Drawing, {"shape": {"kind": "square", "side": 2.0}}, where="here").shape == Square(side=2.0)


def test_a_part_that_is_null_has_defaults_once_it_is_asked_for() -> None:
    assert parse_config(Drawing, {}, where="here").frame is None
    framed = parse_config(Drawing, {"frame": {"pen": {"colour": "blue"}}}, where="here")
    assert framed.frame == Frame(pen=Pen(width=9, colour="blue"))


def test_merge_alters_nothing() -> None:
    base = {"a": {"b": 1}}
    assert merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"pen": {"widht": 2}}, "unknown key 'widht' in here.pen: did you mean 'width'?"),
        ({"pen": {"radius": 1.0}}, "unknown key 'radius' in here.pen: known are: colour, width"),
        (
            {"shape": {"kind": "square", "side": 2.0, "widht": 2}},
            "unknown key 'widht' in here.shape: known are: kind, side",
        ),
        ({"pen": {"width": 1.5}}, "here.pen.width"),
        ({"pen": {"width": "2"}}, "here.pen.width"),
        ({"shape": {"kind": "square"}}, "here.shape.side is missing"),
        ({"shape": {"kind": "sqare"}}, "here.shape.kind 'sqare' is unknown: did you mean 'square'?"),
        ({"shape": {"kind": "square", "side": "2"}}, "here.shape.side"),
        ({"pen": {"width": float("nan")}}, "here holds a value"),
    ],
)
def test_refusals(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace("?", r"\?").replace(".", r"\.")):
        parse_config(Drawing, values, where="here")
