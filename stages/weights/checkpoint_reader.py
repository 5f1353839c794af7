"""Weight files of other projects, read without executing code in them.

The first bytes of a file say what it is. .safetensors holds tensors alone. Files of torch.save are pickles:
torch's own restricted reader takes them, which knows tensors and plain containers. Files of Lightning also hold settings
and callbacks as objects; those of the modules below are read as empty `Ignored` objects, and a file that names anything
else is refused. Tensors are mapped, not read.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.durable import hash_file
from pipeline.errors import CorruptError, InputError, SmaltiError

if TYPE_CHECKING:
    import torch

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
STATES = ("state_dict", "model")  # where Lightning and fairseq keep the tensors
SETTINGS = ("cfg", "model")  # where fairseq keeps the network's settings
START = 512  # bytes at the beginning of a file that tell what it is
TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # of files that torch.save wrote before they were zip archives
SIGNATURES = {
    b"\x89HDF": "HDF5 data",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x1f\x8b": "gzip data",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF document",
    b"version https://git-lfs": "a Git LFS pointer: the file that it stands for was not downloaded",
}
"""First bytes -> what a file is that is often taken for weights."""

Format = Literal["safetensors", "zip", "pickle"]

# What Lightning files hold besides tensors: nothing of these is built, their place is taken by an Ignored.
IGNORED_MODULES = (
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "omegaconf",
    "fairseq",
    "numpy",
    "typing",
    "argparse",
)
IGNORED_NAMES = frozenset(
    ["pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.Path"]
    + [f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "tuple", "str")]
    + [f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("int", "float", "bool", "bytes")]
)
DICTIONARY = "collections.defaultdict"


class Ignored:
    """Stands for an object of a foreign class: takes whatever it is made of, and keeps nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def identify_file(path: Path) -> str:
    """SHA-256 of a weight file; InputError where it cannot be read, CorruptError where it is no weight file."""
    find_format(path)
    return hash_file(path)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file by name, of a Lightning or fairseq file those of its network.

    InputError where there is no such file; CorruptError where it is damaged, holds code, or is not a state dict.
    """
    return _tensors(_read(path), path)


def read_settings(path: Path) -> dict[str, Any]:
    """The network's settings in a file of fairseq; empty where there are none, or they are not plain values. Errors as above."""
    found: Any = _read(path)
    for name in SETTINGS:
        found = found.get(name) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _read(path: Path) -> Any:
    form = find_format(path)
    try:
        return _read_safetensors(path) if form == "safetensors" else _read_pickle(path, is_zip=form == "zip")
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def find_format(path: Path) -> Format:
    """How a weight file is written, by its first bytes. InputError where it cannot be read, CorruptError for other files."""
    if not path.is_file():
        what = f"{path} is a folder, expected a weight file" if path.is_dir() else f"there is no weight file {path}"
        raise InputError(what, path=path)
    try:
        with path.open("rb") as file:
            start = file.read(START)
    except OSError as error:
        raise InputError(f"the weight file {path} cannot be read: {error.strerror}", path=path) from error
    if start.startswith(b"PK"):
        return _check_archive(path)
    if start[:1] == b"\x80" and TORCH_MAGIC in start[:32]:
        return "pickle"
    if start[8:9] == b"{" and _header_bytes(start) <= min(LARGEST_HEADER, path.stat().st_size - 8):
        return "safetensors"
    raise _not_weights(path, _looks_like(path, start))


def _check_archive(path: Path) -> Format:
    if not zipfile.is_zipfile(path):
        raise _not_weights(path, "it is a zip archive whose end is missing, as after a download that broke off")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise _not_weights(path, "it is a damaged zip archive") from error
    if not any(name.endswith("/data.pkl") for name in names):
        raise _not_weights(path, f"it is a zip archive of other files ({', '.join(map(repr, names[:3])) or 'none'})")
    return "zip"


