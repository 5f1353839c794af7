"""Estimates of the memory that generators take whose logits are a table, always in float32."""

from __future__ import annotations

from typing import Any

from models.generators.config import CodeShape, CountingSettings, HistogramConfig


def sampling_bytes(config: CountingSettings, shape: CodeShape, *, rows: int, **asked: Any) -> int:
    """Work per row; of the histogram also the counts, and the table of logits while it is made."""
    table = 24 * (shape.classes + 1) * shape.tokens * shape.codes if isinstance(config, HistogramConfig) else 0
    return table + rows * 32 * shape.codes
