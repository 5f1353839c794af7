"""Estimates of the memory that Llama-style generators take; no torch here, so that planning needs none.

In training, activations of a block are counted as autograd keeps them, per position: D width, V hidden width of the MLP,
and P bytes of a number in products (2 under autocast to bfloat16, else 4). Norms and the residual stream are float32.

| what | bytes |
|---|---|
| two norms: input, and normalised | 16 D |
| inputs of wqkv and of the MLP | 2 D P |
| query, key and value; query and key rotated; attention's result and its transposed copy; masks of dropout (P on the CPU) | 7 D P + 2 D |
| MLP: both inner products, SiLU, input of w2 | 4 V P |
| modulated: both norms' results before; both sums before their gates | 8 D + 2 D P |
"""

from __future__ import annotations

from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig

KEPT_PER_PARAMETER = 16  # float32: itself, its gradient, two moments of AdamW
WORK = 1.1  # gradients of one block at a time, and rounding by allocators

MANY_CODES = 2**16  # from here on the cross entropy is tiled; with fewer codes tiling costs more time than it is worth
CPU_TILE, DEVICE_TILE = 2**21, 2**25  # logits of a tile: a CPU's cache, or enough work for a device
SHORTEST_PRODUCT = 16  # keys: batched products of fewer take a slow path on the CPU
CLASSES_AT_ONCE = (
    16  # products of a fixed shape, so that a class's modulations do not depend on the other classes of a pass
)


def training_bytes(
    config: LlamaConfig | FactorizedConfig,
    shape: CodeShape,
    *,
    rows: int,
    is_half: bool,
    is_averaged: bool,
    checkpoints_activations: bool,
    device_type: str,
) -> int:
    """See `models.generators.memory`."""
    positions, product = rows * shape.tokens, 2 if is_half else 4
    block = block_bytes(config, product=product, device_type=device_type)
    kept = 4 * config.width if checkpoints_activations else block
    recomputed = 2 * block if checkpoints_activations else 0  # one block at a time, with its gradients
    factors = config.subtokens(shape)
    inner = len(factors) * config.head_layers if isinstance(config, FactorizedConfig) else 0
    # Logits, their float32 copy, softmax, gradient.
    logits = sum(factor * (product + 3 * 4) for factor in factors if factor < MANY_CODES)
    tile = DEVICE_TILE if device_type != "cpu" else CPU_TILE
    tiles = 4 * 4 * tile if max(factors) >= MANY_CODES else 0
    ends = config.width * (8 + 3 * 4 * len(factors))  # embeddings, and inputs of the linear layers
    activations = positions * ((config.layers + inner) * kept + logits + ends + recomputed)
    of_parameters = KEPT_PER_PARAMETER + 4 * is_averaged + 2 * is_half
    return int(of_parameters * parameters(config, shape) + WORK * activations) + tiles


def block_bytes(config: LlamaConfig | FactorizedConfig, *, product: int, device_type: str) -> int:
    """Activations of one block per position."""
    mask = product if device_type == "cpu" else 1
    kept = config.width * (16 + 9 * product + 2 * mask) + 4 * config.mlp_width * product
    return kept + config.width * (8 + 2 * product) * isinstance(config, LlamaConfig)


def parameters(config: LlamaConfig | FactorizedConfig, shape: CodeShape) -> int:
    """Number of parameters."""
    width, factors = config.width, config.subtokens(shape)
    block = 4 * width * width + 3 * width * config.mlp_width + 2 * width
    ends = (2 * sum(factors) + shape.classes + 2) * width
    if isinstance(config, FactorizedConfig):
        return (config.layers + config.head_layers) * block + ends
    return config.layers * block + (6 * config.layers + 2) * (width + 1) * width + ends


def sampling_bytes(
    config: LlamaConfig | FactorizedConfig,
    shape: CodeShape,
    *,
    rows: int,
    guided: bool,
    bytes_per_number: int,
    device_type: str,
) -> int:
    """See `models.generators.memory`. A decoder keeps packed copies of the weights of blocks and head."""
    width, hidden, streams, factors = config.width, config.mlp_width, rows * (1 + guided), config.subtokens(shape)
    block = width * (4 * width + 3 * hidden)
    cached = config.layers * max(shape.tokens, SHORTEST_PRODUCT)
    blocks = config.layers
    modulations = 0
    if isinstance(config, FactorizedConfig):
        blocks += config.head_layers
        cached += config.head_layers * max(len(factors), SHORTEST_PRODUCT)
    else:
        classes = -(-(min(rows, shape.classes) + 1) // CLASSES_AT_ONCE) * CLASSES_AT_ONCE
        modulations = (6 * config.layers + 2) * width * (streams + 2 * classes)
    weights = (
        4 * parameters(config, shape) + bytes_per_number * blocks * block + 4 * width * sum(factors) + 3 * 4 * block
    )
    work = streams * (12 * width + 4 * hidden + 8 * max(factors) + 2 * shape.tokens * config.heads)
    return weights + bytes_per_number * 2 * streams * width * cached + 4 * (modulations + work)
