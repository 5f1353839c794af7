"""What a training of a generator does on the way: held-out loss and grids of samples, shared by all processes, without
a trace in the weights; and switches that change memory and time, but not the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.generators.rar.network import Block, Rar
from pipeline.artifact import Artifact, open_artifact
from pipeline.errors import CorruptError, NumericError, UsageError
from pipeline.store import Store
from stages.training.generator import GeneratorTask
from stages.weights.files import load_weights
from tests.models.generators.loud import initialise_loud
from tests.stages.conformance import run_stage
from tests.stages.small_artifacts import CLASSES, CODES, made, token_artifact, tokenizer_artifact
from tests.stages.training.small_task import first_gradients
from tests.two_processes import run_two

IMAGES, CROPS, STEPS, BATCH, LAYERS = 40, 2, 6, 8, 2
RAR = {
    "kind": "rar",
    "width": 16,
    "layers": LAYERS,
    "heads": 2,
    "mlp_width": 32,
    "orders": {"kind": "annealed", "start": 2, "end": 4},
}
QUIET = {**RAR, "dropout": 0.0, "attention_dropout": 0.0}
CONFIG: dict[str, Any] = {
    "model": RAR,
    "rows_per_pass": 8,
    "training": {
        "steps": STEPS,
        "batch": BATCH,
        "seed": 3,
        "ema": 0.5,
        "evaluate_every": 2,
        "optimizer": {"learning_rate": 0.05},
        "schedule": {"kind": "constant"},
    },
}
DRAWN = {**CONFIG, "samples": {"every": 2, "images": 5, "sampling": {"guidance": {"kind": "constant", "scale": 2.0}}}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def tokenizer(store: Store) -> Artifact:
    return tokenizer_artifact(store)


@pytest.fixture(scope="module")
def tokens(store: Store, tokenizer: Artifact) -> Artifact:
    return random_tokens(store, tokenizer, "training")


@pytest.fixture(scope="module")
def held_out(store: Store, tokenizer: Artifact) -> Artifact:
    return random_tokens(store, tokenizer, "held-out")


def random_tokens(store: Store, tokenizer: Artifact, name: str) -> Artifact:
    draw = np.random.default_rng(len(name))
    codes_ICT = draw.integers(0, CODES, (IMAGES, CROPS, 4)).astype(np.uint16)
    labels_I = np.arange(IMAGES, dtype=np.int32) % CLASSES
    return token_artifact(store, tokenizer, codes_ICT, labels_I, name=name, class_names=("zero", "one", "two"))


def train_in(folder: Path, config: dict[str, Any], tokens: Artifact, **inputs: Artifact) -> Artifact:
    named = {name.replace("_", "-"): artifact for name, artifact in inputs.items()}
    return run_stage("train-generator", folder, config, inputs={"tokens": [tokens], **named})


def grids(artifact: Artifact) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in sorted((artifact.path / "log").glob("*.png"))}


def records(artifact: Artifact, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (artifact.path / "log" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def drawn(
    tmp_path_factory: pytest.TempPathFactory, tokens: Artifact, held_out: Artifact, tokenizer: Artifact
) -> Artifact:
    return train_in(tmp_path_factory.mktemp("drawn"), DRAWN, tokens, held_out=held_out, tokenizer=tokenizer)


def test_grids_in_the_log_and_no_trace_in_the_weights(
    drawn: Artifact, tokens: Artifact, held_out: Artifact, tmp_path: Path
) -> None:
    plain = train_in(tmp_path, CONFIG, tokens, held_out=held_out)
    assert drawn.file("weights.safetensors").read_bytes() == plain.file("weights.safetensors").read_bytes()
    assert drawn.facts == plain.facts
    found = grids(drawn)
    assert list(found) == [f"samples-{step:08d}.png" for step in (2, 4, 6)]
    assert [grid.shape for grid in found.values()] == [(64 + 12 + 4, 5 * 66 + 2, 3)] * 3
    assert (found["samples-00000002.png"] != found["samples-00000006.png"]).any()
    assert not grids(plain)
    assert not any(name.startswith("log") for name in drawn.files)


def test_an_interrupted_training_draws_the_same_grids(
    drawn: Artifact,
    tokens: Artifact,
    held_out: Artifact,
    tokenizer: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = GeneratorTask.batch

    def fail(self: GeneratorTask, step: int, *place: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return batch(self, step, *place)

    with monkeypatch.context() as patched:
        patched.setattr(GeneratorTask, "batch", fail)
        with pytest.raises(KeyboardInterrupt):
            train_in(tmp_path, DRAWN, tokens, held_out=held_out, tokenizer=tokenizer)
    again = train_in(tmp_path, DRAWN, tokens, held_out=held_out, tokenizer=tokenizer)
    assert again.digest == drawn.digest
    for name, grid in grids(drawn).items():
        assert (grids(again)[name] == grid).all()


def test_two_processes_share_held_out_rows_and_grid(
    tokens: Artifact, held_out: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    """What they find is what one process finds, and each of them does half of it."""
    config = {**DRAWN, "model": QUIET}

    def work(folder: Path, rank: int) -> dict[str, Any]:
        rows: list[int] = []
        loss = Rar.loss

        def counted(self: Rar, codes_BT: torch.Tensor, *more: torch.Tensor, **draws: torch.Tensor) -> Any:
            if not self.training:
                rows.append(len(codes_BT))
            return loss(self, codes_BT, *more, **draws)

        Rar.loss = counted  # type: ignore[method-assign]
        artifact = train_in(folder.parent / "store", config, tokens, held_out=held_out, tokenizer=tokenizer)
        return {"rows": sum(rows), "path": str(artifact.path), "held_out": artifact.facts["held_out"]}

    alone = train_in(tmp_path / "alone", config, tokens, held_out=held_out, tokenizer=tokenizer)
    found = run_two(tmp_path, work)
    evaluations = STEPS // 2 + 1
    assert [one["rows"] for one in found] == [evaluations * IMAGES * CROPS // 2] * 2
    assert found[0]["held_out"] == found[1]["held_out"] == pytest.approx(alone.facts["held_out"], abs=1e-4)
    together = grids(open_artifact(Path(found[0]["path"])))
    assert list(together) == list(grids(alone))
    for name, grid in grids(alone).items():
        # A sum in another order may round another way, and a pixel with it.
        assert np.abs(together[name].astype(int) - grid).max() <= 1


def test_epochs_are_counted_in_images(drawn: Artifact) -> None:
    assert [line["epochs"] for line in records(drawn, "train")] == [step * BATCH / IMAGES for step in range(1, 7)]
    assert [line["step"] for line in records(drawn, "evaluate")] == [2, 4, 6]
    assert records(drawn, "evaluate")[-1]["loss"] > 0


def test_activation_checkpointing_changes_nothing(
    tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout included, which the second pass repeats."""
    calls: list[bool] = []
    forward = Block.forward

    def counted(self: Block, *place: Any) -> torch.Tensor:
        calls.append(True)
        return forward(self, *place)

    monkeypatch.setattr(Block, "forward", counted)
    monkeypatch.setattr(Rar, "initialise", initialise_loud)
    found = []
    for name, switch in (("plain", False), ("checkpointed", True)):
        calls.clear()
        with first_gradients() as gradients:
            artifact = train_in(tmp_path / name, {**CONFIG, "checkpoints_activations": switch}, tokens)
        found.append((gradients, load_weights(artifact), len(calls)))
    (plain, weights, few), (recomputed, same, many) = found
    assert plain == recomputed
    assert all(torch.equal(one, same[name]) for name, one in weights.items())
    assert (few, many) == (STEPS * LAYERS, 2 * STEPS * LAYERS)


