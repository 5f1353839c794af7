"""RAR against the published implementation's numbers (tests/golden/rar/rar.json says how they were made).

The tolerances are those of the file: logits 2e-4, guided logits 2e-3, gradients and activations 1e-4, loss 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.generators.config import SIZES, AnnealedOrders, CodeShape, FixedOrder, RarConfig
from models.generators.generator import build_decoder
from models.generators.orders import Scan, scan_order
from models.generators.rar.network import Rar
from models.sampling.config import PowerCosineGuidance, SamplingConfig
from models.sampling.loop import guide, sample
from models.schedules import power_cosine
from tests.models.generators.conformance import teacher_forced

GOLDEN = Path(__file__).parents[3] / "golden" / "rar"
SPEC = json.loads((GOLDEN / "rar.json").read_text())
ARRAYS = load_file(GOLDEN / "rar.safetensors")
CODES, TOKENS, CLASSES = 64, 16, 10
SHAPE = CodeShape(codes=CODES, grid=(4, 4), classes=CLASSES)
GUIDANCE = [(16.0, 2.75), (8.0, 1.2), (4.0, 0.0)]


@pytest.fixture(scope="module")
def model() -> Rar:
    numbers = SPEC["config"]
    config = RarConfig(
        width=numbers["hidden_size"],
        layers=numbers["num_hidden_layers"],
        heads=numbers["num_attention_heads"],
        mlp_width=numbers["intermediate_size"],
    )
    rar = Rar(config, SHAPE)
    weights = {k.removeprefix("weights/"): v.float() for k, v in ARRAYS.items() if k.startswith("weights/")}
    rar.load_state_dict(weights, strict=True)
    return rar.eval()


def training_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    labels_B = ARRAYS["in/train_condition_ids"] - CODES - 1
    dropped_B = labels_B == CLASSES
    return ARRAYS["in/train_tokens"], labels_B % CLASSES, ARRAYS["in/train_orders"], dropped_B


def close(ours: torch.Tensor, name: str, tolerance: str) -> None:
    torch.testing.assert_close(ours, ARRAYS[name], atol=SPEC["tolerances"][tolerance], rtol=0)


def test_training_forward(model: Rar) -> None:
    codes_BT, _, orders_BT, _ = training_batch()
    labels_B = ARRAYS["in/train_condition_ids"] - CODES - 1
    shuffled_BT = codes_BT.gather(1, orders_BT)
    x_BJD = model.embed(shuffled_BT, labels_B, orders_BT)
    condition_BJD = model.condition(labels_B, positions=TOKENS + 2)
    close(x_BJD, "out/train_block_input", "default")
    close(condition_BJD, "out/train_adaln_condition", "default")
    for index, block in enumerate(model.blocks):
        x_BJD = block(x_BJD, torch.nn.functional.silu(condition_BJD), slice(None))
        close(x_BJD, f"out/train_block_{index}", "default")
    close(model(shuffled_BT, labels_B, orders_BT), "out/train_logits", "logits")
    assert torch.equal(shuffled_BT, ARRAYS["out/train_labels_shuffled"])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients(model: Rar, checkpointed: bool) -> None:
    model.zero_grad()
    model.checkpoint_blocks = checkpointed
    codes_BT, labels_B, orders_BT, dropped_B = training_batch()
    loss, stats = model.loss(codes_BT, labels_B, orders=orders_BT, dropped=dropped_B)
    loss.backward()
    model.checkpoint_blocks = False
    close(loss.detach()[None], "out/train_loss", "train_loss")
    close(stats["correct"][None], "out/train_correct_tokens", "train_loss")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in [k for k in ARRAYS if k.startswith("out/train_grad/")]:
        close(gradients[name.removeprefix("out/train_grad/")], name, "grads")
    for name, norm in SPEC["train_grad_norm_per_parameter"].items():
        assert float(gradients[name].norm()) == pytest.approx(norm, abs=SPEC["tolerances"]["grads"])
    assert sum(float(g.norm()) ** 2 for g in gradients.values()) ** 0.5 == pytest.approx(
        SPEC["train_grad_norm_total"], abs=1e-4
    )


def logits_of(model: Rar, *, guided: bool, orders: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (R, T, K) of every step, the given codes being fed through the cache."""
    codes_BT = ARRAYS["in/tf_tokens"]
    decoder = build_decoder(model, rows=len(codes_BT), guided=guided, orders=orders)
    return teacher_forced(decoder, codes_BT, ARRAYS["in/tf_condition_ids"] - CODES - 1)


