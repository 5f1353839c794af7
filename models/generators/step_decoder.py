"""The base class of autoregressive decoders: streams, positions and CUDA graphs.

B rows of a pass, R streams (B, or 2B with guidance: the conditional half first), T tokens, D width
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from weakref import WeakMethod

import torch
from torch import Tensor

from models.generators.generator import Generator
from models.generators.step_graphs import Capture, GraphPool, StepGraphs
from models.sampling.heads import Head


class StepDecoder(ABC):
    """Passes of `rows` samples through one set of weights; buffers are allocated once for all passes.

    The weights are read as they are at construction: build another decoder after an optimizer step. A pass is `prefill`
    and then `step` for each further token; both return the hidden states that `head` draws the next codes from.

    A subclass sets `head`, and turns a condition, and then the codes, into inputs of `compute`, which it passes to `feed`:
    `compute` holds the work that is the same in every pass, because on CUDA it is recorded as a graph.
    """

    head: Head

    def __init__(
        self,
        model: Generator,
        *,
        rows: int,
        guided: bool,
        orders: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ):
        """orders: (T,) for all rows or (rows, T), if the generator takes any; default its own.

        dtype: of weights and cache, default the weights' own.
        """
        weight = next(iter(model.state_dict(keep_vars=True).values()))
        self.device, self.dtype = weight.device, dtype or weight.dtype
        self.rows, self.guided, self.streams = rows, guided, rows * (1 + guided)
        self.shape, self.tokens, self.subtokens = model.shape, model.shape.tokens, model.config.subtokens(model.shape)
        self.set_orders(orders)
        self.position = 0
        self.graphs: StepGraphs | None = None
        self.buffers: tuple[Tensor, ...] = ()
        self.hidden_RD: Tensor | None = None

    def set_orders(self, orders: Tensor | None) -> None:
        """Set the orders of the next passes: (T,) for all rows, (rows, T), or None for raster order."""
        self.orders_BT = None if orders is None else orders.to(self.device).expand(self.rows, -1)

    @torch.inference_mode()
    def prefill(self, condition: Tensor | None) -> Tensor:
        """Start a pass for labels (rows,), where `classes` means none, or codes (rows, S) of another space, or None.

        Hidden states (R, D).
        """
        self.position = 0
        return self.begin(None if condition is None else condition.to(self.device))

    @torch.inference_mode()
    def step(self, codes_B: Tensor) -> Tensor:
        """Append the code of the last step, one per row. Hidden states (R, D)."""
        self.position += 1
        return self.append(codes_B)

    @abstractmethod
    def begin(self, condition: Tensor | None) -> Tensor:
        """Feed the condition, all its positions at once, and set `position` to the last one."""

    @abstractmethod
    def append(self, codes_B: Tensor) -> Tensor:
        """Feed codes, at `position`."""

    @abstractmethod
    def compute(self, position: int, *inputs: Tensor) -> Tensor:
        """Hidden states (R, D), in new tensors, from inputs shaped as those of `allocate`; adds a position to the cache."""

    def allocate(self) -> tuple[Tensor, ...]:
        """One tensor for each input of `compute`."""
        raise NotImplementedError

    def streams_of(self, rows: Tensor) -> Tensor:
        """Rows as streams: twice with guidance."""
        return torch.cat([rows, rows]) if self.guided else rows

    def labels_of(self, labels_B: Tensor) -> Tensor:
        """The label of each stream: with guidance, "no class" in the second half."""
        return torch.cat([labels_B, torch.full_like(labels_B, self.shape.classes)]) if self.guided else labels_B

    def feed(self, position: int, *inputs: Tensor) -> Tensor:
        """`compute`, as a graph if graphs are in use. An input that is one of `buffers` is not copied."""
        if self.graphs is None:
            return self.compute(position, *inputs)
        for buffer, given in zip(self.buffers, inputs, strict=True):
            if given is not buffer:
                buffer.copy_(given)
        self.graphs(position)
        assert self.hidden_RD is not None
        return self.hidden_RD.clone()

    def use_graphs_on_cuda(self) -> None:
        """To be called at the end of a subclass's constructor."""
        if self.device.type == "cuda":
            self.use_graphs(GraphPool(self.device))

    @torch.inference_mode()
    def use_graphs(self, capture: Capture) -> None:
        """Run the following steps as graphs, on static buffers."""
        self.buffers = self.allocate()
        compute = WeakMethod(
            self._compute_in_place
        )  # no reference cycle: memory is freed with the last reference to the decoder
        self.graphs = StepGraphs(lambda position: compute()(position), capture)

    def _compute_in_place(self, position: int) -> None:
        hidden_RD = self.compute(position, *self.buffers)
        if self.hidden_RD is None:
            self.hidden_RD = torch.empty_like(hidden_RD)
        self.hidden_RD.copy_(hidden_RD)
