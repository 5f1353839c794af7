"""Checkpoints: the whole state of a training as one safetensors file in the draft's scratch folder.

Names in the file: `model.<part>.<tensor>`, `optimizer.<part>.<parameter>.<moment>`, `average.<part>.<parameter>`, and
the engine's own numbers as `engine.<name>`. A checkpoint is a journaled unit of the draft, so half a one never counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.adapters.layout import compare, how_many, shapes, table
from pipeline.draft import SCRATCH, Draft
from pipeline.errors import CorruptError, NumericError
from stages.weights.files import write_tensors

KEEP = 2  # the last ones; an older one helps nobody but costs disk
PREFIX = "checkpoint-"
BEST = "best-"

State = dict[str, Tensor]


def save_checkpoint(out: Draft, step: int, state: State) -> None:
    """Write the state after `step` steps, and drop checkpoints that are no longer needed."""
    write_state(out, f"{PREFIX}{step:08d}", state)
    for unit in _units(out, PREFIX)[:-KEEP]:
        out.drop(unit)


def save_best(out: Draft, step: int, state: State) -> None:
    """Write the best evaluated weights, made after `step` steps."""
    write_state(out, f"{BEST}{step:08d}", state)


def drop_worse(out: Draft, best_step: int) -> None:
    """Forget all weights kept as best but those of `best_step`."""
    for unit in _units(out, BEST):
        if unit != f"{BEST}{best_step:08d}":
            out.drop(unit)


def newest_checkpoint(out: Draft) -> Path | None:
    """File of the last checkpoint, if there is one."""
    units = _units(out, PREFIX)
    return out.files(units[-1])[0] if units else None


def best_file(out: Draft, step: int) -> Path:
    return out.path / _file(f"{BEST}{step:08d}")


def write_state(out: Draft, unit: str, state: State) -> None:
    """Record a unit of tensors, unless it is there already; a state with NaN or infinity is never written."""
    if out.is_done(unit):
        return
    bad = [name for name, tensor in state.items() if not _is_sound(name, tensor)]
    if bad:
        raise NumericError(f"the training state holds NaN or infinity in {bad[0]} and is not saved ({unit})")
    with out.streaming(unit, _file(unit)) as file:
        write_tensors(file, state)


def read_state(path: Path) -> State:
    """Tensors of a checkpoint; the draft checked its SHA-256 when it was opened."""
    from safetensors.torch import load_file

    return load_file(path)


def check_fits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """CorruptError (exit code 4) with a table where names or shapes differ from those of this training."""
    differences = compare(shapes(found), shapes(wanted))
    if differences:
        raise CorruptError(
            f"the checkpoint {path} belongs to another training: {how_many(differences)}\n" + table(differences),
            path=path,
            hint="remove the draft folder to begin anew",
        )


def part_of(state: Mapping[str, Tensor], prefix: str) -> State:
    """Tensors whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _units(out: Draft, prefix: str) -> list[str]:
    return sorted(unit for unit in out.units() if unit.startswith(prefix))


def _file(unit: str) -> str:
    return f"{SCRATCH}/{unit}.safetensors"


def _is_sound(name: str, tensor: Tensor) -> bool:
    """Whether a tensor may be saved; the engine's own numbers may be infinite ("none yet")."""
    return name.startswith("engine.") or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
