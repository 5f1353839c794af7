"""Configs of the generators; no torch here.

A config describes the architecture. Numbers of codes, positions and classes are properties of the token set: a network is built
from its config and a `CodeShape`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator

from models.config import NEUTRAL, Config
from models.generators.orders import Scan
from models.schedules import random_ratio

SIZES: dict[str, dict[str, int]] = {
    # The paper names S (133M) without a configuration: these numbers give 133,344,256 parameters.
    "s": {"width": 768, "layers": 12, "heads": 16, "mlp_width": 3072},
    "b": {"width": 768, "layers": 24, "heads": 16, "mlp_width": 3072},
    "l": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
    "xl": {"width": 1280, "layers": 32, "heads": 16, "mlp_width": 5120},
    "xxl": {"width": 1408, "layers": 40, "heads": 16, "mlp_width": 6144},
}

LLAMA_SIZES: dict[str, dict[str, float]] = {
    "b": {"width": 1024, "layers": 16, "heads": 16, "gate_scale": 1e-3},
    "l": {"width": 1280, "layers": 20, "heads": 20, "gate_scale": 1e-3},
    "xl": {"width": 1536, "layers": 24, "heads": 24, "gate_scale": 1e-4},
    "xxl": {"width": 1920, "layers": 30, "heads": 30, "gate_scale": 1e-5},
}
FACTORIZED_SIZES: dict[str, dict[str, int]] = {
    "b": {"width": 1024, "layers": 24, "head_layers": 2, "heads": 16},
    "l": {"width": 1280, "layers": 36, "head_layers": 3, "heads": 20},
    "xl": {"width": 1536, "layers": 48, "head_layers": 4, "heads": 24},
}
MLP_MULTIPLE = 256  # the hidden width of SwiGLU is rounded up to a multiple of it

GPT_SIZES: dict[str, dict[str, Any]] = {
    "base": {"width": 1024, "layers": 16, "heads": 16, "mlp_width": 4096, "norm": "post"},
    # The number of heads is not published; 16 is that of GPT-3's model of this width and depth, fairseq's "large".
    "large": {"width": 1536, "layers": 24, "heads": 16, "mlp_width": 6144, "norm": "post"},
    # The pixel decoders of both, and the baseline that has pixel codes alone.
    "pixels": {"width": 1024, "layers": 16, "heads": 16, "mlp_width": 4096, "norm": "pre"},
}
SPECIALS = 5  # of fairseq's vocabulary, beside the codes: start of text, padding, end, unknown (the mask), line feed
UNREAD_POSITIONS = 2  # first rows of fairseq's position tables

SPARE_POSITIONS = 1024  # unused rows of RAR's position tables, which published files have
SPARE_STEPS = 100


class CodeShape(Config):
    """The codes of an image, and what they are conditioned on.

    codes: values of a code.  grid: rows and columns of codes of an image.  classes: labels are 0 to classes - 1; 0 if
    there are none.  factors: number of values of each sub-token of a code, if it has some, the lowest first: the code is
    the sum of every sub-token times the product of the factors before it.  condition: the codes of another space that
    are given for each image, if there are some.
    """

    codes: int = Field(ge=1)
    grid: tuple[int, int] = Field(strict=False)
    classes: int = Field(0, ge=0)
    factors: tuple[int, ...] = Field((), strict=False)
    condition: CodeShape | None = None

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


class GeneratorSettings(Config):
    """Base of the configs of all generators: properties of a kind that are needed without importing its network."""

    kind: str
    trained_by: ClassVar[Literal["gradient", "counting"]] = "gradient"
    """gradient: by its `loss`; counting: by `fit`, in one pass over the data."""
    takes_orders: ClassVar[bool] = False
    """Whether codes can be generated in any order."""

    @property
    def conditions_on(self) -> Literal["none", "class", "codes"]:
        """What is given for each image: nothing, its class, or its codes of another space."""
        return "class"

    @property
    def sampled_by(self) -> Literal["steps", "masks"]:
        """steps: autoregressively, one position after the other; masks: iteratively, all positions at once."""
        return "steps"

    @property
    def can_be_guided(self) -> bool:
        """Whether it is also trained without its condition, as classifier-free guidance needs."""
        return False

    def subtokens(self, shape: CodeShape) -> tuple[int, ...]:
        """Number of values of each sub-token of a code."""
        return (shape.codes,)

    def check_layer(self, layer: int) -> None:
        """ValueError, with the reason, if `Generator.hidden_states` cannot give this layer. Here there are none."""
        raise ValueError(f"a generator of kind {self.kind} has no hidden states")

    def check(self, shape: CodeShape) -> None:
        """ValueError, with the reason, if the generator cannot work on such codes."""
        if self.conditions_on == "class" and not shape.classes:
            raise ValueError("it learns from labels, and these codes have none")
        if self.conditions_on == "codes" and shape.condition is None:
            raise ValueError("its condition is codes of another space, and none are given")
        if self.conditions_on != "codes" and shape.condition is not None:
            raise ValueError("it takes no codes of another space as its condition, but some are given")


class AnnealedOrders(Config):
    """Random orders before step `start`, a share of them that falls linearly to 0 at step `end`, then the order `scan`.

    start = end = 0: the order `scan` from the first step on.
    """

    kind: Literal["annealed"] = "annealed"
    start: int = Field(0, ge=0, description="step from which on the share of random orders falls")
    end: int = Field(320, ge=0, description="step from which on no order is random")
    scan: Scan = Field("raster", description="the order that remains, and in which images are sampled")

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"end {self.end} must not come before start {self.start}")
        return self

    def random_share(self, step: int) -> float:
        """Probability of a random order in a training step."""
        return random_ratio(step, start=self.start, end=self.end)


class FixedOrder(Config):
    """All images in one order throughout."""

    kind: Scan = "raster"

    @property
    def scan(self) -> Scan:
        return self.kind

    def random_share(self, step: int) -> float:
        return 0.0


OrdersConfig = Annotated[AnnealedOrders | FixedOrder, Field(discriminator="kind")]


def _offer_size(schema: dict[str, Any], kind: type[TransformerSettings]) -> None:
    """In the JSON schema, as in a recipe, `size` may replace the numbers of a published size."""
    schema["properties"]["size"] = {"enum": list(kind.sizes), "description": "a published size, instead of its numbers"}


class TransformerSettings(GeneratorSettings):
    """A transformer. `size: b` sets the numbers of a published size."""

    model_config = ConfigDict(json_schema_extra=_offer_size)
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    width: int = Field(gt=0, description="width of the residual stream")
    layers: int = Field(gt=0, description="transformer blocks")
    heads: int = Field(gt=0, description="attention heads; they share the width equally")

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "size" not in fields:
            return fields
        fields = dict(fields)
        size = fields.pop("size")
        if size not in cls.sizes:
            raise ValueError(f"size is {size!r}, known are {', '.join(cls.sizes)}")
        doubled = sorted(set(cls.sizes[size]) & set(fields))
        if doubled:
            raise ValueError(f"size {size} already sets {', '.join(doubled)}; give either the size or the numbers")
        return {**cls.sizes[size], **fields}

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def check_layer(self, layer: int) -> None:
        if self.conditions_on == "codes":
            raise ValueError("its hidden states depend on codes of another space, and none are given")
        if self.conditions_on == "class" and not self.can_be_guided:
            raise ValueError(
                "its hidden states hold the class that it is given: take a generator without a condition, or one that also "
                "learnt without labels"
            )
        if not 0 <= layer <= self.layers:
            raise ValueError(f"it has the layers 0 (what the first block takes) to {self.layers}, not {layer}")


class LabelSettings(TransformerSettings):
    """A transformer conditioned on the class, with label dropout."""

    label_dropout: float = Field(0.1, ge=0, le=1, description="share of labels dropped in training, for guidance")

    @property
    def can_be_guided(self) -> bool:
        return self.label_dropout > 0


class RarConfig(LabelSettings):
    """RAR: a causal transformer over permuted codes, modulated by class and step (arXiv 2411.00776)."""

    sizes: ClassVar = SIZES
    takes_orders: ClassVar = True

    kind: Literal["rar"] = "rar"
    mlp_width: int = Field(gt=0, description="hidden width of the MLPs")
    dropout: float = Field(0.1, ge=0, lt=1, description="after attention, after GELU and after the MLP, in training")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="on attention probabilities, in training")
    orders: OrdersConfig = Field(AnnealedOrders(), description="the orders in which codes are learnt and sampled")
    modulated: bool = Field(
        True,
        json_schema_extra=NEUTRAL,
        description="adaLN: class and step modulate every block; false: a plain transformer",
    )


class LlamaSettings(LabelSettings):
    """What both kinds of Llama-style generators share."""

    dropout: float = Field(0.1, ge=0, lt=1, description="after attention and after the MLP, in training")
    token_dropout: float = Field(0.1, ge=0, lt=1, description="on the embeddings of class and codes, in training")

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.head_width % 4:
            raise ValueError(
                f"heads of width {self.head_width} must be a multiple of 4, for rotary positions in rows and columns"
            )
        return self

    @property
    def mlp_width(self) -> int:
        """Hidden width of SwiGLU: two thirds of four times the width, rounded up."""
        return -(-(8 * self.width // 3) // MLP_MULTIPLE) * MLP_MULTIPLE


class LlamaConfig(LlamaSettings):
    """IBQ's generator: a Llama-style transformer over codes, modulated by the class (arXiv 2412.02692)."""

    sizes: ClassVar = LLAMA_SIZES

    kind: Literal["llama"] = "llama"
    gate_scale: float = Field(1e-3, gt=0, le=1, description="factor of the weights of gates when they are drawn")


