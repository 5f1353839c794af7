"""The codes that a tokenizer uses, and warnings if its codebook collapses.

All processes count together, in blocks; an interrupted count continues from the counts in the draft's scratch folder. Counts
are exact and do not depend on the number of processes. Warnings name settings of the quantizer.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models.tokenizer_config import TokenizerConfig
from pipeline.draft import SCRATCH, Draft
from stages.codes.code_usage import CodeUsage
from stages.images.passes import to_images
from stages.training.images import TrainingImages
from stages.training.replicas import Replicas

COLLAPSE = 0.5  # share of the codes which could be in use and are not that is worth a warning
ADVICE = {
    "vector": "revive codes, more often or for longer (model.quantizer.revive_every and revive_until), start from latents "
    "(model.quantizer.init), or take fewer codes (model.quantizer.codes)",
    "lookup-free": "raise model.quantizer.entropy_weight, batch_weight or enlarge_ratio, lower "
    "training.optimizer.learning_rate, or take fewer bits (model.autoencoder.latent)",
    "index-backpropagation": "raise model.quantizer.entropy_weight or batch_weight, lower "
    "training.optimizer.learning_rate, or take fewer codes (model.quantizer.codes) or narrower ones "
    "(model.autoencoder.latent)",
}
ADVICE_TO_ALL = (
    "take fewer codes, or lower training.optimizer.learning_rate"  # a quantizer that is added has no line above
)
BLOCK = 8192  # images between two notes of the counts
PREFIX = "usage-"


def collapse(config: TokenizerConfig, *, dead: float, tokens: int) -> str | None:
    """The sentence of a warning, if far more codes are dead than with an even use.

    dead: share of codes that are hardly used lately.  tokens: codes of one training step.
    """
    codes = config.codebook_size
    alive = alive_if_even(codes, tokens=tokens, decay=config.quantizer.usage_decay, dead_below=dead_below(config))
    if 1 - dead > (1 - COLLAPSE) * alive:
        return None
    return f"{dead:.0%} of the {codes} codes are hardly used: the codebook collapses; {ADVICE.get(config.quantizer.kind, ADVICE_TO_ALL)}"


def collapsed(config: TokenizerConfig, *, used: int, tokens: int) -> str | None:
    """The sentence of a warning, if a trained tokenizer uses far fewer codes than with an even use.

    used: codes that occur among `tokens` ones.
    """
    codes = config.codebook_size
    if used > (1 - COLLAPSE) * codes * -math.expm1(-tokens / codes):
        return None
    return f"the tokenizer uses {used} of its {codes} codes: the codebook collapsed; {ADVICE.get(config.quantizer.kind, ADVICE_TO_ALL)}"


def dead_below(config: TokenizerConfig) -> float:
    """Less than this share of an even use makes a code dead."""
    quantizer = config.quantizer
    return quantizer.revive_below if quantizer.kind == "vector" else quantizer.dead_below


def alive_if_even(codes: int, *, tokens: int, decay: float, dead_below: float) -> float:
    """Share of codes that a running use would call alive if each was equally likely.

    One occurrence counts (1 - decay) / tokens at first, and keeps a code alive until that has decayed to dead_below / codes.
    In so many steps a large codebook may not come round once: then its dead codes are no sign of a collapse.
    """
    if not dead_below:
        return 1.0
    if not decay:
        steps = 1.0
    else:
        steps = math.log(max((1 - decay) * codes / (dead_below * tokens), 1.0)) / -math.log(decay)
    return 1.0 if steps <= 0 else -math.expm1(-steps * tokens / codes)


def count_codes(
    encode: Callable[[Tensor], Tensor],
    images: TrainingImages,
    replicas: Replicas,
    out: Draft,
    *,
    codes: int,
    rows: int,
) -> CodeUsage:
    """Codes of the upright views of all images, complete in the first process; every process has to call it.

    encode: images in [0,1] (rows, 3, S, S) to their codes (rows, ...), each in [0, codes).
    """
    usage, done = CodeUsage(codes), 0
    if replicas.rank == 0:
        done = _take_up(usage, out)
    done = int(replicas.from_first(str(done)))
    for start in range(done, len(images), BLOCK):
        stop, own = min(start + BLOCK, len(images)), CodeUsage(codes)
        for first in range(start + replicas.rank * rows, stop, replicas.world * rows):
            numbers_R = np.minimum(np.arange(first, first + rows), len(images) - 1)  # always so many rows
            with torch.no_grad():
                codes_Rhw = encode(to_images(images.upright(numbers_R), replicas.device))
            own.add(codes_Rhw[: stop - first].cpu().numpy())
        usage.counts_K += replicas.total(torch.from_numpy(own.counts_K)).numpy()
        if replicas.rank == 0 and stop < len(images):
            _note(usage, stop, out)
    return usage


def _take_up(usage: CodeUsage, out: Draft) -> int:
    """Continue the counts of an interrupted run; returns how many images they are of."""
    units = [unit for unit in out.units() if unit.startswith(PREFIX)]
    if not units:
        return 0
    usage.counts_K += np.load(out.files(units[-1])[0], allow_pickle=False)
    return int(units[-1].removeprefix(PREFIX))


def _note(usage: CodeUsage, done: int, out: Draft) -> None:
    before, unit, buffer = (
        [unit for unit in out.units() if unit.startswith(PREFIX)],
        f"{PREFIX}{done:012d}",
        io.BytesIO(),
    )
    np.save(buffer, usage.counts_K, allow_pickle=False)
    out.put(unit, {f"{SCRATCH}/{unit}.npy": buffer.getvalue()})
    for old in before:
        out.drop(old)
