"""Published weight files: fetched from the Hugging Face hub by name, revision and digest, or taken from its local cache.

A name on the command line is `owner/repository/file`, with `@revision` if it shall never change; the files that the
published systems are known by need no owner.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config import Config
from pipeline.durable import hash_file
from pipeline.errors import CorruptError, InputError
from pipeline.progress import Progress
from stages.foreign import SUFFIXES

NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+)(@(?P<revision>[\w./-]+))?")
DIGEST = re.compile("[0-9a-f]{64}")
OWNERS = {
    "maskgit-vqgan-imagenet-f16-256.bin": "fun-research/TiTok",
    "rar_b.bin": "yucornetto/RAR",
    "rar_l.bin": "yucornetto/RAR",
    "rar_xl.bin": "yucornetto/RAR",
    "rar_xxl.bin": "yucornetto/RAR",
}
"""Published files that are asked for by their bare name -> repository."""


class HubWeights(Config):
    """A weight file on the Hugging Face hub. Without a digest and a fixed revision it may change under its name."""

    repository: str = Field(description="such as timm/vit_base_patch14_reg4_dinov2.lvd142m")
    file: str = Field(default="model.safetensors", description="file in the repository")
    revision: str = Field(default="main", description="branch, tag or commit")
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="digest that the file must have; null: any"
    )


def place_of(word: str) -> HubWeights | None:
    """The file on the hub that a word on the command line means; None where it means none."""
    if word in OWNERS:
        return HubWeights(repository=OWNERS[word], file=word)
    named = NAME.fullmatch(word)
    if named is None or word.startswith(".") or Path(named["file"]).suffix not in SUFFIXES:
        return None
    return HubWeights(repository=named["repository"], file=named["file"], revision=named["revision"] or "main")


def download(place: HubWeights, progress: Progress) -> Path:
    """The file in the hub's local cache, fetched if it is not there, with the hub's own bar for its progress.

    InputError where it can neither be found nor fetched; CorruptError where its SHA-256 is another than was asked for,
    or than the hub gave it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    broken_line: Any = (
        HfHubHTTPError.__bases__
    )  # the errors of the library below, which is another one with each version
    progress.say(f"  weights: {place.file} of {place.repository} at {place.revision}")
    try:
        with _bars(are_shown=progress.stream is not None):
            path = Path(hf_hub_download(place.repository, place.file, revision=place.revision))
    except (*broken_line, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(
            f"the weights {place.file} of {place.repository} are not in the local cache and cannot be downloaded "
            f"({type(error).__name__})",
            path=place.repository,
            hint=f"fetch https://huggingface.co/{place.repository}/resolve/{place.revision}/{place.file} "
            "on a machine with network and give the file (--weights FILE)",
        ) from error
    check_digest(path, place)
    return path


def check_digest(path: Path, place: HubWeights) -> None:
    """CorruptError unless the file is what was asked for, and what the hub keeps under this name.

    The hub's cache links a large file to one that is called by the SHA-256 that the hub knows it by.
    """
    kept_as = path.resolve().name
    wanted = place.sha256 or (kept_as if DIGEST.fullmatch(kept_as) else None)
    if wanted is None:
        return
    found = hash_file(path)
    if found != wanted:
        raise CorruptError(
            f"{place.file} of {place.repository} has SHA-256 {found[:12]}..., expected {wanted[:12]}...",
            path=path,
            hint="delete it from the hub's cache and run again, or correct hub.sha256",
        )


@contextmanager
def _bars(*, are_shown: bool) -> Iterator[None]:
    """Within this block the hub shows its bar, or keeps quiet: it has one switch for the whole process."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
