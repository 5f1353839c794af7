"""Steps of a decoder as CUDA graphs: hundreds of small kernels are started as one.

A step at one position does the same each time, on buffers that never move; what differs between positions is how much of
the cache is read. So there is one graph per position. The first pass runs as it is and warms everything up; the second
records; all others replay.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

Work = Callable[[], None]
Capture = Callable[[Work], Work]


class StepGraphs:
    """`run(position)` as graphs: it reads and writes buffers that never move, and waits for nothing."""

    def __init__(self, run: Callable[[int], None], capture: Capture):
        """capture: records what a function does without doing it, and returns what does it again."""
        self._run, self._capture = run, capture
        self._seen: set[int] = set()
        self._graphs: dict[int, Work] = {}

    def __call__(self, position: int) -> None:
        """Do the step at a position."""
        if position not in self._seen:
            self._seen.add(position)
            self._run(position)
            return
        if position not in self._graphs:
            self._graphs[position] = self._capture(partial(self._run, position))
        self._graphs[position]()


class GraphPool:
    """Captures CUDA graphs that share the memory of what they compute on the way: they never run at the same time."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device, priority=-1)  # before what runs beside it, such as decoding
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """What does `work` again; its tensors must be gone when it returns, but for the buffers that it writes."""
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
