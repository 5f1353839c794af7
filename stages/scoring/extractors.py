"""Feature extractors of torch-fidelity: its Inception, and classifier artifacts, which are registered with it.

An extractor takes uint8 images (B, 3, H, W) and gives features (B, E) and logits (B, L).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from pipeline.keys import sha256
from pipeline.stage_cache import cached
from stages.devices import pick_device
from stages.scoring.protocol import ExtractorFile
from stages.weights.networks import NetworkFile, load_classifier
from stages.weights.places import INCEPTION as WEIGHTS

CLASSIFIER, PYTORCH_FID = "smalti-classifier", "smalti-inception-pytorch-fid"
INCEPTION_LAYERS = ["2048", "logits_unbiased"]
REGISTERED = {
    "classifier": (CLASSIFIER, ["features", "logits"]),
    "inception": ("inception-v3-compat", INCEPTION_LAYERS),
    "inception-pytorch-fid": (PYTORCH_FID, INCEPTION_LAYERS),
}
"""Extractor -> its name in torch-fidelity's registry, and what it is asked for."""


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


class PytorchFidExtractor(FeatureExtractorInceptionV3):  # type: ignore[misc]  # torch-fidelity has no types
    """The same Inception under pytorch-fid's input: resized with half-pixel centres, and 255 becomes exactly 1.

    (TensorFlow's resize aligns corners of pixels to the left, and 255 becomes 127/128.)
    """

    def forward(self, bytes_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """What `INCEPTION_LAYERS` names: features and, without the bias, logits."""
        sides = (self.INPUT_IMAGE_SIZE, self.INPUT_IMAGE_SIZE)
        x_BFhw = 2 * F.interpolate(bytes_B3HW.float() / 255, sides, mode="bilinear", align_corners=False) - 1
        for layer in (layer for name, layer in self.named_children() if name != "fc"):  # in the order of the network
            x_BFhw = layer(x_BFhw)
        features_BE = x_BFhw.flatten(1)
        return features_BE, features_BE @ self.fc.weight.T


for name, extractor in ((CLASSIFIER, ClassifierExtractor), (PYTORCH_FID, PytorchFidExtractor)):
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, extractor)


@cached(4)
def load_extractor(file: ExtractorFile) -> Any:
    """The extractor on its device; once per process."""
    parts = {"classifier": file.classifier} if file.weights is None else _checked_weights(file.weights)
    extractor = create_feature_extractor(*REGISTERED[file.kind], cuda=False, verbose=False, **parts)
    return extractor.to(pick_device(file.device))


def _checked_weights(path: Path) -> dict[str, Any]:
    """The Inception weights as torch-fidelity wants them.

    It unpickles the file, so the bytes are checked before: digest, and tensors only.
    """
    data = path.read_bytes()
    WEIGHTS.check_digest(sha256(data), path)
    torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return {"feature_extractor_weights_path": io.BytesIO(data)}