def _looks_like(path: Path, start: bytes) -> str:
    """The probable type of a file that is not a weight file."""
    size = path.stat().st_size
    known = next((what for signature, what in SIGNATURES.items() if start.startswith(signature)), None)
    if size == 0:
        return "it is empty"
    if known is not None:
        return f"it is {known}"
    if start[:1] == b"\x80":
        return "it is a Python pickle that torch.save did not write"
    if start[8:9] in (b"{", b"[") or path.suffix == ".safetensors":
        return f"as a safetensors file, its header would take {_header_bytes(start):,} of {size:,} bytes"
    text = start.decode("utf-8", errors="ignore") if b"\0" not in start else ""
    if re.match(r"\s*<(!doctype )?html", text, re.IGNORECASE):
        return "it is an HTML page, as servers give it in the place of a file"
    if text and len(text.encode()) >= len(start) - 3 and text.replace("\n", " ").replace("\t", " ").isprintable():
        return f"it is text, {text.split(chr(10))[0][:40]!r}"
    return f"it begins with the bytes {start[:8].hex(' ')}"


def _header_bytes(start: bytes) -> int:
    """The length of a safetensors header, by its first bytes."""
    return int(struct.unpack("<Q", start[:8])[0]) if len(start) >= 8 else 0


def _not_weights(path: Path, what: str) -> CorruptError:
    return CorruptError(f"{path} is not a PyTorch or safetensors file: {what}", path=path)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path, *, is_zip: bool) -> Any:
    import torch

    if path.suffix == ".safetensors":  # torch would read it as such, because of its name
        raise CorruptError(
            f"{path} is a file of torch.save, not a safetensors file", path=path, hint="give it a name that ends in .pt"
        )
    names = _foreign_names(path) if is_zip else []
    stand_ins: list[Any] = [(dict_of_anything if name == DICTIONARY else Ignored, name) for name in names]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _refused_by_torch(path, error) from error


def dict_of_anything(*args: Any) -> dict[Any, Any]:
    """Stands for defaultdict, whose argument is a function."""
    return {}


def _foreign_names(path: Path) -> list[str]:
    """What the pickle names that torch does not know, found without running it; CorruptError for what may be code."""
    import torch

    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except pickle.UnpicklingError as error:
        raise _damaged(path, None) from error
    unknown = [name for name in names if not _is_ignorable(name)]
    if unknown:
        raise _refusal(path, f"it names {', '.join(unknown[:5])}")
    return names


def _is_ignorable(name: str) -> bool:
    return name in IGNORED_NAMES or name == DICTIONARY or name.split(".")[0] in IGNORED_MODULES


def _tensors(found: Any, path: Path) -> dict[str, torch.Tensor]:
    import torch

    for name in STATES:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not found:
        raise CorruptError(f"{path} is not a mapping from names to tensors", path=path)
    odd = [name for name, value in found.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)]
    if odd:
        raise CorruptError(
            f"{path} is not a state dict: {str(odd[0])[:80]!r} is no tensor",
            path=path,
            hint="give the state dict alone",
        )
    return dict(found)


def _refused_by_torch(path: Path, error: Exception) -> SmaltiError:
    """Torch's restricted reader advises to switch it off; what it found is all that is passed on."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return _refusal(path, f"it names {named[1]}") if named else _damaged(path, None)


def _refusal(path: Path, reason: str) -> CorruptError:
    return CorruptError(
        f"{path} holds more than tensors, and was not opened: {reason[:200]}",
        path=path,
        hint="ask its author for a .safetensors file, or for the state dict alone",
    )


def _damaged(path: Path, error: Exception | None) -> CorruptError:
    """Of the right format, but it cannot be read to its end. Torch's sentences are passed on unless they advise."""
    said = (str(error).splitlines() or [""])[0] if error is not None else ""
    reason = f" ({said[:160]})" if said and not re.search("weights_only|pickle", said) else ""
    return CorruptError(f"{path} cannot be read as weights: the file is damaged{reason}", path=path)
