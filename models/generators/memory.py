"""The memory that a generator takes, estimated by its kind's own functions; no torch here, so that planning needs none."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from models.generators.config import GENERATORS, CodeShape, GeneratorSettings

FEWEST_ROWS = 4  # up to here products on the CPU take unpacked weights: see `models.generators.products`
SHORTEST_PRODUCT = 16  # keys: batched products of fewer take a slow path on the CPU


def training_bytes(config: GeneratorSettings, shape: CodeShape, **asked: Any) -> int | None:
    """Bytes of one process that trains with passes of `rows`: parameters, optimizer, and a pass with its gradients.

    rows: of a pass.  is_half: products under autocast to bfloat16.  is_averaged: averaged weights are kept, too.
    checkpoints_activations, device_type.  None: the kind has no estimate.
    """
    return _estimate("training_bytes", config, shape, asked)


def sampling_bytes(config: GeneratorSettings, shape: CodeShape, **asked: Any) -> int | None:
    """Bytes of one process that samples passes of `rows`: weights, the decoder's copies of them, cache, work.

    rows: of a pass.  guided: with a second stream for each.  bytes_per_number: of blocks and cache.  device_type.  None: the
    kind has no estimate.
    """
    return _estimate("sampling_bytes", config, shape, asked)


def _estimate(name: str, config: GeneratorSettings, shape: CodeShape, asked: dict[str, Any]) -> int | None:
    entry = GENERATORS.get(config.kind)
    module = entry and entry.memory
    estimate = module and getattr(import_module(module), name, None)
    return int(estimate(config, shape, **asked)) if estimate else None
