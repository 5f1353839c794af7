"""What turns images into codes: a tokenizer, or a codebook of K-Means over an encoder's features.

A codebook is a tokenizer without `decode`: the nearest centroid of each feature is its code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from pipeline.artifact import Artifact
from pipeline.errors import CorruptError, UsageError
from pipeline.stage_cache import cached
from stages.codes.encoders import Encoder, build_encoder, parse_encoder
from stages.weights.files import WEIGHTS, load_config, load_weights
from stages.weights.networks import NetworkFile, load_tokenizer, read_tokenizer_config

if TYPE_CHECKING:
    from torch import Tensor

# B images, C colour channels, H W pixels, h w grid of codes, K codes, D values of a feature
CENTROIDS = "centroids_KD"
ENCODER_PREFIX = "encoder."


class Encodes(Protocol):
    """The half of a tokenizer that makes codes."""

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
    config, clusters = read_codebook_config(artifact)
    centroids_KD = state.get(CENTROIDS)
    try:
        encoder: Any = build_encoder(config, weights, device)
    except RuntimeError as error:
        raise CorruptError(
            f"the encoder weights of {artifact.name} do not fit its config: {str(error).splitlines()[-1].strip()}",
            path=artifact.path / WEIGHTS,
        ) from error
    wanted = (clusters, int(encoder.dims))
    if centroids_KD is None or tuple(centroids_KD.shape) != wanted:
        found = "none" if centroids_KD is None else f"shape {tuple(centroids_KD.shape)}"
        raise CorruptError(
            f"{artifact.name} should hold centroids of shape {wanted}, found {found}", path=artifact.path / WEIGHTS
        )
    if not bool(centroids_KD.isfinite().all()):
        raise CorruptError(f"the centroids of {artifact.name} are not finite", path=artifact.path / WEIGHTS)
    return FeatureTokenizer(encoder, centroids_KD.to(next(encoder.buffers()).device))


def read_codebook_config(artifact: Artifact) -> tuple[Encoder, int]:
    """The encoder's config and the number of codes of a codebook."""
    values = load_config(artifact)
    return parse_encoder(values.get("encoder"), path=artifact.path), int(values.get("clusters", 0))


def code_grid(artifact: Artifact, pixels: int) -> tuple[int, int]:
    """Rows and columns of codes of a square image; UsageError where images of this size cannot be encoded."""
    if artifact.kind == "codebook":
        encoder, _ = read_codebook_config(artifact)
        if encoder.image_size != pixels:
            raise UsageError(
                f"{artifact.name} takes images of {encoder.image_size} pixels, but views.size is {pixels}",
                hint=f"set views.size to {encoder.image_size}",
            )
        return encoder.grid
    try:
        return read_tokenizer_config(artifact).grid(pixels, pixels)
    except ValueError as error:
        raise UsageError(f"views.size {pixels} does not fit {artifact.name}: {error}") from error


def code_count(artifact: Artifact) -> int:
    """Size of the codebook."""
    if artifact.kind == "codebook":
        return read_codebook_config(artifact)[1]
    return read_tokenizer_config(artifact).codebook_size


def native_pixels(artifact: Artifact) -> int | None:
    """Pixels per side of the images that it was made for, where it says so."""
    if artifact.kind == "codebook":
        return read_codebook_config(artifact)[0].image_size
    found = artifact.facts.get("image_size", artifact.facts.get("resolution"))
    return None if found is None else int(found)
