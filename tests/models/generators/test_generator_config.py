"""Generator configs: sizes by name, refusals, and no torch on the way."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from models.generators.config import BUILDERS, SIZES, RarConfig
from models.generators.rar.network import Rar
from models.registry import build

NUMBERS = {"width": 8, "layers": 1, "heads": 2, "mlp_width": 16}


def test_a_size_is_its_numbers() -> None:
    by_name = RarConfig.model_validate({"kind": "rar", "size": "b", "dropout": 0.0})
    assert by_name == RarConfig(**SIZES["b"], dropout=0.0)
    assert "size" not in by_name.model_dump()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "m"}, "known are s, b, l, xl, xxl"),
        ({"size": "b", "width": 8}, "already says width"),
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
    network = build(RarConfig(**NUMBERS), BUILDERS, codes=5, tokens=4, classes=3)
    assert isinstance(network, Rar)
    assert (network.codes, network.tokens, network.classes) == (5, 4, 3)


def test_configs_are_free_of_torch() -> None:
    code = (
        "import sys, models.generators.config, models.generators.orders, models.sampling.config, models.schedules;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
