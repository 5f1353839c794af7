"""Rows of a training's passes: an estimate that holds against what is measured, a rule for `auto`, and refusals before the first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import stages.training.rows
from cli.main import app
from models.generators.config import CodeShape, RarConfig
from pipeline.errors import MemoryExhausted
from pipeline.recipe import load_recipe
from pipeline.store import Store
from stages import stages as all_stages
from stages.training.config import TrainGeneratorConfig
from stages.training.rows import needed_bytes, refuse_rows, settle_rows
from stages.training.train_generator import settle
from tests.stages.small_artifacts import token_artifact, tokenizer_artifact

ROOT = Path(__file__).parents[3]
SHAPE = CodeShape(codes=1024, grid=(16, 16), classes=1000)
SMALL = RarConfig(width=256, layers=6, heads=8, mlp_width=1024)
MEASURE = r"""
import re, sys, torch
from pathlib import Path
from models.generators.config import CodeShape, RarConfig
from models.generators.rar.network import Rar

def step(config, rows, shape):
    model = Rar(config, shape).train()
    model.checkpoint_blocks = sys.argv[4] == "True"
    optimizer = torch.optim.AdamW(model.parameters())
    codes_BT, labels_B = torch.zeros(rows, shape.tokens, dtype=torch.int64), torch.arange(rows) % shape.classes
    loss, _ = model.loss(codes_BT, labels_B, dropped=torch.zeros(rows, dtype=torch.bool))
    loss.backward()
    optimizer.step()

