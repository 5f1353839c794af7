"""Counts in sentences: one image, two images."""

from __future__ import annotations


def counted(number: int, word: str) -> str:
    """`number` and `word` (given in the singular): "1 image", "2 images", "1,797 images", "3 classes"."""
    many = word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")
    return f"{number:,} {word if number == 1 else many}"
