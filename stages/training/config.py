"""Configs of all trainings: budget, batch, optimizer, schedule (no torch here, so that planning needs none)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from models.autoencoders.config import ConvolutionalConfig
from models.classifiers.config import ClassifierConfig, ConvolutionalClassifierConfig
from models.generators.config import GeneratorConfig, RarConfig
from models.losses.config import (
    AdversarialConfig,
    DiscriminationConfig,
    DiscriminatorConfig,
    LossConfig,
    ReconstructionConfig,
)
from models.quantizers.config import VectorConfig
from models.sampling.config import SamplingConfig
from models.schedules import cosine_between, inverse_sqrt, warmup_cosine, warmup_plateau_linear
from models.tokenizer_config import TokenizerConfig
from pipeline.config import Config
from pipeline.images import Views
from pipeline.images.views import ShiftViews
from pipeline.keys import NEUTRAL
from stages.devices import Precision

AUTO = "auto"
GRIDS = 10  # of reconstructions, over a whole training

Rate = Annotated[float, Field(ge=0)]


class Constant(Config):
    """The constant learning rate, multiplied by `factor` at each of the steps in `drops`."""

    kind: Literal["constant"] = "constant"
    warmup: int = Field(default=0, ge=0, description="steps of a linear rise from 0")
    drops: tuple[int, ...] = Field(
        default=(), strict=False, description="steps from which on the rate is multiplied by factor"
    )
    factor: float = Field(default=0.1, gt=0, le=1, description="multiplier at each drop")

    def rate(self, step: int, *, base: float, steps: int) -> float:
        rise = step / self.warmup if step < self.warmup else 1.0
        return base * rise * self.factor ** sum(step >= drop for drop in self.drops)


class OneCycle(Config):
    """Half a cosine up to the learning rate, half a cosine down to almost nothing (arXiv 1708.07120)."""

    kind: Literal["one-cycle"] = "one-cycle"
    rise: float = Field(default=0.3, gt=0, lt=1, description="share of the steps that rise")
    start: float = Field(default=0.04, ge=0, le=1, description="rate at step 0, as a share of the learning rate")
    end: float = Field(default=4e-6, ge=0, le=1, description="rate at the last step, as a share of the learning rate")

    def rate(self, step: int, *, base: float, steps: int) -> float:
        peak, last = max(self.rise * steps - 1, 0.0), steps - 1
        if step < peak:
            return base * cosine_between(self.start, 1.0, step / peak)
        return base * cosine_between(1.0, self.end, (step - peak) / max(last - peak, 1.0))


class WarmupCosine(Config):
    """Linear from exactly 0 at step 0, then half a cosine down to `end` at the last step's successor."""

    kind: Literal["warmup-cosine"] = "warmup-cosine"
    warmup: int = Field(default=0, ge=0, description="steps of the linear rise")
    start: Rate = Field(default=0.0, json_schema_extra=NEUTRAL, description="learning rate at step 0, if it rises")
    end: Rate = Field(default=0.0, description="learning rate at the end")
    floor: Rate = Field(default=0.0, json_schema_extra=NEUTRAL, description="least learning rate after the rise")
    period: int | None = Field(
        default=None,
        ge=1,
        json_schema_extra=NEUTRAL,
        description="step at which the end is reached; null: after the last",
    )

    def rate(self, step: int, *, base: float, steps: int) -> float:
        total = steps if self.period is None else self.period
        return warmup_cosine(
            step, base=base, end=self.end, warmup=self.warmup, total=total, start=self.start, floor=self.floor
        )


class WarmupPlateauLinear(Config):
    """Linear up, the learning rate for 5 % of the other steps, then linear down: generators of IBQ and Open-MAGVIT2."""

    kind: Literal["warmup-plateau-linear"] = "warmup-plateau-linear"
    warmup: int = Field(default=0, ge=0, description="steps of the linear rise")
    start: float = Field(default=0.005, ge=0, le=1, description="rate at step 0, as a share of the learning rate")
    end: float = Field(default=0.1, ge=0, le=1, description="rate at the last step, as a share of the learning rate")

    def rate(self, step: int, *, base: float, steps: int) -> float:
        return warmup_plateau_linear(step, peak=base, start=self.start, end=self.end, warmup=self.warmup, total=steps)


class InverseSqrt(Config):
    """Linear up, then down with the root of the steps, whatever their number: generators of DiGIT."""

    kind: Literal["inverse-sqrt"] = "inverse-sqrt"
    warmup: int = Field(default=6250, ge=1, description="steps of the linear rise")
    start: Rate = Field(default=1e-7, description="learning rate at step 0")

    def rate(self, step: int, *, base: float, steps: int) -> float:
        return inverse_sqrt(step, peak=base, start=self.start, warmup=self.warmup)


