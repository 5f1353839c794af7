"""The three published networks against their own implementations' numbers, through the adapters of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.adapters import ibq, maskgit_vqgan, open_magvit2
from models.autoencoders.config import BUILDERS, Magvit2Config, MaskgitConfig, TamingConfig
from models.registry import build
from models.tokenizer import Tokenizer, to_bytes

GOLDEN = Path(__file__).parents[2] / "golden"


def load(name: str, adapter: Any) -> tuple[Tokenizer, dict[str, Tensor], dict[str, Any]]:
    arrays = load_file(GOLDEN / f"{name}.safetensors")
    found = adapter.recognise(
        {k.removeprefix("weights/"): v.float() for k, v in arrays.items() if k.startswith("weights/")}
    )
    tokenizer = Tokenizer(found.config)
    tokenizer.load_state_dict(found.state, strict=True)
    return tokenizer.eval(), arrays, json.loads((GOLDEN / f"{name}.json").read_text())


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@torch.no_grad()
def test_taming() -> None:
    tokenizer, golden, spec = load("ibq/tokenizer", ibq)
    tolerances, autoencoder = spec["tolerances"], tokenizer.autoencoder
    close(autoencoder.encoder(golden["in/x"]), golden["out/encoder"], tolerances["out/encoder,z,z_q,post_quant_conv"])
    z_BDhw = autoencoder.encode(golden["in/x"])
    close(z_BDhw, golden["out/z"], tolerances["out/encoder,z,z_q,post_quant_conv"])
    logits_BKhw = torch.einsum("bdhw,kd->bkhw", z_BDhw, tokenizer.quantizer.codebook_KD)
    close(logits_BKhw, golden["out/logits"], tolerances["out/logits"])
    quantized = tokenizer.quantizer(z_BDhw)
    assert torch.equal(quantized.codes_Bhw.flatten(), golden["out/indices"])
    close(quantized.z_BDhw, golden["out/z_q"], tolerances["out/encoder,z,z_q,post_quant_conv"])
    close(quantized.losses["quantization"], golden["out/quant_loss"], tolerances["losses"])
    close(quantized.losses["entropy"] / 0.05, golden["out/entropy_loss"], tolerances["losses"])
    close(quantized.stats["sample_entropy"], golden["out/sample_entropy"], tolerances["losses"])
    close(quantized.stats["codebook_entropy"], golden["out/avg_entropy"], tolerances["losses"])
    close(autoencoder.post_quant_conv(quantized.z_BDhw), golden["out/post_quant_conv"], 1e-4)
    close(autoencoder.decode(quantized.z_BDhw), golden["out/reconstruction"], tolerances["out/reconstruction*"])
    found_BDhw = tokenizer.quantizer.lookup(golden["out/indices"].reshape(quantized.codes_Bhw.shape))
    close(found_BDhw, golden["out/z_q_from_indices"], tolerances["out/encoder,z,z_q,post_quant_conv"])
    close(autoencoder.decode(found_BDhw), golden["out/reconstruction_from_indices"], tolerances["out/reconstruction*"])


@pytest.mark.parametrize("name", ["tokenizer_128style", "tokenizer_256style"])
@torch.no_grad()
def test_magvit2(name: str) -> None:
    tokenizer, golden, spec = load(f"open_magvit2/{name}", open_magvit2)
    tolerances, seen = spec["tolerances"], {}
    watch(
        tokenizer.autoencoder, [key.removeprefix("out/inter/") for key in golden if key.startswith("out/inter/")], seen
    )
    z_BDhw = tokenizer.autoencoder.encode(golden["in/image"])
    close(z_BDhw, golden["out/h"], tolerances["latent_h"])
    quantized = tokenizer.quantizer(z_BDhw)
    close(quantized.z_BDhw, golden["out/quant"], 1e-6)
    codes_BT = quantized.codes_Bhw.flatten(1)
    assert torch.equal(codes_BT, golden["out/indices"])
    first_bits, _ = spec["config"]["factorized_bits"]
    assert torch.equal(codes_BT % 2**first_bits, golden["out/indices_pre"])
    assert torch.equal(codes_BT >> first_bits, golden["out/indices_post"])
    close(tokenizer.autoencoder.decode(quantized.z_BDhw), golden["out/recon"], tolerances["recon"])
    for stage, activation in seen.items():
        close(activation, golden[f"out/inter/{stage}"], tolerances["intermediates"])
    random_BDhw = tokenizer.quantizer.lookup(golden["in/random_indices"].reshape(quantized.codes_Bhw.shape))
    close(tokenizer.autoencoder.decode(random_BDhw), golden["out/recon_random_indices"], tolerances["recon"])


def watch(autoencoder: nn.Module, stages: list[str], seen: dict[str, Tensor]) -> None:
    """Keep what these stages (named as in the fixture: enc/level2_downsample, dec/mid, ...) give."""
    modules = {"enc/mid": autoencoder.encoder.mid_block[-1], "dec/mid": autoencoder.decoder.mid_block[-1]}
    modules["dec/conv_in"] = autoencoder.decoder.conv_in
    for side, levels in (("enc", autoencoder.encoder.down), ("dec", autoencoder.decoder.up)):
        for index, level in enumerate(levels):
            modules[f"{side}/level{index}_blocks"] = level.block[-1]
            for resize in ("downsample", "upsample"):
                if hasattr(level, resize):
                    modules[f"{side}/level{index}_{resize}"] = getattr(level, resize)
    for index, adaptive in enumerate(autoencoder.decoder.adaptive):
        modules[f"dec/level{index}_adagn"] = adaptive
    for stage in stages:
        modules[stage].register_forward_hook(keep(seen, stage))


def keep(seen: dict[str, Tensor], stage: str) -> Any:
    """A hook that keeps the first output (and returns nothing: what a hook returns would replace the output)."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.setdefault(stage, output)

    return hook


