"""Configs of the tokenizer losses, and the table of their builders (no torch here)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from models.config import Config


class ReconstructionConfig(Config):
    """Weighted mean absolute and mean squared error of the pixels, in the network's pixel range."""

    kind: Literal["reconstruction"] = "reconstruction"
    l1: float = Field(default=0.0, ge=0, description="Weight of the mean absolute error.")
    l2: float = Field(default=1.0, ge=0, description="Weight of the mean squared error.")

    @model_validator(mode="after")
    def _compares_something(self) -> ReconstructionConfig:
        if self.l1 == self.l2 == 0:
            raise ValueError("l1 and l2 are both 0, so that nothing would be learnt; give one a weight")
        return self


LossConfig = ReconstructionConfig  # a union tagged by `kind` as soon as there is a second one

BUILDERS: dict[str, str] = {"reconstruction": "models.losses.reconstruction:ReconstructionLoss"}
