"""Names of classes, and checks before sampling (no torch here)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from models.generators.config import CodeShape, GeneratorSettings
from models.sampling.config import SamplingConfig
from pipeline.compatibility import Known, KnownInputs
from pipeline.errors import UsageError
from pipeline.stage import Inputs
from smalti.tokens import open_tokens
from stages.weights.cards import read_card


def names_of_generator(inputs: Inputs) -> Sequence[str]:
    """The names of a generator's classes, in their order; empty if it has none."""
    return read_card(inputs["generator"]).space.class_names


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


def shape_of(facts: Mapping[str, Any]) -> CodeShape | None:
    """The codes that these facts are about, as soon as they, and those of their condition, are known."""
    given = facts.get("condition")
    condition = None if given is None else shape_of(given)
    if facts.get("codes") is None or facts.get("grid") is None or (condition is None) != (given is None):
        return None
    return CodeShape(
        codes=facts["codes"],
        grid=tuple(facts["grid"]),
        classes=facts.get("classes") or 1,
        factors=tuple(facts.get("factors") or ()),
        condition=condition,
    )


def model_of(generator: Known) -> GeneratorSettings | None:
    """The config of a generator artifact, or of the step that trains it; None if it is not imported yet."""
    model: GeneratorSettings | None = generator.get("model")
    return model or (read_card(generator.artifact).model if generator.artifact else None)


def check_labels(asked: Sequence[int] | None, classes: int | None, inputs: KnownInputs) -> None:
    """Raise for classes that the generator does not have."""
    unknown = [label for label in asked or () if label < 0 or (classes is not None and label >= classes)]
    if unknown:
        raise inputs.refusal(f"asks for class {unknown[0]}, but there are {classes} classes")


def check_sampling(
    sampling: SamplingConfig,
    model: GeneratorSettings,
    shape: CodeShape | None,
    *,
    order: Sequence[int] | None = None,
    is_random: bool = False,
    has_condition: bool = False,
) -> None:
    """ValueError, with the reason, if a generator of such codes, as far as they are known, cannot be sampled like that.

    has_condition: whether codes of another space are given.
    """
    if model.conditions_on == "codes" and not has_condition:
        raise ValueError(
            "it draws codes for codes of another space, and none are given: give their token set as the input condition"
        )
    if model.conditions_on != "codes" and has_condition:
        raise ValueError("it has no use for codes of another space: leave the input condition out")
    if sampling.guided and not model.can_be_guided:
        raise ValueError(
            "guidance needs a generator that also learnt without labels, and this one did not: set guidance.scale 1, or "
            "train it with a label_dropout above 0, where its kind has that"
        )
    if shape is not None:
        sampling.check(len(model.subtokens(shape)))
    if (order is not None or is_random) and not model.takes_orders:
        raise ValueError(f"a generator of kind {model.kind} generates the codes of an image in its own order only")
    if order is not None and shape is not None and sorted(order) != list(range(shape.tokens)):
        raise ValueError(
            f"order must name each of the positions 0 to {shape.tokens - 1} once, found {len(order)} numbers"
        )
