"""Places of published weight files, on the Hugging Face hub or at an address with a digest, and their verification.

Both kinds are a `pipeline.stage.Place`: kept in the cache that other programs use too, and downloaded into it once.
A name on the command line is `owner/repository/file`, with `@revision` if it shall never change; the files that the
published systems are known by need no owner, and have a fixed revision and digest.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from pydantic import Field

from pipeline.config import Config
from pipeline.durable import hash_file, writing
from pipeline.errors import CorruptError, InputError, SmaltiError, StorageError
from pipeline.progress import Progress
from stages.weights.checkpoint_reader import SUFFIXES

NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)/(?P<file>[\w./-]+)(@(?P<revision>[\w./-]+))?")
DIGEST = re.compile("[0-9a-f]{64}")
PATIENCE = 2.0  # seconds until a server that does not answer counts as out of reach
STALL = 30.0  # seconds without a byte after which a download is given up
MEGABYTE = 1_000_000


class HubWeights(Config):
    """A weight file on the Hugging Face hub. Its SHA-256 is part of the key: as given, or as computed after the download."""

    repository: str = Field(description="such as timm/vit_base_patch14_reg4_dinov2.lvd142m")
    file: str = Field(default="model.safetensors", description="file in the repository")
    revision: str = Field(default="main", description="branch, tag or commit")
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="digest that the file must have; null: any, and no key before the file is here",
    )

    @property
    def what(self) -> str:
        return self.file

    @property
    def label(self) -> str:
        return f"{self.file} of {self.repository}" + ("" if self.revision == "main" else f" at {self.revision[:12]}")

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repository}/resolve/{self.revision}/{self.file}"

    @property
    def is_keyed(self) -> bool:
        return True

    def find(self) -> Path | None:
        """The file in the hub's local cache: under its revision, or under its digest. Asks no server."""
        from huggingface_hub import constants, try_to_load_from_cache
        from huggingface_hub.file_download import repo_folder_name

        found = try_to_load_from_cache(self.repository, self.file, revision=self.revision)
        if isinstance(found, str):
            return Path(found)
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repository, repo_type="model")
        kept = folder / "blobs" / (self.sha256 or "")
        return kept if kept.is_file() else None

    def digest(self, path: Path) -> str:
        """SHA-256 of a file in the cache, which links a large file to one that is called by its SHA-256."""
        kept_as = path.resolve().name
        return kept_as if DIGEST.fullmatch(kept_as) else hash_file(path)

    def check(self, path: Path) -> None:
        """CorruptError unless the file has the digest that was asked for, and the one that the cache keeps it under."""
        found, wanted = hash_file(path), self.sha256 or self.digest(path)
        if found != wanted:
            raise CorruptError(
                f"{self.label} has SHA-256 {found[:12]}..., expected {wanted[:12]}...",
                path=path,
                hint="delete it from the hub's cache and run again, or ask for the digest that it has",
            )

    def fetch(self, progress: Progress) -> Path:
        """Download the file into the hub's cache. StorageError where no server answers, InputError where it has no such file."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        transport: Any = HfHubHTTPError.__bases__  # errors of the library below, which is another one with each version
        progress.say(f"  weights: {self.label}, from the Hugging Face hub")
        url = hf_hub_url(self.repository, self.file, revision=self.revision)
        try:
            with _quiet_hub(shows_bars=progress.stream is not None):
                _answer(lambda: get_hf_file_metadata(url, timeout=_patience()))
                return Path(hf_hub_download(self.repository, self.file, revision=self.revision))
        except (HfHubHTTPError, *transport, OSError, ValueError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> SmaltiError:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (401, 403, 404):
            why = "it is not there, or only for accounts that were let in (hf auth login)"
            return InputError(f"the hub does not give {self.label}: {why}", path=self.url)
        return _out_of_reach(self.label, self.url, error)


@dataclass(frozen=True)
class WebFile:
    """A file at an address with a fixed content, in torch's cache.

    what: as errors call it.
    """

    what: str
    url: str
    sha256: str

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def label(self) -> str:
        return f"{self.file} (the {self.what})"

    @property
    def is_keyed(self) -> bool:
        """False: its content is fixed by the code."""
        return False

    @property
    def cached(self) -> Path:
        """Where torch.hub keeps the file."""
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        home = Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser()
        return home / "hub" / "checkpoints" / self.file

    def find(self) -> Path | None:
        return self.cached if self.cached.is_file() else None

    def digest(self, path: Path) -> str:
        return hash_file(path)

    def check(self, path: Path) -> None:
        """CorruptError unless this is the published file."""
        self.check_digest(hash_file(path), path)

    def check_digest(self, found: str, path: Path | str) -> None:
        if found != self.sha256:
            raise CorruptError(
                f"{path} is not {self.label}: its SHA-256 begins with {found[:8]}, expected {self.sha256[:8]}",
                path=path,
                hint=f"fetch {self.url} again",
            )

    def fetch(self, progress: Progress) -> Path:
        """Download the file into torch's cache; StorageError where no server answers, CorruptError for another content."""
        from urllib.error import HTTPError
        from urllib.request import Request, urlopen

        progress.say(f"  weights: {self.label}, from {self.url.split('/')[2]}")
        try:
            _answer(lambda: urlopen(Request(self.url, method="HEAD"), timeout=_patience()).close())
        except HTTPError:
            pass  # some servers answer no HEAD: the download will say what is wrong
        except OSError as error:
            raise _out_of_reach(self.label, self.url, error) from error
        with writing(self.cached) as temporary:
            with temporary.open("wb") as file:
                file.writelines(self._blocks(progress))
            self.check_digest(hash_file(temporary), self.url)
        return self.cached

    def _blocks(self, progress: Progress) -> Iterator[bytes]:
        """The file's bytes, megabyte by megabyte; StorageError where the connection breaks."""
        from http.client import HTTPException
        from urllib.request import urlopen

        try:
            with urlopen(self.url, timeout=STALL) as answer:
                blocks = math.ceil(int(answer.headers.get("Content-Length") or 0) / MEGABYTE)
                with progress.bar("download", total=blocks, unit="MB") as bar:
                    while block := answer.read(MEGABYTE):
                        bar.advance(1)
                        yield block
        except (OSError, HTTPException) as error:
            raise _out_of_reach(self.label, self.url, error) from error


