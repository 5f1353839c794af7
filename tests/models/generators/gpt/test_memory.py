"""Estimates of memory beside what networks and decoders hold."""

from __future__ import annotations

import pytest
import torch

from models.generators.config import CodeShape, GptConfig
from models.generators.generator import build_decoder, build_generator
from models.generators.gpt.decoder import GptDecoder
from models.generators.gpt.memory import parameters
from models.generators.memory import sampling_bytes, training_bytes

SEMANTIC = CodeShape(codes=300, grid=(4, 4))
SHAPES = {
    "none": CodeShape(codes=40, grid=(4, 8)),
    "class": CodeShape(codes=40, grid=(4, 8), classes=10),
    "codes": CodeShape(codes=40, grid=(4, 8), condition=SEMANTIC),
}


def config_of(condition: str, **fields: object) -> GptConfig:
    given = {"width": 64, "layers": 3, "heads": 4, "mlp_width": 256, "norm": "pre", "positions": 64}
    return GptConfig.model_validate({**given, "condition": condition, **fields})


@pytest.mark.parametrize("condition", list(SHAPES))
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_parameters_are_counted(condition: str, norm: str) -> None:
    config, shape = config_of(condition, norm=norm), SHAPES[condition]
    model = build_generator(config, shape)
    assert parameters(config, shape) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("condition", list(SHAPES))
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_training_step_keeps_about_what_is_estimated(condition: str, norm: str) -> None:
    """Of what grows with the rows, by what autograd keeps."""
    config, shape = config_of(condition, norm=norm), SHAPES[condition]
    model = build_generator(config, shape).train()
    given = {"none": None, "class": torch.zeros(16, dtype=torch.int64)}
    condition_B = given.get(condition, torch.zeros(16, 16, dtype=torch.int64))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = model.loss(torch.zeros(16, 32, dtype=torch.int64), condition_B)
    assert torch.isfinite(loss)
    asked = {"is_half": False, "is_averaged": False, "checkpoints_activations": False, "device_type": "cpu"}
    one, many = (training_bytes(config, shape, rows=rows, **asked) for rows in (1, 17))
    assert one is not None
    assert many is not None
    assert 0.9 < (many - one) / sum(kept.values()) < 1.5


def test_recomputed_blocks_take_less() -> None:
    asked = {"rows": 16, "is_half": True, "is_averaged": False, "device_type": "cuda"}
    config = GptConfig.model_validate({"size": "base", "condition": "none"})
    kept, made_again = (
        training_bytes(config, SEMANTIC, checkpoints_activations=checkpointed, **asked)
        for checkpointed in (False, True)
    )
    assert kept is not None
    assert made_again is not None
    assert made_again < kept


@pytest.mark.parametrize("condition", list(SHAPES))
def test_a_decoder_holds_what_is_estimated(condition: str) -> None:
    config, shape = config_of(condition), SHAPES[condition]
    model = build_generator(config, shape).eval()
    decoder = build_decoder(model, rows=40, guided=False)
    assert isinstance(decoder, GptDecoder)
    asked = {"guided": False, "bytes_per_number": 4, "device_type": "cpu"}
    none, many = (sampling_bytes(config, shape, rows=rows, **asked) for rows in (5, 45))
    assert none is not None
    assert many is not None
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weights < none < 3 * weights
    cache = sum(both.nbytes for both in decoder.cache.both_2RHJE)
    assert cache < many - none < 3 * cache


def test_masked_sampling_grows_with_the_logits() -> None:
    asked = {"guided": False, "bytes_per_number": 4, "device_type": "cpu"}
    config = config_of("codes", sampling="masks")
    one, many = (sampling_bytes(config, SHAPES["codes"], rows=rows, **asked) for rows in (1, 11))
    assert one is not None
    assert many is not None
    assert many - one > 10 * 4 * 33 * 45
