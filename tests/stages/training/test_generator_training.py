"""Generators in the engine: killed trainings end with the same bytes, and two processes see exactly what one does."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.generators.llama.network import Llama
from models.generators.rar.network import Rar
from pipeline.artifact import Artifact
from pipeline.store import Store
from stages.training.generator import GeneratorTask
from stages.training.task import Batch
from stages.weights.files import load_weights
from tests.models.generators.loud import initialise_loud
from tests.stages.conformance import check_same_bytes, run_stage
from tests.stages.small_artifacts import CLASSES, CODES, token_artifact, tokenizer_artifact
from tests.stages.training.small_task import first_gradients
from tests.two_processes import run_two

IMAGES = 40
SIZE = {"width": 16, "layers": 2, "heads": 2}
ORDERS = {"kind": "annealed", "start": 4, "end": 9}
MODELS: dict[str, dict[str, Any]] = {
    "rar": {"kind": "rar", **SIZE, "mlp_width": 32, "orders": ORDERS},
    "llama": {"kind": "llama", **SIZE},
    "factorized": {"kind": "factorized", **SIZE, "head_layers": 1, "factors": [2, 4]},
}
WITHOUT_DROPOUT: dict[str, dict[str, Any]] = {
    "rar": {"dropout": 0.0, "attention_dropout": 0.0},
    "llama": {"dropout": 0.0, "token_dropout": 0.0},
    "factorized": {"dropout": 0.0, "token_dropout": 0.0},
}
TRAINING = {"steps": 12, "batch": 8, "seed": 3}
each_kind = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Random codes of 40 images in two crops."""
    store, draw = Store(tmp_path_factory.mktemp("tokens")), np.random.default_rng(0)
    codes_ICT = draw.integers(0, CODES, (IMAGES, 2, 4)).astype(np.uint16)
    return token_artifact(store, tokenizer_artifact(store), codes_ICT, np.arange(IMAGES, dtype=np.int32) % CLASSES)


def train_in(store: Path, tokens: Artifact, kind: str, **changes: Any) -> Artifact:
    """Train with a checkpoint after every step."""
    config = {"model": {**MODELS[kind], **changes}, "training": TRAINING}
    return run_stage("train-generator", store, config, inputs={"tokens": [tokens]}, checkpoint_seconds=0.0)


def checkpoints_in(store: Path) -> list[str]:
    return sorted(path.name for path in store.glob("train-generator/.*/scratch/checkpoint-*.safetensors"))


@each_kind
def test_killed_and_resumed_is_the_same_bytes(tmp_path: Path, tokens: Artifact, kind: str) -> None:
    """By SIGKILL, at whatever it was doing when its third and then its eighth checkpoint was there."""
    whole = train_in(tmp_path / "whole", tokens, kind)
    for step in (3, 8):
        kill_after(step, tmp_path / "killed", tokens, kind)
    assert checkpoints_in(tmp_path / "killed")[-1] >= "checkpoint-00000008"
    check_same_bytes(whole, train_in(tmp_path / "killed", tokens, kind))


def kill_after(step: int, store: Path, tokens: Artifact, kind: str) -> None:
    """Train in a child process, and kill it when the checkpoint of a step is there; three steps later it would wait."""
    child = os.fork()
    if child == 0:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process dies
        take = GeneratorTask.batch

        def slowly(self: GeneratorTask, number: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
            time.sleep(0.05 if number <= step + 3 else 60)
            return take(self, number, rows_B, share)

        GeneratorTask.batch = slowly  # type: ignore[method-assign]
        train_in(store, tokens, kind)
        os._exit(0)
    while not any(name >= f"checkpoint-{step:08d}" for name in checkpoints_in(store)):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@each_kind
def test_two_processes_see_what_one_sees(tmp_path: Path, tokens: Artifact, kind: str) -> None:
    """The same rows, orders and dropped labels in every step; first gradients and result as near as sums allow."""
    alone = report(tmp_path / "alone", tokens, kind)
    (tmp_path / "two").mkdir()
    two = run_two(tmp_path / "two", lambda own, rank: report(tmp_path / "two", tokens, kind))
    for step, whole in enumerate(alone["seen"]):
        first, second = two[0]["seen"][step], two[1]["seen"][step]
        assert {name: first[name] + second[name] for name in first} == whole, f"step {step}"
        assert ("orders" in whole) == (kind == "rar" and step < 9), "orders that are all raster are not drawn"
    assert len(alone["seen"]) == TRAINING["steps"]
    assert any(dropped for batch in alone["seen"] for dropped in batch["dropped"]), "some labels should be dropped"
    assert len(alone["first"]) > 20
    for own, shared in zip(alone["first"], two[0]["first"], strict=True):
        torch.testing.assert_close(torch.tensor(shared), torch.tensor(own), atol=1e-5, rtol=0)
    assert two[0]["first"] == two[1]["first"]
    one, together = (load_weights(Store(tmp_path / name).open(*read_key(tmp_path / name))) for name in ("alone", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(together[name], tensor, atol=1e-3, rtol=0)


def report(folder: Path, tokens: Artifact, kind: str) -> dict[str, Any]:
    """Train without dropout; what the batches held and what the first gradients were."""
    seen: list[dict[str, Any]] = []
    take = GeneratorTask.batch

    def look(self: GeneratorTask, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        batch = take(self, step, rows_B, share)
        seen.append({name: tensor.tolist() for name, tensor in batch.items()})
        return batch

    with pytest.MonkeyPatch.context() as patch, first_gradients() as gradients:
        patch.setattr(GeneratorTask, "batch", look)
        patch.setattr(Rar, "initialise", initialise_loud)
        patch.setattr(Llama, "initialise", initialise_evenly)
        train_in(folder, tokens, kind, **WITHOUT_DROPOUT[kind])
    return {"seen": seen, "first": gradients}


def initialise_evenly(network: torch.nn.Module) -> None:
    """Neither gates nor heads are nearly zero, so that every gradient of the first step says something."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


def read_key(store: Path) -> tuple[str, str]:
    return "train-generator", next(path.name for path in (store / "train-generator").iterdir() if len(path.name) == 64)
