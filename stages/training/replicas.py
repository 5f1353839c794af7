"""The processes of one training, through accelerate: mixed precision, replicas, and agreement between them.

`torchrun` and `accelerate launch` start several processes, which communicate by NCCL on CUDA and by gloo on the CPU. A single
process has no overhead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from stages.devices import Precision, pick_device

ACCELERATE_NAMES = {"float32": "no", "tf32": "no", "bfloat16": "bf16"}
CHUNK = 2**22  # bytes of which a checksum is made at a time


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

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast as in training, for code outside of wrapped modules."""
        context: AbstractContextManager[None] = self._accelerator.autocast()
        return context

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

    def mean_of_sums(self, sums: Sequence[float], count: int) -> list[float]:
        """Means over `count` values of which each process summed up its own, the same on each."""
        means = self.mean(torch.tensor(sums, dtype=torch.float64, device=self.device))
        return [mean * self.world / count for mean in means]

    def total(self, counts: Tensor) -> Tensor:
        """Whole numbers of all processes added up, as a CPU tensor."""
        if self.world == 1:
            return counts
        counts = counts.to(self.device, copy=True)
        torch.distributed.all_reduce(counts)
        return counts.cpu()

    def gather(self, values: Tensor) -> Tensor:
        """Tensors of equal shape of all processes, joined along the first axis in the order of ranks."""
        if self.world == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each is true everywhere if it is true anywhere."""
        if self.world == 1:
            return flags
        return tuple(share > 0 for share in self.mean(torch.tensor(flags, dtype=torch.float32, device=self.device)))

    def unequal(self, named: Mapping[str, Tensor]) -> list[str]:
        """Which of these tensors differ between the processes, by a checksum of their bytes."""
        if self.world == 1 or not named:
            return []
        sums = torch.stack([checksum(tensor.detach()) for tensor in named.values()]).to(self.device)
        highest, lowest = sums.clone(), sums.clone()
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
        return [name for name, is_odd in zip(named, (highest != lowest).tolist(), strict=True) if is_odd]

    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the buffers of the first: running statistics are each process's own while it trains."""
        if self.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def from_first(self, text: str) -> str:
        """What rank 0 says."""
        if self.world == 1:
            return text
        box: list[str] = [text]
        torch.distributed.broadcast_object_list(box)
        return box[0]


def checksum(tensor: Tensor) -> Tensor:
    """An int64 that depends on every byte and its place, of a tensor of any type; a chunk of it is copied at a time."""
    stored = tensor.contiguous().flatten().view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, len(stored), CHUNK):
        chunk = stored[first : first + CHUNK]
        total += (chunk * torch.arange(first + 1, first + 1 + len(chunk), device=chunk.device)).sum()
    return total