def peak():  # of this program alone
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
step(RarConfig(width=16, layers=1, heads=2, mlp_width=16), 2, CodeShape(codes=8, grid=(2, 2), classes=3))
before = peak()
step(RarConfig.model_validate_json(sys.argv[1]), int(sys.argv[2]), CodeShape(codes=1024, grid=(int(sys.argv[3]), 1), classes=1000))
print(peak() - before)
"""


def config(**changes: Any) -> TrainGeneratorConfig:
    training = {"batch": 2048, "precision": "bfloat16", **changes.pop("training", {})}
    return TrainGeneratorConfig.model_validate({"model": {"kind": "rar", "size": "b"}, "training": training, **changes})


def give(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(stages.training.rows, "free_bytes", lambda device: int(free))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc, which only Linux has")
@pytest.mark.parametrize(("rows", "tokens", "checkpoints"), [(32, 64, False), (64, 64, True)])
def test_the_estimate_is_what_a_process_takes_and_a_little_more(rows: int, tokens: int, checkpoints: bool) -> None:
    """By the largest resident size of a process that makes a step in float32 on the CPU.

    What glibc keeps of freed memory differs from run to run, by up to as much as the step needs; a fixed threshold gives
    every tensor pages of its own, which go back when it is freed. The estimate lies between the two.
    """
    words = [sys.executable, "-c", MEASURE, SMALL.model_dump_json(), str(rows), str(tokens), str(checkpoints)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # dask sets some
    own["OMP_NUM_THREADS"] = "1"
    kept, needed_at_once = (
        int(subprocess.run(words, cwd=ROOT, env={**own, **more}, capture_output=True, check=True).stdout)
        for more in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"})
    )
    asked = config(model=SMALL, training={"precision": "float32"}, checkpoints_activations=checkpoints)
    shape = CodeShape(codes=1024, grid=(tokens, 1), classes=1000)
    assert 0.8 * kept <= needed_bytes(asked, shape, rows, "cpu") <= 2.5 * needed_at_once


@pytest.mark.parametrize(("size", "rows"), [("b", 32), ("l", 16), ("xl", 16), ("xxl", 8)])
def test_auto_is_one_number_on_every_machine(monkeypatch: pytest.MonkeyPatch, size: str, rows: int) -> None:
    give(monkeypatch, 1e6)
    asked = config(model={"kind": "rar", "size": size}, training={"rows_per_pass": "auto"})
    assert not asked.is_settled
    settled = settle_rows(asked, SHAPE)
    assert (settled.training.rows_per_pass, settled.is_settled) == (rows, True)


def test_auto_divides_the_batch_and_leaves_small_ones_whole() -> None:
    for batch, rows in ((48, 24), (33, 33), (37 * 2, 2), (16, 16)):
        asked = config(training={"rows_per_pass": "auto", "batch": batch})
        assert settle_rows(asked, SHAPE).training.rows_per_pass == rows
    counting = config(model={"kind": "histogram"}, training={"rows_per_pass": "auto"})
    assert settle_rows(counting, SHAPE).training.rows_per_pass is None


@pytest.mark.parametrize("size", ["b", "l", "xl", "xxl"])
def test_the_recipes_fit_one_gpu_of_80_gb(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    """At revision 1 of the recipes a pass was the batch, 2,048 rows of 0.4 GB and more."""
    recipe = load_recipe(ROOT / f"recipes/imagenet256/rar-{size}.yaml", all_stages(), paths={"images": "/nowhere"})
    (step,) = [step for step in recipe.steps if step.stage.name == "train-generator"]
    asked = step.config
    assert isinstance(asked, TrainGeneratorConfig)
    assert asked.training.rows is not None
    assert needed_bytes(asked, SHAPE, asked.training.rows, "cuda") < 0.75 * 80e9
    assert needed_bytes(asked, SHAPE, 2048, "cuda") > 10 * 80e9


def test_rows_that_cannot_fit_are_refused_with_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 80e9)
    whole = config()
    with pytest.raises(MemoryExhausted, match=r"a pass of 2,048 rows takes about .* GB .* has 80 GB free") as refused:
        refuse_rows(whole, SHAPE, "cpu")
    assert refused.value.hint is not None
    assert "training.rows_per_pass to" in refused.value.hint
    rows = int(refused.value.hint.split("rows_per_pass to ")[1].split()[0])
    assert needed_bytes(whole, SHAPE, rows, "cpu") <= 80e9
    refuse_rows(config(training={"rows_per_pass": rows}), SHAPE, "cpu")
    give(monkeypatch, 1e9)
    with pytest.raises(MemoryExhausted) as refused:
        refuse_rows(config(training={"rows_per_pass": 1}), SHAPE, "cpu")
    assert "checkpoints_activations" in str(refused.value.hint)


def test_auto_waits_for_the_codes(tmp_path: Path) -> None:
    from pipeline.compatibility import Known, KnownInputs

    asked = config(training={"rows_per_pass": "auto"})
    unknown = KnownInputs("generator", {"tokens": [Known("tokens", "token-set", {"classes": 1000})]})
    assert not settle(asked, unknown).is_settled
    known = KnownInputs("generator", {"tokens": [Known("tokens", "token-set", {"codes": 1024, "grid": [16, 16]})]})
    assert settle(asked, known).training.rows_per_pass == 32


def test_a_training_by_command_takes_auto_and_says_it_in_its_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    codes_ICT = np.arange(16 * 4).reshape(16, 1, 4) % 8
    tokens = token_artifact(store, tokenizer_artifact(store), codes_ICT, np.arange(16) % 3)
    words = ["train-generator", "--tokens", str(tokens.path), "--store", str(tmp_path / "store"), "--device", "cpu"]
    words += ["--training.steps", "2", "--training.batch", "8", "--json"]
    auto = CliRunner().invoke(app, [*words, "--training.rows-per-pass", "auto"])
    assert auto.exit_code == 0, auto.output
    made = json.loads(auto.stdout)
    manifest = json.loads((Path(made["path"]) / "manifest.json").read_text())
    assert manifest["config"]["training"]["rows_per_pass"] == 8
    said = json.loads(CliRunner().invoke(app, [*words, "--training.rows-per-pass", "8"]).stdout)
    assert (said["key"], said["reused"]) == (made["key"], True)
    give(monkeypatch, 1e3)
    refused = CliRunner().invoke(app, [*words, "--training.rows-per-pass", "4"])
    assert refused.exit_code == 71, refused.output


def test_other_trainings_need_a_number(tmp_path: Path) -> None:
    words = ["train-tokenizer", "--images", "some", "--store", str(tmp_path / "store"), "--training.rows-per-pass"]
    done = CliRunner().invoke(app, [*words, "auto"])
    assert done.exit_code == 2
    assert "rows_per_pass auto is for generators alone" in done.stderr