Schedule = Annotated[
    Constant | OneCycle | WarmupCosine | WarmupPlateauLinear | InverseSqrt, Field(discriminator="kind")
]


Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Config):
    """What all optimizers are told."""

    kind: str
    learning_rate: Rate = Field(default=1e-3, description="peak learning rate; the schedule multiplies it")
    weight_decay: float = Field(default=0.0, ge=0, description="decay of the parameters that `decays` names")
    weight_decay_end: float | None = Field(
        default=None,
        ge=0,
        json_schema_extra=NEUTRAL,
        description="weight decay at the last step, to which it goes by half a cosine; null: it is constant",
    )
    decays: Literal["matrices", "all"] = Field(
        default="matrices",
        json_schema_extra=NEUTRAL,
        description="matrices: what the network lets decay, usually all but biases and norms; all: every parameter, as in "
        "the published trainings of IBQ's, Open-MAGVIT2's and DiGIT's generators",
    )

    def decay(self, step: int, *, steps: int) -> float:
        """Weight decay at a step."""
        last = self.weight_decay if self.weight_decay_end is None else self.weight_decay_end
        return cosine_between(self.weight_decay, last, step / max(1, steps - 1))


class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay (arXiv 1711.05101); with weight_decay 0 it is Adam."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), strict=False, description="decays of the two moments")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")


class Sgd(OptimizerSettings):
    """Stochastic gradient descent with momentum; weight decay is added to the gradient."""

    kind: Literal["sgd"] = "sgd"
    momentum: Share = Field(default=0.9, description="decay of the running sum of gradients")


def _is_adamw_unless_named(optimizer: Any) -> Any:
    return {"kind": "adamw", **optimizer} if isinstance(optimizer, Mapping) else optimizer


Optimizer = Annotated[AdamW | Sgd, Field(discriminator="kind"), BeforeValidator(_is_adamw_unless_named)]
RowsPerPass = Annotated[int, Field(ge=1)] | Literal["auto"] | None


class TrainingConfig(Config):
    """Budget and optimizer of one training, over all processes together."""

    steps: int = Field(default=1000, ge=1, description="optimizer steps")
    batch: int = Field(default=64, ge=1, description="rows of one step, over all processes together")
    seed: int = Field(
        default=0, ge=0, lt=2**53, description="of the first weights, the data order and everything drawn"
    )
    optimizer: Optimizer = Field(default=AdamW(), description="optimizer of the network")
    schedule: Schedule = Field(default=Constant(), description="learning rate over the steps")
    precision: Precision = Field(
        default="float32",
        description="tf32: float32 with the products that CUDA rounds to 11 bits; bfloat16: autocast, with weights and "
        "optimizer in float32",
    )
    rows_per_pass: RowsPerPass = Field(
        default=None,
        description="rows of the batch that go forward and backward together, at most; null: a process's whole share; "
        "auto, for generators: as many as take 16 GB on a GPU",
    )
    clip: float | None = Field(default=1.0, gt=0, description="largest global norm of the gradient, or null")
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay per step of averaged weights, which become the result; null: no average",
    )
    ema_warmup: bool = Field(
        default=True,
        json_schema_extra=NEUTRAL,
        description="let the decay rise as (1 + step) / (10 + step) to that of ema; false: the published, constant one",
    )
    skip_bad_steps: int = Field(
        default=0, ge=0, description="steps with a NaN or infinite loss or gradient to leave out"
    )
    evaluate_every: int = Field(
        default=0, ge=0, description="steps between evaluations on held-out data; 0: at the end alone"
    )
    select: Literal["last", "best"] = Field(
        default="last", description="which weights are the result: the last, or the best evaluated ones"
    )
    is_deterministic: bool = Field(
        default=True, description="on CUDA: only kernels that give the same bits each time, which are slower"
    )

    @property
    def rows(self) -> int | None:
        """Largest number of rows of a pass; `auto` is replaced by a number before a training runs."""
        assert not isinstance(self.rows_per_pass, str)
        return self.rows_per_pass

    @model_validator(mode="after")
    def _fits_itself(self) -> TrainingConfig:
        if isinstance(self.rows_per_pass, int) and self.batch % self.rows_per_pass:
            raise ValueError(f"batch {self.batch} is not a multiple of rows_per_pass {self.rows_per_pass}")
        if self.select == "best" and not self.evaluate_every:
            raise ValueError("select best needs evaluate_every")
        return self


def says_rows(training: TrainingConfig) -> TrainingConfig:
    """ValueError for `auto` rows of a pass without an estimate of memory."""
    if training.rows_per_pass == AUTO:
        raise ValueError("rows_per_pass auto is for generators alone; give a number, or null for the whole batch")
    return training


CutTraining = Annotated[TrainingConfig, AfterValidator(says_rows)]
"""A training whose rows per pass are said: no estimate is known of what a row takes."""


