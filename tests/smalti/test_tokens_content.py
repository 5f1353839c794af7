"""The digest of a token set's content: the same wherever it lies, another one for other codes, labels or facts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smalti import TokenSet, create_tokens
from smalti.tokens import content_digest

CODES_ICT = np.random.default_rng(0).integers(0, 50, (300, 2, 4))
LABELS_I = np.arange(300) % 3


def create(path: Path, codes_ICT: Any = CODES_ICT, labels_I: Any = LABELS_I, **changes: Any) -> TokenSet:
    said = {"codes": 50, "grid": (2, 2), "name": "tiny", "classes": 3, "shard_images": 256, **changes}
    return create_tokens(path, codes_ICT, labels=labels_I, **said)


@pytest.mark.parametrize("profile", ["training", "transport"])
def test_it_is_the_same_elsewhere_and_without_cards(tmp_path: Path, profile: str) -> None:
    first = create(tmp_path / "first", profile=profile)
    shutil.copytree(first.path, tmp_path / "second")
    for name in ("README.md", "croissant.json", "SHA256SUMS"):
        (tmp_path / "second" / name).unlink()
    assert content_digest(TokenSet(tmp_path / "second", first.attributes, **_arrays(first))) == content_digest(first)


def _arrays(token_set: TokenSet) -> dict[str, Any]:
    return {"tokens": token_set.tokens, "labels": token_set.labels, "key_bytes": token_set.key_bytes, "boxes": None}


def test_every_change_shows(tmp_path: Path) -> None:
    other_ICT, other_I = CODES_ICT.copy(), LABELS_I.copy()
    other_ICT[299, 1, 3] = (other_ICT[299, 1, 3] + 1) % 50
    other_I[7] = (other_I[7] + 1) % 3
    variants = [
        create(tmp_path / "0"),
        create(tmp_path / "1", codes_ICT=other_ICT),
        create(tmp_path / "2", labels_I=other_I),
        create(tmp_path / "3", keys=[f"image-{number}" for number in range(300)]),
        create(tmp_path / "4", codes=51),
        create(tmp_path / "5", name="other"),
        create(tmp_path / "6", boxes=np.zeros((300, 2, 5), np.float32)),
        create(tmp_path / "7", boxes=np.ones((300, 2, 5), np.float32)),
    ]
    assert len({content_digest(variant) for variant in variants}) == len(variants)
