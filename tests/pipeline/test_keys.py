"""Keys: canonical JSON (RFC 8785), neutral fields, what is refused; one key is pinned."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.keys import NEUTRAL, artifact_key, canonical_bytes, config_value, sha256

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(-1e15, 1e15) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


class Part(Config):
    rate: float = 1e-3


class Before(Config):
    clusters: int = 128
    part: Part = Part()
    names: tuple[str, ...] = ("a",)


class After(Before):
    """The same config in a later release."""

    seed: int = Field(0, json_schema_extra=NEUTRAL)


class Nested(Config):
    inner: After = After()


@settings(max_examples=100, deadline=None)
@given(PLAIN)
def test_canonical_json_reads_back_and_is_a_fixed_point(value) -> None:
    data = canonical_bytes(value)
    assert json.loads(data) == value
    assert canonical_bytes(json.loads(data)) == data


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=5), st.randoms())
def test_the_order_of_writing_does_not_matter(value, chance) -> None:
    names = list(value)
    chance.shuffle(names)
    assert canonical_bytes({name: value[name] for name in names}) == canonical_bytes(value)


def test_examples_of_rfc_8785() -> None:
    numbers = [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001, -0.0]
    text = '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27,0],"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    value = {"numbers": numbers, "string": '€$\u000f\nA\'B"\\\\"/', "literals": [None, True, False]}
    assert canonical_bytes(value).decode() == text
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    ordered = list(json.loads(canonical_bytes(dict.fromkeys(keys, 0))))
    assert ordered == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]  # by UTF-16 code units


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 2**53 + 1, -(2**60), {1, 2}, b"x", object(), "\ud800", {1: 2}]
)
def test_what_has_no_exact_form_is_refused(value) -> None:
    with pytest.raises(UsageError):
        canonical_bytes({"a": [value]})


def test_a_whole_number_is_the_same_number_as_a_float() -> None:
    assert canonical_bytes(2.0) == canonical_bytes(2)


def test_neutral_fields_leave_old_keys_alone() -> None:
    assert config_value(After()) == config_value(Before())
    assert config_value(After(seed=1)) == {**config_value(Before()), "seed": 1}
    assert config_value(Nested()) == {"inner": config_value(Before())}


def test_defaults_are_part_of_the_key() -> None:
    assert config_value(Before()) == {"clusters": 128, "part": {"rate": 1e-3}, "names": ["a"]}
    assert config_value(Before()) == config_value(Before(clusters=128, part=Part(rate=1e-3)))


REQUEST = {
    "stage": "kmeans",
    "version": 1,
    "config": {"clusters": 128},
    "inputs": {"features": "f" * 64, "more": ["a" * 64, "b" * 64]},
    "externals": {"images": "c" * 64},
}
CHANGES = [
    {"stage": "kmean"},
    {"version": 2},
    {"config": {"clusters": 129}},
    {"config": {"clusters": 128, "seed": 0}},
    {"inputs": {"features": "e" * 64, "more": ["a" * 64, "b" * 64]}},
    {"inputs": {"features": "f" * 64, "more": ["b" * 64, "a" * 64]}},
    {"inputs": {"features": "f" * 64}},
    {"externals": {"images": "d" * 64}},
    {"externals": {}},
]


def test_every_part_of_the_request_changes_the_key() -> None:
    keys = {artifact_key(**{**REQUEST, **change}) for change in [{}, *CHANGES]}
    assert len(keys) == 1 + len(CHANGES)


def test_pinned_key() -> None:
    """Changing this orphans every store there is."""
    assert artifact_key(**REQUEST) == PINNED
    text = (
        '{"config":{"clusters":128},"externals":{"images":"'
        + "c" * 64
        + '"},"inputs":{"features":"'
        + "f" * 64
        + '","more":["'
        + "a" * 64
        + '","'
        + "b" * 64
        + '"]},"stage":"kmeans","version":1}'
    )
    assert artifact_key(**REQUEST) == sha256(text.encode())


PINNED = "502f08d25a73957f3d06e1822494d4dcc0fa7fdbf03e4945aa5086f7cdbe843c"
