"""What surrounds a training: fixed threads and kernels, and memory errors as sentences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from pipeline.errors import MemoryExhausted
from smalti.counting import counted
from stages.training.config import TrainingConfig
from stages.training.rows import rows_together

deterministic: Any = torch.utils.deterministic  # a module with properties, which type checkers do not see
CPU_REFUSAL = "not enough memory: you tried to allocate"  # of torch's allocator, which has no error of its own


@contextmanager
def same_kernels(device: torch.device, *, is_deterministic: bool) -> Iterator[None]:
    """Only kernels that give the same bits each time: always on the CPU, on CUDA where the config asks for it."""
    if device.type != "cpu" and not is_deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_strict, was_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    did_fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    deterministic.fill_uninitialized_memory = False  # costs time and helps to find bugs alone
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_strict, warn_only=was_warning)
        deterministic.fill_uninitialized_memory = did_fill


@contextmanager
def memory_in_words(config: TrainingConfig, world: int) -> Iterator[None]:
    """A refused allocation becomes `MemoryExhausted` (exit code 71) that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _exhausted(config, world) from error
    except RuntimeError as error:
        if CPU_REFUSAL in str(error):
            raise _exhausted(config, world) from error
        raise


def _exhausted(config: TrainingConfig, world: int) -> MemoryExhausted:
    rows = rows_together(config, world)
    fewer = next(fewer for fewer in range(max(1, rows // 2), 0, -1) if config.batch % fewer == 0)
    return MemoryExhausted(
        f"the device has not enough memory for {counted(rows, 'row')} at a time (training.batch {config.batch} over "
        f"{counted(world, 'process')})",
        hint=(f"set training.rows_per_pass to {fewer}, or " if rows > 1 else "")
        + "take training.precision bfloat16 or a smaller model",
    )
