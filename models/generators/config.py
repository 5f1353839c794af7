"""Configs of the generators; no torch here.

A config says the architecture. How many codes, tokens and classes there are is a property of the token set that it is
trained on, and is handed to the network beside the config: `build(config, BUILDERS, codes=..., tokens=..., classes=...)`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from models.config import Config

SIZES: dict[str, dict[str, int]] = {
    # The paper names S (133M) without a configuration: these numbers give 133,344,256 parameters.
    "s": {"width": 768, "layers": 12, "heads": 16, "mlp_width": 3072},
    "b": {"width": 768, "layers": 24, "heads": 16, "mlp_width": 3072},
    "l": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
    "xl": {"width": 1280, "layers": 32, "heads": 16, "mlp_width": 5120},
    "xxl": {"width": 1408, "layers": 40, "heads": 16, "mlp_width": 6144},
}

SPARE_POSITIONS = 1024  # rows of RAR's position tables that nothing reads; published files carry them
SPARE_STEPS = 100


def _offer_size(schema: dict[str, Any]) -> None:
    """In the JSON schema, as in a recipe, a size may stand for the four numbers."""
    schema["properties"]["size"] = {"enum": list(SIZES), "description": "a published size, instead of its numbers"}


class RarConfig(Config):
    """RAR: a causal transformer over permuted codes, modulated by class and step (arXiv 2411.00776).

    `size: b` stands for the four numbers of a published size.
    """

    model_config = ConfigDict(json_schema_extra=_offer_size)

    kind: Literal["rar"] = "rar"
    width: int = Field(gt=0, description="width of the residual stream")
    layers: int = Field(gt=0, description="transformer blocks")
    heads: int = Field(gt=0, description="attention heads; they share the width equally")
    mlp_width: int = Field(gt=0, description="hidden width of the MLPs")
    dropout: float = Field(0.1, ge=0, lt=1, description="after attention, after GELU and after the MLP, in training")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="on attention probabilities, in training")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels dropped in training, for guidance")

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "size" not in fields:
            return fields
        fields = dict(fields)
        size = fields.pop("size")
        if size not in SIZES:
            raise ValueError(f"size is {size!r}, known are {', '.join(SIZES)}")
        doubled = sorted(set(SIZES[size]) & set(fields))
        if doubled:
            raise ValueError(f"size {size} already says {', '.join(doubled)}; give either the size or the numbers")
        return {**SIZES[size], **fields}

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class HistogramConfig(Config):
    """A baseline: each code is drawn from its class's histogram of codes at that position, as if codes were independent."""

    trained_by: ClassVar = "counting"
    kind: Literal["histogram"] = "histogram"


class UniformConfig(Config):
    """The worst case: every code is equally likely everywhere."""

    trained_by: ClassVar = "counting"
    kind: Literal["uniform"] = "uniform"


GeneratorConfig = Annotated[RarConfig | HistogramConfig | UniformConfig, Field(discriminator="kind")]

TRAINING_BYTES: dict[str, str] = {"rar": "models.generators.rar.memory:training_bytes"}
"""What a training takes, of those that are trained by gradient: functions without torch."""

BUILDERS: dict[str, str] = {
    "rar": "models.generators.rar.network:Rar",
    "histogram": "models.generators.histogram:Histogram",
    "uniform": "models.generators.uniform:Uniform",
}
