"""Weight files of other projects, read without running anything that is in them.

.safetensors holds tensors alone. Files of torch.save are pickles: torch's own restricted reader takes them, which knows
tensors and plain containers. Files of Lightning also hold settings and callbacks as objects; those of the modules
below are read as empty `Ignored` objects, and a file that names anything else is refused. Tensors are mapped, not read.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import CorruptError, InputError

if TYPE_CHECKING:
    import torch

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
STATE = "state_dict"  # where Lightning keeps the tensors

# What Lightning files hold besides tensors: nothing of these is built, their place is taken by an Ignored.
IGNORED_MODULES = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "numpy", "typing", "argparse")
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


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file by name, of a Lightning file those of its `state_dict`.

    InputError where there is no such file; CorruptError where it is damaged, holds code, or is no state dict.
    """
    if not path.is_file():
        raise InputError(f"there is no weight file {path}", path=path)
    try:
        found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    return _tensors(found, path)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= header <= min(LARGEST_HEADER, size - 8):
        raise CorruptError(
            f"{path} is no safetensors file: its header would take {header:,} of {size:,} bytes", path=path
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path) -> Any:
    import torch

    is_zip = zipfile.is_zipfile(path)
    names = _foreign_names(path) if is_zip else []
    stand_ins: list[Any] = [(dict_of_anything if name == DICTIONARY else Ignored, name) for name in names]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error).split("\n")[0]) from error


def dict_of_anything(*args: Any) -> dict[Any, Any]:
    """Stands for defaultdict, whose argument is a function."""
    return {}


def _foreign_names(path: Path) -> list[str]:
    """What the pickle names that torch does not know, found without running it; CorruptError for what may be code."""
    import torch

    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except pickle.UnpicklingError as error:
        raise _damaged(path, error) from error
    unknown = [name for name in names if not _is_ignorable(name)]
    if unknown:
        raise _refusal(path, f"it names {', '.join(unknown[:5])}")
    return names


def _is_ignorable(name: str) -> bool:
    return name in IGNORED_NAMES or name == DICTIONARY or name.split(".")[0] in IGNORED_MODULES


def _tensors(found: Any, path: Path) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(found, Mapping) and isinstance(found.get(STATE), Mapping):
        found = found[STATE]
    if not isinstance(found, Mapping) or not found:
        raise CorruptError(f"{path} holds no mapping from names to tensors", path=path)
    odd = [name for name, value in found.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)]
    if odd:
        raise CorruptError(
            f"{path} is no state dict: {str(odd[0])[:80]!r} is no tensor", path=path, hint="give the state dict alone"
        )
    return dict(found)


def _refusal(path: Path, reason: str) -> CorruptError:
    return CorruptError(
        f"{path} holds more than tensors, and was not opened: {reason[:200]}",
        path=path,
        hint="ask its author for a .safetensors file, or for the state dict alone",
    )


def _damaged(path: Path, error: Exception) -> CorruptError:
    said = (str(error).splitlines() or [""])[0]
    return CorruptError(f"{path} cannot be read as weights: {said[:160] or type(error).__name__}", path=path)
