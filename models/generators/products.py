"""Matrix products of a decoder's steps: a few rows, and one weight for hundreds of products.

R rows, I inputs, O outputs
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.generators.memory import FEWEST_ROWS


class Product:
    """x W^T + b.

    On the CPU a step of few rows is bound by memory bandwidth. Very few rows are multiplied by a loop that numba compiles; for
    more, the weight is packed for oneDNN's kernel, which takes half to two thirds of the time of an unpacked weight.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None, *, rows: int, dtype: torch.dtype):
        """dtype: of the product.  rows: of x with two dimensions; for x with more the weight is not packed."""
        weight_OI = weight_OI.detach().to(dtype)
        bias_O = None if bias_O is None else bias_O.detach().to(dtype)
        self.weight_OI, self.bias_O = weight_OI, bias_O
        self.multiply: Callable[[Tensor], Tensor] = self._plain
        if weight_OI.device.type == "cpu" and dtype == torch.float32:
            self.multiply = compiled(weight_OI, bias_O) if rows <= FEWEST_ROWS else packed(weight_OI, bias_O, rows)

    def __call__(self, x_RI: Tensor) -> Tensor:
        return self.multiply(x_RI) if x_RI.ndim == 2 else self._plain(x_RI)

    def _plain(self, x_RI: Tensor) -> Tensor:
        return F.linear(x_RI, self.weight_OI, self.bias_O)


def compiled(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """By a compiled loop."""
    from models.generators.core_kernels import affine  # numba, which only this needs

    bias_O = weight_OI.new_zeros(len(weight_OI)) if bias_O is None else bias_O
    weight, bias = weight_OI.contiguous().numpy(), bias_O.numpy()
    return lambda x_RI: torch.from_numpy(affine(x_RI.contiguous().numpy(), weight, bias))


def packed(weight_OI: Tensor, bias_O: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """By oneDNN, over a packed copy of the weight."""
    weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)
    return lambda x_RI: torch.ops.mkldnn._linear_pointwise(x_RI, weight, bias_O, "none", [], "")
