"""Matrix products of a step: a few rows, a weight that stays the same for hundreds of them.

R rows, I inputs, O outputs
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Product:
    """x W^T. On the CPU the weight is kept as oneDNN's kernel reads it: a step of few rows lasts as long as its weights take
    to arrive from memory, and this way it takes half to two thirds of the time of a weight in its usual order."""

    def __init__(self, weight_OI: Tensor, *, rows: int, dtype: torch.dtype):
        """dtype: of the product.  rows: of x."""
        weight_OI = weight_OI.to(dtype)
        self.is_packed = (
            weight_OI.device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows) if self.is_packed else weight_OI

    def __call__(self, x_RI: Tensor) -> Tensor:
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(x_RI, self.weight, None, "none", [], "")
        return F.linear(x_RI, self.weight)
