"""The table of stages: name -> module that declares it. Importing one imports no torch."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from pipeline.stage import Stage

MODULES = {
    "index": "stages.index",
    "extract": "stages.extract",
    "kmeans": "stages.kmeans",
    "import-weights": "stages.import_weights",
    "train-tokenizer": "stages.train_tokenizer",
    "train-discriminator": "stages.train_discriminator",
    "finetune-decoder": "stages.finetune_decoder",
    "pretokenize": "stages.pretokenize",
    "train-generator": "stages.train_generator",
    "sample": "stages.sample",
    "decode": "stages.decode",
    "generate": "stages.generate",
    "train-classifier": "stages.train_classifier",
    "score": "stages.score",
    "probe": "stages.probe",
}


@cache
def stages() -> dict[str, Stage]:
    """Every stage's declaration, in the order of the pipeline."""
    return {name: _declaration(name, module) for name, module in MODULES.items()}


def _declaration(name: str, module: str) -> Stage:
    found = [value for value in vars(import_module(module)).values() if isinstance(value, Stage) and value.name == name]
    assert len(found) == 1, f"{module} declares {len(found)} stages named {name}"
    return found[0]
