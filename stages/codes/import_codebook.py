"""`import-codebook`: published centroids and the encoder of their features, as a codebook."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.encoders.config import Dinov2Config
from pipeline.compatibility import Facts, KnownInputs
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.durable import hash_file
from pipeline.errors import CorruptError, InputError, UsageError
from pipeline.runtime import Runtime
from pipeline.stage import External, Inputs, read, stage
from smalti.counting import counted
from stages.codes.encoders import default_place, published_weights, read_encoder
from stages.codes.tokenizing import save_codebook
from stages.weights.cards import digest_of
from stages.weights.checkpoint_reader import SUFFIXES, identify_file, read_state
from stages.weights.places import HubWeights

# K clusters, D values of a feature
CENTROIDS = "centroids"  # their name in checkpoints of DiGIT


class ImportCodebookConfig(Config):
    """The encoder whose features the centroids were fitted on."""

    encoder: Dinov2Config | None = Field(
        default=None, description="the encoder, where no features are given that hold it"
    )
    hub: HubWeights | None = Field(
        default=None, description="where the encoder's weights come from without --weights; null: timm's own place"
    )


def identify_centroids(config: ImportCodebookConfig, path: Path) -> str:
    """SHA-256 of the array; InputError where there is no such file."""
    if not path.is_file():
        raise InputError(f"there is no array of centroids {path}", path=path)
    return hash_file(path)


def weights_place(config: ImportCodebookConfig) -> HubWeights | None:
    return (config.hub or default_place(config.encoder)) if config.encoder else None


def foresee(config: ImportCodebookConfig, inputs: KnownInputs) -> Facts:
    """The codes are those of the encoder's grid; how many there are is in the file."""
    if ("features" in inputs) == (config.encoder is not None):
        raise inputs.refusal(
            "needs either features, which hold their encoder, or the encoder", hint="give --features, or encoder.size"
        )
    facts: Facts = {"tokenizer": inputs.own(digest_of(inputs.made))}
    if config.encoder is None:
        return facts | inputs["features"].only("grid", "pixels", "accepts")
    encoder = config.encoder
    return facts | {"grid": encoder.grid, "pixels": encoder.image_size, "accepts": encoder.accepts}


@stage(
    "import-codebook",
    version=1,
    config=ImportCodebookConfig,
    reads={"features": read("features", help="features of the encoder, which hold it", optional=True)},
    writes="codebook",
    example="smalti import-codebook --centroids km_8k.npy --weights dinov2_vitb14_reg4_pretrain.pth "
    "--set encoder.size=base",
    externals={
        "centroids": External(
            help="array of centroids (.npy), float, one row per code; or a checkpoint of digit that holds them",
            identify=identify_centroids,
            is_file=True,
        ),
        "weights": External(
            help="weight file of the encoder (.safetensors or .pth); without it the hub is asked",
            identify=lambda config, path: identify_file(path),
            needed=lambda config: False,
            place=weights_place,
            is_file=True,
        ),
    },
    foresees=foresee,
)
def import_codebook(config: ImportCodebookConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Turn published centroids of K-Means into a codebook.

    reads: an array of centroids; the encoder from features, or from a published weight file.  writes: what kmeans writes,
    but for the cluster sizes.  resumes: from the start.
    """
    if "features" in inputs:
        encoder, state = read_encoder(inputs["features"])
    elif config.encoder is None:
        raise UsageError("import-codebook needs features, which hold their encoder, or the encoder (encoder.size)")
    else:
        encoder, state = config.encoder, published_weights(config.encoder, run.paths["weights"])
    path = run.paths["centroids"]
    centroids_KD = read_centroids(path)
    save_codebook(encoder, state, centroids_KD, out)
    out.facts = {
        "codebook_size": len(centroids_KD),
        "grid": list(encoder.grid),
        "dims": centroids_KD.shape[1],
        "encoder": encoder.kind,
        "image_size": encoder.image_size,
        "accepts": list(encoder.accepts),
        "centroids": hash_file(path),
    }
    out.figure = f"{counted(len(centroids_KD), 'code')} of {centroids_KD.shape[1]} values, {encoder.kind}"


def read_centroids(path: Path) -> NDArray[np.float32]:
    """Centroids (K, D); CorruptError for any other array, and for a file of weights without them."""
    try:
        found = from_checkpoint(path) if path.suffix in SUFFIXES else np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise CorruptError(f"{path} cannot be read as an array of centroids (.npy): {error}", path=path) from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f" or not found.size:
        what = f"an array of shape {found.shape}, {found.dtype}" if isinstance(found, np.ndarray) else "several arrays"
        raise CorruptError(f"{path} holds {what}, expected centroids: floats of shape (codes, values)", path=path)
    if not np.isfinite(found).all():
        raise CorruptError(f"the centroids in {path} hold NaN or infinity", path=path)
    return np.ascontiguousarray(found, dtype=np.float32)


def from_checkpoint(path: Path) -> NDArray[np.float32]:
    """Centroids (K, D) of a checkpoint of DiGIT, which holds them transposed."""
    centroids_DK = read_state(path).get(CENTROIDS)
    if centroids_DK is None:
        raise CorruptError(f"{path} holds no tensor {CENTROIDS}, as checkpoints of DiGIT do", path=path)
    centroids_KD: NDArray[np.float32] = centroids_DK.float().numpy().T
    return centroids_KD