@pytest.mark.usefixtures("each_step")
def test_cached_logits(model: Rar) -> None:
    conditional, unconditional = logits_of(model, guided=True).chunk(2)
    close(conditional, "out/tf_cond_logits", "logits")
    close(unconditional, "out/tf_uncond_logits", "logits")
    close(logits_of(model, guided=False), "out/tf_cond_logits", "logits")


@pytest.mark.usefixtures("each_step")
def test_cached_logits_in_other_orders(model: Rar) -> None:
    conditional, unconditional = logits_of(model, guided=True, orders=ARRAYS["in/tf_orders"]).chunk(2)
    close(conditional, "out/tf_cond_logits_orders", "logits")
    close(unconditional, "out/tf_uncond_logits_orders", "logits")


@pytest.mark.usefixtures("each_step")
@pytest.mark.parametrize(("scale", "power"), GUIDANCE)
def test_guided_logits(model: Rar, scale: float, power: float) -> None:
    logits_RTK = logits_of(model, guided=True)
    weights_T = power_cosine(scale, power, TOKENS)
    guided = torch.stack([guide(logits_RTK[:, t], float(weights_T[t])) for t in range(TOKENS)], dim=1)
    close(guided, f"out/tf_cfg_logits/{scale}_{power}", "cfg_logits")
    close(torch.from_numpy(weights_T), f"out/cfg_scale/{scale}_{power}", "cfg_scale")


@pytest.mark.usefixtures("each_step")
@pytest.mark.parametrize(("name", "scale", "power"), [*((f"{s}_{p}", s, p) for s, p in GUIDANCE), ("nocfg", 1.0, 1.0)])
def test_greedy_sequences(model: Rar, name: str, scale: float, power: float) -> None:
    config = SamplingConfig(guidance=PowerCosineGuidance(scale=(scale,), power=power), greedy=True)
    labels_B = ARRAYS["in/class_labels"]
    decoder = build_decoder(model, rows=len(labels_B), guided=config.guided)
    codes_BT = sample(decoder, labels_B, torch.arange(len(labels_B)), config=config, seed=0)
    assert torch.equal(codes_BT, ARRAYS[f"out/greedy/{name}"])


