"""DiGIT's checkpoints are recognised by their shapes and settings, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.adapters.digit import recognise
from models.adapters.layout import LayoutError
from models.generators.config import CodeShape, GptConfig
from models.generators.generator import build_generator

SETTINGS = {"decoder_attention_heads": 16, "activation_fn": "gelu", "dropout": 0.1}
SEMANTIC = CodeShape(codes=8192, grid=(16, 16))


def published(
    *, width: int, layers: int, codes: int, more_rows: int, norm: str, has_prefix: bool = False
) -> dict[str, Tensor]:
    """A state dict of the published names and shapes, without memory."""
    shapes: dict[str, tuple[int, ...]] = {
        "version": (1,),
        "embed_tokens.weight": (codes + 5 + more_rows, width),
        "embed_positions.weight": (1026, width),
        "output_projection.weight": (codes + 5, width),
    }
    if has_prefix:
        shapes["embed_positions_1.weight"] = (1026, width)
    linears = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    linears |= {"fc1": (4 * width, width), "fc2": (width, 4 * width)}
    norms = [
        f"layers.{layer}.{name}" for layer in range(layers) for name in ("self_attn_layer_norm", "final_layer_norm")
    ]
    for layer in range(layers):
        for name, shape in linears.items():
            shapes |= {f"layers.{layer}.{name}.weight": shape, f"layers.{layer}.{name}.bias": shape[:1]}
    for name in [*norms, "layer_norm"] if norm == "pre" else norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return {f"decoder.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("file", "size", "shape", "condition"),
    [
        ({"width": 1024, "layers": 16, "codes": 8192, "more_rows": 0, "norm": "post"}, "base", SEMANTIC, "none"),
        (
            {"width": 1536, "layers": 24, "codes": 16384, "more_rows": 1000, "norm": "post"},
            "large",
            CodeShape(codes=16384, grid=(16, 16), classes=1000),
            "class",
        ),
        (
            {"width": 1024, "layers": 16, "codes": 1024, "more_rows": 8197, "norm": "pre", "has_prefix": True},
            "pixels",
            CodeShape(codes=1024, grid=(16, 16), condition=SEMANTIC),
            "codes",
        ),
        (
            {"width": 1024, "layers": 16, "codes": 1024, "more_rows": 0, "norm": "pre"},
            "pixels",
            CodeShape(codes=1024, grid=(16, 16)),
            "none",
        ),
    ],
)
def test_published_files_are_recognised(file: dict, size: str, shape: CodeShape, condition: str) -> None:
    others = {"centroids": torch.zeros(2, 3), "vqgan.quantize.embedding.weight": torch.zeros(2, 2)}
    found = recognise(published(**file) | others, SETTINGS)
    assert (found.size, found.shape, found.config.condition) == (size, shape, condition)
    assert found.config == GptConfig.model_validate({"size": size, "condition": condition})
    with torch.device("meta"):
        build_generator(found.config, found.shape).load_state_dict(found.state, strict=True)


def tiny() -> dict[str, Tensor]:
    empty = published(width=8, layers=2, codes=6, more_rows=3, norm="post")
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in empty.items()}


def test_the_heads_are_those_of_the_file() -> None:
    assert recognise(tiny(), SETTINGS | {"decoder_attention_heads": 4}).config.heads == 4
    for heads in (None, 0, "4", True):
        with pytest.raises(ValueError, match="decoder_attention_heads"):
            recognise(tiny(), {"decoder_attention_heads": heads})
    with pytest.raises(ValueError, match="3 heads"):
        recognise(tiny(), {"decoder_attention_heads": 3})


def test_what_it_is_sampled_by_is_said_by_who_asks() -> None:
    found = recognise(tiny(), {"decoder_attention_heads": 2}, sampling="masks", grid=(4, 4))
    assert found.config.sampled_by == "masks"
    assert (found.shape.tokens, found.size) == (16, None)


def test_specials_come_after_the_codes() -> None:
    state = tiny()
    found = recognise(state, {"decoder_attention_heads": 2})
    table = state["decoder.embed_tokens.weight"]
    assert torch.equal(found.state["embeddings.weight"], torch.cat([table[5:11], table[:5], table[11:]]))
    assert torch.equal(found.state["blocks.1.attn.qkv.bias"][8:16], state["decoder.layers.1.self_attn.k_proj.bias"])


def test_settings_of_another_network_are_refused() -> None:
    for name, value in (("activation_fn", "relu"), ("no_scale_embedding", True), ("decoder_normalize_before", True)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            recognise(tiny(), {"decoder_attention_heads": 2, name: value})


def test_every_difference_is_listed() -> None:
    state = tiny()
    del state["decoder.layers.1.self_attn.q_proj.bias"]
    state["decoder.attn_mask"] = torch.zeros(6, 6)
    state["decoder.layers.0.fc2.bias"] = torch.zeros(7)
    with pytest.raises(LayoutError) as caught:
        recognise(state, {"decoder_attention_heads": 2})
    assert [(d.kind, d.name, d.found, d.wanted) for d in caught.value.differences] == [
        ("missing", "layers.1.self_attn.q_proj.bias", None, (8,)),
        ("surplus", "attn_mask", (6, 6), None),
        ("misshapen", "layers.0.fc2.bias", (7,), (8,)),
    ]


@pytest.mark.parametrize("name", ["embed_tokens.weight", "output_projection.weight"])
def test_unreadable_sizes_are_refused(name: str) -> None:
    state = tiny()
    del state[f"decoder.{name}"]
    with pytest.raises(LayoutError, match="a DiGIT generator"):
        recognise(state, SETTINGS)
    with pytest.raises(LayoutError, match="a DiGIT generator"):
        recognise({"weight": torch.zeros(2)}, SETTINGS)
