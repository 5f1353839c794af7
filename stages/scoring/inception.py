"""The Inception weights behind FID, IS and KID: where they lie, and that they are the right ones."""

from __future__ import annotations

from pathlib import Path

from stages.torch_cache import PublishedFile

INCEPTION = PublishedFile(
    what="the published Inception weights",
    external="weights",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256_begins="6726825d",
)


def find_weights(given: Path | None) -> Path:
    """The given file, or the one in torch's cache, downloaded if need be; InputError says how to get it."""
    if given is None:
        return INCEPTION.find()
    INCEPTION.check(INCEPTION.digest(given), given)
    return given
