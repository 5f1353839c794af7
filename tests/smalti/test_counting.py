"""Counts in sentences are grammatical: "1 tensor", never "1 tensors"."""

from __future__ import annotations

import pytest

from models.adapters.layout import Difference, LayoutError
from smalti.counting import counted


@pytest.mark.parametrize(
    ("number", "word", "said"),
    [(0, "image", "0 images"), (1, "image", "1 image"), (1797, "image", "1,797 images"), (1, "class", "1 class"),
     (3, "class", "3 classes"), (2, "batch", "2 batches")],
)  # fmt: skip
def test_counted(number: int, word: str, said: str) -> None:
    assert counted(number, word) == said


def test_one_tensor_that_differs() -> None:
    one = Difference("head.weight", (2, 3), None)
    assert "RAR: 1 tensor that differs\n" in str(LayoutError("RAR", [one]))
    assert "RAR: 2 tensors that differ\n" in str(LayoutError("RAR", [one, one]))
