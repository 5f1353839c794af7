"""The digits recipe small enough for tests: the same steps with budgets of a few seconds."""

from __future__ import annotations

SETTINGS = [
    "judge-1.training.steps=2",
    "judge-2.training.steps=2",
    "judge-3.training.steps=2",
    "tokenizer.training.steps=2",
    "tokenizer.model.autoencoder.widths=[8,8,8]",
    "tokens.views.pixels=0",
    "generator.training.steps=2",
    "generator.model.width=16",
    "generator.model.layers=1",
    "generator.model.heads=2",
    "generator.model.mlp_width=16",
    "samples.images=80",
    "histogram-samples.images=80",
    "random-samples.images=80",
    "codebook.iterations=2",
    "codebook.clusters=16",
]
OPTIONS = [word for setting in SETTINGS for word in ("--set", setting)]
