"""What a recipe lets one know before anything is computed: whether codes, lengths and classes of its steps fit together.

Each step's facts follow from its config and from those of its inputs; what only data can tell (the classes of a folder,
the codebook in a published file) is left out here and checked when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.errors import UsageError
from pipeline.recipe import Recipe, Step
from stages.image_sizes import check_step_sizes

DIGITS = 10

Facts = dict[str, Any]
"""tokenizer: the step that made the codes.  codes, tokens, classes: counts.  pixels: a side of the images; downsample: of
a code."""
Known = Mapping[str, Facts]
"""Facts of an input's steps, by their names."""

WORDS = {
    "tokenizer": "codes of {}",
    "codes": "a vocabulary of {}",
    "tokens": "sequences of {} codes",
    "pixels": "images of {} pixels",
    "downsample": "{} pixels a code",
    "classes": "{} classes",
}


def check_recipe(recipe: Recipe) -> Recipe:
    """The recipe; UsageError (exit code 2) where two steps cannot fit together."""
    check_step_sizes(recipe)
    facts: dict[str, Facts] = {}
    for step in recipe.steps:
        inputs = {
            name: {parent: facts[parent] for parent in ([value] if isinstance(value, str) else value)}
            for name, value in step.inputs.items()
        }
        foresee = FORESEEN.get(step.stage.name)
        facts[step.name] = {name: fact for name, fact in (foresee(step, inputs) if foresee else {}).items() if fact}
    return recipe


def agree(step: Step, *inputs: Known) -> Facts:
    """The facts that all of these inputs have in common; UsageError where they contradict each other."""
    common: Facts = {}
    origins: dict[str, str] = {}
    for parent, facts in (pair for known in inputs for pair in known.items()):
        for name, fact in facts.items():
            if common.setdefault(name, fact) != fact:
                raise UsageError(
                    f"step {step.name} cannot use {origins[name]} and {parent} together: {WORDS[name].format(fact)} "
                    f"in {parent}, but {WORDS[name].format(common[name])} in {origins[name]}"
                )
            origins.setdefault(name, parent)
    return common


def _index(step: Step, inputs: Mapping[str, Known]) -> Facts:
    return {"classes": DIGITS if step.config.source.kind == "digits" else None}  # type: ignore[attr-defined]


def _tokenizer(step: Step, inputs: Mapping[str, Known]) -> Facts:
    config: Any = step.config
    model = config.model
    return {
        "tokenizer": step.name,
        "codes": model.codebook_size,
        "downsample": model.downsample,
        "pixels": config.views.size,
    }


def _imported(step: Step, inputs: Mapping[str, Known]) -> Facts:
    """A tokenizer, or a generator whose tokenizer may be an input."""
    config: Any = step.config
    if step.stage.kind(config) == "tokenizer":
        return {"tokenizer": step.name, "pixels": config.resolution}
    return agree(step, inputs.get("tokenizer", {}))


def _finetuned(step: Step, inputs: Mapping[str, Known]) -> Facts:
    """The same codes as before."""
    return agree(step, inputs["tokenizer"])


def _codebook(step: Step, inputs: Mapping[str, Known]) -> Facts:
    config: Any = step.config
    return {"tokenizer": step.name, "codes": config.clusters}


def _tokens(step: Step, inputs: Mapping[str, Known]) -> Facts:
    config: Any = step.config
    (tokenizer,) = inputs["tokenizer"].values()
    (images,) = inputs["images"].values()
    pixels = config.views.size if config.views is not None else tokenizer.get("pixels")
    side = pixels // tokenizer["downsample"] if pixels and "downsample" in tokenizer else 0
    return {**tokenizer, "pixels": pixels, "tokens": side**2, "classes": images.get("classes")}


def _generator(step: Step, inputs: Mapping[str, Known]) -> Facts:
    """All token sets are alike, and so is the tokenizer that shows samples, but for the size that it was made for."""
    facts = agree(step, inputs["tokens"], inputs.get("held-out", {}))
    agree(step, inputs["tokens"], _coded(inputs.get("tokenizer", {})))
    shown = getattr(step.config, "samples", None)
    _check_classes(step, shown.classes if shown else None, facts)
    return facts


def _samples(step: Step, inputs: Mapping[str, Known]) -> Facts:
    config: Any = step.config
    facts = agree(step, inputs["generator"], _coded(inputs.get("tokenizer", {})))
    _check_classes(step, config.classes, facts)
    if config.order is not None and len(config.order) != facts.get("tokens", len(config.order)):
        raise UsageError(
            f"step {step.name} gives an order of {len(config.order)} positions, but an image has {facts['tokens']} codes"
        )
    return facts


def _images(step: Step, inputs: Mapping[str, Known]) -> Facts:
    agree(step, _coded(inputs["tokens"]), _coded(inputs["tokenizer"]))
    return {}


def _coded(known: Known) -> Known:
    """What is said of the codes alone."""
    return {
        step: {name: facts[name] for name in ("tokenizer", "codes") if name in facts} for step, facts in known.items()
    }


def _check_classes(step: Step, asked: tuple[int, ...] | None, facts: Facts) -> None:
    unknown = [label for label in asked or () if not 0 <= label < facts.get("classes", label + 1)]
    if unknown:
        raise UsageError(f"step {step.name} asks for class {unknown[0]}, but there are {facts.get('classes')} classes")


FORESEEN: dict[str, Callable[[Step, Mapping[str, Known]], Facts]] = {
    "index": _index,
    "train-tokenizer": _tokenizer,
    "import-weights": _imported,
    "finetune-decoder": _finetuned,
    "kmeans": _codebook,
    "pretokenize": _tokens,
    "train-generator": _generator,
    "sample": _samples,
    "generate": _samples,
    "decode": _images,
}
