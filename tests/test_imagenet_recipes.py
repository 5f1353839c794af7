"""The recipes of published generators run, from images to a score, on 20 images, with small networks and random weights.

Every step is that of the recipe; replaced are budgets, sizes of networks, the tokenizer's file (random weights in the
official layout), and Inception, whose Frechet distance needs 2,048 images, by a small judge.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from smalti.tokens import open_tokens
from tests.lightning import GENERATORS, write_tokenizer
from tests.stages.conformance import draw_folder

ROOT = Path(__file__).parent.parent
IMAGES, VALIDATION, SAMPLES, CLASSES, FEATURES = 12, 8, 4, 2, 4
LAYOUTS = {
    **{f"ibq-{size}": "ibq" for size in ("b", "l", "xl", "xxl")},
    **{f"open-magvit2-{size}": "open-magvit2" for size in ("b", "l", "xl")},
}
JUDGE = {"features": FEATURES, "widths": [8, 8, 8, 8]}
SETTINGS = {
    "steps.judge": {
        "stage": "train-classifier",
        "inputs": {"images": "train-images"},
        "config": {"views": {"kind": "center", "size": 256}, "model": JUDGE, "training": {"steps": 1, "batch": 4}},
    },
    "tokens.views.draws": 2,
    "generator.training.steps": 3,
    "generator.training.batch": 4,
    "generator.training.rows_per_pass": 2,
    "generator.training.schedule.warmup": 1,
    "generator.training.evaluate_every": 3,
    "generator.samples": {"every": 3, "images": 2, "classes": [0, 1]},
    "images.images": SAMPLES,
    "images.rows_per_pass": SAMPLES,
    "images.chunk_images": SAMPLES,
    "images.shard_images": SAMPLES,
    "images.rows_per_decoding": 4,
    "score.splits": 2,
    "reconstruction-score.splits": 2,
    **{f"{step}.rows_per_pass": 4 for step in ("tokens", "tokens-val", "reconstructions")},
}
DESCRIPTIONS = ("reference", "originals-features", "reconstruction-features", "image-features")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree like ImageNet's, and a store that the recipes share: what two of them ask for is made once."""
    folder = tmp_path_factory.mktemp("imagenet")
    draw_folder(folder / "images" / "train", classes=CLASSES, images=IMAGES // CLASSES, pixels=300)
    draw_folder(folder / "images" / "val", classes=CLASSES, images=VALIDATION // CLASSES, pixels=280, seed=1)
    for layout in set(LAYOUTS.values()):
        write_tokenizer(folder / f"{layout}.ckpt", layout)
    return folder


def run(here: Path, name: str) -> dict[str, dict[str, Any]]:
    """The steps of a recipe by name, as `smalti run` reports them."""
    layout = LAYOUTS[name]
    settings = {
        **SETTINGS,
        "tokenizer.paths.weights": str(here / f"{layout}.ckpt"),
        "generator.model": GENERATORS[layout].model_dump(mode="json"),
        **{f"{step}.extractor": "classifier" for step in DESCRIPTIONS},
        **{f"{step}.inputs.classifiers": ["judge"] for step in DESCRIPTIONS},
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    recipe = ["run", str(ROOT / "recipes" / "imagenet256" / f"{name}.yaml"), "--images", str(here / "images")]
    done = CliRunner().invoke(app, [*recipe, *words, "--store", str(here / "store"), "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    return {step["step"]: step for step in json.loads(done.stdout)["steps"]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_from_images_to_a_score(here: Path, name: str) -> None:
    steps = run(here, name)
    tokens = open_tokens(steps["tokens"]["path"])
    assert (len(tokens.labels), tokens.attributes.n_crops, tokens.grid, tokens.codes) == (IMAGES, 2, (16, 16), 64)
    assert steps["images"]["facts"]["images"] == SAMPLES
    assert (
        steps["images"]["facts"]["tokenizer"] == tokens.attributes.tokenizer == steps["generator"]["facts"]["tokenizer"]
    )
    for score in ("reconstruction-score", "score"):
        figures = json.loads((Path(steps[score]["path"]) / "metrics.json").read_bytes())["values"]
        assert 0 < figures["distance"] < math.inf
