"""Lookup-free quantization against the published implementation's numbers, whose softmax is over all codes at once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.quantizers.config import LookupFreeConfig
from models.quantizers.lookup_free import LookupFreeQuantizer
from tests.models.quantizers.quantizer_suite import QuantizerSuite

GOLDEN = Path(__file__).parents[2] / "golden" / "open_magvit2"
ARRAYS = load_file(GOLDEN / "quantizer_training.safetensors")
SPEC = json.loads((GOLDEN / "quantizer_training.json").read_text())
TOLERANCES = SPEC["tolerances"]
STATED = TOLERANCES["grad_rel_to_max_abs"]
# Distances from the dense softmax in float64: published float32 values 0.00238 (rounding of one saturated token, where
# the true gradient is below 1e-14), ours 0.00095. None of 30 factorised forms came nearer to the published ones than
# 0.00238 (plain sigmoids 0.00276, their complements 0.0083, a softmax per half 0.03), nor does float64 itself.
OFF_FLOAT64 = {("z14_saturated", "entropy")}
BITS = {case["name"]: case["z"] for case in SPEC["config"]["cases"]}

every_case = pytest.mark.parametrize("case", BITS)


def quantizer(case: str) -> LookupFreeQuantizer:
    return LookupFreeQuantizer(LookupFreeConfig(), dim=BITS[case])


def entropies(z_ND: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    config = LookupFreeConfig(temperature=temperature, entropy_tokens=len(z_ND))
    return LookupFreeQuantizer(config, dim=z_ND.shape[1]).entropies(z_ND)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCES["losses_rel"], atol=TOLERANCES["losses_abs"])


@every_case
def test_values(case: str) -> None:
    quantized = quantizer(case)(ARRAYS[f"in/{case}/x"])
    assert torch.equal(quantized.z_BDhw, ARRAYS[f"out/{case}/quant"].sign())
    assert torch.equal(quantized.codes_Bhw.flatten(1), ARRAYS[f"out/{case}/indices"])
    close(quantized.losses["entropy"] / 0.1, ARRAYS[f"out/{case}/entropy_aux_loss"])
    close(quantized.losses["commitment"] / 0.25, ARRAYS[f"out/{case}/commitment"])
    close(quantized.stats["sample_entropy"], ARRAYS[f"out/{case}/per_sample_entropy"])
    close(quantized.stats["codebook_entropy"], ARRAYS[f"out/{case}/codebook_entropy"])


@every_case
@pytest.mark.parametrize("part", ["entropy", "commit", "st", "total"])
def test_gradients(case: str, part: str) -> None:
    z_BDhw = ARRAYS[f"in/{case}/x"].clone().requires_grad_()
    quantized = quantizer(case)(z_BDhw)
    through = (quantized.z_BDhw * ARRAYS[f"in/{case}/upstream"]).sum()
    objective = {
        "entropy": quantized.losses["entropy"] / 0.1,
        "commit": quantized.losses["commitment"] / 0.25,
        "st": through,
        "total": through + quantized.losses["entropy"] + quantized.losses["commitment"],
    }[part]
    (gradient,) = torch.autograd.grad(objective, z_BDhw)
    theirs = ARRAYS[f"out/{case}/grad_{part}"]
    close_gradients(gradient, theirs, tolerance=0.0024 if (case, part) in OFF_FLOAT64 else STATED)


def close_gradients(ours: Tensor, theirs: Tensor, *, tolerance: float) -> None:
    """Within the stated tolerance of the largest gradient, but for the worst of all tokens, which may use `tolerance`."""
    errors_N = (ours - theirs).abs().movedim(1, -1).flatten(0, 2).amax(1) / theirs.abs().max()
    worst, *others = errors_N.sort(descending=True).values.tolist()
    assert worst < tolerance
    assert max(others) < STATED


@pytest.mark.parametrize("case", ["z10", "z14_saturated"])
def test_entropy_gradient_is_exact(case: str) -> None:
    """Against the dense softmax over all codes in float64."""
    z_BDhw = ARRAYS[f"in/{case}/x"].clone().requires_grad_()
    (ours,) = torch.autograd.grad(quantizer(case)(z_BDhw).losses["entropy"] / 0.1, z_BDhw)
    exact_BDhw = z_BDhw.detach().double().requires_grad_()
    sample, codebook = dense_entropies(exact_BDhw.movedim(1, -1).flatten(0, 2), temperature=0.01)
    (exact,) = torch.autograd.grad(sample - codebook, exact_BDhw)
    assert float((ours - exact).abs().max() / exact.abs().max()) < STATED


def dense_entropies(z_ND: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    bits = z_ND.shape[1]
    codes_KD = (2 * ((torch.arange(2**bits)[:, None] >> torch.arange(bits)) & 1) - 1).to(z_ND.dtype)
    log_p_NK = (2 * z_ND @ codes_KD.T / temperature).log_softmax(1)
    mean_K = log_p_NK.exp().mean(0)
    return -(log_p_NK.exp() * log_p_NK).sum(1).mean(), -(mean_K * (mean_K + 1e-5).log()).sum()


def test_odd_number_of_bits_equals_the_dense_form() -> None:
    torch.manual_seed(0)
    z_ND = torch.randn(6, 5, dtype=torch.float64)
    sample, codebook = entropies(z_ND, temperature=3.0)
    for ours, theirs in zip((sample, codebook), dense_entropies(z_ND, temperature=3.0), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_zero_is_a_zero_bit_and_channel_zero_the_lowest() -> None:
    z_BDhw = torch.tensor([0.5, 0.0, -1.0, 2.0]).reshape(1, 4, 1, 1)
    four_bits = LookupFreeQuantizer(LookupFreeConfig(), dim=4).eval()
    assert four_bits.encode(z_BDhw).item() == 0b1001
    assert four_bits.lookup(torch.tensor([[[0b1001]]])).flatten().tolist() == [1, -1, -1, 1]


def test_every_code_comes_back() -> None:
    six_bits = LookupFreeQuantizer(LookupFreeConfig(), dim=6)
    codes_Bhw = torch.arange(64).reshape(1, 8, 8)
    assert torch.equal(six_bits.encode(six_bits.lookup(codes_Bhw)), codes_Bhw)


def test_float32_under_autocast() -> None:
    z_BDhw = ARRAYS["in/z18/x"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = quantizer("z18")(z_BDhw)
    assert torch.equal(half.losses["entropy"], quantizer("z18")(z_BDhw).losses["entropy"])


def test_entropy_weight_falls_to_its_end() -> None:
    config = LookupFreeConfig(enlarge_ratio=3.0, enlarge_steps=2000)
    assert [config.enlargement(step) for step in (0, 500, 2000, 9000)] == [3.0, 2.25, 0.0, 0.0]


def test_one_bit_has_an_entropy() -> None:
    sample, codebook = entropies(torch.tensor([[1.0], [-1.0]]), temperature=0.01)
    torch.testing.assert_close(torch.stack([sample, codebook]), torch.tensor([0.0, math.log(2)]), atol=1e-4, rtol=0)


class TestConformance(QuantizerSuite):
    def build(self) -> nn.Module:
        return LookupFreeQuantizer(LookupFreeConfig(), dim=self.dim)
