"""Published tokenizer layouts are recognised by their shapes and names; every difference is told at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.adapters import ibq, maskgit_vqgan, open_magvit2
from models.adapters.layout import LayoutError
from models.adapters.tokenizers import COUNTERS, discriminator_weights, published_name
from models.autoencoders.config import Magvit2Config, MaskgitConfig, TamingConfig
from models.losses.config import PatchConfig
from models.losses.patch_discriminator import PatchDiscriminator
from models.quantizers.config import VectorConfig
from models.tokenizer import Tokenizer
from models.tokenizer_config import TokenizerConfig

GOLDEN = Path(__file__).parents[2] / "golden"


def arrays(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def weights(name: str) -> dict[str, Tensor]:
    found = {k.removeprefix("weights/"): v for k, v in arrays(name).items() if k.startswith("weights/")}
    return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}


def tokenizer(found: object) -> Tokenizer:
    built = Tokenizer(found.config)  # type: ignore[attr-defined]
    built.load_state_dict(found.state, strict=True)  # type: ignore[attr-defined]
    return built.eval()


def test_official_layout_of_the_maskgit_vqgan() -> None:
    entry = json.loads((GOLDEN / "rar" / "official_layout.json").read_text())["maskgit_vqgan"]
    found = maskgit_vqgan.recognise(
        {name: torch.empty(shape, device="meta") for name, shape in entry["shapes"].items()}
    )
    assert found.config.autoencoder == MaskgitConfig()
    assert (found.config.codebook_size, found.config.downsample, found.config.rounding) == (1024, 16, "truncate")


def test_sizes_are_read_off_the_shapes() -> None:
    assert ibq.recognise(weights("ibq/tokenizer")).config.autoencoder == TamingConfig(
        width=32, multipliers=(1, 1, 2, 2, 2), blocks=1, attention_levels=(4,), features=48, latent=32
    )
    assert open_magvit2.recognise(weights("open_magvit2/tokenizer_256style")).config.autoencoder == Magvit2Config(
        width=32, multipliers=(1, 1, 2, 1, 1), blocks=2, latent=18
    )
    assert maskgit_vqgan.recognise(weights("digit/vqgan_mage")).config.autoencoder == MaskgitConfig(
        width=32, multipliers=(1, 1, 1, 1, 2), blocks=1, latent=32
    )


@pytest.mark.parametrize("blocks", [1, 3])
def test_middle_blocks_of_a_maskgit_vqgan_are_counted(blocks: int) -> None:
    """RAR's code has as many as per level; a file of it loads strictly, whatever their number."""
    config = TokenizerConfig(
        autoencoder=MaskgitConfig(width=32, multipliers=(1, 2), blocks=blocks, middle_blocks=blocks, latent=8),
        quantizer=VectorConfig(codes=16, beta_on="codebook", init="uniform"),
        rounding="truncate",
    )
    theirs = Tokenizer(config).eval()
    state = {published_name(name, str): tensor for name, tensor in theirs.state_dict().items() if name not in COUNTERS}
    ours = tokenizer(maskgit_vqgan.recognise(state))
    assert ours.config == config
    images_BCHW = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.encode(images_BCHW), theirs.encode(images_BCHW))


@pytest.mark.parametrize("values", ["ema", "raw"])
def test_ibq_checkpoint(values: str) -> None:
    golden = arrays("ibq/tokenizer_ckpt")
    ours = tokenizer(ibq.recognise(weights("ibq/tokenizer_ckpt"), averaged=values == "ema"))
    images_BCHW = (golden["in/x"] + 1) / 2
    codes_Bhw = ours.encode(images_BCHW)
    assert torch.equal(codes_Bhw.flatten(), golden[f"out/{values}/indices"])
    with torch.no_grad():
        z_BDhw = ours.quantizer.lookup(codes_Bhw)
        torch.testing.assert_close(z_BDhw, golden[f"out/{values}/z_q"], atol=5e-4, rtol=0)
        torch.testing.assert_close(
            ours.autoencoder.decode(z_BDhw), golden[f"out/{values}/reconstruction"], atol=5e-4, rtol=0
        )


