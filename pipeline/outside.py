"""Token sets outside of the store: what `smalti.create_tokens` or another project wrote, used where it lies.

Such a folder has no manifest. It is an input like an artifact of the store: its key is the digest of its content, so that
the same codes in another folder are the same input, and other codes in the same folder are another one.
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
    """A token set as an artifact that no store holds, checked at level *open*.

    InputError: there is none at `path`.  CorruptError: it is damaged.
    """
    token_set = open_tokens(path)
    key, said = content_digest(token_set), token_set.attributes
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
            "images": said.n_images,
            "crops": said.n_crops,
            "grid": list(said.grid),
            "codes": said.codes,
            "classes": said.classes,
            "resolution": said.resolution,
            "tokenizer": dict(said.tokenizer),
        },
        files={name: FileEntry.of(path, name) for name in metadata},
    )


def verify_outside(path: Path) -> Artifact:
    """The token set after every byte and every code was checked, as far as its checksums go."""
    verify_tokens(path)
    return open_outside(path)


def open_input(path: Path) -> Artifact:
    """What lies in a folder that is an input: an artifact, or a token set outside of the store."""
    return open_outside(path) if is_token_folder(path) else open_artifact(path)


def _is_opened(*given: Any) -> None:
    raise AssertionError("what lies outside is opened, never made")


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
"""What stands in a recipe's plan for a token set that lies outside."""
