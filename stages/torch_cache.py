"""Published weight files that torch keeps in its cache: found there, downloaded, or given; and that they are the right ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pipeline.durable import hash_file
from pipeline.errors import InputError


class PublishedFile(NamedTuple):
    """A file of others that has one content, which part of its name says.

    what: as errors call it.  external: the name under which a command takes the file.
    """

    what: str
    external: str
    url: str
    sha256_begins: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def hint(self) -> str:
        return (
            f"download {self.url} and give it with --{self.external} FILE (in a recipe: "
            f"--set STEP.paths.{self.external}=FILE), or put it into $TORCH_HOME/hub/checkpoints"
        )

    @property
    def cached(self) -> Path:
        """Where torch.hub keeps the file."""
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        home = Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser()
        return home / "hub" / "checkpoints" / self.name

    def find(self) -> Path:
        """The checked file in torch's cache, downloaded if need be; InputError says how to get it."""
        if not self.cached.exists():
            self._download()
        self.check(self.digest(self.cached), self.cached)
        return self.cached

    def digest(self, path: Path) -> str:
        """SHA-256 of a file; InputError if it cannot be read."""
        try:
            return hash_file(path)
        except OSError as error:
            raise InputError(
                f"{self.what} {path} cannot be read: {error.strerror}", path=path, hint=self.hint
            ) from error

    def check(self, found: str, path: Path) -> None:
        """InputError unless this is the digest of the published file."""
        if not found.startswith(self.sha256_begins):
            raise InputError(
                f"{path} is not {self.what}: its SHA-256 begins with {found[:8]}, expected {self.sha256_begins}",
                path=path,
                hint=self.hint,
            )

    def _download(self) -> None:
        from torch.hub import download_url_to_file

        try:
            self.cached.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(self.url, str(self.cached), hash_prefix=self.sha256_begins, progress=False)
        except (OSError, RuntimeError) as error:  # URLError is an OSError, a wrong digest a RuntimeError
            raise InputError(
                f"{self.what} ({self.name}) are neither here nor could they be downloaded: {error}",
                path=self.cached,
                hint=self.hint,
            ) from error
