"""Tokenizers in the engine: killed trainings end with the same bytes, alone and in two processes; unequal codebooks stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models.quantizers.vector import VectorQuantizer
from pipeline.artifact import Artifact
from pipeline.errors import NumericError, SmaltiError
from pipeline.store import Store
from stages.training.task import Batch
from stages.training.tokenizer import TokenizerTask
from stages.weights.files import load_weights
from tests.stages.conformance import check_same_bytes, draw_folder, index_folder, run_stage
from tests.two_processes import die, run_two

QUANTIZERS: dict[str, dict[str, Any]] = {
    "vector": {"kind": "vector", "codes": 16, "revive_every": 2, "revive_until": 5, "usage_decay": 0.5},
    "lookup-free": {"kind": "lookup-free", "temperature": 0.5},
    "index-backpropagation": {"kind": "index-backpropagation", "codes": 16, "temperature": 0.5},
}
ADVERSARIAL: dict[str, Any] = {
    "discriminator": {"kind": "patch", "width": 4, "layers": 1},
    "weight": None,
    "start": 1,
    "lecam_decay": 0.9,
}
STEPS = 6
KINDS: dict[str, dict[str, Any]] = {
    "in passes": {"training": {"rows_per_pass": 2}},
    "half": {"training": {"precision": "bfloat16"}},
    "best": {"training": {"evaluate_every": 2, "select": "best"}},
    "generator first": {"adversarial": {"order": "generator-first"}},
    "generator first, in passes": {"adversarial": {"order": "generator-first"}, "training": {"rows_per_pass": 2}},
    "blur": {"adversarial": {"discriminator": {"kind": "blur", "width": 32, "stages": 1}}},
}

BeforeBatch = Callable[[TokenizerTask, int], None]


class Killed(BaseException):
    """Stands for a process that dies: nothing catches it."""


def config_of(quantizer: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """A training with everything that has to survive an interruption: discriminator, LeCAM, averages, running use."""
    autoencoder = {"kind": "convolutional", "widths": [8, 8], "latent": 4}
    return {
        "model": {"autoencoder": autoencoder, "quantizer": QUANTIZERS[quantizer]},
        "views": {"kind": "shifts", "size": 16, "pixels": 1},
        "rows_per_pass": 10,
        "adversarial": {**ADVERSARIAL, **changes.get("adversarial", {})},
        "training": {"steps": STEPS, "batch": 8, "ema": 0.9, **changes.get("training", {})},
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("images")
    return index_folder(draw_folder(folder / "train", images=10), folder / "store")


def train_in(
    store: Path, images: Artifact, config: dict[str, Any], *, before: BeforeBatch = lambda task, step: None
) -> Artifact:
    """Train with a checkpoint after every step; `before` is called before each batch is read."""
    take = TokenizerTask.batch

    def look(self: TokenizerTask, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        before(self, step)
        return take(self, step, rows_B, share)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerTask, "batch", look)
        return run_stage("train-tokenizer", store, config, inputs={"images": images}, checkpoint_seconds=0.0)


def train_two(store: Path, images: Artifact, quantizer: str, *, stop_at: int = -1) -> Artifact | None:
    """The same in two processes, both of which die before a step, or end with what the first has written."""

    def stop(task: TokenizerTask, step: int) -> None:
        if step == stop_at:
            die()

    def work(own: Path, rank: int) -> dict[str, Any]:
        return {"key": train_in(store, images, config_of(quantizer), before=stop).path.name}

    store.mkdir(exist_ok=True)
    reports = run_two(store, work, dies=stop_at >= 0)
    return Store(store).open("train-tokenizer", reports[0]["key"]) if reports else None


@pytest.mark.parametrize(("quantizer", "kind"), zip([*QUANTIZERS, *QUANTIZERS], KINDS, strict=True))
def test_killed_and_resumed_is_the_same_bytes(tmp_path: Path, images: Artifact, quantizer: str, kind: str) -> None:
    config, steps = config_of(quantizer, **KINDS[kind]), list[int]()
    whole = train_in(tmp_path / "whole", images, config)

    def kill(task: TokenizerTask, step: int) -> None:
        steps.append(step)
        if step in (1, 4) and steps.count(step) == 1:
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            train_in(tmp_path / "killed", images, config, before=kill)
    check_same_bytes(whole, train_in(tmp_path / "killed", images, config, before=kill))
    assert steps == [0, 1, 1, 2, 3, 4, 4, 5], "it began anew instead of continuing"


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_two_processes_killed_and_resumed_are_the_same_bytes(tmp_path: Path, images: Artifact, quantizer: str) -> None:
    whole = train_two(tmp_path / "whole", images, quantizer)
    train_two(tmp_path / "killed", images, quantizer, stop_at=4)
    (draft,) = (tmp_path / "killed/train-tokenizer").glob(".*/scratch")
    assert [path.name for path in sorted(draft.iterdir())][-1] == "checkpoint-00000004.safetensors"
    resumed = train_two(tmp_path / "killed", images, quantizer)
    assert whole is not None
    assert resumed is not None
    check_same_bytes(whole, resumed)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_pieces_and_processes_train_as_one(tmp_path: Path, images: Artifact, quantizer: str) -> None:
    """Entropies, first codebook, revivals and clocks are those of the whole batch; sums differ in their last digits."""
    config = {**config_of(quantizer), "adversarial": None}
    config["training"] = {**config["training"], "optimizer": {"kind": "adamw", "learning_rate": 1e-3, "eps": 1e-3}}
    whole = load_weights(train_in(tmp_path / "whole", images, config))
    pieces = {**config, "training": {**config["training"], "rows_per_pass": 2}}
    cut = load_weights(train_in(tmp_path / "cut", images, pieces))

    def work(own: Path, rank: int) -> dict[str, Any]:
        return {"key": train_in(tmp_path / "shared", images, config).path.name}

    (tmp_path / "shared").mkdir()
    reports = run_two(tmp_path / "shared", work)
    shared = load_weights(Store(tmp_path / "shared").open("train-tokenizer", reports[0]["key"]))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=2e-4, rtol=1e-3, msg=f"cut: {name}")
        torch.testing.assert_close(shared[name], tensor, atol=2e-4, rtol=1e-3, msg=f"shared: {name}")


def test_codes_are_revived_here(tmp_path: Path, images: Artifact) -> None:
    """At the steps of a revival some codes are little used, or the test above would prove nothing about it."""
    little_used: dict[int, int] = {}

    def count(task: TokenizerTask, step: int) -> None:
        quantizer: VectorQuantizer = task.tokenizer.quantizer
        little_used[step] = int(quantizer.little_used().sum())

    train_in(tmp_path, images, config_of("vector"), before=count)
    assert little_used[2] + little_used[4] > 0


def test_unequal_codebooks_stop_the_training(tmp_path: Path, images: Artifact) -> None:
    """Process 0 leaves with the sentence and the exit code of bad numbers, the checkpoint before is whole; the other leaves too."""

    def work(own: Path, rank: int) -> dict[str, Any]:
        def push(task: TokenizerTask, step: int) -> None:
            if (rank, step) == (1, 3):
                with torch.no_grad():
                    task.tokenizer.quantizer.codebook_KD[5, 2] += 1e-3

        with pytest.raises(SmaltiError) as caught:
            train_in(tmp_path / "store", images, config_of("index-backpropagation"), before=push)
        return {"said": str(caught.value), "code": caught.value.exit_code}

    reports = run_two(tmp_path, work)
    assert reports[0]["code"] == NumericError.exit_code
    assert "after step 4 the processes no longer hold the same codebook (codebook_KD)" in reports[0]["said"]
    assert "the last good checkpoint is step 3" in reports[0]["said"]
