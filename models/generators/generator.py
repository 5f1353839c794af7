"""What every generator is: a network that is built from its config and the shape of its codes, and learns which codes follow
which. How it is sampled is another module's, which the network does not know.

B rows, T tokens of an image
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.generators.config import GENERATORS, LOOPS, CodeShape, GeneratorSettings
from models.registry import load

Streams = Callable[[str], np.random.Generator]
"""From a name to its random numbers, which depend on the seed of the training, the name and the step."""


class Generator(nn.Module, ABC):
    """A subclass is `Network(config, shape)`; ValueError if its config refuses the shape."""

    config: Any

    def __init__(self, config: GeneratorSettings, shape: CodeShape):
        super().__init__()
        config.check(shape)
        self.config, self.shape = config, shape
        self.checkpoint_blocks = False
        """Whether each of the repeated blocks is computed again in the backward pass instead of keeping its activations."""

    def draws(self, streams: Streams, rows: int, step: int) -> dict[str, NDArray[Any]]:
        """What chance decides in a training step, for all `rows` of its global batch (the first axis): arguments of `loss`.

        Which of them there are depends on the step alone.
        """
        return {}

    @abstractmethod
    def loss(
        self, codes_BT: Tensor, condition: Tensor | None, **draws: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy of all B*T codes, and named scalars, {"correct": share of argmax hits} among them.

        codes_BT: int64 in raster order.  condition: labels (B,) or codes (B, S) of another space, int64, or None.  Without
        draws nothing is left to chance, and the condition is given.
        """

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Learn from codes (N, T) and labels (N,), a block of them after the other, where the config says "counting"."""
        raise NotImplementedError

    def decayed(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies to a parameter."""
        return parameter.ndim >= 2

    def repeated_blocks(self) -> Iterable[nn.Module]:
        """The blocks that are compiled where that is asked for, all alike."""
        return ()


def build_generator(config: GeneratorSettings, shape: CodeShape) -> Generator:
    """The network of a kind, with fresh parameters. ValueError if it cannot work on such codes."""
    network: Generator = load(GENERATORS[config.kind].network)(config, shape)
    return network


def build_decoder(
    model: Generator, *, rows: int, guided: bool, orders: Tensor | None = None, dtype: torch.dtype | None = None
) -> Any:
    """What samples from these weights as they are now, in passes of `rows` (see `models.sampling.loop.Decoder`).

    orders: the position in raster order that each step lays, (T,) for all rows or (rows, T) one each; default: the
    generator's own.  dtype: of the blocks' weights and of the cache, default theirs.
    """
    return load(GENERATORS[model.config.kind].decoder)(model, rows=rows, guided=guided, orders=orders, dtype=dtype)


def loop_of(config: GeneratorSettings) -> Any:
    """The loop that the kind is sampled by: (decoder, condition, sample ids, config=, seed=, stream=) to codes (rows, T)."""
    return load(LOOPS[config.sampled_by])
