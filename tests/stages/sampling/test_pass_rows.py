"""Rows of a pass that are chosen by free memory: as many as fit, by an estimate that holds against what is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import stages.sampling.pass_rows
from cli.main import app
from models.generators.config import HistogramConfig, RarConfig, UniformConfig
from models.sampling.config import ConstantGuidance, SamplingConfig
from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.stage import Inputs
from pipeline.store import Store
from smalti.tokens import open_tokens
from stages.sampling.config import SampleConfig
from stages.sampling.pass_rows import SHARE, needed_bytes, propose_rows
from stages.weights.cards import GeneratorCard
from tests.stages.small_artifacts import generator_artifact, tokenizer_artifact

ROOT = Path(__file__).parents[3]
GUIDED = SampleConfig(images=1000, sampling=SamplingConfig(guidance=ConstantGuidance(scale=(4.0,))))
RAR = RarConfig(width=256, layers=4, heads=8, mlp_width=1024)
MEASURE = r"""
import re, sys, torch
from pathlib import Path
from models.generators.config import CodeShape, RarConfig
from models.generators.generator import build_decoder
from models.generators.rar.network import Rar
from models.sampling.config import ConstantGuidance, SamplingConfig
from models.sampling.loop import sample

def draw(config, rows, shape):
    model = Rar(config, shape).eval().requires_grad_(False)
    labels_B = torch.arange(rows) % shape.classes
    decoder = build_decoder(model, rows=rows, guided=True)
    sample(decoder, labels_B, torch.arange(rows), config=SamplingConfig(guidance=ConstantGuidance(scale=(4.0,))), seed=0)

def peak():  # of this program alone: what getrusage says goes back to its parent's
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
draw(RarConfig(width=16, layers=1, heads=2, mlp_width=16), 2, CodeShape(codes=8, grid=(2, 2), classes=3))
before = peak()
draw(RarConfig.model_validate_json(sys.argv[1]), int(sys.argv[2]), CodeShape(codes=1024, grid=(int(sys.argv[3]), 1), classes=1000))
print(peak() - before)
"""


def card(model: Config, *, grid: tuple[int, int] = (16, 16)) -> GeneratorCard:
    said = {"model": model, "space": {"codes": 1024, "classes": 1000, "grid": grid}}
    return GeneratorCard.model_validate(said)


@pytest.fixture
def generator(tmp_path: Path) -> Artifact:
    store = Store(tmp_path / "store")
    return generator_artifact(store, tokenizer_artifact(store))


def give(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(stages.sampling.pass_rows, "free_bytes", lambda device: int(free))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc, which only Linux has")
@pytest.mark.parametrize(("rows", "grid"), [(64, (8, 8)), (2, (4, 4))])
def test_the_estimate_is_what_a_process_takes_and_a_little_more(rows: int, grid: tuple[int, int]) -> None:
    """By the largest resident size of a process that builds a network and samples with it."""
    words = [sys.executable, "-c", MEASURE, RAR.model_dump_json(), str(rows), str(grid[0] * grid[1])]
    found = subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    needed, taken = needed_bytes(card(RAR, grid=grid), GUIDED, rows, "cpu"), int(found.stdout)
    assert 0.95 * taken <= needed <= 1.6 * taken


def test_more_rows_guidance_and_precision_take_more() -> None:
    def needed(rows: int, device: str = "cpu", **changes: object) -> int:
        return needed_bytes(card(RAR), GUIDED.model_copy(update=changes), rows, device)

    assert needed(64) > needed(32) > needed(32, sampling=SamplingConfig())
    assert needed(32) > needed(32, precision="bfloat16")
    # The weights are not copied for few rows, nor on a device of the same precision.
    assert needed(32, "cpu") > needed(32, "cuda")
    assert needed(1, "cpu") == needed(1, "cuda")


@pytest.mark.parametrize("model", [HistogramConfig(), UniformConfig()])
def test_other_generators_have_an_estimate_too(model: Config) -> None:
    assert 0 < needed_bytes(card(model), GUIDED, 1, "cpu") < needed_bytes(card(model), GUIDED, 64, "cpu")


@pytest.mark.parametrize(("processes", "more"), [(1, 1.0), (2, 2.0)])
def test_the_most_rows_that_fit(
    monkeypatch: pytest.MonkeyPatch, generator: Artifact, processes: int, more: float
) -> None:
    inputs, own = Inputs({"generator": generator}), stages.sampling.pass_rows.read_card(generator)
    needed = needed_bytes(own, GUIDED, 16, "cpu")
    give(monkeypatch, more * needed / SHARE + 2)
    assert propose_rows(GUIDED, inputs, "cpu", processes).value == 16
    give(monkeypatch, more * needed / SHARE - 100)
    assert propose_rows(GUIDED, inputs, "cpu", processes).value == 8
    give(monkeypatch, 1e15)
    assert propose_rows(GUIDED, inputs, "cpu", processes).value == 64
    assert propose_rows(GUIDED.model_copy(update={"images": 50}), inputs, "cpu", processes).value == 50
    assert propose_rows(GUIDED.model_copy(update={"shard_images": 20}), inputs, "cpu", processes).value == 20
    give(monkeypatch, 1000)
    assert propose_rows(GUIDED, inputs, "cpu", processes).value == 1


def test_auto_on_the_command_line(monkeypatch: pytest.MonkeyPatch, generator: Artifact, tmp_path: Path) -> None:
    """It says what was chosen and why; the number goes into the key, so that saying it gives the same artifact."""
    give(
        monkeypatch,
        needed_bytes(stages.sampling.pass_rows.read_card(generator), SampleConfig(images=20), 4, "cpu") / SHARE + 2,
    )
    words = ["sample", "--generator", str(generator.path), "--images", "20", "--device", "cpu"]
    words += ["--store", str(tmp_path / "store"), "--json"]
    auto = CliRunner().invoke(app, [*words, "--rows-per-pass", "auto"])
    assert auto.exit_code == 0, auto.output
    assert "--rows-per-pass 4: a pass of these takes about" in auto.stderr
    assert "free on cpu" in auto.stderr
    made = json.loads(auto.stdout)
    assert open_tokens(made["path"]).attributes.extra["sampled"]["rows_per_pass"] == 4
    said = json.loads(CliRunner().invoke(app, [*words, "--rows-per-pass", "4"]).stdout)
    assert (said["key"], said["reused"]) == (made["key"], True)
    set_ = json.loads(CliRunner().invoke(app, [*words, "--set", "rows_per_pass=auto"]).stdout)
    assert (set_["key"], set_["reused"]) == (made["key"], True)


@pytest.mark.parametrize(
    ("field", "word", "said"),
    [
        ("--rows-per-pass", "some", "rows_per_pass"),
        ("--rows-per-pass", "0", "rows_per_pass"),
        ("--rows-per-pass", "[", "expected a number or auto"),
        ("--shard-images", "auto", "shard-images"),
    ],
)
def test_nonsense_is_refused(generator: Artifact, tmp_path: Path, field: str, word: str, said: str) -> None:
    words = ["sample", "--generator", str(generator.path), "--store", str(tmp_path / "store"), field, word]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