class FactorizedConfig(LlamaSettings):
    """Open-MAGVIT2's generator: a Llama-style transformer that draws each code as sub-tokens (arXiv 2409.04410)."""

    sizes: ClassVar = FACTORIZED_SIZES

    kind: Literal["factorized"] = "factorized"
    head_layers: int = Field(gt=0, description="blocks of the transformer over the sub-tokens of a code")
    factors: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (),
        strict=False,
        description="number of values of each sub-token, the lowest first, such as [64, 4096] for 6 + 12 bits; "
        "default: the factors of the codes",
    )

    def subtokens(self, shape: CodeShape) -> tuple[int, ...]:
        return self.factors or shape.factors

    def check(self, shape: CodeShape) -> None:
        super().check(shape)
        factors = self.subtokens(shape)
        written = " x ".join(map(str, factors))
        if not factors:
            raise ValueError(
                f"it draws codes as sub-tokens, but these {shape.codes} codes have no factors; set factors to numbers "
                f"whose product is {shape.codes}"
            )
        if len(factors) < 2:
            raise ValueError(f"it draws codes as two or more sub-tokens, and factors name one, of {written} values")
        if math.prod(factors) != shape.codes:
            raise ValueError(
                f"factors {written} multiply to {math.prod(factors)}, but there are {shape.codes} codes; a factor is the "
                f"number of values of a sub-token (64 for 6 bits)"
            )