@torch.no_grad()
def test_maskgit() -> None:
    tokenizer, golden, spec = load("rar/maskgit_vqgan", maskgit_vqgan)
    tolerances, autoencoder = spec["tolerances"], tokenizer.autoencoder
    z_BDhw = autoencoder.encode(golden["in/image"])
    close(z_BDhw, golden["out/latent"], tolerances["default"])
    quantized = tokenizer.quantizer(z_BDhw)
    assert torch.equal(quantized.codes_Bhw.flatten(1), golden["out/codes"])
    close(quantized.z_BDhw, golden["out/quantized"], tolerances["default"])
    distances_NK = torch.cdist(z_BDhw.movedim(1, -1).flatten(0, 2), tokenizer.quantizer.codebook_KD).square()
    close(distances_NK, golden["out/distances"], tolerances["distances"])
    close((-distances_NK / 2).softmax(1).reshape(golden["out/soft_code_t2"].shape), golden["out/soft_code_t2"], 1e-4)
    close(sum(quantized.losses.values()).reshape(1), golden["out/quantizer_loss"], tolerances["default"])
    close(autoencoder.decoder.conv_in(quantized.z_BDhw), golden["out/decoder_conv_in"], tolerances["default"])
    close(autoencoder.decode(quantized.z_BDhw), golden["out/decoded_raw"], tolerances["decoded_raw"])
    images_BCHW = tokenizer.decode(quantized.codes_Bhw)
    close(images_BCHW, golden["out/decoded"], tolerances["decoded_raw"])
    bytes_BHWC = to_bytes(images_BCHW, tokenizer.rounding).movedim(1, -1)
    apart = (bytes_BHWC.int() - golden["out/decoded_uint8"].int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 1e-3
    codes_rect_Bhw = tokenizer.encode(golden["in/image_rect"])
    assert torch.equal(codes_rect_Bhw, golden["out/codes_rect"])
    lookup = tokenizer.quantizer.lookup
    close(autoencoder.decode(lookup(codes_rect_Bhw)), golden["out/decoded_rect_raw"], tolerances["decoded_raw"])
    random_Bhw = golden["in/codes_random"].reshape(2, 8, 8)
    close(autoencoder.decode(lookup(random_Bhw)), golden["out/decoded_codes_random_raw"], tolerances["decoded_raw"])


@torch.no_grad()
def test_maskgit_levels() -> None:
    """The fixture takes each level with the averaging after it."""
    tokenizer, golden, spec = load("rar/maskgit_vqgan", maskgit_vqgan)
    encoder = tokenizer.autoencoder.encoder
    x_BFhw = encoder.conv_in(golden["in/image"])
    for index, level in enumerate(encoder.down):
        x_BFhw = level(x_BFhw)
        if index < len(encoder.down) - 1:
            x_BFhw = nn.functional.avg_pool2d(x_BFhw, 2)
        close(x_BFhw, golden[f"out/encoder_down_{index}"], spec["tolerances"]["default"])


@torch.no_grad()
def test_mage() -> None:
    tokenizer, golden, spec = load("digit/vqgan_mage", maskgit_vqgan)
    latents, pixels = (
        spec["tolerance"][f"{part}_max_abs"] for part in ("features_and_latents", "pixels_and_reconstructions")
    )
    z_BDhw = tokenizer.autoencoder.encode(golden["in/imgs_uint8"] / 255)
    close(z_BDhw, golden["out/encoder_latent"], latents)
    quantized = tokenizer.quantizer(z_BDhw)
    assert torch.equal(quantized.codes_Bhw.flatten(), golden["out/indices"])
    close(quantized.z_BDhw, golden["out/z_q"], latents)
    close(sum(quantized.losses.values()), golden["out/codebook_loss"], latents)
    close(tokenizer.autoencoder.decode(quantized.z_BDhw), golden["out/reconstruction"], pixels)
    found_BDhw = tokenizer.quantizer.lookup(golden["in/codes"])
    close(found_BDhw, golden["out/codebook_entry"], latents)
    close(tokenizer.autoencoder.decode(found_BDhw), golden["out/decoded_from_codes"], pixels)


@pytest.mark.parametrize(
    ("config", "encoder", "decoder"),
    [
        (TamingConfig(), 46_752_256, 59_903_875),
        (Magvit2Config(), 49_751_442, 65_376_387),
        (Magvit2Config(multipliers=(1, 2, 2, 4)), 48_422_162, 63_599_491),
        (MaskgitConfig(), 23_775_104, 30_478_339),
    ],
)
def test_published_sizes(config: Any, encoder: int, decoder: int) -> None:
    with torch.device("meta"):
        autoencoder = build(config, BUILDERS)
    assert sum(parameter.numel() for parameter in autoencoder.encoder.parameters()) == encoder
    assert sum(parameter.numel() for parameter in autoencoder.decoder.parameters()) == decoder


def test_attention_must_be_at_a_level() -> None:
    with pytest.raises(ValueError, match="attention_levels names level 3"):
        TamingConfig(multipliers=(1, 2), attention_levels=(3,))
