"""Training batches of codes: rows of one or several token sets, gathered for many steps at once.

Small sets are held in memory, larger ones are mapped: then the rows of `LOOK_AHEAD` steps are read together, shard by
shard, since single batches would touch every shard in every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Artifact
from pipeline.errors import CorruptError
from smalti.attributes import TokenAttributes
from smalti.tokens import TokenSet, open_tokens
from stages.weights.identity import check_same_tokenizer

# N rows (image, crop) of all sets, T tokens, R rows that are asked for

LOADED_BYTES = 2**30
BLOCK_CODES = 2**22
SAME = ("codes", "classes", "grid", "scan_order", "factors", "class_names")


class TrainingTokens:
    """The rows of token sets that belong together, as one table."""

    def __init__(self, artifacts: Sequence[Artifact], *, like: Artifact):
        """CorruptError: a set of another codebook, grid or classes than `like`, or a code or label out of range."""
        sets = [open_tokens(artifact.path) for artifact in artifacts]
        for artifact, token_set in zip(artifacts, sets, strict=True):
            check_same_kind(token_set, artifact, open_tokens(like.path), like)
            token_set.check_values()
        self.sets = [token_set.load() if _bytes(token_set) <= LOADED_BYTES else token_set for token_set in sets]
        self._ends = np.cumsum([len(token_set) for token_set in sets])

    @property
    def attributes(self) -> TokenAttributes:
        """Of the first set; the others agree in all that matters."""
        return self.sets[0].attributes

    @property
    def are_loaded(self) -> bool:
        return all(_bytes(token_set) <= LOADED_BYTES for token_set in self.sets)

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
        """Codes (R, T) and labels (R,), both int64."""
        codes_RT = np.empty((len(rows_R), self.attributes.tokens), np.int64)
        labels_R = np.empty(len(rows_R), np.int64)
        owner_R = np.searchsorted(self._ends, rows_R, side="right")
        for number, token_set in enumerate(self.sets):
            mine = owner_R == number
            own_rows = rows_R[mine] - (self._ends[number] - len(token_set))
            codes_RT[mine], labels_R[mine] = token_set.codes_of(own_rows), token_set.labels_of(own_rows)
        return codes_RT, labels_R


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
