"""Networks and sampling caches are in memory while their stage runs, and not after it: here and in workers."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import cloudpickle
import pytest

import stages.sampling.generate
import stages.sampling.sample
from models.generators.rar.decoder import RarDecoder
from models.generators.rar.network import Rar
from models.tokenizer import Tokenizer
from pipeline.artifact import Artifact
from pipeline.cluster import Dask, connect
from pipeline.errors import NumericError
from pipeline.runner import Options, make
from pipeline.stage import Inputs, Stage
from pipeline.store import Store
from stages.sampling.config import DecodeConfig, GenerateConfig, SampleConfig
from stages.sampling.decode import decode_tokens
from stages.sampling.generate import generate_images
from stages.sampling.sample import draw_samples
from tests.stages.small_artifacts import generator_artifact, tokenizer_artifact

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op")  # looking at every object touches it
CUT = {"shard_images": 4, "chunk_images": 4, "images": 8}


def alive() -> int:
    """Decoders and whole networks in the memory of this process that something still holds.

    What numba compiles may raise errors on its way, whose frames refer to each other: these wait for the collector.
    """
    gc.collect()
    return sum(
        issubclass(type(one), RarDecoder | Rar | Tokenizer) for one in gc.get_objects()
    )  # some raise at isinstance


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def given(store: Store) -> dict[str, Artifact]:
    tokenizer = tokenizer_artifact(store)
    return {"tokenizer": tokenizer, "generator": generator_artifact(store, tokenizer)}


def run(
    store: Store, stage: Stage, config: Any, inputs: dict[str, Artifact], options: Options | None = None
) -> Artifact:
    return make(store, stage, config, Inputs(inputs), {}, options or Options(device="cpu")).artifact


def test_no_decoder_and_no_network_outlives_its_stage(
    store: Store, given: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    monkeypatch.setattr(
        stages.sampling.sample, "threads", lambda count: most.append(alive()) or stages.sampling.generate.threads(count)
    )
    before = alive()
    for rows in (2, 4):
        tokens = run(store, draw_samples, SampleConfig(rows_per_pass=rows, **CUT), {"generator": given["generator"]})
        assert alive() == before
    config = DecodeConfig(shard_images=4, chunk_images=4)
    run(store, decode_tokens, config, {"tokens": tokens, "tokenizer": given["tokenizer"]})
    assert alive() == before
    assert max(most) > before  # the second shard found them


def test_a_stage_that_fails_gives_back_as_well(store: Store, given: dict[str, Artifact]) -> None:
    broken = generator_artifact(store, given["tokenizer"], poison="lm_head.weight")
    before = alive()
    with pytest.raises(NumericError):
        run(store, draw_samples, SampleConfig(seed=9, **CUT), {"generator": broken})
    gc.collect()  # the error held its frames
    assert alive() == before


def test_the_thread_that_decodes_ends_with_its_stage(
    store: Store, given: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, seen = stages.sampling.generate.decode_pass, set[threading.Thread]()

    def watched(*place: Any, **more: Any) -> Any:
        seen.add(threading.current_thread())
        return decode(*place, **more)

    monkeypatch.setattr(stages.sampling.generate, "decode_pass", watched)
    run(store, generate_images, GenerateConfig(rows_per_decoding=2, **CUT), given)
    (thread,) = seen  # one for all shards
    thread.join(10)
    assert not thread.is_alive()


def test_workers_give_back_at_the_end_of_a_stage(store: Store, given: dict[str, Artifact]) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know the tests
    with connect(workers=1) as cluster:
        assert isinstance(cluster, Dask)
        options = Options(cluster=cluster, device="cpu")
        run(store, draw_samples, SampleConfig(seed=5, **CUT), {"generator": given["generator"]}, options)
        assert set(cluster.client.run(alive).values()) == {0}
