"""Index backpropagation against the published implementation's numbers, in float32 and in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.quantizers import propagation, tempered
from models.quantizers.config import IndexBackpropagationConfig
from models.quantizers.index_backpropagation import IndexBackpropagationQuantizer
from tests.models.quantizers.quantizer_suite import QuantizerSuite

GOLDEN = Path(__file__).parents[2] / "golden" / "ibq"
NAMES = ("small", "large", "saturated", "other_hyper")
CASES = {name: load_file(GOLDEN / f"quantizer_{name}.safetensors") for name in NAMES}
SPECS = {name: json.loads((GOLDEN / f"quantizer_{name}.json").read_text()) for name in NAMES}


def build(name: str, *, entropy: bool, dtype: torch.dtype = torch.float32) -> IndexBackpropagationQuantizer:
    spec = SPECS[name]["config"]
    config = IndexBackpropagationConfig(
        codes=spec["K"],
        beta=spec["beta"],
        temperature=spec["entropy_temperature"],
        entropy_weight=0.05 if entropy else 0.0,
        sample_weight=spec["sample_minimization_weight"],
        batch_weight=spec["batch_maximization_weight"],
    )
    quantizer = IndexBackpropagationQuantizer(config, dim=spec["D"]).to(dtype)
    quantizer.codebook_KD.data.copy_(CASES[name]["weights/embedding.weight"])
    return quantizer


def gradients(
    quantizer: IndexBackpropagationQuantizer, z_BDhw: Tensor, objective: str, upstream: Tensor
) -> list[Tensor]:
    z_BDhw = z_BDhw.detach().requires_grad_()
    quantized = quantizer(z_BDhw)
    terms = {
        "upstream": (quantized.z_BDhw * upstream).sum(),
        "quant": quantized.losses["quantization"],
        "entropy": quantized.losses.get("entropy", torch.zeros(())) / 0.05,
    }
    weighted = terms["upstream"] + terms["quant"] + 0.05 * terms["entropy"]
    return list(
        torch.autograd.grad(weighted if objective == "total" else terms[objective], [z_BDhw, quantizer.codebook_KD])
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(params=[7, 64], autouse=True)
def rows_per_tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size of the chunks gives the same numbers."""
    monkeypatch.setattr(propagation, "CPU_ROWS_PER_TILE", request.param)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("entropy", [True, False])