def test_compiled_blocks_learn_the_same(tokens: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, differentiated and replayed as compiled code is, but without the minute that a C++ compiler takes."""
    compile_in_place, backends = torch.nn.Module.compile, []

    def compile_quickly(self: torch.nn.Module) -> None:
        backends.append("aot_eager")
        compile_in_place(self, backend=backends[-1])

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    quiet = {**CONFIG, "model": QUIET}
    quiet["training"] = {**CONFIG["training"], "steps": 2, "evaluate_every": 0}
    plain, compiled = (train_in(tmp_path, {**quiet, "compiles": switch}, tokens) for switch in (False, True))
    assert len(backends) == LAYERS
    assert plain.key != compiled.key
    assert list(load_weights(plain)) == list(load_weights(compiled))
    for name, tensor in load_weights(compiled).items():
        torch.testing.assert_close(tensor, load_weights(plain)[name], atol=1e-4, rtol=0)


def test_settings_without_these_switches_keep_their_key(store: Store) -> None:
    from pipeline.keys import config_value
    from stages.training.config import TrainGeneratorConfig

    assert set(config_value(TrainGeneratorConfig())) == {"model", "rows_per_pass", "training"}


def test_what_does_not_belong_together_is_refused_before_data_is_read(
    store: Store, tokens: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="reads no tokenizer"):
        train_in(tmp_path, DRAWN, tokens)
    with pytest.raises(UsageError, match=r"set samples.every"):
        train_in(tmp_path, CONFIG, tokens, tokenizer=tokenizer)
    with pytest.raises(CorruptError, match="tokenizer"):
        train_in(tmp_path, DRAWN, tokens, tokenizer=tokenizer_artifact(store, seed=1))
    facts = {"codes": 8, "grid": [2, 2], "classes": 3}
    one = made(store, "token-set", lambda out: None, name="one", **facts)
    for name, value, said in (
        ("codes", 9, "a vocabulary of 9"),
        ("grid", [4, 4], "a grid of 4x4 codes"),
        ("classes", 4, "4 classes"),
    ):
        other = made(store, "token-set", lambda out: None, name=name, **{**facts, name: value})
        with pytest.raises(CorruptError, match=f"cannot use .* together: {said} in"):
            train_in(tmp_path, CONFIG, one, held_out=other)
    beyond = {**DRAWN, "samples": {"classes": [0, 3]}}
    with pytest.raises(UsageError, match="asks for class 3, but there are 3 classes"):
        train_in(tmp_path, beyond, one, tokenizer=tokenizer)


def test_weights_without_samples_are_a_numeric_error(tokens: Artifact, tokenizer: Artifact, tmp_path: Path) -> None:
    wild = {**DRAWN["training"], "ema": None, "clip": None, "optimizer": {"learning_rate": 1e30}}
    with pytest.raises(NumericError):
        train_in(tmp_path, {**DRAWN, "training": wild}, tokens, tokenizer=tokenizer)
