"""Whether a state dict has exactly the names and shapes of a network; all differences are reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from models.generators.config import CodeShape, GeneratorSettings

Shape = tuple[int, ...]
ANY = -1  # a wanted size that is not known


@dataclass(frozen=True)
class GeneratorWeights:
    """A recognised state dict: a generator of this config, for codes of this shape.

    state: its tensors by our names.  size: the published size ("b", ...) that it has, or None.
    """

    config: GeneratorSettings
    shape: CodeShape
    state: Mapping[str, Tensor]
    size: str | None


@dataclass(frozen=True)
class Difference:
    """One tensor that does not fit: found is None where it is missing, wanted is None where it is surplus."""

    name: str
    found: Shape | None
    wanted: Shape | None

    @property
    def kind(self) -> str:
        if self.found is None:
            return "missing"
        return "surplus" if self.wanted is None else "misshapen"


def how_many(differences: Sequence[Difference]) -> str:
    """ "1 tensor that differs", "2 tensors that differ"."""
    return "1 tensor that differs" if len(differences) == 1 else f"{len(differences)} tensors that differ"


class LayoutError(ValueError):
    """A state dict does not fit; `differences` lists every tensor, and so does the message, as a table."""

    def __init__(self, subject: str, differences: Sequence[Difference]):
        super().__init__(f"the weights are not those of {subject}: {how_many(differences)}\n{table(differences)}")
        self.subject = subject
        self.differences = tuple(differences)

    def __reduce__(self) -> tuple[object, ...]:
        return (LayoutError, (self.subject, self.differences))


def compare(found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[Difference]:
    """All differences, missing ones first, then surplus, then misshapen; each kind in the order of its mapping."""
    missing = [Difference(name, None, shape) for name, shape in wanted.items() if name not in found]
    surplus = [Difference(name, shape, None) for name, shape in found.items() if name not in wanted]
    shared = [Difference(name, found[name], shape) for name, shape in wanted.items() if name in found]
    return missing + surplus + [difference for difference in shared if difference.found != difference.wanted]


def table(differences: Sequence[Difference]) -> str:
    """Lines `kind  name  found  wanted`, in columns."""
    rows = [("", "tensor", "found", "wanted")]
    rows += [(d.kind, d.name, _written(d.found), _written(d.wanted)) for d in differences]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _written(shape: Shape | None) -> str:
    if shape is None:
        return "-"
    return "x".join("?" if size == ANY else str(size) for size in shape) or "scalar"