def _rar(file: str, revision: str, sha256: str) -> HubWeights:
    return HubWeights(repository="yucornetto/RAR", file=file, revision=revision, sha256=sha256)


PUBLISHED = {
    place.file: place
    for place in (
        HubWeights(
            repository="fun-research/TiTok",
            file="maskgit-vqgan-imagenet-f16-256.bin",
            revision="ab646ed225080a3acb7c78440a574d7f67f16fa7",
            sha256="424e7f2b11d1d63691ae3fbab74cf6c417ecbe0d8f86187b71f3538c7b56f6d2",
        ),
        _rar(
            "rar_b.bin",
            "8562ced2ff8815c86ee1845bd3b2348579f599e3",
            "cbbf4b27dc36afae77fdb2fe0d6b9b5b7446eae45f1a9f91d442ab0b315b9ebf",
        ),
        _rar(
            "rar_l.bin",
            "049466db4b5fa7932926263c83bb5d09ae6f37ee",
            "edad8e9905e20a5df14eeee0d5d04c1be48b16a7751b4b3f4954a6dec8ad87d5",
        ),
        _rar(
            "rar_xl.bin",
            "75376fac980be9a45486d63653de9be914a97118",
            "7b4cec5c76f18dc7a3ea055a6b0cc4c5748c533768eed71564a88d897c762bc8",
        ),
        _rar(
            "rar_xxl.bin",
            "f19f57f5dbfad9f1edc1a6ddeb322dd0b5291cac",
            "85aba44fef7aecfd879829077e541f09da4c29da3b1fd374837601d7322bf6ff",
        ),
    )
}
"""Published files that are asked for by their bare name; revision and digest as the hub lists them."""

INCEPTION = WebFile(
    what="Inception weights",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
VGG16 = WebFile(
    what="VGG16 weights of LPIPS",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)


def place_of(word: str) -> HubWeights | None:
    """The file on the hub of an option's value, or None."""
    if word in PUBLISHED:
        return PUBLISHED[word]
    named = NAME.fullmatch(word)
    if named is None or word.startswith(".") or Path(named["file"]).suffix not in SUFFIXES:
        return None
    return HubWeights(repository=named["repository"], file=named["file"], revision=named["revision"] or "main")


def _patience() -> float:
    return float(os.environ.get("HF_HUB_ETAG_TIMEOUT", PATIENCE))


def _answer(ask: Callable[[], object]) -> None:
    """Ask a server in a thread of its own, because looking up its name has no time limit; TimeoutError after one."""
    outcome: SimpleQueue[Exception | None] = SimpleQueue()

    def wait() -> None:
        try:
            ask()
            outcome.put(None)
        except Exception as error:
            outcome.put(error)

    Thread(target=wait, daemon=True).start()
    try:
        error = outcome.get(timeout=_patience() + 0.25)
    except Empty:
        raise TimeoutError(f"no answer within {_patience():g} s; HF_HUB_ETAG_TIMEOUT sets how long to wait") from None
    if error is not None:
        raise error


def _out_of_reach(label: str, url: str, error: Exception) -> StorageError:
    why = "HF_HUB_OFFLINE is set" if type(error).__name__ == "OfflineModeIsEnabled" else f"{_in_short(error)}"
    return StorageError(f"{label} is not on this machine and cannot be downloaded ({why})", path=url)


def _in_short(error: Exception) -> str:
    said = str(getattr(error, "reason", "") or error).split("\n")[0].strip()
    return said[:120] or type(error).__name__


@contextmanager
def _quiet_hub(*, shows_bars: bool) -> Iterator[None]:
    """Within this block the hub's library logs nothing, and shows its bar or not: it has one switch for the whole process."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hides_bars = not (shows_bars or are_progress_bars_disabled())
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    if hides_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hides_bars:
            enable_progress_bars()
