"""Foreign weight files: tensors come out, code never runs, damage is said in a sentence."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
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
from stages.weights.checkpoint_reader import find_format, read_state

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


def zipped(**members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return buffer.getvalue()


WRONG = {
    "random.bin": (bytes.fromhex("03a1b2c3d4e5f60718293a4b5c6d7e8f"), "it begins with the bytes 03 a1 b2 c3"),
    "empty.bin": (b"", "it is empty"),
    "text.pt": (b"no weights at all", "it is text, 'no weights at all'"),
    "note.safetensors": (b"see the other folder", "its header would take"),
    "page.bin": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "it is an HTML page"),
    "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
    "huge.safetensors": (struct.pack("<Q", 2**60) + b"{}", "its header would take"),
    "photo.ckpt": (b"\xff\xd8\xff\xe0" + bytes(100), "it is a JPEG image"),
    "array.pt": (b"\x93NUMPY" + bytes(100), "it is a NumPy array"),
    "pickle.pt": (pickle.dumps({"a": 1}), "it is a Python pickle that torch.save did not write"),
    "other.ckpt": (zipped(**{"../../evil": "x"}), "it is a zip archive of other files"),
    "cut.ckpt": (zipped(**{"archive/data.pkl": "x" * 500})[:300], "it is a zip archive whose end is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_weight_file_is_refused_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    data, said = WRONG[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorruptError) as refusal:
        find_format(tmp_path / name)
    assert str(refusal.value).startswith(f"{tmp_path / name} is not a PyTorch or safetensors file: ")
    assert said in str(refusal.value)


def damaged_files(root: Path) -> list[Path]:
    """Files that begin as weight files do."""
    save_file(STATE, root / "cut.safetensors")
    (root / "cut.safetensors").write_bytes((root / "cut.safetensors").read_bytes()[:-4])
    (root / "deep.safetensors").write_bytes(struct.pack("<Q", 200_000) + b"{" + b"[" * 199_999)
    torch.save([torch.ones(1)], root / "list.pt")
    torch.save({"a": 1}, root / "numbers.pt")
    (root / "fake.pt").write_bytes(zipped(**{"archive/data.pkl": "no pickle", "archive/version": "3"}))
    torch.save(STATE, root / "old.pth", _use_new_zipfile_serialization=False)
    old = (root / "old.pth").read_bytes()
    (root / "cut.pth").write_bytes(old[:-3])
    (root / "rubbish.pth").write_bytes(old[:120] + random.Random(0).randbytes(300))
    (root / "old.pth").unlink()
    return sorted(root.iterdir())


def test_damaged_files_are_refused_and_no_protection_is_spoken_of(tmp_path: Path) -> None:
    files = damaged_files(tmp_path)
    assert len(files) == 7
    for path in files:
        with pytest.raises(CorruptError, match=path.name) as refusal:
            read_state(path)
        assert "weights_only" not in str(refusal.value)


def test_the_first_bytes_count_and_not_the_name(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.bin")
    torch.save(STATE, tmp_path / "w")
    assert same(read_state(tmp_path / "w.bin"))
    assert same(read_state(tmp_path / "w"))
    torch.save(STATE, tmp_path / "w.safetensors")
    with pytest.raises(CorruptError, match=r"is a file of torch.save, not a safetensors file; give it a name"):
        read_state(tmp_path / "w.safetensors")


def test_absent_files_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no weight file"):
        read_state(tmp_path / "w.ckpt")
