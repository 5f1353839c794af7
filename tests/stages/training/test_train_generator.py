"""train-generator: learning and counting, the same bytes after any crash and from memory or disk, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.generators.config import CodeShape, GeneratorSettings
from pipeline.artifact import Artifact
from pipeline.compatibility import Known, KnownInputs
from pipeline.errors import CorruptError, InputError, UsageError
from pipeline.store import Store
from smalti.tokens import open_tokens
from stages.training.config import TrainGeneratorConfig
from stages.training.rows import settle_rows
from stages.training.train_generator import foresee
from stages.weights.cards import CodeSpace, GeneratorCard, TokenizerCard, read_card
from stages.weights.files import load_weights
from stages.weights.networks import NetworkFile, load_generator
from tests.stages.conformance import check_every_crash, run_stage
from tests.stages.small_artifacts import CLASSES, CODES, token_artifact, tokenizer_artifact

MODEL = {
    "kind": "rar",
    "width": 16,
    "layers": 1,
    "heads": 2,
    "mlp_width": 32,
    "orders": {"kind": "annealed", "start": 1, "end": 3},
}
TINY: dict[str, Any] = {
    "model": MODEL,
    "rows_per_pass": 5,
    "training": {"steps": 4, "batch": 8},
}
IMAGES, CROPS = 12, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tokenizer_artifact(Store(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tokenizer: Artifact) -> Artifact:
    return make_tokens(tmp_path_factory.mktemp("tokens"), tokenizer)


def make_tokens(folder: Path, tokenizer: Artifact, **said: Any) -> Artifact:
    """Codes that are a function of the class and the crop: easy to learn."""
    labels_I = np.arange(IMAGES, dtype=np.int32) % CLASSES
    codes_ICT = (labels_I[:, None, None] * 2 + np.arange(CROPS)[None, :, None] + np.zeros((1, 1, 4))) % CODES
    return token_artifact(Store(folder), tokenizer, codes_ICT.astype(np.uint16), labels_I, **said)


def test_it_learns_what_a_class_looks_like(tmp_path: Path, tokenizer: Artifact, tokens: Artifact) -> None:
    config = {**TINY, "training": {"steps": 80, "batch": 12, "optimizer": {"learning_rate": 1e-2}}}
    made = run_stage("train-generator", tmp_path, config, inputs={"tokens": [tokens], "held-out": tokens})
    assert made.facts["held_out"]["loss"] < 0.3 * math.log(CODES)
    assert made.facts["held_out"]["correct"] > 0.7
    assert made.figure.startswith(f"loss {made.facts['loss']:.2f} (held-out ")
    assert made.facts["tokenizer"] == TokenizerCard.of(tokenizer).identity
    assert (made.facts["codes"], made.facts["tokens"], made.facts["classes"]) == (CODES, 4, CLASSES)
    network = load_generator(NetworkFile.of(made, "cpu"))
    assert made.facts["parameters"] == sum(one.numel() for one in network.parameters())
    assert read_card(made).space.grid == (2, 2)


@pytest.mark.parametrize(
    ("condition", "sampling"), [("none", "steps"), ("class", "steps"), ("none", "masks"), ("class", "masks")]
)
def test_every_kind_of_gpt_is_trained_and_sampled(
    tmp_path: Path, tokens: Artifact, condition: str, sampling: str
) -> None:
    model = {"kind": "gpt", "width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "norm": "pre"}
    config = {**TINY, "model": {**model, "condition": condition, "sampling": sampling}}
    made = run_stage("train-generator", tmp_path, config, inputs={"tokens": [tokens], "held-out": tokens})
    assert math.isfinite(made.facts["held_out"]["loss"])
    asked = {"images": 5, "rows_per_pass": 2, "sampling": {"iterations": 3, "top_k": 7}}
    samples = run_stage("sample", tmp_path, asked, inputs={"generator": made})
    codes_NT = open_tokens(samples.path).tokens.read().reshape(5, 4)
    assert 0 <= int(codes_NT.min()) <= int(codes_NT.max()) < CODES


@pytest.mark.crash
def test_whole_after_any_crash(tmp_path: Path, tokens: Artifact) -> None:
    check_every_crash(
        lambda store: run_stage("train-generator", store, TINY, inputs={"tokens": [tokens]}, checkpoint_seconds=0.0),
        tmp_path,
        most=6,
    )


def test_codes_from_disk_train_as_codes_in_memory(
    tmp_path: Path, tokens: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.training import generator
    from stages.training import tokens as training_tokens

    inputs = {"tokens": [tokens, tokens]}
    loaded = run_stage("train-generator", tmp_path / "loaded", TINY, inputs=inputs)
    monkeypatch.setattr(training_tokens, "LOADED_BYTES", 0)
    monkeypatch.setattr(generator, "LOOK_AHEAD", 3)
    mapped = run_stage("train-generator", tmp_path / "mapped", TINY, inputs=inputs)
    assert mapped.digest == loaded.digest


def test_rows_of_several_sets_are_one_table(tokens: Artifact) -> None:
    from stages.training.tokens import TrainingTokens

    both, one = TrainingTokens([tokens, tokens], like=tokens), TrainingTokens([tokens], like=tokens)
    assert len(both) == 2 * len(one) == 2 * IMAGES * CROPS
    for found, expected in zip(both.read(np.array([30, 3, 47])), one.read(np.array([6, 3, 23])), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_published_split_of_weight_decay_is_used(tokens: Artifact) -> None:
    from stages.training.config import TrainGeneratorConfig
    from stages.training.generator import GeneratorTask
    from stages.training.tokens import TrainingTokens
    from stages.training.trained_part import build_optimizer

    table = TrainingTokens([tokens], like=tokens)
    config = TrainGeneratorConfig()
    task = GeneratorTask(
        config,
        GeneratorCard(model=config.model, space=CodeSpace.of(table.attributes)),
        table,
        None,
        torch.device("cpu"),
    )
    decayed, others = build_optimizer(task.parts[0]).param_groups
    assert decayed["weight_decay"] == 0.03
    assert others["weight_decay"] == 0.0
    network = task.network
    assert any(one is network.cls_token for one in decayed["params"])
    assert any(one is network.adaln_before_head.adaLN_modulation.get_submodule("1").weight for one in others["params"])


def test_a_histogram_is_counted(tmp_path: Path, tokens: Artifact) -> None:
    made = run_stage("train-generator", tmp_path, {"model": {"kind": "histogram"}}, inputs={"tokens": [tokens]})
    counts_CTK = load_weights(made)["counts_CTK"]
    assert counts_CTK.sum() == IMAGES * CROPS * 4
    assert counts_CTK[1, 0].tolist() == [0, 0, 4, 4, 0, 0, 0, 0]
    assert made.figure == "counted 24 code sequences"


def test_a_class_without_images_is_refused_by_the_histogram(tmp_path: Path, tokenizer: Artifact) -> None:
    odd = make_tokens(tmp_path / "odd", tokenizer, classes=CLASSES + 1)
    with pytest.raises(InputError, match="none of"):
        run_stage("train-generator", tmp_path, {"model": {"kind": "histogram"}}, inputs={"tokens": [odd]})


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"codes": 9}, "vocabulary of 9 in .*, but a vocabulary of 8 in"),
        ({"classes": 4}, "4 classes in .*, but 3 classes in"),
    ],
)
def test_token_sets_of_different_kinds_are_refused(
    tmp_path: Path, tokenizer: Artifact, tokens: Artifact, said: dict[str, Any], words: str
) -> None:
    other = make_tokens(tmp_path / "other", tokenizer, **said)
    with pytest.raises(CorruptError, match=words):
        run_stage("train-generator", tmp_path, TINY, inputs={"tokens": [tokens, other]})


def test_token_sets_of_different_tokenizers_are_refused(tmp_path: Path, tokens: Artifact) -> None:
    other = make_tokens(tmp_path / "other", tokenizer_artifact(Store(tmp_path / "its"), seed=5))
    with pytest.raises(CorruptError, match="another tokenizer"):
        run_stage("train-generator", tmp_path, TINY, inputs={"tokens": [tokens], "held-out": other})


def test_a_code_beyond_the_codebook_is_refused_with_its_row(
    tmp_path: Path, tokenizer: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as unchecked:
        unchecked.setattr("stages.codes.token_files.check_codes", lambda *given: None)
        odd = make_tokens(tmp_path / "odd", tokenizer, codes=5)
    with pytest.raises(CorruptError, match=r"row 5 \(image 2, crop 1\) holds code 5"):
        run_stage("train-generator", tmp_path, TINY, inputs={"tokens": [odd]})


class Even(GeneratorSettings):
    """A kind that learns grids of even height alone."""

    kind: str = "even"

    def check(self, shape: CodeShape) -> None:
        super().check(shape)
        if shape.grid[0] % 2:
            raise ValueError(f"it needs an even number of rows of codes, and there are {shape.grid[0]}")


def test_codes_that_a_generator_cannot_learn_are_refused_when_the_recipe_is_read() -> None:
    config = TrainGeneratorConfig().model_copy(update={"model": Even()})

    def asked(rows: int) -> KnownInputs:
        facts = {"codes": 8, "grid": (rows, 4), "classes": 3}
        return KnownInputs("generator", {"tokens": [Known("tokens", "token-set", facts)]}, step="some")

    assert foresee(config, asked(2))["model"] == Even()
    with pytest.raises(
        UsageError, match=r"step generator cannot train .* even: it needs an even number of rows .* are 3"
    ):
        foresee(config, asked(3))


def test_a_kind_without_an_estimate_of_its_memory_takes_a_number_of_rows() -> None:
    config = TrainGeneratorConfig.model_validate({"training": {"rows_per_pass": "auto"}})
    with pytest.raises(ValueError, match="kind even has no estimate of its memory"):
        settle_rows(config.model_copy(update={"model": Even()}), CodeShape(codes=8, grid=(2, 2), classes=3))
