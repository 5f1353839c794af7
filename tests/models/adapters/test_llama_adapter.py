"""Published files of both kinds of Llama-style generators are recognised by their shapes, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.adapters.layout import LayoutError
from models.adapters.llama import PUBLISHED, published_name, recognise
from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig
from models.generators.llama.network import Llama
from tests.models.generators.llama.fixtures import IBQ, MAGVIT2, published, read


def published_layout(config: LlamaConfig | FactorizedConfig, codes: int) -> dict[str, Tensor]:
    """A state dict of the published names, without memory, beside a tokenizer's, tables and a cache."""
    with torch.device("meta"):
        own = Llama(config, CodeShape(codes=codes, grid=(16, 16), classes=1000)).state_dict()
        others = ["first_stage_model.encoder.conv_in.weight", "transformer.freqs_cis"]
        others += ["transformer.blocks.0.attention.kv_cache.k_cache"]
        names = {name: published_name(name, PUBLISHED[config.kind]) for name in own}
        return {f"transformer.{names[name]}": own[name] for name in own} | {name: torch.empty(3) for name in others}


@pytest.mark.parametrize("size", ["b", "l", "xl", "xxl"])
def test_files_of_ibq(size: str) -> None:
    config = LlamaConfig.model_validate({"size": size})
    found = recognise(published_layout(config, 16384), kind="llama")
    assert (found.size, found.config) == (size, config)
    assert found.shape == CodeShape(codes=16384, grid=(16, 16), classes=1000)


@pytest.mark.parametrize("size", ["b", "l", "xl"])
def test_files_of_open_magvit2(size: str) -> None:
    config = FactorizedConfig.model_validate({"size": size, "factors": [64, 4096]})
    found = recognise(published_layout(config, 2**18), kind="factorized")
    assert (found.size, found.config) == (size, config)
    assert found.shape == CodeShape(codes=2**18, grid=(16, 16), classes=1000, factors=(64, 4096))


def test_the_fixtures_have_these_names() -> None:
    """Every tensor of them has its place; that they are the right ones is shown by what the networks compute."""
    ibq = recognise(published(read(IBQ)[1]), kind="llama", heads=2, grid=(4, 4))
    magvit2 = recognise(published(read(MAGVIT2)[1]), kind="factorized", heads=4, grid=(4, 4))
    assert (ibq.shape, ibq.size) == (CodeShape(codes=96, grid=(4, 4), classes=10), None)
    assert ibq.config == LlamaConfig(width=64, heads=2, layers=2)
    assert magvit2.shape == CodeShape(codes=4096, grid=(4, 4), classes=10, factors=(16, 256))
    assert magvit2.config == FactorizedConfig(width=64, heads=4, layers=3, head_layers=2, factors=(16, 256))


def tiny() -> dict[str, Tensor]:
    config = LlamaConfig(width=64, layers=2, heads=1)
    state = Llama(config, CodeShape(codes=5, grid=(2, 2), classes=3)).state_dict()
    return {published_name(name, PUBLISHED["llama"]): tensor for name, tensor in state.items()}


def test_every_difference_is_listed() -> None:
    state = tiny()
    del state["blocks.1.attention.wo.weight"]
    state["attn_mask"] = torch.zeros(6, 6)
    state["head.weight"] = torch.zeros(7, 64)
    with pytest.raises(LayoutError) as caught:
        recognise(state, kind="llama")
    assert [(d.kind, d.name, d.found, d.wanted) for d in caught.value.differences] == [
        ("missing", "blocks.1.attention.wo.weight", None, (64, 64)),
        ("surplus", "attn_mask", (6, 6), None),
        ("misshapen", "head.weight", (7, 64), (5, 64)),
    ]


@pytest.mark.parametrize("change", ["nothing", "blocks", "classes", "width"])
def test_unreadable_sizes_are_refused(change: str) -> None:
    state = tiny()
    if change == "nothing":
        state = {}
    elif change == "blocks":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    elif change == "classes":
        state["class_emb.embedding_table.weight"] = torch.zeros(1, 64)
    else:
        state["tok_emb.weight"] = torch.zeros(5, 66)
    with pytest.raises(LayoutError, match=r"tok_emb|class_emb"):
        recognise(state, kind="llama")


def test_a_file_of_the_other_kind_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"Open-MAGVIT2 generator.*\n.*\n.*missing +pre_emb\.weight"):
        recognise(tiny(), kind="factorized")
