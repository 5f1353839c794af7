"""Classes and guidance by them: names as numbers, and what is refused before anything is sampled (no torch here)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from models.sampling.config import SamplingConfig
from pipeline.compatibility import KnownInputs
from pipeline.errors import UsageError
from pipeline.stage import Inputs
from smalti.tokens import open_tokens
from stages.weights.networks import read_card


def names_of_generator(inputs: Inputs) -> Sequence[str]:
    """The names of the classes that a generator knows, in their order; none where nobody gave it any."""
    return read_card(inputs["generator"]).class_names


def names_of_tokens(inputs: Inputs) -> Sequence[str]:
    """The names of the classes of the first token set."""
    return open_tokens(inputs.all("tokens")[0].path).attributes.class_names


def numbers_of(asked: Sequence[Any], names: Sequence[str], *, where: str) -> list[Any]:
    """Numbers as they are, and a number for every name; UsageError for a name that is unknown or that two classes have."""
    return [_number(item, names, where) if isinstance(item, str) else item for item in asked]


def _number(name: str, names: Sequence[str], where: str) -> int:
    found = [number for number, other in enumerate(names) if other == name]
    if len(found) == 1:
        return found[0]
    if found:
        numbers = " and ".join(map(str, found))
        raise UsageError(f"{where}: {name!r} is the name of the classes {numbers}", hint="give the number")
    if not names:
        raise UsageError(f"{where}: {name!r} is not a number, and the classes have no names here")
    folded = {other.casefold(): other for other in names}
    nearest = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    advice = f"did you mean {folded[nearest[0]]!r}?" if nearest else f"known are {', '.join(names[:10])}"
    raise UsageError(
        f"{where}: {name!r} is not the name of a class: {advice}{'' if nearest or len(names) <= 10 else ', ...'}"
    )


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
