"""Estimates of the memory that training and sampling of RAR take; no torch here, so that planning needs none.

In training, activations of a block are counted as autograd keeps them, per position: D width, M hidden width of the MLP, and P bytes
of a number in products (2 under autocast to bfloat16, else 4). Norms and the residual stream are float32 throughout.

| what | bytes |
|---|---|
| modulation: its input, and six results | 7 D P |
| two norms: input, output; 1 + scale | 16 D + 2 D P |
| query, key and value; query and key normalised, as float32 and as the kernel takes them; attention's result | 8 D + 6 D P |
| inputs of qkv and of the MLP; attention and MLP after dropout, and its masks (one byte; P on the CPU) | 4 D P + 2 D |
| MLP: before and after GELU and dropout, and its mask | 2 M P + M |
"""

from __future__ import annotations

from models.generators.config import SPARE_POSITIONS, SPARE_STEPS, CodeShape, RarConfig

KEPT_PER_PARAMETER = 16  # float32: itself, its gradient, two moments of AdamW
WORK = 1.1  # gradients of one block at a time, and rounding by allocators

STRETCH = 64  # steps of modulations that a decoder keeps at a time, if the table is not too large
SHORTEST_STRETCH = 16  # shorter ones would read the weights too often
CPU_TABLE_BYTES, DEVICE_TABLE_BYTES = 2**30, 2**33  # largest table of the modulations of a stretch
FEW_STREAMS = 8  # up to here the compiled step is the faster one on a CPU, at widths of 256 to 1,408
SHORTEST_PRODUCT = 16  # keys: batched products of fewer take a slow path on the CPU


def training_bytes(
    config: RarConfig,
    shape: CodeShape,
    *,
    rows: int,
    is_half: bool,
    is_averaged: bool,
    checkpoints_activations: bool,
    device_type: str,
) -> int:
    """See `models.generators.memory`."""
    positions = rows * (shape.tokens + 1)
    product = 2 if is_half else 4
    block = block_bytes(config, tokens=shape.tokens, product=product, device_type=device_type)
    kept = 4 * config.width if checkpoints_activations else block
    logits = shape.codes * (product + 3 * 4)  # logits, their float32 copy, softmax, gradient
    recomputed = 2 * block if checkpoints_activations else 0  # one block at a time, with its gradients
    activations = positions * (config.layers * kept + logits + recomputed)
    of_parameters = KEPT_PER_PARAMETER + 4 * is_averaged + 2 * is_half
    return int(of_parameters * parameters(config, shape) + WORK * activations)


def block_bytes(config: RarConfig, *, tokens: int, product: int, device_type: str) -> int:
    """Activations of one block per position."""
    on_cpu = device_type == "cpu"
    mask = product if on_cpu else 1
    kept = config.width * (24 + (12 + 7 * config.modulated) * product + 2 * mask) + config.mlp_width * (
        2 * product + mask
    )
    if on_cpu and config.attention_dropout:  # the CPU kernel with dropout keeps three attention matrices
        kept += 3 * 4 * config.heads * (tokens + 1)
    return kept


def parameters(config: RarConfig, shape: CodeShape) -> int:
    """Number of parameters."""
    width, hidden = config.width, config.mlp_width
    attention = 4 * width * width + 4 * width + 4 * config.head_width
    mlp = 2 * width * hidden + width + hidden
    modulations = (6 * config.layers + 2) * (width + 1) * width if config.modulated else 2 * width
    blocks = config.layers * (attention + mlp + 4 * width)
    tables = shape.codes + shape.classes + 2 + 2 * (shape.tokens + SPARE_POSITIONS) + 1
    tables += (shape.tokens + SPARE_STEPS) * config.modulated
    return blocks + modulations + (width + 1) * shape.codes + tables * width


def sampling_bytes(
    config: RarConfig, shape: CodeShape, *, rows: int, guided: bool, bytes_per_number: int, device_type: str
) -> int:
    """See `models.generators.memory`."""
    width, layers, streams, positions = config.width, config.layers, rows * (1 + guided), shape.tokens + 1
    codes, classes = shape.codes, shape.classes
    modulations = (6 * layers + 2) * width
    block = 4 * width * width + 2 * width * config.mlp_width
    of_modulations = modulations * (width if config.modulated else 1)
    own = layers * block + of_modulations + (2 * codes + classes + 3 * (positions + SPARE_POSITIONS)) * width
    # The decoder has joined modulations of its own and, on the CPU with many rows, transposed weights of blocks and head.
    is_copied = (device_type == "cpu" and streams > FEW_STREAMS) or bytes_per_number != 4
    copied = bytes_per_number * layers * block + 4 * codes * width if is_copied else 0
    weights = 4 * own + 4 * of_modulations + copied
    cache = 2 * layers * streams * max(positions, SHORTEST_PRODUCT) * width
    table = min(rows, classes + 1) * min(STRETCH, positions) * modulations if config.modulated else 0
    largest_table = max(table_bytes(device_type), SHORTEST_STRETCH * rows * modulations * 4)
    work = streams * (modulations + 12 * width + config.mlp_width + 8 * codes + 2 * positions * config.heads)
    passes = bytes_per_number * cache + 4 * work + min(4 * table, largest_table)
    joining = (
        3 * 4 * of_modulations
    )  # the network's modulations, their parts and the joined ones, before the cache exists
    return weights + max(passes, joining)


def table_bytes(device_type: str) -> int:
    """Largest table of the modulations of a stretch on a device."""
    return CPU_TABLE_BYTES if device_type == "cpu" else DEVICE_TABLE_BYTES
