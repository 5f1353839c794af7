"""Rotary positions of a grid (arXiv 2104.09864, in two dimensions), as published Llama-style image generators have them.

Half of a head's pairs of channels are rotated by the row of a code, the other half by its column. The first row of the table,
which belongs to the class, is zero: cosine and sine are both 0 (not the identity rotation), so that query and key
there are zero vectors. Every query gives the class a score of 0; its value still counts.

J = 1 + h w positions, E width of a head, F = E / 2 pairs of adjacent channels
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 10_000


def rope_table(grid: tuple[int, int], head_width: int) -> Tensor:
    """Cosine and sine of each pair at each position, (J, F, 2) float32; head_width is a multiple of 4."""
    height, width = grid
    frequencies = BASE ** (-torch.arange(0, head_width // 2, 2).float() / (head_width // 2))
    rows, columns = (torch.outer(torch.arange(size).float(), frequencies) for size in grid)
    angles_hwF = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
    angles_TF = angles_hwF.flatten(0, 1)
    table_TF2 = torch.stack([angles_TF.cos(), angles_TF.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table_TF2[:1]), table_TF2])


def rotate(x_BJHE: Tensor, table_JF2: Tensor) -> Tensor:
    """Rotate the pairs of all heads, in float32: (a cos - b sin, b cos + a sin)."""
    pairs_BJHF2, table_J1F2 = x_BJHE.float().unflatten(-1, (-1, 2)), table_JF2[:, None]
    if (
        not torch.compiler.is_compiling()
    ):  # complex numbers take a quarter of the time; the compiler does not support them
        rotated_BJHF = torch.view_as_complex(pairs_BJHF2) * torch.view_as_complex(table_J1F2)
        return torch.view_as_real(rotated_BJHF).flatten(-2)
    (first, second), (cos, sin) = pairs_BJHF2.unbind(-1), table_J1F2.unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
