"""From images to codes: by a tokenizer, or by a K-Means codebook over an encoder's features.

A codebook is a tokenizer without `decode`: the nearest centroid of each feature is its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.encoders.config import BUILDERS
from models.registry import build
from pipeline.artifact import Artifact
from pipeline.compatibility import Known, KnownInputs, either
from pipeline.draft import Draft
from pipeline.errors import CorruptError, UsageError
from pipeline.images import ViewPolicy
from pipeline.keys import config_value
from pipeline.stage_cache import cached
from stages.codes.encoders import Encoder, build_encoder
from stages.weights.cards import CodebookConfig, TokenizerCard, read_config
from stages.weights.files import WEIGHTS, load_weights, save_weights
from stages.weights.networks import NetworkFile, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

# B images, C colour channels, H W pixels, h w grid of codes, K codes, D values of a feature
CENTROIDS = "centroids_KD"
ENCODER_PREFIX = "encoder."


class Encodes(Protocol):
    """The encoding half of a tokenizer."""

    codebook_size: int

    def encode(self, images_BCHW: Tensor) -> Tensor: ...


class FeatureTokenizer:
    """Codes of images are the centroids nearest to their features."""

    def __init__(self, encoder: Any, centroids_KD: Tensor):
        self.encoder = encoder
        self.centroids_KD = centroids_KD
        self.codebook_size = len(centroids_KD)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Images in [0,1] to int64 codes (B, h, w)."""
        from models.quantizers.vector import nearest

        features_BhwD = self.encoder(images_BCHW)
        return nearest(features_BhwD.flatten(0, 2), self.centroids_KD).reshape(features_BhwD.shape[:3])


def check_codes_fit(views: ViewPolicy, tokenizer: Known, inputs: KnownInputs) -> tuple[int, int] | None:
    """Rows and columns of codes of a view, as far as they are known; a refusal where views do not divide into codes."""
    if tokenizer.artifact is not None:
        try:
            return TokenizerCard.of(tokenizer.artifact).grid(views.size)
        except UsageError as error:
            raise inputs.refusal(f"cannot use these views: {error.message}", hint=error.hint) from error
    pixels, downsample = tokenizer.get("pixels"), tokenizer.get("downsample")
    if tokenizer.kind == "codebook":
        accepts = tokenizer.get("accepts", (pixels or views.size,))
        if views.size not in accepts:
            raise inputs.refusal(
                f"sees images at {views.size} pixels (views.size), but {tokenizer.name} takes images of {either(accepts)} pixels"
            )
        grid: tuple[int, int] | None = tokenizer.get("grid")
        return grid
    if downsample is not None and views.size % downsample:
        raise inputs.refusal(
            f"sees images at {views.size} pixels (views.size), but a code of {tokenizer.name} is {downsample} pixels wide"
        )
    return None if downsample is None else (views.size // downsample,) * 2


@cached(4)
def load_encodes(file: NetworkFile) -> Encodes:
    """The network of a tokenizer or codebook artifact, in evaluation mode; once per process."""
    artifact = file.open()
    if artifact.kind == "codebook":
        return load_codebook(artifact, file.device)
    tokenizer: Encodes = load_tokenizer(file)
    return tokenizer


def load_codebook(artifact: Artifact, device: str) -> FeatureTokenizer:
    """A codebook with its encoder; CorruptError where the centroids are missing or do not fit the encoder."""
    state = load_weights(artifact)
    weights = {name.removeprefix(ENCODER_PREFIX): state[name] for name in state if name.startswith(ENCODER_PREFIX)}
    config = read_config(artifact, CodebookConfig)
    centroids_KD = state.get(CENTROIDS)
    try:
        encoder: Any = build_encoder(config.encoder, weights, device)
    except RuntimeError as error:
        raise CorruptError(
            f"the encoder weights of {artifact.name} do not fit its config: {str(error).splitlines()[-1].strip()}",
            path=artifact.path / WEIGHTS,
        ) from error
    wanted = (config.clusters, int(encoder.dims))
    if centroids_KD is None or tuple(centroids_KD.shape) != wanted:
        found = "none" if centroids_KD is None else f"shape {tuple(centroids_KD.shape)}"
        raise CorruptError(
            f"{artifact.name} should hold centroids of shape {wanted}, found {found}", path=artifact.path / WEIGHTS
        )
    if not bool(centroids_KD.isfinite().all()):
        raise CorruptError(f"the centroids of {artifact.name} are not finite", path=artifact.path / WEIGHTS)
    return FeatureTokenizer(encoder, centroids_KD.to(next(encoder.buffers()).device))


def save_codebook(encoder: Encoder, state: Mapping[str, Tensor], centroids_KD: NDArray[np.float32], out: Draft) -> None:
    """The centroids and the encoder as weights of a codebook. CorruptError where they do not fit together."""
    import torch

    dims = int(build(encoder, BUILDERS).dims)
    if centroids_KD.shape[1] != dims:
        raise CorruptError(
            f"the centroids have {centroids_KD.shape[1]} values, but features of {encoder.kind} have {dims}",
            hint="name the encoder whose features were clustered",
        )
    tensors = {f"{ENCODER_PREFIX}{name}": value for name, value in state.items()}
    config = CodebookConfig(kind="kmeans", clusters=len(centroids_KD), encoder=encoder)
    save_weights(out, {CENTROIDS: torch.from_numpy(centroids_KD), **tensors}, config_value(config))
