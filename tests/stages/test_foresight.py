"""Vocabulary, length and classes are compared when a recipe is read: nothing has been computed then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from pipeline.errors import UsageError
from pipeline.recipe import Recipe, load_recipe
from stages import stages
from stages.foresight import FORESEEN, check_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
RECIPE = """
title: two tokenizers
steps:
  train: {stage: index, config: {source: {kind: digits, split: train}}}
  held-out: {stage: index, config: {source: {kind: digits, split: held-out}}}
  tokenizer: {stage: train-tokenizer, inputs: {images: train}}
  other: {stage: train-tokenizer, inputs: {images: train}, config: {model: {quantizer: {codes: 128}}}}
  tuned: {stage: finetune-decoder, inputs: {images: train, tokenizer: tokenizer}}
  tokens: {stage: pretokenize, inputs: {images: train, tokenizer: tokenizer}}
  tokens-held-out: {stage: pretokenize, inputs: {images: held-out, tokenizer: tokenizer}}
  other-tokens: {stage: pretokenize, inputs: {images: held-out, tokenizer: other}}
  generator: {stage: train-generator, inputs: {tokens: tokens, held-out: tokens-held-out}}
  samples: {stage: sample, inputs: {generator: generator}}
  images: {stage: decode, inputs: {tokens: samples, tokenizer: tuned}}
  at-once: {stage: generate, inputs: {generator: generator, tokenizer: tokenizer}}
"""


def load(folder: Path, *settings: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, stages(), settings=settings)


@pytest.mark.parametrize("path", RECIPES, ids=[f"{path.parent.name}/{path.stem}" for path in RECIPES])
def test_every_recipe_fits_together(path: Path) -> None:
    check_recipe(load_recipe(path, stages()))


def test_a_recipe_that_fits(tmp_path: Path) -> None:
    assert check_recipe(load(tmp_path)) == load(tmp_path)
    assert set(FORESEEN) <= set(stages())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "generator.inputs.held-out=other-tokens",
            "step generator cannot use tokens and other-tokens together: codes of",
        ),
        ("generator.inputs.tokens=[tokens,other-tokens]", "codes of other in other-tokens, but codes of tokenizer in"),
        (
            "tokens-held-out.config.views={kind: center, size: 64}",
            "images of 64 pixels in tokens-held-out, but images of 32",
        ),
        ("images.inputs.tokenizer=other", "step images cannot use samples and other together"),
        ("at-once.inputs.tokenizer=other", "step at-once cannot use generator and other together"),
        ("samples.config.classes=[3,10]", "step samples asks for class 10, but there are 10 classes"),
        ("samples.config.order=[1,0]", "an order of 2 positions, but an image has 16 codes"),
        ("at-once.config.classes=[-1]", "step at-once asks for class -1"),
        ("generator.config.samples={classes: [12]}", "step generator asks for class 12"),
    ],
)
def test_what_cannot_fit_is_said(tmp_path: Path, setting: str, said: str) -> None:
    if "inputs" in setting:
        step, _, rest = setting.partition(".inputs.")
        name, _, value = rest.partition("=")
        text = RECIPE.replace(_line(step), _with_input(_line(step), name, value))
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        recipe = load_recipe(path, stages())
    else:
        recipe = load(tmp_path, setting.replace(".config", "", 1))
    with pytest.raises(UsageError, match=said.replace("[", r"\[")):
        check_recipe(recipe)


def _line(step: str) -> str:
    return next(line for line in RECIPE.splitlines() if line.startswith(f"  {step}: "))


def _with_input(line: str, name: str, value: str) -> str:
    before, _, inputs = line.partition("inputs: {")
    given, _, after = inputs.partition("}")
    kept = [one for one in given.split(", ") if not one.startswith(f"{name}:")]
    return f"{before}inputs: {{{', '.join([*kept, f'{name}: {value}'])}}}{after}"


def test_planning_says_it_with_exit_code_2(tmp_path: Path) -> None:
    load(tmp_path)
    words = ["plan", str(tmp_path / "recipe.yaml"), "--store", str(tmp_path / "store")]
    assert CliRunner().invoke(app, words).exit_code == 0
    done = CliRunner().invoke(app, [*words, "--set", "samples.classes=[10]"])
    assert done.exit_code == 2
    assert "there are 10 classes" in done.stderr


def test_no_torch_is_needed() -> None:
    code = "import sys; import stages.foresight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
