"""Recipes: every wrong word is answered with its place and the nearest right one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tiny_stages import RECIPE, STAGES, load, recipe_file

from pipeline.errors import InputError, UsageError
from pipeline.recipe import load_recipe, parse_setting, recipe_name, recipe_schema
from pipeline.recipe_text import parse_yaml

STEPS = "title: t\nsteps:\n"
NUMBERS = "  numbers: {stage: count}\n"


def refusal(folder: Path, text: str, *settings: str, **paths: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_file(folder, text), STAGES, settings=settings, paths=paths)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RECIPE + "step: 3", "unknown key 'step' in tiny.yaml: did you mean 'steps'?"),
        (STEPS + "  n: {stage: count, confg: {}}", "unknown key 'confg' in tiny.yaml.steps.n: did you mean 'config'?"),
        (STEPS + "  n: {stage: coutn}", "unknown key 'coutn' in tiny.yaml: steps.n.stage: did you mean 'count'?"),
        (
            STEPS + "  n: {stage: count, config: {row: 3}}",
            "unknown key 'row' in tiny.yaml: steps.n.config: did you mean 'rows'?",
        ),
        (STEPS + "  n: {stage: count, config: {inner: {rat: 3}}}", "steps.n.config.inner: did you mean 'rate'?"),
        (STEPS + "  n: {stage: count, config: {zzzzzzz: 3}}", "known are: fault, faulty"),
        (
            STEPS + "  n: {stage: count, config: {rows: many}}",
            'steps.n.config.rows: input should be a valid integer (found "many")',
        ),
        (STEPS + "  n: {stage: count, config: {rows: 1.5}}", "steps.n.config.rows"),
        (STEPS + "  n: {stage: count, config: {rows: '8'}}", "steps.n.config.rows"),
        (STEPS + "  n: {stage: count, config: {rows: true}}", "steps.n.config.rows"),
        (STEPS + "  n: {stage: count, config: {rows: 0}}", "greater than or equal to 1 (found 0)"),
        (STEPS + "  n: {stage: count, config: {rows: .nan}}", "is not a valid number"),
        (STEPS + "  n: {stage: count, config: {mark: 2024-01-01}}", "is not a valid number"),
        (STEPS + "  n: {stage: count, config: {fault: crash}}", "'none', 'raise'"),
        (STEPS + "  s: {stage: add}", "steps.s.inputs lacks numbers (stage add)"),
        (STEPS + NUMBERS + "  s: {stage: add, inputs: {number: numbers}}", "did you mean 'numbers'?"),
        (STEPS + NUMBERS + "  s: {stage: add, inputs: {numbers: nubmers}}", "did you mean 'numbers'?"),
        (STEPS + NUMBERS + "  s: {stage: add, inputs: {numbers: [numbers]}}", "takes one step, found a list"),
        (
            STEPS + "  a: {stage: add, inputs: {numbers: b}}\n  b: {stage: add, inputs: {numbers: a}}",
            "form a cycle",
        ),
        (STEPS + "  a: {stage: add, inputs: {numbers: a}}", "a -> a form a cycle"),
        (STEPS + "  n: {stage: count, paths: {image: x}}", "unknown key 'image' in tiny.yaml: steps.n.paths"),
        (
            STEPS + NUMBERS + "  s: {stage: add, inputs: {numbers: numbers}, config: {scale: -1.0}}",
            "paths lacks weights: a file of weights",
        ),
        (
            STEPS + NUMBERS + "  s: {stage: add, inputs: {numbers: numbers}, paths: {weights: '{wieghts}/x'}}",
            "unknown key 'wieghts'",
        ),
        (STEPS + "  a/b: {stage: count}", "'a/b' is not a valid name for a step"),
        (STEPS + "  ..: {stage: count}", "'..' is not a valid name for a step"),
        (STEPS + "  a.b: {stage: count}", "'a.b' is not a valid name for a step"),
        (STEPS + NUMBERS + NUMBERS, "the key 'numbers' is a duplicate, line "),
        (
            STEPS + "  a: &a {stage: count}\n  b: {<<: *a, config: {}, config: {}}",
            "the key 'config' is a duplicate, line ",
        ),
        ("steps: {}", "tiny.yaml.title is missing"),
        ("title: t", "tiny.yaml.steps is missing"),
        ("title: t\nsteps: [1]", "tiny.yaml.steps"),
        ("- a\n- b", "is not a mapping"),
        ("", "is not a mapping"),
        ("a: [", "not valid YAML"),
        ("[" * 1500, "nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_what_is_written_wrongly_is_named(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("nubmers.rows=3", "did you mean 'numbers'?"),
        ("numbers.row=3", "did you mean 'rows'?"),
        ("numbers.rows", "expected dotted.key=value"),
        ("=3", "expected dotted.key=value"),
        ("numbers..rows=3", "expected dotted.key=value"),
        ("numbers.rows=[", "not valid YAML"),
        ("numbers.rows.deep=3", "numbers.config.rows"),
        ("numbers=3", "steps.numbers.config"),
        ("numbers.stage=coutn", "did you mean 'count'?"),
        ("title=3", "tiny.yaml.title"),
        ("numbers.inner.rate=.inf", "not a valid number"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, setting: str, words: str) -> None:
    assert words in refusal(tmp_path, RECIPE, setting)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("a.b=3", 3), ("a.b=1e-3", 1e-3), ("a.b=2E5", 2e5), ("a.b=word", "word"), ("a.b='3'", "3"), ("a.b=[1, 2e-1]", [1, 0.2]),
     ("a.b=true", True), ("a.b={c: 1}", {"c": 1}), ("a.b=x=y", "x=y"), ("a.b=", None), ("a.b=1.5", 1.5), ("a.b=v2e", "v2e")],
)  # fmt: skip
def test_values_are_what_they_seem(setting: str, value: Any) -> None:
    keys, found = parse_setting(setting)
    assert (keys, found, type(found)) == (["a", "b"], value, type(value))


def test_settings_reach_every_place(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        "title=other",
        "numbers.rows=9",
        "numbers.inner.rate=2e-2",
        "sum.config.scale=4.0",
        "numbers.config={rows: 8}",
        "numbers.seed=1",
    )
    configs = {step.name: step.config.model_dump() for step in recipe.steps}
    assert recipe.title == "other"
    assert (configs["numbers"]["rows"], configs["numbers"]["seed"], configs["numbers"]["inner"]["rate"]) == (8, 1, 1e-3)
    assert configs["sum"]["scale"] == 4.0


def test_a_pattern_sets_the_same_in_several_steps(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, RECIPE + "  number-2: {stage: count}\n  number-3: {stage: count}\n")
    recipe = load_recipe(path, STAGES, settings=["number-*.inner={rate: 2e-2}", "number-3.inner.rate=3e-2"])
    rates = {step.name: step.config.inner.rate for step in recipe.steps if step.stage.name == "count"}
    assert rates == {"numbers": 1e-3, "number-2": 2e-2, "number-3": 3e-2}
    assert "number-*" in refusal(tmp_path, RECIPE, "number-*.rows=3")
    assert "--set num*.rows=x: " in refusal(tmp_path, RECIPE, "num*.rows=x")


def test_numbers_of_yaml_1_2_are_numbers(tmp_path: Path) -> None:
    recipe = load(tmp_path, text=STEPS + "  n: {stage: count, config: {inner: {rate: 5e-4}}}")
    assert recipe.steps[0].config.inner.rate == 5e-4  # type: ignore[attr-defined]


def test_words_are_words_and_numbers_are_decimal() -> None:
    """As in YAML 1.2; to YAML 1.1 the first three are a truth value, an octal number and seconds."""
    assert parse_yaml("[on, 017, 1:30, 0o17, true]") == ["on", 17, "1:30", 15, True]


def test_steps_may_share_settings(tmp_path: Path) -> None:
    text = (
        STEPS
        + """
  deep: {stage: add, inputs: &deep {<<: {numbers: b}, numbers: a}}
  a: &a {stage: count, config: {rows: 3}}
  b: &b {<<: *a, config: {rows: 4}}
  c: {<<: *b, config: {rows: 5}}
  d: {stage: add, inputs: {<<: *deep, numbers: c}}
