"""Training of a classifier: the judge of image sets that no published network knows."""

from __future__ import annotations

from pydantic import Field, model_validator

from models.classifiers.config import ClassifierConfig, ConvolutionalClassifierConfig
from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import UsageError
from pipeline.images import ImageSet, Views
from pipeline.images.views import ShiftViews
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from stages.training.config import AdamW, OneCycle, TrainingConfig
from stages.weights import config_json, save_weights

HELD_OUT = "held-out"


class TrainClassifierConfig(Config):
    """A network, the views under which it sees the images, and a budget."""

    model: ClassifierConfig = Field(default=ConvolutionalClassifierConfig(), description="the network")
    views: Views = Field(
        default=ShiftViews(size=32, pixels=2, fill=0), description="views to train on; the upright one is judged"
    )
    smoothing: float = Field(default=0.05, ge=0, lt=1, description="label smoothing of the cross entropy")
    rows_per_pass: int = Field(
        default=64, ge=1, description="images that go through the network together when it is judged"
    )
    training: TrainingConfig = Field(
        default=TrainingConfig(
            steps=340,
            optimizer=AdamW(learning_rate=3e-3, weight_decay=0.01),
            schedule=OneCycle(rise=0.25, end=1e-3),
        ),
        description="budget and optimizer",
    )

    @model_validator(mode="after")
    def _views_fit_the_network(self) -> TrainClassifierConfig:
        if self.views.size != self.model.image_size:
            raise ValueError(f"views.size is {self.views.size}, but model.image_size is {self.model.image_size}")
        return self


@stage(
    "train-classifier",
    version=1,
    config=TrainClassifierConfig,
    reads={
        "images": read("image-set", help="labelled images to train on"),
        HELD_OUT: read("image-set", help="labelled images to judge the accuracy on", optional=True),
    },
    writes="classifier",
    trains=True,
    example="smalti train-classifier --images digits/rar/train-images --held-out digits/rar/held-out-images --training.seed 1",
    digits_defaults=("views.size",),
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
    images, judged = open_images(inputs, run, views=config.views, seed=config.training.seed)
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
            f"model.classes is {config.model.classes}, but {artifact.name} has {found} classes",
            path=artifact.path,
            hint=f"set model.classes to {found}",
        )


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
