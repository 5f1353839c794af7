"""The examples for library users run as they stand, without a store, and learn."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_quantizer_in_plain_torch() -> None:
    text = (EXAMPLES / "train_quantizer.py").read_text()
    assert len(text.splitlines()) <= 35
    assert "stages" not in text
    figures = runpy.run_path(str(EXAMPLES / "train_quantizer.py"))["train"]()
    assert figures["error"] < 0.02  # the variance of the pixels is 0.14
    assert figures["usage"] > 0.7


def test_a_tokenizer_by_steps_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(EXAMPLES / "train_tokenizer.py"))["train"]("cpu")["psnr"] > 16  # 8.5 for a mean image
    assert not list(tmp_path.iterdir())
