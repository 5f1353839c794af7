"""The networks of DiGIT against the published implementation's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.generators.config import CodeShape, GptConfig
from models.generators.generator import build_generator
from models.generators.gpt.network import Gpt

from ..digit_fixtures import arrays, as_published, codes_of, network, tolerance

BY_STEPS = ["stage1_uncond", "stage1_classcond", "stage2_ar", "vq_baseline"]
SEMANTIC = CodeShape(codes=8192, grid=(16, 16))
LARGE_SEMANTIC = CodeShape(codes=16384, grid=(16, 16))


def condition_of(name: str) -> Tensor | None:
    found = arrays(name)
    return {
        "stage1_classcond": found.get("in/cls_ids"),
        "stage2_ar": found.get("out/semantic_raw"),
        "stage2_nar": None if name != "stage2_nar" else semantic_codes(found["out/semantic_ids_in_embedding"]),
    }.get(name)


def semantic_codes(ids_BS: Tensor) -> Tensor:
    """From rows of the fixture's embedding table, which begins with 48 codes and twice the specials."""
    return ids_BS - (48 + 5 + 5)


def close(ours: Tensor, name: str, key: str) -> None:
    torch.testing.assert_close(ours, arrays(name)[key], atol=tolerance(name), rtol=0)


@pytest.mark.parametrize("name", BY_STEPS)
@torch.no_grad()
def test_logits_and_loss_by_steps(name: str) -> None:
    model, found = network(name), arrays(name)
    codes_BT = codes_of(found["out/target"][:, :-1])
    logits_BTV = model(codes_BT, condition_of(name))
    close(as_published(logits_BTV), name, "out/logits")
    loss, stats = model.loss(codes_BT, condition_of(name))
    close(loss, name, "out/loss")
    hits = as_published(logits_BTV).argmax(-1) == found["out/target"]
    assert float(stats["correct"]) == pytest.approx(float(hits.float().mean()))
    model.config = model.config.model_copy(update={"label_smoothing": 0.0})
    close(model.loss(codes_BT, condition_of(name))[0], name, "out/nll_loss")


@pytest.mark.parametrize("name", ["stage1_uncond", "stage1_classcond"])
@torch.no_grad()
def test_inner_states(name: str) -> None:
    model, found = network(name), arrays(name)
    states = list(model.inner_states(codes_of(found["out/target"][:, :-1]), condition_of(name)))
    assert len(states) == 1 + model.config.layers
    close(states[0], name, "out/inner_state_first")
    close(states[-1], name, "out/inner_state_last")


@torch.no_grad()
def test_logits_and_loss_by_masks() -> None:
    model, found = network("stage2_nar"), arrays("stage2_nar")
    masks_BT, codes_BT = found["out/train_mask"][:, 1:], found["out/vq_indices"]
    condition_BS = condition_of("stage2_nar")
    masked_BT = codes_BT.masked_fill(masks_BT, model.shape.codes + 3)
    close(as_published(model(masked_BT, condition_BS)), "stage2_nar", "out/logits")
    close(model.loss(codes_BT, condition_BS, masks=masks_BT)[0], "stage2_nar", "out/loss")
    model.config = model.config.model_copy(update={"label_smoothing": 0.0})
    close(model.loss(codes_BT, condition_BS, masks=masks_BT)[0], "stage2_nar", "out/nll_loss")


@pytest.mark.parametrize(
    ("size", "condition", "shape", "parameters"),
    [
        ("base", "none", SEMANTIC, 219_377_664),
        ("base", "class", SEMANTIC.model_copy(update={"classes": 1000}), 220_401_664),
        ("large", "none", LARGE_SEMANTIC, 731_879_424),
        ("large", "class", LARGE_SEMANTIC.model_copy(update={"classes": 1000}), 733_415_424),
        ("pixels", "codes", CodeShape(codes=1024, grid=(16, 16), condition=SEMANTIC), 214_144_000),
        ("pixels", "codes", CodeShape(codes=1024, grid=(16, 16), condition=LARGE_SEMANTIC), 222_532_608),
        ("pixels", "none", CodeShape(codes=1024, grid=(16, 16)), 204_699_648),
    ],
)
def test_published_counts_of_parameters(size: str, condition: str, shape: CodeShape, parameters: int) -> None:
    config = GptConfig.model_validate({"size": size, "condition": condition})
    with torch.device("meta"):
        model = build_generator(config, shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def tiny(**fields: object) -> Gpt:
    given = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 64, "norm": "pre", "condition": "none", "dropout": 0.0}
    torch.manual_seed(0)
    model = build_generator(GptConfig.model_validate(given | fields), CodeShape(codes=40, grid=(4, 5)))
    assert isinstance(model, Gpt)
    return model


def test_fresh_parameters_are_drawn_as_published() -> None:
    model = tiny()
    assert float(model.embeddings.weight[:40].std()) == pytest.approx(32**-0.5, rel=0.1)
    assert float(model.positions.weight.std()) == pytest.approx(32**-0.5, rel=0.05)
    assert float(model.head.weight.std()) == pytest.approx(32**-0.5, rel=0.1)
    assert not model.embeddings.weight[41].any()
    assert not model.positions.weight[1].any()
    attention = model.blocks[0].attn
    for part_DD in attention.qkv.weight.chunk(3):
        assert float(part_DD.detach().abs().max()) == pytest.approx(math.sqrt(6 / 64 / 2), rel=0.02)
    assert float(attention.proj.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / 64), rel=0.02)
    assert not attention.proj.bias.any()
    assert attention.qkv.bias.any()


def test_masks_are_drawn_for_a_step_of_training() -> None:
    def streams(name: str) -> np.random.Generator:
        return np.random.default_rng(len(name))

    masks = tiny(sampling="masks").draws(streams, 3, 0)["masks"]
    assert masks.shape == (3, 20)
    assert masks.dtype == np.bool_
    assert tiny().draws(streams, 3, 0) == {}


def test_without_drawn_masks_some_codes_are_masked_and_judged() -> None:
    model, codes_BT = tiny(sampling="masks"), torch.arange(20)[None]
    loss, stats = model.loss(codes_BT, None)
    assert torch.isfinite(loss)
    hidden_BT = codes_BT.clone()
    hidden_BT[0, 0] = 30  # position 0 is masked: what was there changes the target alone
    torch.testing.assert_close(model(hidden_BT.masked_fill(torch.ones(1, 20).bool(), 43), None).shape, (1, 21, 45))
    assert 0 <= float(stats["correct"]) <= 1


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_with_recomputed_blocks_are_the_same(checkpointed: bool) -> None:
    model = tiny().train()
    model.checkpoint_blocks = checkpointed
    model.loss(torch.arange(20)[None], None)[0].backward()
    gradient = model.embeddings.weight.grad
    assert gradient is not None
    plain = tiny().train()
    plain.loss(torch.arange(20)[None], None)[0].backward()
    torch.testing.assert_close(gradient, plain.embeddings.weight.grad)
