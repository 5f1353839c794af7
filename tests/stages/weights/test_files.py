"""Weights in artifacts: written whole or refused in words, whatever the library under them says."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from sweep import in_child, limit_file_size

from pipeline.draft import Draft, Request
from pipeline.durable import HashingFile, hash_file
from stages.weights.files import save_weights, write_tensors

STATE = {"weight": torch.zeros(1000)}


def test_weights_on_a_full_disk_are_73_and_leave_nothing(tmp_path: Path) -> None:
    def save() -> None:
        save_weights(Draft.open(tmp_path / "draft", Request("x", "x", 1, "0" * 64, {}, {}, {})), STATE, {})

    assert in_child(save, before=lambda: limit_file_size(1000)) == 73
    assert [path.name for path in (tmp_path / "draft").iterdir()] == ["request.json"]
    save()
    assert (tmp_path / "draft" / "weights.safetensors").stat().st_size > 4000


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """To the byte, for all types, shapes and names; the digest is that of the file."""
    types = (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.float32,
    )
    state = {f"b.{kind}": torch.arange(6).reshape(3, 2).to(kind).T for kind in (*types, torch.float64, torch.int64)}
    state |= {"a": torch.tensor(2.5), "z": torch.zeros(0, 4), '\u00e4 "b"': torch.ones(1)}
    with (tmp_path / "x").open("wb") as raw:
        file = HashingFile(raw)
        write_tensors(file, state)
    assert (tmp_path / "x").read_bytes() == save({name: one.contiguous() for name, one in state.items()})
    assert (file.sha256, file.size) == (hash_file(tmp_path / "x"), (tmp_path / "x").stat().st_size)
