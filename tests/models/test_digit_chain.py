"""DiGIT's whole chain against the published implementation's numbers: from images to codes, and from codes to images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.adapters.dinov2 import to_timm
from models.adapters.maskgit_vqgan import recognise
from models.encoders.config import Dinov2Config
from models.encoders.dinov2 import Dinov2
from models.tokenizer import Tokenizer, to_bytes

from .generators.digit_fixtures import about, arrays, codes_of, published_weights

STAGE_2 = ["stage2_ar", "stage2_nar"]


def images() -> Tensor:
    return arrays("stage1_uncond")["in/imgs_uint8"].float() / 255


def part(name: str, prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: tensor for key, tensor in published_weights(name).items() if key.startswith(prefix)}


@torch.no_grad()
def test_semantic_codes_of_images() -> None:
    config = Dinov2Config.model_validate({"size": "base", "image_size": 224, "block": -3})
    encoder = Dinov2(config, embed_dim=32, depth=5, num_heads=2).eval()
    encoder.load_weights(to_timm(part("stage1_uncond", "pretrained_encoder.")))
    images_BCHW = F.interpolate(images(), scale_factor=0.875, mode="bicubic", antialias=False, align_corners=False)
    features_BTD = encoder(images_BCHW).flatten(1, 2)
    tolerance = about("stage1_uncond")["tolerance"]["features_and_latents_max_abs"]
    torch.testing.assert_close(features_BTD, arrays("stage1_uncond")["out/features"], atol=tolerance, rtol=0)
    codebook_KD = part("stage1_uncond", "")["centroids"].T
    codes_BT = torch.cdist(features_BTD, codebook_KD).argmin(-1)
    assert torch.equal(codes_BT, arrays("stage1_uncond")["out/tokens_raw"])
    assert torch.equal(codes_BT, codes_of(arrays("stage1_classcond")["out/target"][:, :-1]))
    norms = part("stage1_uncond", "")["centroid_norm"]
    torch.testing.assert_close(codebook_KD.square().sum(1)[None], norms)


def tokenizer() -> Tokenizer:
    found = recognise(part("stage2_ar", "vqgan."))
    network = Tokenizer(found.config)
    network.load_state_dict(found.state, strict=True)
    return network.eval()


@torch.no_grad()
def test_pixel_codes_of_images() -> None:
    codes_BT = tokenizer().encode(images()).flatten(1)
    for name in [*STAGE_2, "vq_baseline"]:
        assert torch.equal(codes_BT, arrays(name)["out/vq_indices"])


@torch.no_grad()
@pytest.mark.parametrize(("name", "codes"), [("stage2_ar", "greedy_tokens"), ("stage2_nar", "random/final_tokens")])
def test_images_of_pixel_codes(name: str, codes: str) -> None:
    found = arrays(name)
    network = tokenizer()
    codes_Bhw = codes_of(found[f"out/{codes}"])[:1].reshape(1, 16, 16)
    images_BCHW = network.decode(codes_Bhw)
    if "out/pixels0_crop128" in found:
        tolerance = about(name)["tolerance"]["pixels_and_reconstructions_max_abs"]
        raw_BCHW = network.autoencoder.decode(network.quantizer.lookup(codes_Bhw))[..., :128, :128]
        torch.testing.assert_close(raw_BCHW, found["out/pixels0_crop128"], atol=tolerance, rtol=0)
    bytes_BHWC = to_bytes(images_BCHW, network.rounding)[..., :128, :128].movedim(1, -1)
    key = next(key for key in found if key.endswith("png_rgb_crop128"))
    apart = (bytes_BHWC.int() - found[key].int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 1e-3
