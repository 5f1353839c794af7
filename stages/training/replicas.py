"""The processes of one training, through accelerate: mixed precision, replicas, and agreement between them.

One process needs none of it and pays nothing. `torchrun` and `accelerate launch` start several, which talk by NCCL on
CUDA and by gloo on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from stages.devices import pick_device

Precision = Literal["float32", "bfloat16"]
ACCELERATE_NAMES = {"float32": "no", "bfloat16": "bf16"}


class Replicas:
    """All processes together, seen from one of them. device: as the command line says it."""

    def __init__(self, *, device: str, precision: Precision):
        picked = pick_device(device)
        if picked.type == "cuda" and picked.index is not None:
            torch.cuda.set_device(picked)
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier training may have had another precision
        self._accelerator = Accelerator(cpu=picked.type == "cpu", mixed_precision=ACCELERATE_NAMES[precision])

    @property
    def rank(self) -> int:
        return int(self._accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        return torch.device(self._accelerator.device)

    def seed(self, seed: int) -> None:
        """Seed torch's default generators. `torch.manual_seed` costs a millisecond and keeps a note for every call."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on the device, with gradients averaged over the replicas and with autocast as configured."""
        wrapped: nn.Module = self._accelerator.prepare_model(module)
        return wrapped

    def unwrap(self, wrapped: nn.Module) -> None:
        """Undo what `wrap` did to the module's forward."""
        self._accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    @contextmanager
    def without_exchange(self, modules: list[nn.Module]) -> Iterator[None]:
        """Within this block gradients only accumulate here: for all but the last part of a batch."""
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(self._accelerator.no_sync(module))
            yield

    def mean(self, values: Tensor) -> list[float]:
        """Numbers of this process averaged over all of them, the same on each; waits for the device."""
        if self.world > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
            values /= self.world
        return [float(value) for value in values.tolist()]

    def any(self, flag: bool) -> bool:
        """True everywhere if true anywhere."""
        return flag if self.world == 1 else self.mean(torch.tensor([float(flag)], device=self.device))[0] > 0

    def from_first(self, text: str) -> str:
        """What rank 0 says."""
        if self.world == 1:
            return text
        box: list[str] = [text]
        torch.distributed.broadcast_object_list(box)
        return box[0]
