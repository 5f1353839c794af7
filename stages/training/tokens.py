"""Training batches of codes: rows of one or several token sets, gathered for many steps at once.

Small sets are held in memory, larger ones are mapped: then the rows of `LOOK_AHEAD` steps are read together, shard by
shard, since single batches would touch every shard in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.errors import CorruptError, InputError
from smalti.attributes import TokenAttributes
from smalti.counting import counted
from smalti.tokens import TokenSet, open_tokens
from stages.weights.identity import check_same_tokenizer

# N rows (image, crop) of all sets, T tokens, S tokens of their condition, R rows that are asked for

LOADED_BYTES = 2**30
BLOCK_CODES = 2**22
BLOCK_IMAGES = 2**16
SAME = ("codes", "classes", "grid", "scan_order", "factors", "class_names")


class TrainingTokens:
    """The rows of token sets that belong together, as one table."""

    def __init__(self, artifacts: Sequence[Artifact], *, like: Artifact, condition: TrainingTokens | None = None):
        """condition: codes of another space, which are given for those of the same view of the same image.

        CorruptError: a set of another codebook, grid or classes than `like`, or a code or label out of range.
        InputError: the condition has other images, views or labels.
        """
        sets = [open_tokens(artifact.path) for artifact in artifacts]
        for artifact, token_set in zip(artifacts, sets, strict=True):
            check_same_kind(token_set, artifact, open_tokens(like.path), like)
            token_set.check_values()
        self.sets = [token_set.load() if _bytes(token_set) <= LOADED_BYTES else token_set for token_set in sets]
        self._ends = np.cumsum([len(token_set) for token_set in sets])
        self.condition = condition
        if condition is not None:
            check_pairs(self, condition)

    @property
    def attributes(self) -> TokenAttributes:
        """Of the first set; the others agree in all that matters."""
        return self.sets[0].attributes

    @property
    def are_loaded(self) -> bool:
        are_small = all(_bytes(token_set) <= LOADED_BYTES for token_set in self.sets)
        return are_small and (self.condition is None or self.condition.are_loaded)

    @property
    def images(self) -> int:
        """Images of all sets; each may be several rows."""
        return sum(token_set.n_images for token_set in self.sets)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """All rows in order, in blocks of about `BLOCK_CODES` codes: codes (R, T) and labels (R,)."""
        rows = max(1, BLOCK_CODES // self.attributes.tokens)
        for first in range(0, len(self), rows):
            yield self.read(np.arange(first, min(first + rows, len(self))))

    def read(self, rows_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Codes (R, T), and labels (R,) or, where there is a condition, its codes (R, S), all int64."""
        codes_RT = np.empty((len(rows_R), self.attributes.tokens), np.int64)
        labels_R = np.empty(len(rows_R), np.int64)
        owner_R = np.searchsorted(self._ends, rows_R, side="right")
        for number, token_set in enumerate(self.sets):
            mine = owner_R == number
            own_rows = rows_R[mine] - (self._ends[number] - len(token_set))
            codes_RT[mine], labels_R[mine] = token_set.codes_of(own_rows), token_set.labels_of(own_rows)
        return codes_RT, labels_R if self.condition is None else self.condition.read(rows_R)[0]


def check_pairs(tokens: TrainingTokens, condition: TrainingTokens) -> None:
    """InputError, naming the first image that differs, unless row i of both is the same view of the same image, with one label."""
    if len(tokens.sets) != len(condition.sets):
        raise InputError(
            f"{counted(len(tokens.sets), 'token set')} cannot be joined with {len(condition.sets)} as their condition: give "
            "one condition for each, in the same order"
        )
    for one, other in zip(tokens.sets, condition.sets, strict=True):
        problem = _mismatch(one, other)
        if problem:
            raise InputError(
                f"the codes of {one.path} and their condition in {other.path} do not belong together: {problem}",
                path=other.path,
                hint="make both with pretokenize, of the same images and under the same views",
            )


def _mismatch(one: TokenSet, other: TokenSet) -> str | None:
    """The first difference between two token sets that should be of the same views, in their order."""
    for number, (key, found) in enumerate(zip(one.keys, other.keys, strict=False)):
        if key != found:
            return f"image {number} has the key {key!r}, and {found!r} in the condition"
    if one.n_images != other.n_images:
        longer = max(one, other, key=lambda tokens: tokens.n_images)
        extra = longer.keys[min(one.n_images, other.n_images)]
        return f"only {longer.path.name} has the key {extra!r} ({one.n_images} images, and {other.n_images} in the condition)"
    if one.n_crops != other.n_crops:
        return f"an image has {counted(one.n_crops, 'view')}, and {other.n_crops} in the condition"
    for number, (crop, found_crop) in enumerate(zip(one.attributes.crops, other.attributes.crops, strict=False)):
        if crop != found_crop:
            return f"view {number} is {dict(crop)}, and {dict(found_crop)} in the condition"
    differing = np.flatnonzero(one.labels != other.labels)
    if differing.size:
        row = int(differing[0])
        return f"{one.keys[row]!r} has label {one.labels[row]}, and {other.labels[row]} in the condition"
    return _moved_box(one, other)


def _moved_box(one: TokenSet, other: TokenSet) -> str | None:
    """The first random crop that lies elsewhere, as far as both sets say where theirs lie."""
    if one.boxes is None or other.boxes is None:
        return None
    for start in range(0, one.n_images, BLOCK_IMAGES):
        stop = min(start + BLOCK_IMAGES, one.n_images)
        boxes_IC5, found_IC5 = one.boxes.read_rows(start, stop), other.boxes.read_rows(start, stop)
        moved = np.argwhere((boxes_IC5 != found_IC5).any(axis=-1))
        if moved.size:
            image, crop = (int(place) for place in moved[0])
            box, found = boxes_IC5[image, crop].tolist(), found_IC5[image, crop].tolist()
            return f"view {crop} of {one.keys[start + image]!r} is the box {box}, and {found} in the condition"
    return None


def check_same_kind(token_set: TokenSet, artifact: Artifact, first: TokenSet, first_artifact: Artifact) -> None:
    """CorruptError unless two token sets have the same tokenizer, grid and classes."""
    for name in SAME:
        found, wanted = getattr(token_set.attributes, name), getattr(first.attributes, name)
        if found != wanted:
            raise CorruptError(
                f"the token sets {first_artifact.name} and {artifact.name} cannot be used together: "
                f"{name} is {wanted} in one and {found} in the other",
                path=artifact.path,
            )
    if first.attributes.tokenizer or token_set.attributes.tokenizer:
        check_same_tokenizer(
            token_set.attributes.tokenizer,
            first.attributes.tokenizer,
            what=artifact.name,
            by=first_artifact.name,
            path=artifact.path,
        )


def _bytes(token_set: TokenSet) -> int:
    return len(token_set) * token_set.attributes.tokens * token_set.tokens.dtype.itemsize
