"""How codes are chosen from logits; no torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from models.config import NEUTRAL, Config
from models.schedules import power_cosine

SCALE = "weight of the condition, or one for each sub-token of a code; 1 is no guidance"
Weights_T = NDArray[np.float32]


class OneOrEach:
    """Marks a tuple that may be given as one value, which holds for every sub-token."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self._listed, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        several = handler(schema)
        return {"anyOf": [several["items"], several]}

    @staticmethod
    def _listed(value: Any) -> Any:
        return tuple(value) if isinstance(value, list | tuple) else (value,)


Positive = Annotated[float, Field(gt=0)]
Positives = Annotated[tuple[Positive, ...], Field(min_length=1), OneOrEach()]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), OneOrEach()]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1), OneOrEach()]


class ConstantGuidance(Config):
    """One weight at every step."""

    kind: Literal["constant"] = "constant"
    scale: Positives = Field(default=(1.0,), description=SCALE)

    def weights(self, scale: float, tokens: int) -> Weights_T:
        """The weight at each of `tokens` steps."""
        return np.full(tokens, scale, np.float32)


class LinearGuidance(Config):
    """A weight that rises linearly from 1 at step 0 towards the scale, which it would reach one step after the last."""

    kind: Literal["linear"] = "linear"
    scale: Positives = Field(description=SCALE)

    def weights(self, scale: float, tokens: int) -> Weights_T:
        """The weight at each of `tokens` steps."""
        return (1 + (scale - 1) * np.arange(tokens) / tokens).astype(np.float32)


class PowerCosineGuidance(Config):
    """RAR's: a weight that rises as a cosine from 1 at step 0 towards the scale; a larger power makes it rise later."""

    kind: Literal["power-cosine"] = "power-cosine"
    scale: Positives = Field(description=SCALE)
    power: float = Field(ge=0, description="power of the cosine's argument; 0 is constant")

    def weights(self, scale: float, tokens: int) -> Weights_T:
        """The weight at each of `tokens` steps."""
        return power_cosine(scale, self.power, tokens)


Guidance = Annotated[ConstantGuidance | LinearGuidance | PowerCosineGuidance, Field(discriminator="kind")]


class Filters(NamedTuple):
    """Temperature and filters of the logits of one sub-token."""

    temperature: float
    top_k: int | None
    top_p: float | None
    greedy: bool


class SamplingConfig(Config):
    """Guidance first, then temperature, top-k and top-p, then one draw (or the largest logit with `greedy`).

    A code that is drawn in several sub-tokens may have a value for each, in the order in which they are drawn.
    """

    guidance: Guidance = Field(default=ConstantGuidance(), description="how much the condition counts at each step")
    temperature: Positives = Field(default=(1.0,), description="divides the guided logits")
    top_k: Counts | None = Field(None, description="keep the k likeliest codes (and what ties with the last)")
    top_p: Shares | None = Field(None, description="keep the likeliest codes that together reach this")
    greedy: bool = Field(False, description="take the likeliest code instead of drawing")
    iterations: int = Field(
        8, ge=1, le=1024, description="how often codes are drawn that are sampled by masks", json_schema_extra=NEUTRAL
    )
    noise: float = Field(
        4.5, ge=0, description="of the choice of codes that are masked again, at first", json_schema_extra=NEUTRAL
    )

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional stream is needed."""
        return any(scale != 1 for scale in self.guidance.scale)

    def check(self, subtokens: int) -> None:
        """ValueError unless each setting has one value, or as many as a code has sub-tokens."""
        given = {"guidance.scale": self.guidance.scale, "temperature": self.temperature}
        given |= {name: value for name, value in (("top_k", self.top_k), ("top_p", self.top_p)) if value}
        for name, values in given.items():
            if len(values) not in (1, subtokens):
                wanted = f"1 or {subtokens}" if subtokens > 1 else "1"
                raise ValueError(f"{name} has {len(values)} values, but a code is drawn in {subtokens}: give {wanted}")

    def filters(self, subtoken: int) -> Filters:
        """Filters of a sub-token."""
        return Filters(
            _of(self.temperature, subtoken),
            self.top_k and _of(self.top_k, subtoken),
            self.top_p and _of(self.top_p, subtoken),
            self.greedy,
        )

    def weights(self, subtoken: int, tokens: int) -> Weights_T:
        """The weight of the condition at each of `tokens` steps, for a sub-token."""
        return self.guidance.weights(_of(self.guidance.scale, subtoken), tokens)


def _of(values: tuple[Any, ...], subtoken: int) -> Any:
    return values[subtoken if len(values) > 1 else 0]
