"""What the stages that ask a generator for samples refuse before anything is sampled (no torch here)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.sampling.config import SamplingConfig
from pipeline.known import KnownInputs


def can_be_guided(model: Any) -> bool:
    """Whether a generator also learns to do without a label: guidance compares the two."""
    return getattr(model, "label_dropout", 1.0) > 0


def check_labels(asked: Sequence[int] | None, classes: int | None, inputs: KnownInputs) -> None:
    """A refusal of classes that are not among those of the generator."""
    unknown = [label for label in asked or () if label < 0 or (classes is not None and label >= classes)]
    if unknown:
        raise inputs.refusal(f"asks for class {unknown[0]}, but there are {classes} classes")


def check_guidance(sampling: SamplingConfig, generator: str, facts: Mapping[str, Any], inputs: KnownInputs) -> None:
    """A refusal of guidance where the generator never learnt what to do without a label."""
    if sampling.guided and facts.get("guidable") is False:
        raise inputs.refusal(
            f"has guidance_scale {sampling.guidance_scale:g}, but {generator} is trained with label_dropout 0, and "
            "guidance needs a generator that also learnt without labels",
            hint="set model.label_dropout of the generator, or guidance_scale 0",
        )
