"""Small files in the layout of the published generators of IBQ and Open-MAGVIT2, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.adapters.llama import PREFIX, PUBLISHED, Kind
from models.adapters.llama import published_name as of_generator
from models.adapters.tokenizers import COUNTERS
from models.adapters.tokenizers import published_name as of_tokenizer
from models.autoencoders.config import Magvit2Config, TamingConfig
from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig
from models.generators.generator import build_generator
from models.quantizers.config import IndexBackpropagationConfig, LookupFreeConfig
from models.tokenizer import Tokenizer
from models.tokenizer_config import TokenizerConfig

KINDS: dict[str, Kind] = {"ibq": "llama", "open-magvit2": "factorized"}
LEVELS: dict[str, Any] = {"width": 32, "multipliers": (1, 1, 1, 1, 1), "blocks": 1}
BITS = 6
TOKENIZERS = {
    "ibq": TokenizerConfig(
        autoencoder=TamingConfig(**LEVELS, features=8, latent=8, attention_levels=(4,)),
        quantizer=IndexBackpropagationConfig(codes=2**BITS),
    ),
    "open-magvit2": TokenizerConfig(autoencoder=Magvit2Config(**LEVELS, latent=BITS), quantizer=LookupFreeConfig()),
}
GENERATORS = {
    "ibq": LlamaConfig(width=64, layers=2, heads=1),
    "open-magvit2": FactorizedConfig(width=64, layers=2, heads=1, head_layers=1, factors=(2, 2 ** (BITS - 1))),
}


def tokenizer_state(layout: str, *, seed: int = 0) -> dict[str, Tensor]:
    """16 pixels a code, 64 codes."""
    own = random_state(Tokenizer(TOKENIZERS[layout]), seed)
    return {of_tokenizer(name, str): tensor for name, tensor in own.items() if name not in COUNTERS}


def generator_state(layout: str, *, classes: int = 1000, seed: int = 0) -> dict[str, Tensor]:
    config = GENERATORS[layout]
    own = random_state(build_generator(config, CodeShape(codes=2**BITS, grid=(16, 16), classes=classes)), seed)
    return {PREFIX + of_generator(name, PUBLISHED[KINDS[layout]]): tensor for name, tensor in own.items()}


def random_state(network: nn.Module, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.state_dict()


def write_tokenizer(path: Path, layout: str) -> Path:
    """A training checkpoint with averages beside the weights."""
    state = tokenizer_state(layout)
    averages = {
        "model_ema." + name.replace(".", ""): tensor for name, tensor in tokenizer_state(layout, seed=1).items()
    }
    return write(path, state | averages)


def write_generator(path: Path, layout: str, *, classes: int = 1000) -> Path:
    """A generator, its tokenizer, and what a file saved after sampling holds beside them."""
    caches = {
        "transformer.freqs_cis": torch.zeros(257, 32, 2),
        "transformer.blocks.0.attention.kv_cache.k_cache": torch.zeros(2, 1, 264, 64),
    }
    state = {f"first_stage_model.{name}": tensor for name, tensor in tokenizer_state(layout).items()}
    return write(path, generator_state(layout, classes=classes) | caches | state)


def write(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": state, "epoch": 1, "global_step": 7, "optimizer_states": [{"lr": 0.1}]}, path)
    return path