def test_values(name: str, entropy: bool) -> None:
    case = CASES[name]
    part = f"out/entropy_{'on' if entropy else 'off'}"
    quantizer = build(name, entropy=entropy)
    quantized = quantizer(case["in/z"])
    assert torch.equal(quantized.codes_Bhw.flatten(), case[f"{part}/indices"])
    torch.testing.assert_close(quantized.z_BDhw, case[f"{part}/z_q"], atol=2e-6, rtol=0)
    ours = {"quant_loss": quantized.losses["quantization"]}
    if entropy:
        ours |= {
            "sample_entropy": quantized.stats["sample_entropy"],
            "avg_entropy": quantized.stats["codebook_entropy"],
            "entropy_loss": quantized.losses["entropy"] / 0.05,
        }
    for term, value in ours.items():
        torch.testing.assert_close(value, case[f"{part}/{term}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("entropy", [True, False])
def test_float32_gradients(name: str, entropy: bool) -> None:
    case, part = CASES[name], f"entropy_{'on' if entropy else 'off'}"
    ours = gradients(build(name, entropy=entropy), case["in/z"], "total", case["in/upstream"])
    for gradient, of in zip(ours, ("z", "codebook"), strict=True):
        assert relative(gradient, case[f"out/{part}/grad_{of}"]) < (2e-4 if entropy else 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", ["upstream", "quant", "entropy", "total"])
def test_float64_gradients(name: str, objective: str) -> None:
    case = CASES[name]
    quantizer = build(name, entropy=True, dtype=torch.float64)
    ours = gradients(quantizer, case["in/z"].double(), objective, case["in/upstream"].double())
    part = "entropy_on" if objective == "total" else f"only_{objective}"
    for gradient, of in zip(ours, ("z", "codebook"), strict=True):
        assert relative(gradient, case[f"out64/{part}/grad_{of}"]) < 1e-9


@pytest.mark.parametrize("share", [0, 10**9])
def test_window_and_dense_form_agree(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk by the underflow window, then every chunk by the dense form: the published gradients both times."""
    monkeypatch.setattr(tempered, "SPARSE_SHARE", share)
    test_float64_gradients("large", "entropy")
    test_float32_gradients("small", True)


@pytest.mark.parametrize("seed", range(3))
def test_diffuse_gradients_of_the_entropies_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """130 tokens: the last product of the backward pass has another shape than that of the forward pass."""
    monkeypatch.setattr(propagation, "CPU_ROWS_PER_TILE", 128)
    random = torch.Generator().manual_seed(seed)
    z_ND = (0.5 * torch.randn(130, 256, generator=random, dtype=torch.float64)).requires_grad_()
    codebook_KD = torch.randn(1024, 256, generator=random, dtype=torch.float64, requires_grad=True)
    passed = propagation.propagate(z_ND, codebook_KD, beta=0.25, temperature=0.01)
    logits_NK = z_ND @ codebook_KD.T / 0.01
    q_NK = logits_NK.softmax(1)
    mass_K = q_NK.mean(0)
    theirs = (mass_K * (mass_K + 1e-5).log()).sum() - (q_NK * logits_NK.log_softmax(1)).sum(1).mean()
    ours = passed.sample_entropy - passed.codebook_entropy_G[0]
    for a, b in zip(*(torch.autograd.grad(x, [z_ND, codebook_KD]) for x in (ours, theirs)), strict=True):
        assert relative(a, b) < 1e-9


def test_encode_and_lookup() -> None:
    case = CASES["large"]
    quantizer = build("large", entropy=True).eval()
    codes_Bhw = quantizer.encode(case["in/z"])
    assert torch.equal(codes_Bhw.flatten(), case["out/entropy_on/indices"])
    torch.testing.assert_close(quantizer.lookup(codes_Bhw), case["out/entropy_on/z_q"], atol=2e-6, rtol=0)


def test_float32_under_autocast() -> None:
    case = CASES["small"]
    quantizer = build("small", entropy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = quantizer(case["in/z"])
    assert torch.equal(quantized.stats["sample_entropy"], quantizer(case["in/z"]).stats["sample_entropy"])
    assert quantized.z_BDhw.dtype == torch.float32


@pytest.mark.parametrize("codes", [1, 63, 65, 200])
def test_any_codebook_size(codes: int) -> None:
    """Codebooks that do not fill whole groups: indices and gradients are those of the formula by autograd."""
    torch.manual_seed(codes)
    z_ND = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    codebook_KD = torch.randn(codes, 4, dtype=torch.float64, requires_grad=True)
    passed = propagation.propagate(z_ND, codebook_KD, beta=0.25, temperature=0.5)
    p_NK = (z_ND @ codebook_KD.T).softmax(1)
    assert torch.equal(passed.codes_N, p_NK.argmax(1))
    q_NK = (z_ND @ codebook_KD.T / 0.5).softmax(1)
    chosen_NK = torch.nn.functional.one_hot(passed.codes_N, codes) + (p_NK - p_NK.detach())
    mass_K = q_NK.mean(0)
    theirs = (chosen_NK @ codebook_KD).square().sum() - (q_NK * q_NK.log()).sum(1).mean()
    theirs = theirs - (mass_K * (mass_K + 1e-5).log()).sum()
    ours = passed.z_ND.square().sum() + passed.sample_entropy + passed.codebook_entropy_G[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for a, b in zip(*(torch.autograd.grad(x, [z_ND, codebook_KD]) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class TestConformance(QuantizerSuite):
    def build(self) -> nn.Module:
        quantizer = IndexBackpropagationQuantizer(IndexBackpropagationConfig(codes=16), dim=self.dim)
        with torch.no_grad():  # only of rows of one length is each the most similar to itself
            quantizer.codebook_KD.copy_(nn.functional.normalize(quantizer.codebook_KD))
        return quantizer
