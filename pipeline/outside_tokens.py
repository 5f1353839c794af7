"""Token sets outside of the store, written by `smalti.create_tokens` or another project, as inputs.

Such a folder has no manifest. Its key is the digest of its content: the same codes in another folder are the same input,
and other codes in the same folder are another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifact import MANIFEST, Artifact, FileEntry, open_artifact
from pipeline.config import Config
from pipeline.stage import External, Stage
from smalti.tokens import content_digest, open_tokens, verify_tokens

EXTERNAL = "external"
KIND = "token-set"
FOLDER = "folder"
METADATA = "zarr.json"


def is_token_folder(path: Path) -> bool:
    """Whether this is a zarr group that is not an artifact."""
    return (path / METADATA).is_file() and not (path / MANIFEST).exists()


def open_outside(path: Path) -> Artifact:
    """A token set outside of the store as an artifact, checked at level *open*.

    InputError: there is none at `path`.  CorruptError: it is damaged.
    """
    token_set = open_tokens(path)
    key, attributes = content_digest(token_set), token_set.attributes
    arrays = ["tokens", "labels", "keys", *(["boxes"] if token_set.boxes is not None else [])]
    metadata = sorted([METADATA, *(f"{name}/{METADATA}" for name in arrays)])  # shards have checksums of their own
    return Artifact(
        path.absolute(),
        digest=key,
        stage=EXTERNAL,
        version=1,
        kind=KIND,
        key=key,
        config={},
        inputs={},
        externals={},
        facts={
            "images": attributes.n_images,
            "crops": attributes.n_crops,
            "grid": list(attributes.grid),
            "codes": attributes.codes,
            "classes": attributes.classes,
            "resolution": attributes.resolution,
            "tokenizer": dict(attributes.tokenizer),
        },
        files={name: FileEntry.of(path, name) for name in metadata},
    )


def verify_outside(path: Path) -> Artifact:
    """The token set, after a check of all checksums and codes."""
    verify_tokens(path)
    return open_outside(path)


def open_input(path: Path) -> Artifact:
    """The input in a folder: an artifact, or a token set outside of the store."""
    return open_outside(path) if is_token_folder(path) else open_artifact(path)


def _is_opened(*given: Any) -> None:
    raise AssertionError("a token set outside of the store is opened, not made")


OUTSIDE = Stage(
    name=EXTERNAL,
    version=1,
    config=Config,
    reads={},
    writes=KIND,
    function=_is_opened,
    help="A token set outside of the store.",
    example="",
    externals={FOLDER: External("folder of the token set", lambda config, path: open_outside(path).key)},
)
"""The stage of a token set outside of the store in a recipe's plan."""
