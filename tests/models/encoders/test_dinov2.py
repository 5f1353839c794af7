"""DINOv2 through timm against the published implementation (golden: tiny random weights under the published names)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from models.adapters.dinov2 import to_timm
from models.encoders.config import Dinov2Config
from models.encoders.dinov2 import Dinov2, resample_positions

GOLDEN = Path(__file__).parents[2] / "golden" / "digit"
TOLERANCE = json.loads((GOLDEN / "dinov2_reg.json").read_text())["tolerance"]["features_and_latents_max_abs"]


@cache
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "dinov2_reg.safetensors")


def published_weights() -> dict[str, torch.Tensor]:
    return {name[8:]: tensor.float() for name, tensor in golden().items() if name.startswith("weights/")}


def tiny_encoder(image_size: int, **fields: object) -> Dinov2:
    config = Dinov2Config.model_validate({"size": "base", "image_size": image_size} | fields)
    return Dinov2(config, embed_dim=32, depth=5, num_heads=2).eval()


@pytest.mark.parametrize(("case", "image_size"), [("a", 224), ("b", 112)])
@pytest.mark.parametrize(
    ("block", "norm", "output"), [(-1, True, "n1_norm"), (-3, True, "n3_norm"), (-3, False, "n3_nonorm")]
)
@torch.no_grad()
def test_patch_features_agree(case: str, image_size: int, block: int, norm: bool, output: str) -> None:
    expected_BTD = golden()[f"out/{case}/{output}"]
    encoder = tiny_encoder(image_size, block=block, norm=norm)
    encoder.load_weights(to_timm(published_weights()))
    features_BhwD = encoder(golden()[f"in/{case}_uint8"].float() / 255)
    assert features_BhwD.shape[1:] == (*encoder.config.grid, encoder.dims)
    torch.testing.assert_close(features_BhwD.flatten(1, 2), expected_BTD, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_larger_images_are_resized_after_normalization() -> None:
    """256 pixels for an encoder of 224, as the published training feeds it; a block may be counted from 0."""
    encoder = tiny_encoder(112)
    encoder.load_weights(to_timm(published_weights()))
    images_BCHW = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    mean, std = encoder.mean_C11, encoder.std_C11
    resized = F.interpolate((images_BCHW - mean) / std, scale_factor=0.875, mode="bicubic", antialias=False)
    assert resized.shape[-1] == 112
    same = tiny_encoder(112, block=2)  # of 5 blocks
    same.load_weights(to_timm(published_weights()))
    torch.testing.assert_close(encoder(images_BCHW), same(resized * std + mean), rtol=0, atol=TOLERANCE)
    assert Dinov2Config(size="base").accepts == (224, 256)


def test_a_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="block 12 is outside of the 12 blocks of size base"):
        Dinov2Config(size="base", block=12)


def test_resampled_positions_agree() -> None:
    weights = published_weights()
    for case, side in (("a", 16), ("b", 8)):
        resampled_1ND = resample_positions(weights["pos_embed"][:, 1:], (side, side))
        expected_1ND = golden()[f"out/{case}/pos_embed_interp"][:, 1:]
        torch.testing.assert_close(resampled_1ND, expected_1ND, rtol=0, atol=TOLERANCE)


def test_positions_at_the_published_size_are_kept() -> None:
    table_1ND = torch.randn(1, 25, 4)
    assert resample_positions(table_1ND, (5, 5)) is table_1ND


def test_timm_names_pass_through_the_adapter() -> None:
    state = to_timm(published_weights())
    assert to_timm(state) == state
    assert "mask_token" not in state


def test_missing_weight_is_refused() -> None:
    state = to_timm(published_weights())
    del state["norm.weight"]
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        tiny_encoder(112).load_weights(state)


def test_fitted_state_round_trip() -> None:
    encoder, other = tiny_encoder(112), tiny_encoder(112)
    encoder.load_weights(to_timm(published_weights()))
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other.transformer.pos_embed, encoder.transformer.pos_embed)


def test_timm_interpolation_is_another_one() -> None:
    published = tiny_encoder(112)
    published.load_weights(to_timm(published_weights()))
    timm_like = tiny_encoder(112, interpolation="timm")
    timm_like.load_weights(to_timm(published_weights()))
    assert (published.transformer.pos_embed - timm_like.transformer.pos_embed).abs().max() > 1e-3


def test_names_of_timm() -> None:
    assert Dinov2Config(size="large").timm_name == "vit_large_patch14_reg4_dinov2"
