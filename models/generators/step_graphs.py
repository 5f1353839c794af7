"""Steps of a decoder as CUDA graphs: hundreds of small kernels are launched at once.

A step at one position is the same in each pass, on static buffers; between positions, the part of the cache that is read
differs. So there is one graph per position. The first pass runs eagerly as a warm-up, the second records, the others replay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

Work = Callable[[], None]
Capture = Callable[[Work], Work]


class StepGraphs:
    """`run(position)` as graphs: it must read and write static buffers and must not synchronise."""

    def __init__(self, run: Callable[[int], None], capture: Capture):
        """capture: records a function without running it, and returns a function that replays it."""
        self._run, self._capture = run, capture
        self._seen: set[int] = set()
        self._graphs: dict[int, Work] = {}

    def __call__(self, position: int) -> None:
        """Run the step at a position."""
        if position not in self._seen:
            self._seen.add(position)
            self._run(position)
            return
        if position not in self._graphs:
            self._graphs[position] = self._capture(partial(self._run, position))
        self._graphs[position]()


class GraphPool:
    """Captures CUDA graphs that share memory for intermediate results: they never run at the same time."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device, priority=-1)  # before other streams, such as that of decoding
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """A function that replays `work`, which must keep no tensor that it allocates."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            # Another thread may allocate meanwhile (images are decoded beside the sampling).
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay
