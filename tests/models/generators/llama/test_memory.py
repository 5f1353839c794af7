"""Estimates of memory, beside what is counted."""

from __future__ import annotations

import pytest
import torch

from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig
from models.generators.generator import build_decoder
from models.generators.llama.memory import KEPT_PER_PARAMETER, WORK, parameters, sampling_bytes, training_bytes
from models.generators.llama.network import Llama

SHAPE = CodeShape(codes=64, grid=(4, 4), classes=5)
LLAMA = LlamaConfig(width=64, layers=3, heads=2)
FACTORIZED = FactorizedConfig(width=64, layers=3, heads=2, head_layers=2, factors=(8, 8))


@pytest.mark.parametrize("config", [LLAMA, FACTORIZED], ids=["llama", "factorized"])
def test_parameters(config: LlamaConfig | FactorizedConfig) -> None:
    assert parameters(config, SHAPE) == sum(parameter.numel() for parameter in Llama(config, SHAPE).parameters())


@pytest.mark.parametrize("config", [LLAMA, FACTORIZED], ids=["llama", "factorized"])
@pytest.mark.parametrize("is_half", [False, True])
def test_activations(config: LlamaConfig | FactorizedConfig, is_half: bool) -> None:
    """What autograd keeps for the backward pass, each storage once, is near the estimate without parameters."""
    model, rows = Llama(config, SHAPE).train(), 8
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.untyped_storage().data_ptr() not in own:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    codes_BT, labels_B = torch.randint(64, (rows, 16)), torch.zeros(rows, dtype=torch.int64)
    kept_by_autograd = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
    with kept_by_autograd, torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        loss, _ = model.loss(codes_BT, labels_B)
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2) * 2 * is_half  # cast for products
    found = sum(saved.untyped_storage().nbytes() for saved in kept.values()) - weights
    asked = {"is_half": is_half, "is_averaged": False, "checkpoints_activations": False, "device_type": "cpu"}
    estimate = training_bytes(config, SHAPE, rows=rows, **asked) - training_bytes(config, SHAPE, rows=0, **asked)
    assert 0.85 < estimate / WORK / found < 1.3
    del loss


def test_training_counts_parameters_and_pieces() -> None:
    asked = {"rows": 4, "is_half": False, "is_averaged": False, "device_type": "cpu"}
    whole = training_bytes(LLAMA, SHAPE, checkpoints_activations=False, **asked)
    assert whole > KEPT_PER_PARAMETER * parameters(LLAMA, SHAPE)
    deep = LLAMA.model_copy(update={"layers": 30})
    assert training_bytes(deep, SHAPE, checkpoints_activations=True, **asked) < training_bytes(
        deep, SHAPE, checkpoints_activations=False, **asked
    )


@pytest.mark.parametrize("config", [LLAMA, FACTORIZED], ids=["llama", "factorized"])
def test_sampling(config: LlamaConfig | FactorizedConfig) -> None:
    """Cache and weights, which are most of it for many rows, are counted as they are allocated."""
    model, rows = Llama(config, SHAPE), 64
    decoder = build_decoder(model, rows=rows, guided=True)
    steps = [decoder.run] + ([decoder.head.run] if isinstance(config, FactorizedConfig) else [])
    cache = sum(cache.nbytes for step in steps for cache in step.cache_2RHJE)
    estimate = sampling_bytes(config, SHAPE, rows=rows, guided=True, bytes_per_number=4, device_type="cpu")
    own = 4 * parameters(config, SHAPE)
    assert own + cache < estimate < 3 * own + 2 * cache
