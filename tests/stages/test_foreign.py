"""Foreign weight files: tensors come out, code never runs, damage is said in a sentence."""

from __future__ import annotations

import collections
import os
import struct
import sys
import time
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import CorruptError, InputError
from stages.foreign import read_state

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}


class Payload:
    """What an attacker puts into a pickle: a call that unpickling makes."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("name", ["w.bin", "w.pt", "w.ckpt"])
def test_tensors_of_a_pickle(tmp_path: Path, name: str) -> None:
    torch.save(STATE, tmp_path / name)
    assert same(read_state(tmp_path / name))


def test_tensors_of_the_old_pickle_format_and_of_safetensors(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "w.safetensors")
    assert same(read_state(tmp_path / "old.pth"))
    assert same(read_state(tmp_path / "w.safetensors"))


def test_lightning_files_with_objects_of_classes_that_are_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    module = types.ModuleType("omegaconf.dictconfig")
    exec("class DictConfig:\n    def __setstate__(self, state): calls.append(state)", {"calls": calls}, vars(module))
    module.DictConfig.__module__ = module.__name__
    module.DictConfig.__qualname__ = "DictConfig"
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    settings = module.DictConfig()
    settings.parts = collections.defaultdict(dict, {"kind": dict})
    torch.save(
        {"state_dict": STATE, "epoch": 3, "hyper_parameters": settings, "callbacks": {"best": Path("x")}},
        tmp_path / "lightning.ckpt",
    )
    monkeypatch.delitem(sys.modules, module.__name__)
    assert same(read_state(tmp_path / "lightning.ckpt"))
    assert calls == []


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("place", ["beside", "instead"])
def test_code_is_refused_and_not_run(tmp_path: Path, is_zip: bool, place: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / "bad.ckpt"
    held = {"state_dict": STATE, "callbacks": Payload(mark)} if place == "beside" else Payload(mark)
    torch.save(held, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CorruptError, match="holds more than tensors, and was not opened"):
        read_state(file)
    assert not mark.exists()


def test_an_allowed_name_does_not_open_a_way_to_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in an ignored module becomes an empty object even if that module is here and the name is a function."""
    ran = []
    module = types.ModuleType("lightning")
    module.attack = lambda *args: ran.append(args)
    module.attack.__module__, module.attack.__qualname__ = "lightning", "attack"
    monkeypatch.setitem(sys.modules, "lightning", module)

    class Calls:
        def __reduce__(self) -> tuple[Any, ...]:
            return module.attack, (1,)

    torch.save({"state_dict": STATE, "x": Calls()}, tmp_path / "w.ckpt")
    assert same(read_state(tmp_path / "w.ckpt"))
    assert ran == []


def test_huge_headers_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    started = time.monotonic()
    with pytest.raises(CorruptError, match="its header would take"):
        read_state(tmp_path / "w.safetensors")
    assert time.monotonic() - started < 1


def damaged_files(root: Path) -> dict[str, Path]:
    torch.save(STATE, root / "cut.ckpt")
    (root / "cut.ckpt").write_bytes((root / "cut.ckpt").read_bytes()[:200])
    save_file(STATE, root / "cut.safetensors")
    (root / "cut.safetensors").write_bytes((root / "cut.safetensors").read_bytes()[:-4])
    (root / "empty.bin").write_bytes(b"")
    (root / "text.pt").write_bytes(b"no weights at all")
    (root / "deep.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    torch.save([torch.ones(1)], root / "list.pt")
    torch.save({"a": 1}, root / "numbers.pt")
    with zipfile.ZipFile(root / "zip.ckpt", "w") as archive:
        archive.writestr("../../evil", "x")
    return {path.name: path for path in root.iterdir()}


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    files = damaged_files(tmp_path)
    assert len(files) == 8
    for path in files.values():
        with pytest.raises(CorruptError, match=path.name):
            read_state(path)


def test_absent_files_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no weight file"):
        read_state(tmp_path / "w.ckpt")
