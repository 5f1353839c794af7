"""Llama-style generators against the published implementations' numbers (tests/golden/ibq/ar.json and
tests/golden/open_magvit2/ar_generator.json say how they were made, and the tolerances).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig, LlamaSettings
from models.generators.llama.network import Llama
from models.layers.rope import rope_table, rotate
from models.losses import head_cross_entropy
from tests.models.generators.llama.fixtures import IBQ, MAGVIT2, load, published_names, read

IBQ_SPEC, IBQ_ARRAYS = read(IBQ)
MAGVIT2_SPEC, MAGVIT2_ARRAYS = read(MAGVIT2)
LOW = 16  # values of the first sub-token in Open-MAGVIT2's fixture


def close(ours: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, wanted, atol=tolerance, rtol=0)


def magvit2_codes() -> Tensor:
    return MAGVIT2_ARRAYS["out/target_pre"] + LOW * MAGVIT2_ARRAYS["out/target_post"]


@pytest.mark.parametrize(
    ("width", "wanted"), [(32, IBQ_ARRAYS["out/freqs_cis"]), (16, MAGVIT2_ARRAYS["out/rope_table"])]
)
def test_rotary_positions(width: int, wanted: Tensor) -> None:
    """The first row is zero, and not a rotation by nothing."""
    close(rope_table((4, 4), width), wanted, IBQ_SPEC["tolerances"]["freqs_cis"])
    assert not wanted[0].any()


def test_compiled_blocks_rotate_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers get real numbers, and whoever runs the operations one by one complex ones."""
    torch.manual_seed(0)
    x_BJHE, table_JF2 = torch.randn(2, 17, 3, 32), rope_table((4, 4), 32)
    complex_BJHE = rotate(x_BJHE, table_JF2)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x_BJHE, table_JF2), complex_BJHE)


def test_logits_of_ibq() -> None:
    model, tolerance = load(IBQ), IBQ_SPEC["tolerances"]["logits"]
    labels_B = IBQ_ARRAYS["in/class"][:, 0]
    (logits_BTK,) = model(IBQ_ARRAYS["in/tokens"], labels_B)
    close(logits_BTK, IBQ_ARRAYS["out/train/logits"], tolerance)
    labels_B = torch.cat([torch.tensor([10]), labels_B[1:]])
    (logits_BTK,) = model(IBQ_ARRAYS["in/tokens"], labels_B)
    close(logits_BTK, IBQ_ARRAYS["out/train/logits_with_class_dropped_for_sample0"], tolerance)


def test_logits_of_open_magvit2() -> None:
    model, tolerance = load(MAGVIT2), MAGVIT2_SPEC["tolerances"]["logits"]
    labels_B = MAGVIT2_ARRAYS["in/class_label"]
    for name, labels in (("logits", labels_B), ("null_logits", torch.full_like(labels_B, 10))):
        for part, logits_BTK in zip(("pre", "post"), model(magvit2_codes(), labels), strict=True):
            close(logits_BTK, MAGVIT2_ARRAYS[f"out/{name}_{part}"], tolerance)


def test_the_sub_tokens_of_a_code() -> None:
    """The code is the first plus the second times the number of values of the first, as published."""
    arrays = MAGVIT2_ARRAYS
    low_BT, high_BT = load(MAGVIT2).split(arrays["out/greedy/full_index"])
    assert torch.equal(low_BT, arrays["out/greedy/pre"])
    assert torch.equal(high_BT, arrays["out/greedy/post"])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("many_codes", [1, 10**9], ids=["tiled", "whole"])
def test_loss_and_gradients_of_ibq(monkeypatch: pytest.MonkeyPatch, checkpointed: bool, many_codes: int) -> None:
    monkeypatch.setattr(head_cross_entropy, "MANY_CODES", many_codes)
    monkeypatch.setattr(head_cross_entropy, "FEWEST_CODES", 40)  # the second tile is cut short
    model = without_dropout(load(IBQ)).train()
    model.checkpoint_blocks = checkpointed
    loss, stats = model.loss(IBQ_ARRAYS["in/tokens"], IBQ_ARRAYS["in/class"][:, 0])
    loss.backward()
    close(loss.detach(), IBQ_ARRAYS["out/train/loss"], IBQ_SPEC["tolerances"]["loss"])
    hits = IBQ_ARRAYS["out/train/logits"].argmax(-1) == IBQ_ARRAYS["in/tokens"]
    close(stats["correct"], hits.float().mean(), 1e-6)
    gradients = published_gradients(model)
    for name in [name for name in IBQ_ARRAYS if name.startswith("out/train/grad/")]:
        wanted = IBQ_ARRAYS[name]
        close(gradients[name.removeprefix("out/train/grad/")], wanted, 1e-4 * float(wanted.abs().max()))
    for name, norm in IBQ_SPEC["grad_norms"].items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_of_open_magvit2(checkpointed: bool) -> None:
    model, tolerances = without_dropout(load(MAGVIT2)).train(), MAGVIT2_SPEC["tolerances"]
    model.checkpoint_blocks = checkpointed
    loss, stats = model.loss(magvit2_codes(), MAGVIT2_ARRAYS["in/class_label"])
    loss.backward()
    close(loss.detach(), MAGVIT2_ARRAYS["out/loss"], tolerances["loss"])
    hits = [
        MAGVIT2_ARRAYS[f"out/logits_{part}"].argmax(-1) == MAGVIT2_ARRAYS[f"out/target_{part}"]
        for part in ("pre", "post")
    ]
    close(stats["correct"], (hits[0] & hits[1]).float().mean(), 1e-6)
    gradients = published_gradients(model)
    for name in [name for name in MAGVIT2_ARRAYS if name.startswith("out/grad/")]:
        close(gradients[name.removeprefix("out/grad/")], MAGVIT2_ARRAYS[name], tolerances["grads_rel"])
    norms = zip(MAGVIT2_SPEC["grad_names"], MAGVIT2_ARRAYS["out/grad_norms"].tolist(), strict=True)
    for name, norm in norms:
        own = float(gradients[name.removeprefix("transformer.")].norm())
        assert own == pytest.approx(norm, rel=tolerances["grads_rel"])


