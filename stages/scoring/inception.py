"""The Inception weights behind FID, IS and KID: where they lie, and that they are the right ones."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pipeline.errors import InputError

NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAME}"
SHA256_BEGINS = "6726825d"
HINT = f"download {URL} and give it with --path weights=FILE, or put it into $TORCH_HOME/hub/checkpoints"


def find_weights(given: Path | None) -> Path:
    """The given file, or the one in torch's cache, downloaded if need be; InputError says how to get it."""
    path = given or cached_weights()
    if given is None and not path.exists():
        _download(path)
    check_weights(read_weights(path), path)
    return path


def cached_weights() -> Path:
    """Where torch.hub and torch-fidelity keep the file."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    home = Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser()
    return home / "hub" / "checkpoints" / NAME


def read_weights(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the Inception weights {path} cannot be read: {error.strerror}", path=path, hint=HINT
        ) from error


def check_weights(data: bytes, path: Path) -> None:
    """InputError unless these are the published weights: torch-fidelity itself does not look."""
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(SHA256_BEGINS):
        raise InputError(
            f"{path} is not the published Inception network: its SHA-256 begins with {found[:8]}, "
            f"expected {SHA256_BEGINS}",
            path=path,
            hint=HINT,
        )


def _download(path: Path) -> None:
    from torch.hub import download_url_to_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(URL, str(path), hash_prefix=SHA256_BEGINS, progress=False)
    except (OSError, RuntimeError) as error:  # URLError is an OSError, a wrong digest a RuntimeError
        raise InputError(
            f"the Inception weights {NAME} are neither here nor could they be downloaded: {error}", path=path, hint=HINT
        ) from error
