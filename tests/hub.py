"""A hub for tests: holds files, lays them into a cache like the real one's, and notes what it is asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants, errors


class Hub:
    """Takes the place of the hub's client. What it does not hold is out of reach, as without network.

    asked: (repository, file, revision) of every download.
    """

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch):
        self.cache = cache
        self.files: dict[tuple[str, str], bytes] = {}
        self.asked: list[tuple[str, str, str]] = []
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self._look)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self._download)

    def keep(self, repository: str, file: str, data: bytes) -> str:
        """Let the hub hold a file under every revision; returns its SHA-256."""
        self.files[repository, file] = data
        return hashlib.sha256(data).hexdigest()

    def forget(self) -> None:
        """Go offline; the cache stays."""
        self.files.clear()

    def _look(self, url: str, **more: Any) -> None:
        path = urlsplit(url).path
        if not any(path.startswith(f"/{repository}/") and path.endswith(file) for repository, file in self.files):
            raise errors.LocalEntryNotFoundError("no network")

    def _download(self, repository: str, file: str, *, revision: str) -> str:
        self.asked.append((repository, file, revision))
        data = self.files[repository, file]
        folder = self.cache / f"models--{repository.replace('/', '--')}"
        commit = hashlib.sha1(data).hexdigest()
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        link = folder / "snapshots" / (revision if len(revision) == 40 else commit) / file
        for path, text in ((blob, data), (folder / "refs" / revision, commit.encode())):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        return str(link)
