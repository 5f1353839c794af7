"""Weights that say something: a fresh RAR is its input and its head, because its modulations are zero."""

from __future__ import annotations

import torch
from torch import nn

from models.generators.rar.network import Rar

PUBLISHED = Rar.initialise


def make_loud(rar: Rar, *, linear: float, embeddings: float, modulations: float) -> Rar:
    """Draw all but biases and affines anew, from normals of these standard deviations."""
    with torch.no_grad():
        for name, module in rar.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=modulations if "adaLN_modulation" in name else linear)
        for table in rar.tables():
            table.normal_(std=embeddings)
    return rar


def initialise_loud(rar: Rar) -> None:
    """Stands in for `Rar.initialise` where every gradient of the first step has to say something."""
    PUBLISHED(rar)
    make_loud(rar, linear=0.02, embeddings=0.3, modulations=0.05)