def test_modulations_of_the_distinct_classes_are_those_of_each_row(model: Rar) -> None:
    """With more rows than classes they are computed once per class; a row alone computes its own."""
    codes_BT, labels_B, orders_BT = (
        torch.cat([ARRAYS[f"in/train_{name}"]] * 3) for name in ("tokens", "condition_ids", "orders")
    )
    labels_B = labels_B - CODES - 1
    assert len(labels_B) > CLASSES + 1
    logits_BTK = model(codes_BT, labels_B, orders_BT)
    alone = [model(codes_BT[i : i + 1], labels_B[i : i + 1], orders_BT[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(logits_BTK[:4], torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("each_step")
def test_modulations_that_rows_share_are_those_of_each_row(model: Rar) -> None:
    """In a pass of nine rows of three classes, and where every row is a pass of its own."""
    codes_BT = ARRAYS["in/tf_tokens"][:1].repeat(9, 1)
    codes_BT = (codes_BT + torch.arange(9)[:, None]) % CODES
    labels_B = torch.arange(9) % 3

    def logits(rows: slice) -> torch.Tensor:
        decoder = build_decoder(model, rows=len(labels_B[rows]), guided=True)
        return teacher_forced(decoder, codes_BT[rows], labels_B[rows])

    shared = logits(slice(None)).unflatten(0, (2, 9))
    own = torch.stack([logits(slice(row, row + 1)) for row in range(9)], dim=1)
    torch.testing.assert_close(shared, own, atol=SPEC["tolerances"]["logits"], rtol=0)
    top_B = own.topk(2, dim=-1).values
    is_clear = top_B[..., 0] - top_B[..., 1] > 2 * SPEC["tolerances"]["logits"]
    assert torch.equal(shared.argmax(-1)[is_clear], own.argmax(-1)[is_clear])
    assert is_clear.float().mean() > 0.9


def test_weight_decay_is_split_as_published(model: Rar) -> None:
    split = {kind: set(SPEC["weight_decay"][kind]) for kind in ("decayed", "not_decayed")}
    decayed = {name for name, parameter in model.named_parameters() if model.decayed(name, parameter)}
    assert decayed == split["decayed"]
    assert {name for name, _ in model.named_parameters()} - decayed == split["not_decayed"]


@pytest.mark.parametrize(
    ("size", "parameters", "decayed"),
    [
        ("s", 133_344_256, None),
        ("b", 260_923_648, 255_591_168),
        ("l", 461_668_352, None),
        ("xl", 955_425_024, None),
        ("xxl", 1_498_520_704, None),
    ],
)
def test_published_sizes(size: str, parameters: int, decayed: int | None) -> None:
    with torch.device("meta"):
        rar = Rar(RarConfig.model_validate({"size": size}), CodeShape(codes=1024, grid=(16, 16), classes=1000))
    assert sum(p.numel() for p in rar.parameters()) == parameters
    if decayed is not None:
        assert sum(p.numel() for name, p in rar.named_parameters() if rar.decayed(name, p)) == decayed
    assert RarConfig.model_validate({"size": size}) == RarConfig(**SIZES[size])


def test_a_fresh_network_is_drawn_as_published() -> None:
    torch.manual_seed(0)
    rar = Rar(RarConfig(width=64, layers=1, heads=2, mlp_width=64), SHAPE)
    for name, parameter in rar.state_dict().items():
        if name == "cls_token" or name.endswith("bias") or "adaLN_modulation" in name:
            assert not parameter.any(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            assert float(parameter.mean()) == pytest.approx(0.0, abs=0.002), name
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize("kind", ["raster", "spiral-in"])
def test_without_randomness_the_order_is_the_configured_scan(model: Rar, kind: Scan) -> None:
    """In the loss, and in a decoder: both as if the orders had been given."""
    config = model.config.model_copy(update={"orders": FixedOrder(kind=kind)})
    scanned = Rar(config, SHAPE).eval()
    scanned.load_state_dict(model.state_dict())
    codes_BT, labels_B, _, _ = training_batch()
    orders_BT = torch.from_numpy(scan_order(kind, (4, 4))).expand_as(codes_BT)
    assert torch.equal(scanned.loss(codes_BT, labels_B)[0], model.loss(codes_BT, labels_B, orders=orders_BT)[0])
    given, own = (
        sample(
            build_decoder(one, rows=2, guided=False, orders=orders),
            torch.tensor([0, 1]),
            torch.arange(2),
            config=SamplingConfig(),
            seed=0,
        )
        for one, orders in ((model, orders_BT[0]), (scanned, None))
    )
    assert torch.equal(given, own)
    assert (build_decoder(scanned, rows=2, guided=False).orders_BT is None) == (kind == "raster")


def test_what_is_not_random_is_not_drawn(model: Rar) -> None:
    def streams(name: str) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=len(name)))

    def names(**changes: object) -> set[str]:
        config = model.config.model_copy(update=changes)
        return set(Rar(config, SHAPE).draws(streams, 3, 5))

    assert names() == {"orders", "dropped"}
    assert names(orders=AnnealedOrders(start=0, end=5)) == names(orders=FixedOrder()) == {"dropped"}
    assert names(label_dropout=0.0, orders=FixedOrder(kind="alternate")) == set()
