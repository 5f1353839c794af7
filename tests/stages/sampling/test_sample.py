"""Sampling: the codes belong to (seed, sample id) alone, whatever happens around them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.generators.config import UniformConfig
from models.sampling.config import ConstantGuidance, SamplingConfig
from pipeline.artifact import Artifact
from pipeline.cluster import Outcomes, Say, connect
from pipeline.errors import CorruptError, NumericError, UsageError
from pipeline.runner import Options, make
from pipeline.stage import Inputs
from pipeline.store import Store
from smalti.tokens import open_tokens, verify_tokens
from stages.sampling.config import SampleConfig
from stages.sampling.sample import draw_samples as sample
from stages.sampling.sample import share_out, spread
from stages.weights.cards import TokenizerCard
from tests.stages.small_artifacts import (
    CLASSES,
    CODES,
    Killed,
    digests,
    generator_artifact,
    killed_at,
    token_artifact,
    tokenizer_artifact,
)

CONFIG = SampleConfig(images=21, rows_per_pass=4, shard_images=8, chunk_images=4, seed=5)
THOUSAND = SampleConfig(
    images=1000,
    rows_per_pass=50,
    shard_images=50,
    chunk_images=50,
    sampling=SamplingConfig(guidance=ConstantGuidance(scale=(2.0,))),
)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def tokenizer(origin: Store) -> Artifact:
    return tokenizer_artifact(origin)


@pytest.fixture(scope="module")
def generator(origin: Store, tokenizer: Artifact) -> Artifact:
    return generator_artifact(origin, tokenizer)


@pytest.fixture(scope="module")
def uniform(origin: Store, tokenizer: Artifact) -> Artifact:
    """A generator that finds every code equally likely."""
    return generator_artifact(origin, tokenizer, UniformConfig())


@pytest.fixture(scope="module")
def samples(origin: Store, generator: Artifact) -> Artifact:
    return run(origin, CONFIG, generator)


def run(
    store: Store, config: SampleConfig, generator: Artifact, options: Options | None = None, **more: Artifact
) -> Artifact:
    return make(store, sample, config, Inputs({"generator": generator, **more}), {}, options or Options()).artifact


def codes(artifact: Artifact) -> np.ndarray:
    return open_tokens(artifact.path).tokens.read()[:, 0]


def test_a_token_set_that_says_where_it_comes_from(samples: Artifact, tokenizer: Artifact) -> None:
    tokens = verify_tokens(samples.path)
    assert tokens.labels.tolist() == [row % CLASSES for row in range(21)]
    assert tokens.keys[:2] == ["000000", "000001"]
    assert tokens.attributes.tokenizer == TokenizerCard.of(tokenizer).identity == samples.facts["tokenizer"]
    assert tokens.attributes.class_names == ("zero", "one", "two")
    assert tokens.attributes.created_by == samples.key
    assert tokens.attributes.extra["sampled"]["seed"] == 5
    assert len(np.unique(tokens.tokens.read())) > CODES // 2


def test_a_sample_does_not_depend_on_how_many_are_drawn(samples: Artifact, generator: Artifact, tmp_path: Path) -> None:
    fewer = run(Store(tmp_path), CONFIG.model_copy(update={"images": 9}), generator)
    assert (codes(fewer) == codes(samples)[:9]).all()


def test_another_seed_gives_other_codes(samples: Artifact, generator: Artifact, tmp_path: Path) -> None:
    assert (codes(run(Store(tmp_path), CONFIG.model_copy(update={"seed": 6}), generator)) != codes(samples)).any()


@pytest.mark.parametrize("call", [1, 4, 9, 12, 20, 33, 45])
def test_interrupted_and_continued_gives_the_same_bytes(
    call: int, samples: Artifact, generator: Artifact, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    with pytest.raises(Killed), killed_at(call):
        run(store, CONFIG, generator)
    assert digests(run(store, CONFIG, generator)) == digests(samples)


def test_two_workers_give_the_same_bytes(samples: Artifact, generator: Artifact, tmp_path: Path) -> None:
    with connect(workers=2) as cluster:
        again = run(Store(tmp_path), CONFIG, generator, Options(cluster=cluster))
    assert digests(again) == digests(samples)


class OneIsKilled:
    """A dask cluster that loses a worker to SIGKILL as soon as the first shard is there."""

    def __init__(self, cluster: Any):
        self.cluster = cluster
        self.killed: list[int] = []

    def map(self, function: Callable[[int], Any], numbers: Iterable[int], *, folder: Path, say: Say) -> Outcomes:
        for number, outcome in self.cluster.map(function, numbers, folder=folder, say=say):
            if not self.killed:
                self.killed = sorted(self.cluster.client.run(os.getpid).values())[:1]
                os.kill(self.killed[0], signal.SIGKILL)
            yield number, outcome


def test_a_thousand_samples_are_the_same_bytes_however_they_are_made(generator: Artifact, tmp_path: Path) -> None:
    """By one process; by three workers of which one is killed; by a run that is killed, killed again, and continued."""
    alone = run(Store(tmp_path / "alone"), THOUSAND, generator)
    assert len([name for name in alone.files if name.startswith("tokens/c/")]) == 20, "it should be many shards"
    with connect(workers=3) as cluster:
        killing = OneIsKilled(cluster)
        together = run(Store(tmp_path / "together"), THOUSAND, generator, Options(cluster=killing))
        assert len(killing.killed) == 1
        assert killing.killed[0] not in cluster.client.run(os.getpid).values()
    assert digests(together) == digests(alone)
    store = Store(tmp_path / "interrupted")
    for call in (30, 17):
        with pytest.raises(Killed), killed_at(call):
            run(store, THOUSAND, generator)
    assert len(list(store.drafts())) == 1
    assert digests(run(store, THOUSAND, generator)) == digests(alone)


def test_random_numbers_belong_to_the_sample_alone(uniform: Artifact, tmp_path: Path) -> None:
    """The uniform generator shows them bare: passes, shards and their number leave no trace."""
    whole = codes(run(Store(tmp_path), CONFIG, uniform))
    for rows, shard in ((1, 8), (8, 8), (21, 24), (5, 4)):
        config = CONFIG.model_copy(update={"rows_per_pass": rows, "shard_images": shard})
        assert (codes(run(Store(tmp_path), config, uniform)) == whole).all()
    assert (codes(run(Store(tmp_path), CONFIG.model_copy(update={"images": 5}), uniform)) == whole[:5]).all()


def test_guidance_and_another_order_are_followed(samples: Artifact, generator: Artifact, tmp_path: Path) -> None:
    guided = CONFIG.model_copy(update={"sampling": SamplingConfig(guidance=ConstantGuidance(scale=(8.0,)))})
    backwards = CONFIG.model_copy(update={"order": (3, 2, 1, 0)})
    shuffled = CONFIG.model_copy(update={"random_order": True})
    found = [codes(run(Store(tmp_path), config, generator)) for config in (guided, backwards, shuffled)]
    assert all((one != codes(samples)).any() for one in found)
    few = shuffled.model_copy(update={"images": 3})
    assert (codes(run(Store(tmp_path), few, generator)) == found[2][:3]).all()
    with pytest.raises(ValueError, match="give one of them"):
        SampleConfig(order=(0, 1), random_order=True)


def test_only_the_asked_classes(generator: Artifact, tmp_path: Path) -> None:
    artifact = run(Store(tmp_path), CONFIG.model_copy(update={"classes": (2, 0), "images": 5}), generator)
    assert open_tokens(artifact.path).labels.tolist() == [2, 0, 2, 0, 2]


def test_labels_in_the_proportions_of_a_token_set(
    origin: Store, generator: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    like = token_artifact(origin, tokenizer, np.zeros((10, 1, 4), int), np.array([0] * 7 + [2] * 3), name="like")
    config = CONFIG.model_copy(update={"labels": "like", "images": 20})
    labels = open_tokens(run(Store(tmp_path), config, generator, labels=like).path).labels
    assert np.bincount(labels, minlength=3).tolist() == [14, 0, 6]
    assert np.bincount(labels[:10], minlength=3).tolist() == [7, 0, 3]


def test_a_uniform_generator_serves_the_same_loop(uniform: Artifact, tmp_path: Path) -> None:
    found = codes(run(Store(tmp_path), CONFIG.model_copy(update={"images": 400}), uniform))
    assert np.bincount(found.ravel(), minlength=CODES).min() > 100


def test_share_out_is_exact_and_spread_is_even() -> None:
    counts_C = share_out(11, np.array([1, 1, 1, 0]))
    assert counts_C.tolist() == [4, 4, 3, 0]
    assert spread(np.array([2, 4])).tolist() == [1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"classes": (0, 3)}, "class 3 was asked for, but the generator has classes 0 to 2"),
        ({"order": (0, 1, 2, 2)}, "order must name each of the positions 0 to 3 once"),
        ({"labels": "like"}, "needs the input labels"),
        ({"shard_images": 8, "chunk_images": 3}, "chunk"),
    ],
)
def test_nonsense_is_refused(change: dict[str, object], sentence: str, generator: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence):
        run(Store(tmp_path), CONFIG.model_copy(update=change), generator)


def test_weights_that_are_not_numbers_are_a_numeric_error(origin: Store, tokenizer: Artifact, tmp_path: Path) -> None:
    broken = generator_artifact(origin, tokenizer, poison="lm_head.bias")
    with pytest.raises(NumericError, match="samples 0 to 3 cannot be drawn"):
        run(Store(tmp_path), CONFIG, broken)


def test_a_generator_of_another_config_is_refused(origin: Store, tokenizer: Artifact, tmp_path: Path) -> None:
    other = generator_artifact(origin, tokenizer, codes=CODES + 1)
    with pytest.raises(CorruptError, match=r"lm_head.weight +8x16 +9x16"):
        run(Store(tmp_path), CONFIG, other)
