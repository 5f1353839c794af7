"""The chain of two generators: codes of one space are learnt and drawn for those of another, joined by key and view."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifact import Artifact
from pipeline.compatibility import Known, KnownInputs, facts_of
from pipeline.errors import CorruptError, InputError, UsageError
from pipeline.store import Store
from smalti.arrays import MappedArray
from smalti.tokens import open_tokens
from stages.codes.token_files import TokenLayout, write_labels_and_cards
from stages.sampling.config import SampleConfig
from stages.sampling.sample import foresee as foresee_samples
from stages.training.config import TrainGeneratorConfig
from stages.training.train_generator import foresee as foresee_training
from stages.weights.cards import TokenizerCard, read_card
from tests.stages.conformance import check_every_crash, run_stage, two_workers
from tests.stages.small_artifacts import CLASSES, CODES, Backwards, digests, made, tokenizer_artifact

IMAGES, CROPS, MEANINGS = 24, 2, 5  # MEANINGS: codes of the condition
GPT = {"kind": "gpt", "width": 16, "layers": 1, "heads": 2, "mlp_width": 32, "norm": "pre", "condition": "codes"}
PIXELS: dict[str, Any] = {"model": GPT, "rows_per_pass": 5, "training": {"steps": 4, "batch": 8}}
CHAIN: dict[str, Any] = {"images": 11, "rows_per_pass": 4, "shard_images": 4, "chunk_images": 2, "seed": 7}
LABELS_I = np.arange(IMAGES, dtype=np.int32) % CLASSES


def tokens_of(folder: Path, tokenizer: Artifact, codes_ICT: np.ndarray, **said: Any) -> Artifact:
    """A token set; `keys`, `labels_I` and `boxes` may be others than those of the rest."""
    from smalti.attributes import TokenAttributes

    keys = said.pop("keys", [f"image-{row}" for row in range(len(codes_ICT))])
    labels_I, boxes_IC5 = said.pop("labels_I", LABELS_I[: len(codes_ICT)]), said.pop("boxes", None)
    described = {
        "name": "tiny",
        "n_images": len(codes_ICT),
        "n_crops": codes_ICT.shape[1],
        "grid": (2, 2),
        "codes": CODES,
        "classes": CLASSES,
        "class_names": ("zero", "one", "two"),
        "tokenizer": TokenizerCard.of(tokenizer).identity,
        **said,
    }
    layout = TokenLayout(TokenAttributes(**described), max(map(len, keys)), 8, 4, has_boxes=boxes_IC5 is not None)

    def write(out: Any) -> None:
        for number in range(layout.shards):
            start, stop = layout.shard_range(number)
            files = layout.shard(number, codes_ICT[start:stop].astype(np.uint16))
            boxes = {} if boxes_IC5 is None else layout.box_shard(number, boxes_IC5[start:stop])
            out.put(f"shard-{number}", files | boxes)
        write_labels_and_cards(out, layout, labels_I, keys)

    facts = {name: described[name] for name in ("codes", "grid", "classes", "tokenizer")}
    return made(Store(folder), "token-set", write, images=len(codes_ICT), crops=codes_ICT.shape[1], **facts)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    store = Store(tmp_path_factory.mktemp("tokenizers"))
    return {"pixels": tokenizer_artifact(store), "semantic": tokenizer_artifact(store, seed=3, codes=MEANINGS)}


def semantic_codes(images: int = IMAGES, crops: int = CROPS) -> np.ndarray:
    rows = np.random.default_rng(4).integers(0, MEANINGS, (images, crops, 1))
    return np.repeat(rows, 4, axis=2)


@pytest.fixture(scope="module")
def semantic(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Artifact]) -> Artifact:
    return tokens_of(tmp_path_factory.mktemp("semantic"), tokenizers["semantic"], semantic_codes(), codes=MEANINGS)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Artifact]) -> Artifact:
    """Codes that are a function of the semantic ones, and of nothing else."""
    return tokens_of(tmp_path_factory.mktemp("pixels"), tokenizers["pixels"], semantic_codes() + 2)


def train(
    store: Path, pixels: Artifact, semantic: Artifact, config: dict[str, Any] | None = None, **more: Any
) -> Artifact:
    inputs = {"tokens": [pixels], "condition": [semantic], **more.pop("inputs", {})}
    return run_stage("train-generator", store, config or PIXELS, inputs=inputs, **more)


@pytest.fixture(scope="module", params=["steps", "masks"])
def decoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pixels: Artifact, semantic: Artifact
) -> Artifact:
    """A pixel decoder of each kind."""
    config = {**PIXELS, "model": {**GPT, "sampling": request.param}}
    return train(tmp_path_factory.mktemp("decoder"), pixels, semantic, config)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Artifact]) -> Artifact:
    """One view of each of 16 images."""
    return tokens_of(tmp_path_factory.mktemp("given"), tokenizers["semantic"], semantic_codes(16, 1), codes=MEANINGS)


def draw(
    store: Path, decoder: Artifact, given: Artifact, config: dict[str, Any] | None = None, **more: Any
) -> Artifact:
    return run_stage(
        "sample", store, {**CHAIN, **(config or {})}, inputs={"generator": decoder, "condition": given}, **more
    )


def test_pixel_codes_are_learnt_from_semantic_ones(
    tmp_path: Path, tokenizers: dict[str, Artifact], pixels: Artifact, semantic: Artifact
) -> None:
    """Without the condition they cannot be told from each other; with the wrong rows of it neither."""
    config = {**PIXELS, "model": {**GPT, "label_smoothing": 0.0, "dropout": 0.0}}
    config["training"] = {"steps": 150, "batch": 16, "optimizer": {"learning_rate": 1e-2}}
    judged = {"held-out": pixels, "held-out-condition": semantic}
    made = train(tmp_path, pixels, semantic, config, inputs=judged)
    assert made.facts["held_out"]["correct"] > 0.95
    assert made.facts["condition"]["codes"] == MEANINGS
    card = read_card(made)
    assert card.condition is not None
    assert (card.space.codes, card.condition.codes) == (CODES, MEANINGS)
    assert card.condition.tokenizer == semantic.facts["tokenizer"] != card.space.tokenizer
    views = semantic_codes()[:, :1]
    first = tokens_of(tmp_path / "first", tokenizers["semantic"], views, codes=MEANINGS)
    drawn = draw(tmp_path, made, first, {"images": IMAGES, "sampling": {"greedy": True}})
    expected_NT = semantic_codes()[:, 0] + 2
    assert (open_tokens(drawn.path).tokens.read()[:, 0] == expected_NT).mean() > 0.95


def test_codes_from_disk_train_as_codes_in_memory(
    tmp_path: Path, pixels: Artifact, semantic: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.training import generator
    from stages.training import tokens as training_tokens

    both = {"inputs": {"tokens": [pixels, pixels], "condition": [semantic, semantic]}}
    loaded = train(tmp_path / "loaded", pixels, semantic, **both)
    monkeypatch.setattr(training_tokens, "LOADED_BYTES", 0)
    monkeypatch.setattr(generator, "LOOK_AHEAD", 3)
    assert train(tmp_path / "mapped", pixels, semantic, **both).digest == loaded.digest


@pytest.mark.crash
@pytest.mark.parametrize("sampling", ["steps", "masks"])
def test_a_training_on_pairs_is_whole_after_any_crash(
    tmp_path: Path, pixels: Artifact, semantic: Artifact, sampling: str
) -> None:
    config = {**PIXELS, "model": {**GPT, "sampling": sampling}}
    check_every_crash(lambda store: train(store, pixels, semantic, config, checkpoint_seconds=0.0), tmp_path, most=6)


def boxes(place: float = 3.0) -> np.ndarray:
    made = np.zeros((IMAGES, CROPS, 5), np.float32)
    made[9, 1, 0] = place
    return made


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"keys": ["image-0", "image-1", "other", *(f"image-{row}" for row in range(3, IMAGES))]}, r"image 2 has the key 'image-2', and 'other'"),
        ({"keys": [f"image-{row}" for row in (1, 0, *range(2, IMAGES))]}, r"image 0 has the key 'image-0', and 'image-1'"),
        ({"codes_ICT": semantic_codes()[:20]}, r"has the key 'image-20' \(24 images, and 20 in the condition\)"),
        ({"codes_ICT": semantic_codes()[:, :1]}, r"an image has 2 views, and 1 in the condition"),
        ({"labels_I": (LABELS_I + (np.arange(IMAGES) == 7)) % CLASSES}, r"'image-7' has label 1, and 2"),
        ({"boxes": boxes(4.0)}, r"view 1 of 'image-9' is the box \[3.0, .*, and \[4.0,"),
        ({"crops": [{"id": "center"}, {"id": "right"}]}, r"view 1 is {'id': 'left'}, and {'id': 'right'}"),
    ],
)  # fmt: skip
def test_pairs_of_other_views_are_refused(
    tmp_path: Path, tokenizers: dict[str, Artifact], said: dict[str, Any], words: str
) -> None:
    crops = {"crops": [{"id": "center"}, {"id": "left"}]} if "crops" in said else {}
    pixels = tokens_of(tmp_path / "p", tokenizers["pixels"], semantic_codes() + 2, boxes=boxes(), **crops)
    codes_ICT = said.pop("codes_ICT", semantic_codes())
    other = tokens_of(tmp_path / "s", tokenizers["semantic"], codes_ICT, codes=MEANINGS, **said)
    with pytest.raises(InputError, match=words):
        train(tmp_path, pixels, other)


def test_inputs_that_cannot_be_pairs_are_refused(tmp_path: Path, pixels: Artifact, semantic: Artifact) -> None:
    plain = {**PIXELS, "model": {**GPT, "condition": "none"}}
    for config, inputs, words in (
        (plain, {}, "reads .* as a condition, but a generator of kind gpt that conditions on none has no use for it"),
        (PIXELS, {"condition": []}, "has no input condition, but .* needs the codes of another space"),
        (PIXELS, {"tokens": [pixels, pixels]}, "reads 2 token sets and 1 as their condition"),
        (PIXELS, {"held-out": pixels}, "give held-out-condition too"),
        (PIXELS, {"held-out-condition": semantic}, "no held-out codes with a condition"),
        ({**PIXELS, "samples": {"every": 2}}, {}, "shows samples on the way"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            train(tmp_path, pixels, semantic, config, inputs=inputs)


def test_a_recipe_that_cannot_fit_is_refused_when_it_is_read() -> None:
    images = {"images": 24, "crops": 2}
    facts = {
        "tokens": {**images, "codes": 8, "grid": (2, 2), "classes": 3},
        "condition": {**images, "codes": 5, "grid": (3, 3)},
    }

    def training(**changes: dict[str, Any]) -> KnownInputs:
        known = {name: [Known(name, "token-set", {**facts[name], **changes.get(name, {})})] for name in facts}
        return KnownInputs("decoder", known, step="some")

    config = TrainGeneratorConfig.model_validate(PIXELS)
    generator = Known("decoder", "generator", foresee_training(config, training()))
    assert generator.facts["condition"]["grid"] == (3, 3)
    with pytest.raises(UsageError, match=r"step decoder .* 3 views of each image in condition"):
        foresee_training(config, training(condition={"crops": 3}))
    with pytest.raises(UsageError, match="it has 1024 positions, and these codes take 1156"):
        foresee_training(config, training(condition={"grid": (34, 34)}))

    def sampling(config: dict[str, Any], **condition: Any) -> dict[str, Any]:
        given = {"images": 24, "crops": 1, "codes": 5, "grid": (3, 3), "classes": 3, **condition}
        known = {"generator": [generator], "condition": [Known("given", "token-set", given)]}
        return foresee_samples(SampleConfig.model_validate(config), KnownInputs("samples", known, step="some"))

    assert sampling({"images": 24})["classes"] == 3
    for change, condition, words in (
        ({"images": 25}, {}, "which has only 24"),
        ({"images": 2}, {"crops": 2}, "one view of each image as its condition, but given has 2"),
        ({"images": 2}, {"codes": 6}, "a vocabulary of 6 in given, but a vocabulary of 5 in the condition that"),
        ({"images": 2, "classes": (1,)}, {}, "takes the labels of its condition"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            sampling(change, **condition)


def test_samples_have_keys_and_labels_of_their_condition(tmp_path: Path, decoder: Artifact, given: Artifact) -> None:
    drawn, condition = open_tokens(draw(tmp_path, decoder, given).path), open_tokens(given.path)
    assert drawn.keys == condition.keys[:11]
    assert (drawn.labels == condition.labels[:11]).all()
    assert drawn.attributes.class_names == condition.attributes.class_names
    assert (drawn.codes, drawn.attributes.tokenizer) == (CODES, read_card(decoder).space.tokenizer)
    assert drawn.attributes.extra["sampled"]["stream"] == 1


def test_a_sample_depends_on_its_own_row_of_the_condition_alone(
    tmp_path: Path, decoder: Artifact, given: Artifact, tokenizers: dict[str, Artifact]
) -> None:
    changed = semantic_codes(16, 1)
    changed[6] = (changed[6] + 1) % MEANINGS
    other = tokens_of(tmp_path / "other", tokenizers["semantic"], changed, codes=MEANINGS)
    sure = {"sampling": {"temperature": 0.1}}
    one, two = (
        open_tokens(draw(tmp_path, decoder, condition, sure).path).tokens.read()[:, 0] for condition in (given, other)
    )
    assert set(np.flatnonzero((one != two).any(axis=1))) <= {6}


@pytest.mark.crash
def test_samples_are_the_same_however_they_are_made(tmp_path: Path, decoder: Artifact, given: Artifact) -> None:
    """Killed anywhere, in two workers, in another order, in passes of other sizes."""
    alone = draw(tmp_path, decoder, given)
    assert digests(draw(tmp_path / "backwards", decoder, given, cluster=pickled())) == digests(alone)
    with two_workers() as cluster:
        assert digests(draw(tmp_path / "workers", decoder, given, cluster=cluster)) == digests(alone)
    others = draw(tmp_path, decoder, given, {"rows_per_pass": 3, "shard_images": 6})
    assert (open_tokens(others.path).tokens.read() == open_tokens(alone.path).tokens.read()).all()
    check_every_crash(lambda store: draw(store, decoder, given), tmp_path / "crashes", most=6)


def pickled() -> Any:
    return pickle.loads(pickle.dumps(Backwards()))


def test_generate_makes_the_images_of_the_same_samples(
    tmp_path: Path, decoder: Artifact, given: Artifact, tokenizers: dict[str, Artifact]
) -> None:
    codes = draw(tmp_path, decoder, given)
    images = {"shard_images": 4, "chunk_images": 2}
    decoded = run_stage("decode", tmp_path, images, inputs={"tokens": codes, "tokenizer": tokenizers["pixels"]})
    inputs = {"generator": decoder, "tokenizer": tokenizers["pixels"], "condition": given}
    generated = run_stage("generate", tmp_path, CHAIN, inputs=inputs)
    assert (MappedArray(generated.path / "images").read() == MappedArray(decoded.path / "images").read()).all()
    assert (MappedArray(generated.path / "labels").read() == LABELS_I[:11]).all()


def test_the_stages_of_a_chain_draw_from_streams_of_their_own(
    tmp_path: Path, tokenizers: dict[str, Artifact], semantic: Artifact, given: Artifact
) -> None:
    """A decoder of semantic codes for semantic codes: its samples, and samples for these, differ in streams alone."""
    again = train(tmp_path, semantic, semantic)
    first = draw(tmp_path, again, given)
    second = draw(tmp_path, again, first)
    assert [open_tokens(one.path).attributes.extra["sampled"]["stream"] for one in (first, second)] == [1, 2]
    assert (open_tokens(first.path).tokens.read() != open_tokens(second.path).tokens.read()).any()


def test_conditions_that_do_not_fit_are_refused(
    tmp_path: Path, decoder: Artifact, given: Artifact, semantic: Artifact, tokenizers: dict[str, Artifact]
) -> None:
    codes = semantic_codes(16, 1)
    stranger = tokens_of(tmp_path / "stranger", tokenizer_artifact(Store(tmp_path), seed=9), codes, codes=MEANINGS)
    larger = tokens_of(tmp_path / "larger", tokenizers["semantic"], codes, codes=MEANINGS + 1)
    for condition, change, error, words in (
        (stranger, {}, CorruptError, "was made with another tokenizer"),
        (larger, {}, CorruptError, f"has codes {MEANINGS + 1}, but the condition of .* has {MEANINGS}"),
        (semantic, {}, UsageError, "one view of each image as its condition"),
        (given, {"images": 17}, UsageError, "which has only 16"),
        (given, {"classes": [1]}, UsageError, "takes the labels of its condition"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            draw(tmp_path, decoder, condition, change)
    with pytest.raises(UsageError, match="none are given"):
        run_stage("sample", tmp_path, CHAIN, inputs={"generator": decoder})


def test_a_finished_generator_says_what_it_is_given(decoder: Artifact) -> None:
    facts = facts_of(decoder)
    assert facts["condition"]["grid"] == (2, 2)
    assert facts["condition"]["tokenizer"].digest
