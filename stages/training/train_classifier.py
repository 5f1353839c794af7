"""Training of a classifier, which scores image sets that no published classifier was trained on."""

from __future__ import annotations

from pipeline.compatibility import Facts, KnownInputs
from pipeline.draft import Draft
from pipeline.keys import config_value
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from stages.images.checks import NOT_YET, check_rgb, check_seen, common_pixels
from stages.training.config import TrainClassifierConfig
from stages.training.inputs import check_batch
from stages.weights.files import save_weights

HELD_OUT = "held-out"
LEAST = 8  # the network halves the image three times


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
    checks_inputs=True,
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

    images, judged = open_images(inputs, run, views=config.seen, seed=config.training.seed)
    outcome = train(
        lambda device: ClassifierTask(config, images, judged, device),
        config.training,
        out,
        run,
        label="train-classifier",
    )
    if outcome.is_first:
        save_weights(out, outcome.task.network.state_dict(), config_value(config.model))
        describe(
            out,
            config,
            outcome.figures["accuracy"],
            images=len(images),
            where=HELD_OUT if HELD_OUT in inputs else "training images",
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
