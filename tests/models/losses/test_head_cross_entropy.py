"""The cross entropy that is computed tile by tile is that of the whole logits, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import head_cross_entropy as module
from models.losses.head_cross_entropy import head_cross_entropy

ROWS, WIDTH, CODES = 7, 6, 50


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tiles, the last one cut short."""
    for name, value in {"MANY_CODES": 1, "CPU_TILE": 1, "FEWEST_CODES": 16}.items():
        monkeypatch.setattr(module, name, value)


def problem(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, CODES, bias=bias, dtype=dtype)
    targets_M = torch.tensor([0, 15, 16, 31, 47, 48, 49])  # at the edges of tiles
    return torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True), linear, targets_M


def gradients(loss: Tensor, x_MD: Tensor, linear: nn.Linear) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x_MD, *linear.parameters()]))


@pytest.mark.parametrize("bias", [True, False])
def test_value_hits_and_gradients(bias: bool) -> None:
    x_MD, linear, targets_M = problem(bias=bias)
    targets_M[2] = linear(x_MD)[2].argmax()  # one hit at least
    loss, hits_M = head_cross_entropy(x_MD, linear, targets_M)
    logits_MK = linear(x_MD)
    wanted = F.cross_entropy(logits_MK, targets_M)
    torch.testing.assert_close(loss, wanted)
    assert torch.equal(hits_M, logits_MK.argmax(-1) == targets_M)
    for found, expected in zip(gradients(3 * loss, x_MD, linear), gradients(3 * wanted, x_MD, linear), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_by_differences() -> None:
    x_MD, linear, targets_M = problem()
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: module.TiledCrossEntropy.apply(x, weight, bias, targets_M, torch.float64)[0],
        (x_MD, linear.weight, linear.bias),
    )


def test_equal_logits_hit_the_first_code() -> None:
    """As argmax does: a fresh head is not right about everything."""
    x_MD, linear, targets_M = problem()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    assert head_cross_entropy(x_MD, linear, targets_M)[1].tolist() == [True] + [False] * 6


@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_large_logits(size: float) -> None:
    x_MD, linear, targets_M = problem(dtype=torch.float32)
    loss, _ = head_cross_entropy(size * x_MD, linear, targets_M)
    torch.testing.assert_close(loss, F.cross_entropy(linear(size * x_MD), targets_M))


def test_under_autocast_only_products_are_rounded() -> None:
    """The loss and the gradient of the weight are float32, and as near as those of whole logits."""
    x_MD, linear, targets_M = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_cross_entropy(x_MD, linear, targets_M)
        wanted = F.cross_entropy(linear(x_MD).float(), targets_M)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, atol=1e-3, rtol=0)
    for found, expected in zip(gradients(loss, x_MD, linear), gradients(wanted, x_MD, linear), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-2)


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept between the passes is a number per position, beside the arguments."""
    kept: list[int] = []
    x_MD, linear, targets_M = problem()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        head_cross_entropy(x_MD, linear, targets_M)
    assert sum(kept) <= x_MD.numel() + linear.weight.numel() + CODES + 2 * ROWS
    sizes = [logits_Mk.shape for _, logits_Mk in module.tiles(x_MD, linear.weight, linear.bias)]
    assert sizes == [(ROWS, 16)] * 3 + [(ROWS, 2)]
