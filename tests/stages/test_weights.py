"""Weights in artifacts: written whole or refused in words, whatever the library under them says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from sweep import in_child, limit_file_size

from pipeline.draft import Draft, Request
from stages.weights import save_weights, write_tensors

STATE = {"weight": torch.zeros(1000)}


def test_weights_on_a_full_disk_are_73_and_leave_nothing(tmp_path: Path) -> None:
    def save() -> None:
        save_weights(Draft.open(tmp_path / "draft", Request("x", "x", 1, "0" * 64, {}, {}, {})), STATE, {})

    assert in_child(save, before=lambda: limit_file_size(1000)) == 73
    assert list((tmp_path / "draft").iterdir()) == []
    save()
    assert (tmp_path / "draft" / "weights.safetensors").stat().st_size > 4000


def test_what_the_system_answers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="No such file"):
        write_tensors(tmp_path / "nowhere" / "x", STATE)

    def fail(*args: object) -> None:
        raise SafetensorError("another complaint")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(SafetensorError, match="another complaint"):
        write_tensors(tmp_path / "x", STATE)