def without_dropout(model: Llama) -> Llama:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def published_gradients(model: Llama) -> dict[str, Tensor]:
    names = published_names(model)
    return {names[name]: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "size", "parameters"),
    [
        (LlamaConfig, "b", 342_994_944),
        (LlamaConfig, "l", 649_640_960),
        (LlamaConfig, "xl", 1_076_103_168),
        (LlamaConfig, "xxl", 2_063_331_840),
        (FactorizedConfig, "b", 343_570_432),
        (FactorizedConfig, "l", 804_362_240),
        (FactorizedConfig, "xl", 1_486_679_040),
    ],
)
def test_published_sizes(kind: type[LlamaSettings], size: str, parameters: int) -> None:
    config = kind.model_validate({"size": size})
    codes = 16384 if kind is LlamaConfig else 2**18
    with torch.device("meta"):
        model = Llama(config, CodeShape(codes=codes, grid=(16, 16), classes=1000, factors=(64, codes // 64)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_fresh_network_is_drawn_as_published() -> None:
    torch.manual_seed(0)
    shape, numbers = CodeShape(codes=64, grid=(4, 4), classes=10), {"width": 64, "layers": 1, "heads": 2}
    networks = (
        Llama(LlamaConfig(**numbers, gate_scale=0.01), shape),
        Llama(FactorizedConfig(**numbers, head_layers=1, factors=(8, 8)), shape),
    )
    for name, parameter in (pair for network in networks for pair in network.state_dict().items()):
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias") or name.startswith("head.linears"):
            assert not parameter.any(), name
        elif "ada_lin" in name:
            gates = 128 if name.startswith("blocks") else 0
            assert float(parameter[gates:].std()) == pytest.approx(0.01, rel=0.05), name
            if gates:
                assert float(parameter[:gates].std()) == pytest.approx(0.0002, rel=0.05), name
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.1), name


def test_dropped_labels_are_the_class_of_none() -> None:
    model, codes_BT = load(IBQ), IBQ_ARRAYS["in/tokens"]
    labels_B = torch.tensor([1, 2, 3])
    dropped = model.loss(codes_BT, labels_B, dropped=torch.tensor([True, False, True]))[0]
    assert torch.equal(dropped, model.loss(codes_BT, torch.tensor([10, 2, 10]))[0])
    assert not torch.equal(dropped, model.loss(codes_BT, labels_B)[0])


@pytest.mark.parametrize("rate", ["dropout", "token_dropout"])
def test_dropouts_are_of_training_alone(rate: str) -> None:
    shape = CodeShape(codes=16, grid=(2, 2), classes=2, factors=(4, 4))
    rates = {"dropout": 0.0, "token_dropout": 0.0} | {rate: 0.5}
    model = Llama(FactorizedConfig(width=16, layers=1, heads=2, head_layers=1, **rates), shape)
    torch.nn.init.normal_(model.head.linears[0].weight)
    codes_BT, labels_B = torch.arange(8).view(2, 4), torch.tensor([0, 1])
    losses = [float(model.loss(codes_BT, labels_B)[0].detach()) for _ in range(2)]
    assert losses[0] != losses[1]
    model.eval()
    losses = [float(model.loss(codes_BT, labels_B)[0].detach()) for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("factors", [(8, 8), (4, 16), (2, 2, 2, 8)])
def test_any_factors_serve_the_same_codes(factors: tuple[int, ...]) -> None:
    """The factors are the config's; a fresh network finds all codes equally likely whatever they are."""
    shape = CodeShape(codes=64, grid=(2, 2), classes=2, factors=(2, 32))
    model = Llama(FactorizedConfig(width=16, layers=1, heads=2, head_layers=1, factors=factors), shape).eval()
    assert model.factors == factors
    codes_BT = torch.arange(64).view(16, 4)
    subtokens = model.split(codes_BT)
    assert torch.equal(sum(size * part for size, part in zip(model.sizes, subtokens, strict=True)), codes_BT)
    loss, _ = model.loss(codes_BT, torch.zeros(16, dtype=torch.int64))
    assert float(loss.detach()) == pytest.approx(math.log(64))


def test_what_decays() -> None:
    """Matrices; as published everything does, which is the training's own setting."""
    model = Llama(LlamaConfig(width=16, layers=1, heads=2), CodeShape(codes=16, grid=(2, 2), classes=2))
    for name, parameter in model.named_parameters():
        assert model.decayed(name, parameter) == (parameter.ndim == 2), name
