"""The base class of generators: a network built from its config and the shape of its codes. Sampling is in other modules.

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
"""From a name to a random generator, seeded by the seed of the training, the name and the step."""


class Generator(nn.Module, ABC):
    """A subclass is `Network(config, shape)`; ValueError if its config refuses the shape."""

    config: Any

    def __init__(self, config: GeneratorSettings, shape: CodeShape):
        super().__init__()
        config.check(shape)
        self.config, self.shape = config, shape
        self.checkpoint_blocks = False
        """Whether activations of the repeated blocks are recomputed in the backward pass (activation checkpointing)."""

    def draws(self, streams: Streams, rows: int, step: int) -> dict[str, NDArray[Any]]:
        """The random variables of a training step, for all `rows` of its global batch (first axis): arguments of `loss`.

        Their names depend on the step alone.
        """
        return {}

    @abstractmethod
    def loss(
        self, codes_BT: Tensor, condition: Tensor | None, **draws: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy of all B*T codes, and named scalars, {"correct": share of argmax hits} among them.

        codes_BT: int64 in raster order.  condition: labels (B,) or codes (B, S) of another space, int64, or None.
        Without draws the loss is deterministic and conditional.
        """

    def hidden_states(self, codes_BT: Tensor, layer: int) -> Tensor:
        """Input of the first block (layer 0), or output of block `layer`, at each of J positions, (B, J, D).

        codes_BT: int64 in raster order.  No condition is given. ValueError where `config.check_layer` refuses the layer.
        """
        self.config.check_layer(layer)
        raise NotImplementedError

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Learn from blocks of codes (N, T) and labels (N,), where the config is `trained_by` counting."""
        raise NotImplementedError

    def decayed(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay applies to a parameter."""
        return parameter.ndim >= 2

    def repeated_blocks(self) -> Iterable[nn.Module]:
        """Blocks of one structure, which are compiled one by one if compilation is on."""
        return ()


def build_generator(config: GeneratorSettings, shape: CodeShape) -> Generator:
    """The network of a config, with fresh parameters. ValueError if its config does not fit the codes."""
    network: Generator = load(GENERATORS[config.kind].network)(config, shape)
    return network


def build_decoder(
    model: Generator, *, rows: int, guided: bool, orders: Tensor | None = None, dtype: torch.dtype | None = None
) -> Any:
    """A decoder (see `models.sampling.loop.Decoder`) that samples from the present weights, in passes of `rows`.

    orders: the position in raster order that each step generates, (T,) for all rows or (rows, T); default: the
    generator's own.  dtype: of the blocks' weights and of the cache, default that of the weights.
    """
    return load(GENERATORS[model.config.kind].decoder)(model, rows=rows, guided=guided, orders=orders, dtype=dtype)


def loop_of(config: GeneratorSettings) -> Any:
    """The sampling loop of the kind: (decoder, condition, sample ids, config=, seed=, stream=) to codes (rows, T)."""
    return load(LOOPS[config.sampled_by])
