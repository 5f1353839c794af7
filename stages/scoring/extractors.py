"""Feature extractors of torch-fidelity: its own Inception, and a classifier of ours, registered beside it.

An extractor takes uint8 images (B, 3, H, W) and gives features (B, E) and logits (B, L).
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from stages.devices import pick_device
from stages.networks import NetworkFile, load_classifier
from stages.scoring.extraction import CLASSIFIER, INCEPTION, ExtractorFile
from stages.scoring.inception import check_weights, read_weights

LAYERS = {CLASSIFIER: ["features", "logits"], INCEPTION: ["2048", "logits_unbiased"]}


class ClassifierExtractor(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no types
    """A classifier artifact: its feature vector before the head, and its logits."""

    def __init__(self, name: str, features_list: list[str], *, classifier: NetworkFile, **unused: Any):
        super().__init__(name, features_list)
        self.network = load_classifier(classifier)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("features", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> Literal[False]:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        raise NotImplementedError("this extractor is never compiled")

    def forward(self, bytes_B3HW: Tensor) -> tuple[Tensor, ...]:
        features_BE = self.network.features(bytes_B3HW.float() / 255)
        found = {"features": features_BE, "logits": self.network.head(features_BE)}
        return tuple(found[name] for name in self.features_list)


if CLASSIFIER not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(CLASSIFIER, ClassifierExtractor)


@lru_cache(4)
def load_extractor(file: ExtractorFile) -> Any:
    """The extractor on its device; once per process."""
    parts = {"classifier": file.classifier} if file.weights is None else _checked_weights(file.weights)
    extractor = create_feature_extractor(file.name, LAYERS[file.name], cuda=False, verbose=False, **parts)
    return extractor.to(pick_device(file.device))


def _checked_weights(path: Path) -> dict[str, Any]:
    """The Inception weights as torch-fidelity wants them.

    It unpickles whatever it is given, so the very bytes that it gets are checked before: digest, and tensors only.
    """
    data = read_weights(path)
    check_weights(data, path)
    torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return {"feature_extractor_weights_path": io.BytesIO(data)}
