"""Device, threads and numeric precision of a running stage, as settings of torch."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pipeline import ranks
from pipeline.errors import UsageError
from pipeline.stage_cache import after_giving_back

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "tf32", "bfloat16"]


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Of several processes on a machine each has a device of its own."""
    import torch

    # In sampling the number of keys grows with every step, and cuDNN would build a plan for each number.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 unless `products` says otherwise
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this machine has no CUDA device", hint="leave --device out or give cpu")
    if name == "cuda" and ranks.local_world_size() > 1:
        name = f"cuda:{ranks.local_rank() % torch.cuda.device_count()}"
    try:
        picked = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from error
    if picked.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N; other devices were never tried")
    return picked


@after_giving_back
def return_device_memory() -> None:
    """Return unused cached memory to CUDA."""
    torch = sys.modules.get("torch")  # who has not imported it holds no memory of a device
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()  # recorded steps and compiled blocks refer to each other
        torch.cuda.empty_cache()


def sharing(device: torch.device, processes: int) -> int:
    """How many of `processes` on this machine share one device, if `device` has no number."""
    import torch

    if device.type != "cuda" or device.index is not None:
        return processes
    return -(-processes // torch.cuda.device_count())


def free_bytes(device: torch.device) -> int:
    """Free memory of the device, or of this machine within the limit of its container."""
    import psutil
    import torch
    from distributed.system import MEMORY_LIMIT

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    own = psutil.Process().memory_info().rss
    return int(min(psutil.virtual_memory().available, MEMORY_LIMIT - own))


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Within this block float32 products on CUDA keep all digits, or, but for "float32", those of TF32 (11 bits).

    The setting is the whole process's, so all that runs meanwhile in other threads shares it.
    """
    import torch

    is_rounded = precision != "float32"
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_rounded
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with exactly `count` torch threads: float sums depend on the number, so shards fix it (1)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_kernels(device: torch.device, *, is_deterministic: bool) -> Iterator[None]:
    """Only kernels that give the same bits each time: always on the CPU, on CUDA where the config asks for it."""
    import torch
    import torch.utils.deterministic

    if device.type != "cpu" and not is_deterministic:
        yield
        return
    deterministic: Any = torch.utils.deterministic  # a module with properties, which type checkers do not see
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_strict, was_warning = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    did_fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    deterministic.fill_uninitialized_memory = False  # costs time and only helps to find bugs
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_strict, warn_only=was_warning)
        deterministic.fill_uninitialized_memory = did_fill
