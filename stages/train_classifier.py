"""Training of a classifier: the judge of image sets that no published network knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from models.classifiers.config import ClassifierConfig, ConvolutionalClassifierConfig
from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import UsageError
from pipeline.images import ImageSet, Views
from pipeline.images.views import ShiftViews
from pipeline.known import Facts, KnownInputs
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from smalti.counting import counted
from stages.known_images import NOT_YET, check_rgb, check_seen, common_pixels
from stages.training.config import AdamW, CutTraining, OneCycle, TrainingConfig
from stages.training.inputs import check_batch
from stages.weights import config_json, save_weights

HELD_OUT = "held-out"
SHIFTS: dict[str, Any] = {"kind": "shifts", "pixels": 2}
LEAST = 8  # the network halves the image three times


class TrainClassifierConfig(Config):
    """A network, the views under which it sees the images, and a budget."""

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
        """The views, once the images have told their size."""
        return self.views or ShiftViews(size=self.model.pixels, **SHIFTS)


def settle(config: TrainClassifierConfig, inputs: KnownInputs) -> TrainClassifierConfig:
    """As many classes as the images have, and their size, where the config does not say others."""
    images = inputs["images"]
    classes = config.model.classes or images.get("classes")
    pixels = config.views.size if config.views else config.model.image_size or common_pixels(images)
    if pixels is None:
        raise inputs.refusal(
            f"has no views, and the images of {images.name} are not squares of one size: set views.size"
        )
    if pixels == NOT_YET:
        return config.model_copy(update={"model": config.model.model_copy(update={"classes": classes})})
    if pixels % LEAST:
        raise inputs.refusal(
            f"judges images of {pixels} pixels ({images.name}), but needs a multiple of {LEAST}",
            hint="set views.size to one",
        )
    model = config.model.model_copy(update={"classes": classes, "image_size": pixels})
    settled = config.model_copy(update={"model": model})
    return settled.model_copy(update={"views": settled.seen})


def foresee(config: TrainClassifierConfig, inputs: KnownInputs) -> Facts:
    """A judge of the images' classes."""
    images, classes = inputs["images"], config.model.classes
    if images.get("classes") == 1:
        raise inputs.refusal(f"learns to tell classes apart, but the images of {images.name} have no labels: one class")
    if images.get("classes", classes) != classes:
        raise inputs.refusal(
            f"has model.classes {classes}, but {images.name} has {images.get('classes')} classes; leave model.classes out"
        )
    inputs.agree([images, *inputs.all(HELD_OUT)], "classes", "class_names")
    if config.views:
        check_seen(config.views, inputs, "images", HELD_OUT)
    check_rgb(config.model, "model", inputs)
    check_batch(config.training, inputs, images)
    known = {"classes": classes, "pixels": config.model.image_size, "features": config.model.features}
    return {name: fact for name, fact in known.items() if fact is not None}


@stage(
    "train-classifier",
    version=2,
    config=TrainClassifierConfig,
    reads={
        "images": read("image-set", help="labelled images to train on"),
        HELD_OUT: read("image-set", help="labelled images to judge the accuracy on", optional=True),
    },
    writes="classifier",
    trains=True,
    foresees=foresee,
    settles=settle,
    example="smalti train-classifier --images digits/rar/train-images --held-out digits/rar/validation-images --training.seed 1",
)
def train_classifier(config: TrainClassifierConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Train a classifier of labelled images, whose features then serve to score generated ones.

    Writes config.json and weights.safetensors. An interrupted training continues from its last checkpoint.
    """
    from stages.training.classifier import ClassifierTask
    from stages.training.engine import train
    from stages.training.images import open_images

    for artifact in inputs.flat():
        check_classes(config, artifact)
    images, judged = open_images(inputs, run, views=config.seen, seed=config.training.seed)
    outcome = train(
        lambda device: ClassifierTask(config, images, judged, device),
        config.training,
        out,
        run,
        label="train-classifier",
    )
    if outcome.is_first:
        save_weights(out, outcome.task.network.state_dict(), config_json(config.model))
        describe(
            out,
            config,
            outcome.figures["accuracy"],
            images=len(images),
            where=HELD_OUT if HELD_OUT in inputs else "training images",
        )


def check_classes(config: TrainClassifierConfig, artifact: Artifact) -> None:
    """UsageError if the image set has other classes than the network."""
    found = len(ImageSet.open(artifact.path).classes)
    if found != config.model.classes:
        raise UsageError(
            f"model.classes is {config.model.classes}, but {artifact.name} has {counted(found, 'class')}",
            path=artifact.path,
            hint="leave model.classes out, and give images and held-out images of the same classes",
        )
    if found == 1:
        raise UsageError(f"a judge tells classes apart, but the images of {artifact.name} have one", path=artifact.path)


def describe(out: Draft, config: TrainClassifierConfig, accuracy: float, *, images: int, where: str) -> None:
    out.facts = {
        "accuracy": round(accuracy, 6),
        "accuracy_on": where,
        "classes": config.model.classes,
        "features": config.model.features,
        "image_size": config.model.image_size,
        "images": images,
    }
    out.figure = f"{100 * accuracy:.1f} % on {where}"