@pytest.mark.parametrize("values", ["ema", "raw"])
def test_open_magvit2_checkpoint(values: str) -> None:
    golden = arrays("open_magvit2/tokenizer_checkpoint")
    ours = tokenizer(open_magvit2.recognise(weights("open_magvit2/tokenizer_checkpoint"), averaged=values == "ema"))
    with torch.no_grad():
        z_BDhw = ours.autoencoder.encode(golden["in/image"])
        torch.testing.assert_close(z_BDhw, golden[f"out/{values}/h"], atol=5e-4, rtol=0)
        codes_Bhw = ours.quantizer.encode(z_BDhw)
        assert torch.equal(codes_Bhw.flatten(1), golden[f"out/{values}/indices"])
        output_BCHW = ours.autoencoder.decode(ours.quantizer.lookup(codes_Bhw))
    torch.testing.assert_close(output_BCHW, golden[f"out/{values}/recon"], atol=5e-4, rtol=0)


def test_averages_are_the_default() -> None:
    state = weights("open_magvit2/tokenizer_checkpoint")
    name = "encoder.conv_out.weight"
    found = open_magvit2.recognise(state).state[f"autoencoder.{name}"]
    assert torch.equal(found, state["model_ema.encoderconv_outweight"])
    assert not torch.equal(found, state[name])


def test_a_published_average_is_one_update_of_the_stated_decay() -> None:
    golden, state = arrays("open_magvit2/tokenizer_checkpoint"), weights("open_magvit2/tokenizer_checkpoint")
    average, raw = state["model_ema.encoderconv_outweight"], state["encoder.conv_out.weight"]
    updated = average.lerp(raw, 1 - float(state["model_ema.decay"]))
    torch.testing.assert_close(updated, golden["out/ema_after_one_update/encoder.conv_out.weight"], atol=1e-6, rtol=0)


def test_tokenizer_of_a_generator_checkpoint() -> None:
    plain = weights("ibq/tokenizer")
    wrapped = {f"first_stage_model.{name}": tensor for name, tensor in plain.items()} | {
        "transformer.head.weight": torch.zeros(2, 2)
    }
    ours, theirs = ibq.recognise(wrapped), ibq.recognise(plain)
    assert ours.config == theirs.config
    assert all(torch.equal(ours.state[name], theirs.state[name]) for name in theirs.state)


def test_every_difference_is_listed() -> None:
    state = weights("ibq/tokenizer_ckpt")
    del state["decoder.mid.attn_1.q.bias"], state["model_ema.decodermidattn_1qbias"]
    state["encoder.extra"] = torch.zeros(3)
    state["model_ema.encoderextra"] = torch.zeros(3)
    state["model_ema.ofnothing"] = torch.zeros(2)
    state["post_quant_conv.bias"] = state["model_ema.post_quant_convbias"] = torch.zeros(7)
    with pytest.raises(LayoutError) as caught:
        ibq.recognise(state)
    told = {(difference.kind, difference.name) for difference in caught.value.differences}
    assert told == {
        ("missing", "decoder.mid.attn_1.q.bias"),
        ("surplus", "encoder.extra"),
        ("surplus", "model_ema.ofnothing"),
        ("misshapen", "post_quant_conv.bias"),
    }


def test_a_missing_average_is_told() -> None:
    state = weights("open_magvit2/tokenizer_checkpoint")
    del state["model_ema.decoderconv_inbias"]
    with pytest.raises(LayoutError, match=r"missing +model_ema\.decoderconv_inbias"):
        open_magvit2.recognise(state)
    open_magvit2.recognise(state, averaged=False)


@pytest.mark.parametrize("adapter", [ibq, open_magvit2, maskgit_vqgan])
@pytest.mark.parametrize("file", ["ibq/tokenizer", "open_magvit2/tokenizer_128style", "rar/maskgit_vqgan"])
def test_a_layout_is_not_taken_for_another(adapter: object, file: str) -> None:
    fits = {"ibq/tokenizer": ibq, "open_magvit2/tokenizer_128style": open_magvit2, "rar/maskgit_vqgan": maskgit_vqgan}
    if fits[file] is adapter:
        adapter.recognise(weights(file))  # type: ignore[attr-defined]
    else:
        with pytest.raises(LayoutError):
            adapter.recognise(weights(file))  # type: ignore[attr-defined]


@pytest.mark.parametrize("values", ["ema", "raw"])
def test_discriminator_of_a_checkpoint(values: str) -> None:
    golden = arrays("ibq/tokenizer_ckpt")
    discriminator = PatchDiscriminator(PatchConfig(width=8), channels=3).eval()
    state = discriminator_weights(weights("ibq/tokenizer_ckpt"), averaged=values == "ema")
    discriminator.load_state_dict(state, strict=True)
    with torch.no_grad():
        logits = discriminator(golden["in/x"])
    torch.testing.assert_close(logits, golden[f"out/{values}/discriminator_logits_on_x"], atol=5e-4, rtol=0)
