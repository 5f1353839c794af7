"""The table of stages: name -> module that declares it. Importing these modules does not import torch."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from pipeline.stage import Stage

MODULES = {
    "index": "stages.images.index",
    "extract": "stages.codes.extract",
    "kmeans": "stages.codes.kmeans",
    "import-codebook": "stages.codes.import_codebook",
    "import-weights": "stages.weights.import_weights",
    "train-tokenizer": "stages.training.train_tokenizer",
    "train-discriminator": "stages.training.train_discriminator",
    "finetune-decoder": "stages.training.finetune_decoder",
    "pretokenize": "stages.codes.pretokenize",
    "train-generator": "stages.training.train_generator",
    "describe-tokens": "stages.codes.describe_tokens",
    "sample": "stages.sampling.sample",
    "decode": "stages.sampling.decode",
    "generate": "stages.sampling.generate",
    "train-classifier": "stages.training.train_classifier",
    "describe-images": "stages.scoring.describe_images",
    "score": "stages.scoring.score",
    "probe": "stages.training.probe",
}


@cache
def stages() -> dict[str, Stage]:
    """Every stage's declaration, in the order of the pipeline."""
    return {name: _declaration(name, module) for name, module in MODULES.items()}


def _declaration(name: str, module: str) -> Stage:
    found = [value for value in vars(import_module(module)).values() if isinstance(value, Stage) and value.name == name]
    assert len(found) == 1, f"{module} declares {len(found)} stages named {name}"
    return found[0]