"""
    )
    recipe = load(tmp_path, text=text)
    configs = {step.name: step.config.model_dump() for step in recipe.steps}
    assert [configs[name]["rows"] for name in "abc"] == [3, 4, 5]
    assert {step.name: step.inputs for step in recipe.steps}["deep"] == {"numbers": "a"}


@pytest.mark.parametrize("seed", range(5))
def test_steps_run_after_their_inputs_in_whatever_order_they_stand(tmp_path: Path, seed: int) -> None:
    names = [f"step-{number}" for number in range(8)]
    lines = ["  step-0: {stage: count}"]
    lines += [
        f"  step-{number}: {{stage: add, inputs: {{numbers: step-{number - 1}, more: [step-0, step-{number // 2}]}}}}"
        for number in range(1, 8)
    ]
    random.Random(seed).shuffle(lines)
    assert [step.name for step in load(tmp_path, text=STEPS + "\n".join(lines)).steps] == names


def test_paths_are_filled_and_missing_ones_are_told(tmp_path: Path) -> None:
    text = RECIPE + "    \n" + "  other: {stage: add, inputs: {numbers: numbers}, paths: {weights: '{weights}/x'}}\n"
    step = {step.name: step for step in load(tmp_path, text=text).steps}["other"]
    assert (step.paths, step.missing) == ({}, ("weights",))
    recipe = load_recipe(recipe_file(tmp_path, text), STAGES, paths={"weights": "/data/{odd}"})
    step = {step.name: step for step in recipe.steps}["other"]
    assert (step.paths, step.missing) == ({"weights": Path("/data/{odd}/x")}, ())
    assert "did you mean 'weights'?" in refusal(tmp_path, text, weight="/data")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("recipes/digits/rar.yaml", "digits/rar"),
        ("/home/recipes/project/recipes/digits/rar.yaml", "digits/rar"),
        ("elsewhere/mine.yaml", "mine"),
        ("recipes/../mine.yaml", "mine"),
        ("recipes/a.b.yaml", "a.b"),
    ],
)
def test_names_of_recipes(path: str, name: str) -> None:
    assert recipe_name(Path(path)) == name


def test_a_recipe_that_cannot_be_read_is_3(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(InputError, match="cannot be read"):
            load_recipe(path, STAGES)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_recipe(tmp_path / "binary.yaml", STAGES)


def test_the_schema_accepts_recipes_and_refuses_what_loading_refuses() -> None:
    schema = recipe_schema(STAGES)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = parse_yaml(RECIPE)
    assert validator.is_valid(document)
    document["steps"]["numbers"]["config"] = {"rows": 3, "inner": {"rate": 0.5}}
    assert validator.is_valid(document)
    for place, value in [("rows", "many"), ("row", 3), ("inner", {"rat": 1.0}), ("rows", 0), ("fault", "crash")]:
        assert not validator.is_valid({**document, "steps": {"n": {"stage": "count", "config": {place: value}}}})
    for step in ({"stage": "coutn"}, {"stage": "add", "inputs": {"number": "n"}}, {}, {"stage": "count", "x": 1}):
        assert not validator.is_valid({**document, "steps": {"n": step}})
    assert not validator.is_valid({**document, "steps": {"a/b": {"stage": "count"}}})


def test_the_schema_carries_the_help_texts() -> None:
    schema = recipe_schema(STAGES)
    assert schema["$defs"]["count-config"]["properties"]["rows"]["description"] == "how many numbers"
