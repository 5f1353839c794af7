"""Generator configs: sizes by name, refusals, and no torch on the way."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from models.generators.config import GENERATORS, SIZES, CodeShape, RarConfig
from models.generators.generator import Generator, build_generator
from models.generators.rar.network import Rar
from models.generators.step_decoder import StepDecoder
from models.registry import load

NUMBERS = {"width": 8, "layers": 1, "heads": 2, "mlp_width": 16}


def test_a_size_is_its_numbers() -> None:
    by_name = RarConfig.model_validate({"kind": "rar", "size": "b", "dropout": 0.0})
    assert by_name == RarConfig(**SIZES["b"], dropout=0.0)
    assert "size" not in by_name.model_dump()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "m"}, "known are s, b, l, xl, xxl"),
        ({"size": "b", "width": 8}, "already sets width"),
        ({**NUMBERS, "heads": 3}, "not divisible by 3 heads"),
        ({**NUMBERS, "depth": 3}, "depth"),
        ({**NUMBERS, "dropout": 1.0}, "dropout"),
        ({**NUMBERS, "init": {"codes": 0.3}}, "init"),
    ],
)
def test_refusals(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RarConfig.model_validate(fields)


def test_the_registry_builds_it() -> None:
    shape = CodeShape(codes=5, grid=(2, 2), classes=3)
    network = build_generator(RarConfig(**NUMBERS), shape)
    assert isinstance(network, Rar)
    assert network.shape == shape


def test_configs_are_free_of_torch() -> None:
    code = (
        "import sys, models.generators.memory, models.generators.rar.memory, models.generators.gpt.memory, models.sampling.config, models.schedules;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("orders", "scan", "shares"),
    [
        ({"kind": "annealed", "start": 2, "end": 6}, "raster", {0: 1.0, 2: 1.0, 3: 0.75, 6: 0.0}),
        ({"kind": "annealed", "start": 0, "end": 0, "scan": "spiral-in"}, "spiral-in", {0: 0.0}),
        ({"kind": "z-curve"}, "z-curve", {0: 0.0, 9: 0.0}),
    ],
)
def test_orders(orders: dict, scan: str, shares: dict[int, float]) -> None:
    found = RarConfig.model_validate({**NUMBERS, "orders": orders}).orders
    assert found.scan == scan
    assert {step: found.random_share(step) for step in shares} == shares


@pytest.mark.parametrize("orders", [{"kind": "annealed", "start": 3, "end": 2}, {"kind": "diagonal"}, {"end": 2}])
def test_orders_that_mean_nothing_are_refused(orders: dict) -> None:
    with pytest.raises(ValidationError):
        RarConfig.model_validate({**NUMBERS, "orders": orders})


def test_codes_that_a_generator_cannot_work_on_are_refused() -> None:
    shape = CodeShape(codes=5, grid=(2, 2))
    with pytest.raises(ValueError, match="these codes have none"):
        build_generator(RarConfig(**NUMBERS), shape)
    with pytest.raises(ValueError, match="takes no codes of another space"):
        RarConfig(**NUMBERS).check(CodeShape(codes=5, grid=(2, 2), classes=3, condition=shape))


@pytest.mark.parametrize("kind", GENERATORS)
def test_each_line_of_the_table_names_what_is_there(kind: str) -> None:
    entry = GENERATORS[kind]
    assert issubclass(load(entry.network), Generator)
    decoder = load(entry.decoder)
    assert issubclass(decoder, StepDecoder) if isinstance(decoder, type) else callable(decoder)
    assert entry.memory is None or callable(load(f"{entry.memory}:sampling_bytes"))