class AdversaryConfig(AdversarialConfig):
    """A discriminator beside the tokenizer, and how it is trained: by the tokenizer's settings unless it has its own."""

    optimizer: Optimizer | None = Field(default=None, description="optimizer of the discriminator; null: as training's")
    schedule: Schedule | None = Field(default=None, description="its learning rate over the steps; null: as training's")


class ReconstructionTraining(Config):
    """Settings of all trainings on reconstructions: views, and a budget."""

    views: Views = Field(
        default=ShiftViews(size=32, pixels=1, fill=0), description="views to train on; the upright one is judged"
    )
    rows_per_pass: int = Field(
        default=64, ge=1, description="images that go through the network together when it is judged"
    )
    training: CutTraining = Field(default=TrainingConfig(), description="budget and optimizer")


def check_sees(discriminator: DiscriminatorConfig, pixels: int) -> None:
    """ValueError where the views are smaller than a patch of the discriminator."""
    if pixels < discriminator.least_pixels:
        knob = "layers" if discriminator.kind == "patch" else "stages"
        raise ValueError(
            f"the discriminator needs images of at least {discriminator.least_pixels} pixels, but views.size is {pixels}; "
            f"lower adversarial.discriminator.{knob}"
        )


class ReconstructionsConfig(Config):
    """Grids of originals and reconstructions in the log during training. They do not affect the weights."""

    every: int | None = Field(default=None, ge=1, description="steps between two grids; null: a tenth of the steps")
    images: int = Field(default=20, ge=1, le=100, description="images of a grid, the same ones each time")

    def every_of(self, steps: int) -> int:
        """Steps between two grids of a training of so many steps."""
        return self.every or max(1, steps // GRIDS)


class TokenizerLearning(ReconstructionTraining):
    """Settings of trainings of a tokenizer or its decoder."""

    loss: LossConfig = Field(default=ReconstructionConfig(l2=4.0), description="what a reconstruction is compared by")
    adversarial: AdversaryConfig | None = Field(
        default=None,
        json_schema_extra=NEUTRAL,
        description="a discriminator that is trained with the tokenizer, and the adversarial loss; null: none",
    )
    reconstructions: ReconstructionsConfig | None = Field(
        default=ReconstructionsConfig(),
        json_schema_extra=NEUTRAL,
        description="grids of reconstructions in log/ on the way; null: none",
    )

    @model_validator(mode="after")
    def _discriminator_sees_the_views(self) -> TokenizerLearning:
        if self.adversarial is not None:
            check_sees(self.adversarial.discriminator, self.views.size)
        return self


SMALL_TOKENIZER = TokenizerConfig(
    autoencoder=ConvolutionalConfig(widths=(16, 32, 96), pixel_range="0..1"),
    quantizer=VectorConfig(codes=256, weight=0.1, revive_every=20, revive_until=560),
)


class TrainTokenizerConfig(TokenizerLearning):
    """A network, its loss, the views of the images, and a budget. The defaults suit 32-pixel images."""

    model: TokenizerConfig = Field(default=SMALL_TOKENIZER, description="the tokenizer")
    training: CutTraining = Field(
        default=TrainingConfig(
            steps=800,
            batch=32,
            optimizer=AdamW(learning_rate=5e-3, weight_decay=0.01),
            schedule=OneCycle(rise=0.25, end=1e-3),
        ),
        description="budget and optimizer",
    )

    @model_validator(mode="after")
    def _views_divide_into_codes(self) -> TrainTokenizerConfig:
        self.model.grid(self.views.size, self.views.size)
        return self


class FinetuneDecoderConfig(TokenizerLearning):
    """A loss, the views of the images, and a budget. The defaults suit 32-pixel images."""

    training: CutTraining = Field(
        default=TrainingConfig(
            steps=400, batch=32, optimizer=AdamW(learning_rate=5e-4), schedule=WarmupCosine(warmup=20)
        ),
        description="budget and optimizer",
    )


class TrainDiscriminatorConfig(ReconstructionTraining):
    """A discriminator, the views of the images, and a budget. The defaults suit 32-pixel images."""

    adversarial: DiscriminationConfig = Field(
        default=DiscriminationConfig(), description="the discriminator and its loss"
    )
    training: CutTraining = Field(
        default=TrainingConfig(steps=400, batch=32, optimizer=AdamW(learning_rate=1e-4, betas=(0.5, 0.9))),
        description="budget and optimizer",
    )

    @model_validator(mode="after")
    def _discriminator_sees_the_views(self) -> TrainDiscriminatorConfig:
        check_sees(self.adversarial.discriminator, self.views.size)
        return self


SMALL_RAR = RarConfig(width=128, layers=4, heads=4, mlp_width=512, dropout=0.0, attention_dropout=0.0)


class SamplesConfig(Config):
    """Grids of samples in the log during training. They do not affect the weights."""

    every: int = Field(default=5000, ge=1, description="steps between two grids")
    images: int = Field(default=20, ge=1, le=100, description="samples of a grid, the same ones each time")
    classes: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, strict=False, min_length=1, description="their classes, in turn; null: all classes in turn"
    )
    sampling: SamplingConfig = Field(
        default=SamplingConfig.model_validate({}), description="guidance, temperature, top-k, top-p, greedy"
    )


