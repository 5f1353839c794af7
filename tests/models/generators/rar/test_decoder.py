"""RAR keeps to what every generator keeps to, and its own shortcuts change nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.generators.config import CodeShape, FixedOrder, RarConfig
from models.generators.generator import build_decoder
from models.generators.rar import core_step
from models.generators.rar import decoder as rar_decoder
from models.generators.rar import memory as rar_memory
from models.generators.rar.core_step import RarCoreStep
from models.generators.rar.decoder import FEW_STREAMS
from models.generators.rar.network import Rar
from models.generators.rar.step import RarStep
from models.sampling.config import ConstantGuidance, SamplingConfig
from models.sampling.loop import sample
from models.sampling.philox import random_orders
from tests.models.generators.conformance import StepConformance, teacher_forced
from tests.models.generators.loud import make_loud

CONFIG = RarConfig(width=16, layers=2, heads=2, mlp_width=24, dropout=0.0, attention_dropout=0.0)
PLAIN_CONFIG = RarConfig(**{**CONFIG.model_dump(), "modulated": False, "orders": FixedOrder(kind="spiral-out")})


def build_loud(config: RarConfig = CONFIG) -> Rar:
    return make_loud(
        Rar(config, CodeShape(codes=12, grid=(2, 3), classes=3)), linear=0.2, embeddings=0.5, modulations=0.1
    )


def build_uneven(config: RarConfig) -> Rar:
    """With affines and biases that are not the identity."""
    rar = build_loud(config)
    with torch.no_grad():
        for parameter in rar.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return rar


@pytest.mark.usefixtures("each_step")
class TestPlainTransformer(StepConformance):
    """Without adaLN, and along a spiral: one of the published ablations."""

    recorded = 7  # positions

    def build(self) -> Rar:
        return build_uneven(PLAIN_CONFIG)

    def uncached(self, model: Rar, codes_BT: Tensor, labels_B: Tensor) -> Tensor:
        orders_BT = model.scan_T.expand_as(codes_BT)
        return model(codes_BT[:, :-1], labels_B, orders_BT)

    def test_nothing_of_the_modulations_is_left(self, model: Rar) -> None:
        names = {name for name, _ in model.named_parameters()}
        assert not any("adaLN" in name or "timesteps" in name for name in names)
        assert rar_memory.parameters(model.config, model.shape) == sum(one.numel() for one in model.parameters())
        assert rar_memory.parameters(CONFIG, model.shape) == sum(one.numel() for one in build_loud().parameters())


@pytest.mark.usefixtures("each_step")
class TestRar(StepConformance):
    recorded = 7  # positions

    def build(self) -> Rar:
        return build_uneven(CONFIG)

    def uncached(self, model: Rar, codes_BT: Tensor, labels_B: Tensor) -> Tensor:
        return model(codes_BT[:, :-1], labels_B)

    def test_modulations_are_computed_once_per_class_and_step(
        self, model: Rar, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows, product = [], torch.addmm

        def counting(bias: Tensor, x: Tensor, weight: Tensor, **out: Tensor) -> Tensor:
            rows.extend([len(x)] if out else [])  # only modulations are written in place
            return product(bias, x, weight, **out)

        monkeypatch.setattr(torch, "addmm", counting)
        monkeypatch.setattr(rar_decoder, "STRETCH", 4)  # seven positions in stretches of four and three
        self.draw(model, [1, 1, 1, 2], [0, 1, 2, 3], SamplingConfig(guidance=ConstantGuidance(scale=(2.0,))))
        assert rows == [4, 4, 4, 3, 3, 3]  # two classes and "no class"

    @pytest.mark.parametrize("stretch", [1, 3, 7, 64])
    def test_the_length_of_a_stretch_changes_nothing(
        self, model: Rar, monkeypatch: pytest.MonkeyPatch, stretch: int
    ) -> None:
        codes_BT, labels_B = self.batch(model, 3)
        monkeypatch.setattr(rar_decoder, "STRETCH", stretch)
        decoder = build_decoder(model, rows=3, guided=False)
        logits = teacher_forced(decoder, codes_BT, labels_B)
        expected = self.uncached(model, codes_BT, labels_B)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)

    def test_large_tables_make_short_stretches(self, model: Rar, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rar_decoder, "SHORTEST_STRETCH", 2)
        decoder = build_decoder(model, rows=3, guided=True)
        assert decoder._stretch_length() == 7
        monkeypatch.setattr(rar_memory, "CPU_TABLE_BYTES", 4 * decoder.modulations[1].nbytes * 3)
        assert decoder._stretch_length() == 3
        monkeypatch.setattr(rar_memory, "CPU_TABLE_BYTES", 1)
        assert decoder._stretch_length() == 2

    def test_one_order_for_all_is_that_order_for_each(self, model: Rar) -> None:
        order_T = torch.tensor([3, 0, 5, 1, 4, 2])
        labels_B = torch.tensor([0, 2])
        shared, own = (build_decoder(model, rows=2, guided=True, orders=o) for o in (order_T, order_T.expand(2, -1)))
        assert torch.equal(shared.orders_BT, own.orders_BT)
        torch.testing.assert_close(shared.prefill(labels_B), own.prefill(labels_B))
        torch.testing.assert_close(shared.step(labels_B), own.step(labels_B))

    def test_orders_may_change_between_passes(self, model: Rar) -> None:
        labels_B, ids_B = torch.tensor([0, 2]), torch.tensor([5, 9])
        orders_BT = random_orders(3, ids_B, model.shape.tokens)
        assert orders_BT.sort(dim=1).values.tolist() == [list(range(6))] * 2
        assert orders_BT[0].tolist() != orders_BT[1].tolist()
        assert torch.equal(orders_BT[1:], random_orders(3, ids_B[1:], model.shape.tokens))
        changed = build_decoder(model, rows=2, guided=False)
        sample(changed, labels_B, ids_B, config=SamplingConfig(), seed=3)
        changed.set_orders(orders_BT)
        own = build_decoder(model, rows=2, guided=False, orders=orders_BT)
        found, expected = (sample(one, labels_B, ids_B, config=SamplingConfig(), seed=3) for one in (changed, own))
        assert torch.equal(found, expected)
        codes_BT = torch.gather(found, 1, orders_BT)
        logits_BTK = model(codes_BT[:, :-1], labels_B, orders_BT)
        torch.testing.assert_close(teacher_forced(changed, codes_BT, labels_B), logits_BTK, atol=1e-5, rtol=1e-4)

    def test_nonsense_is_not_hidden(self, model: Rar) -> None:
        with torch.no_grad():
            model.blocks[0].attn.qkv.weight[20, 3] = torch.nan  # a key's
        with pytest.raises(FloatingPointError):
            self.draw(model, [0, 1], [0, 1], SamplingConfig())


def test_the_step_is_chosen_by_shape_and_precision() -> None:
    rar = Rar(CONFIG, CodeShape(codes=12, grid=(2, 3), classes=3))

    def step(rows: int, dtype: torch.dtype | None = None) -> object:
        return build_decoder(rar, rows=rows, guided=True, dtype=dtype).run

    assert isinstance(step(FEW_STREAMS // 2), RarCoreStep)
    assert isinstance(step(FEW_STREAMS // 2 + 1), RarStep)
    assert isinstance(step(1, torch.bfloat16), RarStep)


@pytest.mark.parametrize("streams", range(1, 10))
def test_both_steps_agree_for_any_number_of_rows(streams: int) -> None:
    torch.manual_seed(0)
    rar = build_loud().eval()
    with torch.inference_mode():
        steps = [RarCoreStep(rar, streams=streams), RarStep(rar, streams=streams, dtype=torch.float32)]
        for position in range(7):
            x_RD, modulations_RMD = torch.randn(streams, 16), torch.randn(streams, 14, 16)
            compiled_RK, plain_RK = (step(x_RD, modulations_RMD, position) for step in steps)
            torch.testing.assert_close(compiled_RK, plain_RK, atol=1e-4, rtol=1e-5)


def test_a_fresh_published_network_is_its_input_and_its_head() -> None:
    """The zero gates close every block, and nothing is modulated before the head."""
    rar = Rar(RarConfig(width=8, layers=2, heads=2, mlp_width=16), CodeShape(codes=5, grid=(2, 2), classes=3)).eval()
    codes_BT, labels_B, orders_BT = (
        torch.zeros(2, 4, dtype=torch.int64),
        torch.tensor([0, 1]),
        torch.arange(4).expand(2, -1),
    )
    x_BJD = rar.embed(codes_BT, labels_B, orders_BT)[:, 1:]
    expected = rar.lm_head(torch.nn.functional.layer_norm(x_BJD, (8,), eps=1e-6))
    torch.testing.assert_close(rar(codes_BT, labels_B, orders_BT), expected)


def test_bfloat16_is_nearer_to_float32_than_autocast() -> None:
    """Residual stream and modulations are float32; guidance multiplies what is left of the error."""
    torch.manual_seed(0)
    config = RarConfig(width=128, layers=6, heads=4, mlp_width=256, dropout=0.0, attention_dropout=0.0)
    quiet = Rar(config, CodeShape(codes=64, grid=(4, 4), classes=3))
    rar = make_loud(quiet, linear=0.06, embeddings=0.5, modulations=0.05).eval()
    codes_BT, labels_B = torch.randint(64, (8, 16)), torch.randint(3, (8,))
    orders_BT = torch.arange(16).expand(8, -1)

    def guided(conditional: Tensor, unconditional: Tensor) -> Tensor:
        return unconditional + 4 * (conditional - unconditional)

    def decoded(dtype: torch.dtype) -> Tensor:
        decoder = build_decoder(rar, rows=8, guided=True, dtype=dtype)
        logits = teacher_forced(decoder, codes_BT, labels_B)
        return guided(*logits.chunk(2))

    exact = decoded(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        both = [rar(codes_BT[:, :-1], some_B, orders_BT).float() for some_B in (labels_B, torch.full_like(labels_B, 3))]
    rounded, autocast = (
        float((one - exact).square().mean().sqrt()) for one in (decoded(torch.bfloat16), guided(*both))
    )
    assert 0 < rounded < 0.9 * autocast


def test_dropped_labels_are_the_class_of_none() -> None:
    torch.manual_seed(0)
    rar = build_loud().eval()
    codes_BT = torch.arange(6)[None]
    dropped = rar.loss(codes_BT, torch.tensor([1]), dropped=torch.tensor([True]))[0]
    none = rar.loss(codes_BT, torch.tensor([3]))[0]
    kept = rar.loss(codes_BT, torch.tensor([1]), dropped=torch.tensor([False]))[0]
    assert torch.equal(dropped, none)
    assert not torch.equal(dropped, kept)


def test_without_a_folder_for_compiled_code_it_is_compiled_again(tmp_path: Path) -> None:
    """As where neither the installation nor the user's cache can be written: here both would lie below a file."""
    root = Path(core_step.__file__).parents[3]
    copied = tmp_path / "models" / "generators" / "rar"
    copied.mkdir(parents=True)
    for name in ("core_step.py", "step.py", "__init__.py"):
        (copied / name).write_bytes((root / "models" / "generators" / "rar" / name).read_bytes())
    (copied / "__pycache__").write_text("a file stands in the way")
    (tmp_path / "cache").write_text("here, too")
    program = f"""
import sys
sys.dont_write_bytecode = True
sys.path[:0] = [{str(root)!r}]
import models.generators.rar
models.generators.rar.__path__.insert(0, {str(copied)!r})
from models.generators.rar import core_step
import numpy as np
assert core_step.__file__.startswith({str(copied)!r})
print(core_step.affine(np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), np.zeros(3, np.float32)).tolist())
"""
    unset = {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "PYTHONPYCACHEPREFIX"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(tmp_path / "cache"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[2.0, 2.0, 2.0]]"


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "xpu"])
def test_any_device_has_a_size_for_its_tables(device_type: str) -> None:
    assert rar_memory.table_bytes(device_type) > 0
