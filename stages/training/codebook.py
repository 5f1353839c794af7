"""Whether a codebook collapses, and what to do about it: the advice names settings of the quantizer at hand."""

from __future__ import annotations

import math

from models.tokenizer_config import TokenizerConfig

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
