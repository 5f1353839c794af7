"""Estimates of the memory that training and sampling of GPT take; no torch here, so that planning needs none.

In training, activations of a block are counted as autograd keeps them, per position: D width, M hidden width of the MLP, and P bytes
of a number in products (2 under autocast to bfloat16, else 4). Norms and the residual stream are float32 throughout.

| what | bytes |
|---|---|
| two norms: input and output; the output as products take it | 16 D + 2 D P |
| query, key and value; attention's result, and its transposed copy | 5 D P |
| masks of dropout after attention and MLP (one byte; P on the CPU) | 2 D |
| MLP: before and after GELU | 2 M P |
"""

from __future__ import annotations

from models.generators.config import SPECIALS, UNREAD_POSITIONS, CodeShape, GptConfig
from models.generators.masks import LARGEST_PIECE
from models.generators.memory import FEWEST_ROWS, SHORTEST_PRODUCT

KEPT_PER_PARAMETER = 16  # float32: itself, its gradient, two moments of AdamW
WORK = 1.1  # gradients of one block at a time, and rounding by allocators
DRAWING = 8 + 8 + 4 + 4 + 4  # bytes per logit: cumulative sums and likelihoods in float64, logits, tempered, filtered


def training_bytes(
    config: GptConfig,
    shape: CodeShape,
    *,
    rows: int,
    is_half: bool,
    is_averaged: bool,
    checkpoints_activations: bool,
    device_type: str,
) -> int:
    """See `models.generators.memory`."""
    product = 2 if is_half else 4
    block = block_bytes(config, product=product, device_type=device_type)
    kept = 4 * config.width if checkpoints_activations else block
    recomputed = 2 * block if checkpoints_activations else 0  # one block at a time, with its gradients
    logits = (shape.codes + SPECIALS) * (product + 3 * 4)  # logits, their float32 copy, softmax, gradient
    activations = positions(shape) * (config.layers * kept + recomputed) + (shape.tokens + 1) * logits
    of_parameters = KEPT_PER_PARAMETER + 4 * is_averaged + 2 * is_half
    return int(of_parameters * parameters(config, shape) + WORK * rows * activations)


def block_bytes(config: GptConfig, *, product: int, device_type: str) -> int:
    """Activations of one block per position."""
    mask = product if device_type == "cpu" else 1
    return config.width * (16 + 7 * product + 2 * mask) + 2 * config.mlp_width * product


def positions(shape: CodeShape) -> int:
    """Of a whole sequence: codes of the condition, start, codes."""
    return (shape.condition.tokens if shape.condition else 0) + 1 + shape.tokens


def parameters(config: GptConfig, shape: CodeShape) -> int:
    """Number of parameters."""
    width, hidden = config.width, config.mlp_width
    block = 4 * (width + 1) * width + 2 * width * hidden + width + hidden + 4 * width
    tables = config.vocabulary(shape) + (1 + bool(shape.condition)) * (config.positions + UNREAD_POSITIONS)
    head = (shape.codes + SPECIALS) * width + 2 * width * (config.norm == "pre")
    return config.layers * block + tables * width + head


def sampling_bytes(
    config: GptConfig, shape: CodeShape, *, rows: int, guided: bool, bytes_per_number: int, device_type: str
) -> int:
    """See `models.generators.memory`."""
    width, hidden, vocabulary = config.width, config.mlp_width, shape.codes + SPECIALS
    blocks = config.layers * (4 * width * width + 2 * width * hidden)
    at_once = 4 * (4 * width) + bytes_per_number * (5 * width + 2 * hidden)  # of a position while a block is computed
    weights = 4 * parameters(config, shape)
    if config.sampled_by == "masks":
        cast = bytes_per_number * blocks if bytes_per_number != 4 else 0
        logits = 8 * (shape.tokens + 1) * vocabulary  # and their float32 copy
        drawing = DRAWING * min(LARGEST_PIECE, rows * shape.tokens * vocabulary)
        return weights + cast + rows * (positions(shape) * at_once + logits) + drawing
    # The decoder's own copies of weights of blocks and head.
    is_copied = (device_type == "cpu" and rows > FEWEST_ROWS) or bytes_per_number != 4
    copied = bytes_per_number * blocks + 4 * vocabulary * width if is_copied else 0
    cached = max(positions(shape) - 1, SHORTEST_PRODUCT)  # the last code is not fed
    cache = 2 * config.layers * width * cached * bytes_per_number
    first = (positions(shape) - shape.tokens) * at_once
    return weights + copied + rows * (cache + first + DRAWING * vocabulary)
