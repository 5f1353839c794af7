"""Recipes over bases: what differs replaces, the rest stays, and every wrong value is named by its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_stages import RECIPE, STAGES

from pipeline.errors import InputError, SmaltiError, UsageError
from pipeline.recipe import Recipe, load_recipe

BASE = """\
title: a base
paths: {weights: /data/w}
steps:
  numbers:
    stage: count
    config:
      rows: 9
      inner: {kind: plain, rate: 0.5}
  more: {stage: count, config: {seed: 3}}
  sum:
    stage: add
    inputs: {numbers: numbers, more: [more]}
    config: {scale: 3.0}
    paths: {weights: "{weights}/x"}
"""


def write(folder: Path, **texts: str) -> Path:
    """Recipes by their names; the path of the last one."""
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def load(folder: Path, text: str, *settings: str, base: str = BASE) -> Recipe:
    return load_recipe(write(folder, base=base, over=f"base: base.yaml\n{text}"), STAGES, settings=settings)


def configs(recipe: Recipe) -> dict[str, dict[str, object]]:
    return {step.name: step.config.model_dump() for step in recipe.steps}


def test_a_base_alone_is_the_same_recipe(tmp_path: Path) -> None:
    found, base = load(tmp_path, ""), load_recipe(tmp_path / "base.yaml", STAGES)
    assert (found.name, found.title, found.steps) == ("over", base.title, base.steps)


def test_what_differs_is_merged_deeply_and_lists_are_replaced(tmp_path: Path) -> None:
    text = "title: over\nsteps: {numbers: {config: {inner: {rate: 0.1}}}, sum: {inputs: {more: [numbers, more]}}, new: {stage: count}}"
    recipe = load(tmp_path, text)
    found = configs(recipe)
    assert recipe.title == "over"
    assert (found["numbers"]["rows"], found["numbers"]["inner"]) == (9, {"kind": "plain", "rate": 0.1})
    assert (found["more"]["seed"], found["sum"]["scale"], found["new"]["rows"]) == (3, 3.0, 7)
    assert {step.name: step.inputs for step in recipe.steps}["sum"] == {
        "numbers": "numbers",
        "more": ["numbers", "more"],
    }


def test_another_kind_and_another_stage_stand_for_themselves(tmp_path: Path) -> None:
    found = configs(load(tmp_path, "steps: {numbers: {config: {inner: {kind: loud}}}}"))
    assert (found["numbers"]["rows"], found["numbers"]["inner"]) == (9, {"kind": "loud", "rate": 1e-3})
    found = configs(load(tmp_path, "steps: {numbers: {config: {inner: {kind: plain}}}}"))
    assert found["numbers"]["inner"] == {"kind": "plain", "rate": 0.5}
    recipe = load(tmp_path, "steps: {more: {stage: add, inputs: {numbers: numbers}}}")
    assert configs(recipe)["more"] == {"scale": 2.0, "verbose": True, "seconds": 0.0}


def test_null_takes_away_what_the_base_has(tmp_path: Path) -> None:
    text = "steps: {more: null, numbers: {config: {rows: null, inner: null}}, sum: {inputs: {more: null}, paths: null}}"
    recipe = load(tmp_path, text)
    assert [step.name for step in recipe.steps] == ["numbers", "sum"]
    assert (configs(recipe)["numbers"]["rows"], configs(recipe)["numbers"]["inner"]) == (
        7,
        {"kind": "plain", "rate": 1e-3},
    )
    assert (recipe.steps[1].inputs, recipe.steps[1].paths) == ({"numbers": "numbers"}, {})


def test_null_is_a_value_where_null_is_one(tmp_path: Path) -> None:
    from stages import stages

    assert load(tmp_path, "paths: {weights: null}").steps[-1].missing == ("weights",)
    training = "title: t\npaths: {c: /c}\nsteps: {g: {stage: train-generator, inputs: {tokens: '{c}'}, config: {training: {clip: 2.0, steps: 5}}}}"
    over = write(
        tmp_path, rar=training, over="base: rar.yaml\nsteps: {g: {config: {training: {clip: null, steps: null}}}}"
    )
    found = load_recipe(over, stages()).steps[-1].config.training  # type: ignore[attr-defined]
    assert (found.clip, found.steps) == (None, 800)


def test_bases_may_have_bases_in_other_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, base=BASE)
    write(
        tmp_path / "deep",
        middle="base: ../base.yaml\nsteps: {more: null, sum: {inputs: {more: null}}, numbers: {config: {rows: null}}}",
    )
    path = write(tmp_path, over="base: deep/middle.yaml\nsteps: {numbers: {config: {rows: 2}}, more: {stage: count}}")
    assert {name: config.get("rows") for name, config in configs(load_recipe(path, STAGES)).items()} == {
        "numbers": 2,
        "more": 7,
        "sum": None,
    }


def test_settings_work_on_the_result(tmp_path: Path) -> None:
    recipe = load(tmp_path, "steps: {numbers: {config: {rows: 4}}}", "numbers.inner.rate=0.2", "more.rows=5")
    assert configs(recipe)["numbers"]["inner"] == {"kind": "plain", "rate": 0.2}
    assert (configs(recipe)["numbers"]["rows"], configs(recipe)["more"]["rows"]) == (4, 5)
    with pytest.raises(UsageError, match=r"unknown key 'base' in --set base=x\.yaml"):
        load(tmp_path, "", "base=x.yaml")


def test_settings_change_one_step_of_those_that_share_an_anchor(tmp_path: Path) -> None:
    text = "title: t\nsteps:\n  a: {stage: count, config: &rows {rows: 3}}\n  b: {stage: count, config: *rows}\n"
    found = configs(load_recipe(write(tmp_path, shared=text), STAGES, settings=["a.rows=4"]))
    assert (found["a"]["rows"], found["b"]["rows"]) == (4, 3)


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("steps:\n  numbers:\n    config:\n      rows: many", [], "over.yaml, line 5: over.yaml: steps.numbers.config.rows: input should be"),
        ("steps:\n  numbers:\n    config:\n      row: 3", [], "over.yaml, line 5: unknown key 'row'"),
        ("", ["numbers.inner.rat=1"], "--set numbers.inner.rat=1: unknown key 'rat'"),
        ("steps: {numbers: null}", [], "base.yaml, line 12: unknown key 'numbers' in over.yaml: steps.sum.inputs.numbers"),
        ("steps:\n  sum: {paths: null, config: {scale: -1.0}}", [], "over.yaml, line 3: over.yaml: steps.sum.paths lacks weights"),
        ("steps:\n  numbers: {inputs: {\n    more: more}}", [], "over.yaml, line 4: unknown key 'more'"),
        ("steps:\n  sum: {paths: {weights: '{wieghts}'}}", [], "over.yaml, line 3: unknown key 'wieghts'"),
        ("steps:\n  a.b: {stage: count}", [], "over.yaml, line 3: over.yaml: 'a.b' is not a valid name"),
        ("steps:\n  numbers: {config:\n   {rows: .nan}}", [], "over.yaml, line 4: over.yaml holds a value that is not a valid number"),
        ("title: 3", [], "over.yaml, line 2: over.yaml.title"),
        ("steps:\n  gone: null", [], "over.yaml, line 3: over.yaml.steps.gone"),
        ("steps:\n  numbers:\n    stage: null", [], "over.yaml, line 4: over.yaml.steps.numbers.stage is missing"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_with_file_and_line(tmp_path: Path, text: str, settings: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, *settings)
    assert words in str(caught.value)


def test_a_wrong_value_of_the_base_is_named_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"base\.yaml, line 7: over\.yaml: steps\.numbers\.config\.rows"):
        load(tmp_path, "steps: {numbers: {config: {seed: 1}}}", base=BASE.replace("rows: 9", "rows: none"))


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("base: 3", UsageError, "over.yaml, line 1: base is not a path"),
        ("base: none.yaml", InputError, "over.yaml, line 1: the recipe .*none.yaml cannot be read"),
        ("base: bad.yaml", UsageError, "bad.yaml is not valid YAML.*line 1"),
        ("base: over.yaml", UsageError, "over.yaml, line 1: the bases of the recipe form a cycle: .*over.yaml -> .*over.yaml"),
        ("base: round.yaml", UsageError, "round.yaml, line 1: the bases of the recipe form a cycle: .*over.yaml -> .*round.yaml -> .*over.yaml"),
    ],
)  # fmt: skip
def test_bases_that_cannot_be(tmp_path: Path, text: str, kind: type[SmaltiError], words: str) -> None:
    path = write(tmp_path, bad="a: [", round="base: ./over.yaml", over=text)
    with pytest.raises(kind, match=words):
        load_recipe(path, STAGES)


def test_base_null_is_none(tmp_path: Path) -> None:
    assert len(load_recipe(write(tmp_path, over=f"base: null\n{RECIPE}"), STAGES).steps) == 2
