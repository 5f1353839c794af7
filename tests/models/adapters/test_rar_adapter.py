"""Published layouts are recognised by their shapes, and nothing else is taken for one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from models.adapters.layout import LayoutError
from models.adapters.rar import recognise
from models.generators.config import SIZES, CodeShape, RarConfig
from models.generators.rar.network import Rar

SHAPE = CodeShape(codes=5, grid=(2, 2), classes=3)
LAYOUT = json.loads((Path(__file__).parents[2] / "golden" / "rar" / "official_layout.json").read_text())["rar"]


def published(name: str) -> dict[str, torch.Tensor]:
    """A state dict of the published names and shapes, without memory."""
    entry = LAYOUT[name]
    state = {}
    for pattern, shape in entry["shapes"].items():
        names = (
            [pattern.replace("{i}", str(i)) for i in range(entry["num_hidden_layers"])]
            if "{i}" in pattern
            else [pattern]
        )
        state.update({n: torch.empty(shape, device="meta") for n in names})
    assert len(state) == entry["tensors"]
    return state


@pytest.mark.parametrize("size", ["b", "l", "xl", "xxl"])
def test_published_files_are_recognised(size: str) -> None:
    found = recognise(published(f"rar_{size}"))
    assert (found.size, found.shape) == (size, CodeShape(codes=1024, grid=(16, 16), classes=1000))
    assert found.config == RarConfig(**SIZES[size])


def tiny() -> dict[str, torch.Tensor]:
    config = RarConfig(width=8, layers=2, heads=2, mlp_width=16)
    return Rar(config, SHAPE).state_dict()


def test_own_weights_come_back() -> None:
    state = tiny()
    found = recognise(state)
    assert (found.size, found.config.layers, found.shape) == (None, 2, SHAPE)
    Rar(found.config, found.shape).load_state_dict(state, strict=True)


def test_every_difference_is_listed() -> None:
    state = tiny()
    del state["blocks.1.attn.proj.bias"]
    state["attn_mask"] = torch.zeros(6, 6)
    state["lm_head.bias"] = torch.zeros(7)
    with pytest.raises(LayoutError) as caught:
        recognise(state)
    assert [(d.kind, d.name, d.found, d.wanted) for d in caught.value.differences] == [
        ("missing", "blocks.1.attn.proj.bias", None, (8,)),
        ("surplus", "attn_mask", (6, 6), None),
        ("misshapen", "lm_head.bias", (7,), (5,)),
    ]
    assert "misshapen  lm_head.bias" in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "rank", "tokens", "no square", "heads"])
def test_unreadable_sizes_are_refused(change: str) -> None:
    state = tiny()
    if change == "missing":
        del state["cls_token"]
    elif change == "rank":
        state["cls_token"] = torch.zeros(8)
    elif change in ("tokens", "no square"):
        state["pos_embed"] = torch.zeros(1, 1000 if change == "tokens" else 1030, 8)
    else:
        state["blocks.0.attn.q_norm.weight"] = torch.zeros(3)
        state["cls_token"] = torch.zeros(1, 1, 7)
    with pytest.raises(LayoutError, match=r"\?x\?x\?"):
        recognise(state)


def test_the_error_travels_between_processes() -> None:

    with pytest.raises(LayoutError) as caught:
        recognise({})
    assert pickle.loads(pickle.dumps(caught.value)).differences == caught.value.differences  # our own bytes
