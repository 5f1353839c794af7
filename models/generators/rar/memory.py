"""About how much memory a training of RAR takes; no torch here, so that planning needs none.

Activations of a block are counted as autograd keeps them, per position: D width, M hidden width of the MLP, and P bytes
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

from models.generators.config import SPARE_POSITIONS, SPARE_STEPS, RarConfig

KEPT_PER_PARAMETER = 16  # float32: itself, its gradient, two moments of AdamW
WORK = 1.1  # gradients of one block at a time, and what allocators round up


def training_bytes(
    config: RarConfig,
    *,
    codes: int,
    tokens: int,
    classes: int,
    rows: int,
    is_half: bool,
    is_averaged: bool,
    checkpoints_activations: bool,
    device_type: str,
) -> int:
    """Of one process that trains with passes of `rows`: parameters, optimizer, and a pass with its gradients.

    is_half: products under autocast to bfloat16.  is_averaged: averaged weights are kept, too.
    """
    positions = rows * (tokens + 1)
    product = 2 if is_half else 4
    block = block_bytes(config, tokens=tokens, product=product, device_type=device_type)
    kept = 4 * config.width if checkpoints_activations else block
    logits = codes * (product + 3 * 4)  # as they are, as float32, normalised, and their gradient
    made_again = 2 * block if checkpoints_activations else 0  # one block at a time, with its gradients
    activations = positions * (config.layers * kept + logits + made_again)
    of_parameters = KEPT_PER_PARAMETER + 4 * is_averaged + 2 * is_half
    return int(of_parameters * parameters(config, codes=codes, tokens=tokens, classes=classes) + WORK * activations)


def block_bytes(config: RarConfig, *, tokens: int, product: int, device_type: str) -> int:
    """Activations of one block per position."""
    on_cpu = device_type == "cpu"
    mask = product if on_cpu else 1
    kept = config.width * (24 + 19 * product + 2 * mask) + config.mlp_width * (2 * product + mask)
    if on_cpu and config.attention_dropout:  # the one kernel that drops there keeps three whole matrices
        kept += 3 * 4 * config.heads * (tokens + 1)
    return kept


def parameters(config: RarConfig, *, codes: int, tokens: int, classes: int) -> int:
    """How many there are."""
    width, hidden = config.width, config.mlp_width
    attention = 4 * width * width + 4 * width + 4 * config.head_width
    mlp = 2 * width * hidden + width + hidden
    blocks = config.layers * (attention + mlp + 4 * width + 6 * (width + 1) * width)
    head = 2 * (width + 1) * width + (width + 1) * codes
    tables = (codes + classes + 2) + 2 * (tokens + SPARE_POSITIONS) + (tokens + SPARE_STEPS) + 1
    return blocks + head + tables * width