class GptConfig(TransformerSettings):
    """GPT: DiGIT's generators of semantic codes, pixel decoders, and baseline (arXiv 2410.12490)."""

    sizes: ClassVar = GPT_SIZES

    kind: Literal["gpt"] = "gpt"
    mlp_width: int = Field(gt=0, description="hidden width of the MLPs")
    norm: Literal["post", "pre"] = Field(description="norms after the sums of attention and MLP, or before these")
    condition: Literal["none", "class", "codes"] = Field(description="what is given for each image")
    sampling: Literal["steps", "masks"] = Field(
        "steps", description="codes one after the other, or all at once and the least likely ones again"
    )
    positions: int = Field(
        1024, gt=0, description="most positions of the codes, their start included, and of the condition"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="on embeddings, after attention and after the MLP, in training")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of a target that all of the vocabulary gets")

    @property
    def conditions_on(self) -> Literal["none", "class", "codes"]:
        return self.condition

    @property
    def sampled_by(self) -> Literal["steps", "masks"]:
        return self.sampling

    def vocabulary(self, shape: CodeShape) -> int:
        """Rows of the embedding table: codes and specials, then classes, or specials and codes of the condition."""
        conditions = {
            "none": 0,
            "class": shape.classes,
            "codes": SPECIALS + shape.condition.codes if shape.condition else 0,
        }
        return shape.codes + SPECIALS + conditions[self.condition]

    def check(self, shape: CodeShape) -> None:
        super().check(shape)
        needed = max(shape.tokens + 1, shape.condition.tokens if shape.condition else 0)
        if needed > self.positions:
            raise ValueError(f"it has {self.positions} positions, and these codes take {needed}: raise positions")


class CountingSettings(GeneratorSettings):
    """A table of code frequencies per class and position, counted in one pass over the data."""

    trained_by: ClassVar = "counting"
    takes_orders: ClassVar = True

    @property
    def can_be_guided(self) -> bool:
        return True


class HistogramConfig(CountingSettings):
    """A baseline: each code is drawn from its class's histogram of codes at that position, as if codes were independent."""

    kind: Literal["histogram"] = "histogram"


class UniformConfig(CountingSettings):
    """A lower bound: every code is equally likely at every position."""

    kind: Literal["uniform"] = "uniform"


GeneratorConfig = Annotated[
    RarConfig | GptConfig | LlamaConfig | FactorizedConfig | HistogramConfig | UniformConfig,
    Field(discriminator="kind"),
]


class Entry(NamedTuple):
    """The parts of a kind of generator, as "module:Class".  memory: a module without torch, see `models.generators.memory`."""

    network: str
    decoder: str
    memory: str | None = None


GENERATORS: dict[str, Entry] = {
    "rar": Entry(
        "models.generators.rar.network:Rar", "models.generators.rar.decoder:RarDecoder", "models.generators.rar.memory"
    ),
    **{
        kind: Entry(
            "models.generators.llama.network:Llama",
            "models.generators.llama.decoder:LlamaDecoder",
            "models.generators.llama.memory",
        )
        for kind in ("llama", "factorized")
    },
    "gpt": Entry(
        "models.generators.gpt.network:Gpt",
        "models.generators.gpt.decoder:decoder_of",
        "models.generators.gpt.memory",
    ),
    "histogram": Entry(
        "models.generators.tables.network:Histogram",
        "models.generators.tables.decoder:TableDecoder",
        "models.generators.tables.memory",
    ),
    "uniform": Entry(
        "models.generators.tables.network:Uniform",
        "models.generators.tables.decoder:TableDecoder",
        "models.generators.tables.memory",
    ),
}

LOOPS: dict[str, str] = {"steps": "models.sampling.loop:sample", "masks": "models.sampling.masks:sample_masks"}
"""The sampling loop of each `sampled_by`."""