class TrainGeneratorConfig(Config):
    """A network and a budget. The defaults suit 16 codes of a small codebook."""

    model: GeneratorConfig = Field(
        default=SMALL_RAR, description="the network; counts of codes and classes are the data's"
    )
    rows_per_pass: int = Field(default=64, ge=1, description="rows that go through the network together in evaluations")
    training: TrainingConfig = Field(
        default=TrainingConfig(
            steps=800,
            optimizer=AdamW(learning_rate=4e-3, betas=(0.9, 0.96), weight_decay=0.03),
            schedule=WarmupCosine(warmup=40),
        ),
        description="budget and optimizer; generators that only count ignore it",
    )
    checkpoints_activations: bool = Field(
        default=False,
        json_schema_extra=NEUTRAL,
        description="compute each block again in the backward pass instead of keeping its activations: less memory",
    )
    compiles: bool = Field(
        default=False,
        json_schema_extra=NEUTRAL,
        description="compile the blocks by torch.compile, which needs a C++ compiler on the CPU: faster, later",
    )
    samples: SamplesConfig | None = Field(
        default=None,
        json_schema_extra=NEUTRAL,
        description="grids of samples in log/ on the way, by the input tokenizer; null: none",
    )

    @property
    def is_settled(self) -> bool:
        return self.training.rows_per_pass != AUTO


SHIFTS: dict[str, Any] = {"kind": "shifts", "pixels": 2}


class TrainClassifierConfig(Config):
    """A network, the views of the images, and a budget."""

    model: ClassifierConfig = Field(default=ConvolutionalClassifierConfig(), description="the network")
    views: Views | None = Field(
        default=None,
        description="views to train on; the upright one is judged; null: shifts of up to 2 pixels, at the images' own size",
    )
    smoothing: float = Field(default=0.05, ge=0, lt=1, description="label smoothing of the cross entropy")
    rows_per_pass: int = Field(
        default=64, ge=1, description="images that go through the network together when it is judged"
    )
    training: CutTraining = Field(
        default=TrainingConfig(
            steps=340,
            optimizer=AdamW(learning_rate=3e-3, weight_decay=0.01),
            schedule=OneCycle(rise=0.25, end=1e-3),
        ),
        description="budget and optimizer",
    )

    @field_validator("views", mode="before")
    @classmethod
    def _are_shifts_unless_named(cls, views: Any) -> Any:
        return {**SHIFTS, **views} if isinstance(views, Mapping) and "kind" not in views else views

    @model_validator(mode="after")
    def _views_fit_the_network(self) -> TrainClassifierConfig:
        if self.views is not None and self.model.image_size not in (None, self.views.size):
            raise ValueError(f"views.size is {self.views.size}, but model.image_size is {self.model.image_size}")
        return self

    @property
    def is_settled(self) -> bool:
        return None not in (self.model.classes, self.model.image_size, self.views)

    @property
    def seen(self) -> Views:
        """The views, at the size of the images."""
        return self.views or ShiftViews(size=self.model.pixels, **SHIFTS)


PUBLISHED_PROBE = TrainingConfig(
    steps=100_000, batch=1024, optimizer=Sgd(learning_rate=0.4), schedule=WarmupCosine(), clip=None
)
"""DiGIT's linear probe (arXiv 2410.12490): four GPUs with 256 rows each, half a cosine to 0."""


class ProbeConfig(Config):
    """What the linear model sees, and how it is fitted: to codes by logistic regression, to features by a training."""

    inputs: Literal["one-hot", "centroids"] = Field(
        default="one-hot",
        description="of token sets: each position's code as one of K, or as its centroid (needs a codebook)",
    )
    training: CutTraining = Field(
        default=PUBLISHED_PROBE,
        json_schema_extra=NEUTRAL,
        description="of features: budget and optimizer of the linear layer",
    )
    inverse_penalty: float = Field(default=1.0, gt=0, description="C of the logistic regression: smaller is smoother")
    iterations: int = Field(default=500, ge=1, description="steps of L-BFGS at most")
    passes: int = Field(
        default=10,
        ge=1,
        json_schema_extra=NEUTRAL,
        description="passes over the rows, where the weights are too many for L-BFGS",
    )
    max_rows: int = Field(default=200_000, ge=2, description="training rows; of more, those of the smallest hash")
    seed: int = Field(default=0, ge=0, lt=2**53, description="seed of the choice of rows")
