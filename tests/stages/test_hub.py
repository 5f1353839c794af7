"""Weights from the hub: what a name means, what is said without network, and digests that must be right."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from pipeline.errors import CorruptError, InputError
from pipeline.progress import Progress
from stages.hub import HubWeights, download, place_of

BROKEN: Any = HfHubHTTPError.__bases__[0]  # of the library that the hub's client talks through


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("rar_b.bin", ("yucornetto/RAR", "rar_b.bin", "main")),
        ("maskgit-vqgan-imagenet-f16-256.bin", ("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin", "main")),
        ("somebody/things/model.safetensors", ("somebody/things", "model.safetensors", "main")),
        ("somebody/things/deep/model.ckpt@v1.0", ("somebody/things", "deep/model.ckpt", "v1.0")),
        ("other.bin", None),
        ("things/model.bin", None),
        ("digits/rar/generator", None),
        ("./some/folder/model.bin", None),
        ("/some/folder/model.bin", None),
    ],
)
def test_names_of_the_hub(word: str, place: tuple[str, str, str] | None) -> None:
    found = place_of(word)
    assert (None if found is None else (found.repository, found.file, found.revision)) == place


def cached(folder: Path, monkeypatch: pytest.MonkeyPatch, *, digest: str | None = None) -> list[Any]:
    """Let the hub's client find a file in a cache laid out like its own; returns what it is asked for."""
    data = b"weights"
    blob = folder / "blobs" / (digest or hashlib.sha256(data).hexdigest())
    link = folder / "snapshots" / "0123abc" / "rar_b.bin"
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.symlink_to(blob)
    asked: list[Any] = []

    def find(repository: str, file: str, *, revision: str) -> str:
        asked.append((repository, file, revision, are_progress_bars_disabled()))
        return str(link)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", find)
    return asked


def test_a_file_is_asked_for_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cached(tmp_path, monkeypatch)
    place = HubWeights(repository="yucornetto/RAR", file="rar_b.bin", revision="0123abc")
    assert download(place, Progress()).read_bytes() == b"weights"
    seen = io.StringIO()
    download(place, Progress(seen))
    assert "rar_b.bin of yucornetto/RAR at 0123abc" in seen.getvalue()
    assert asked == [("yucornetto/RAR", "rar_b.bin", "0123abc", is_quiet) for is_quiet in (True, False)]
    assert not are_progress_bars_disabled()


def test_what_the_hub_knows_by_another_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path, monkeypatch, digest="0" * 64)
    with pytest.raises(CorruptError, match=r"rar_b.bin of yucornetto/RAR has SHA-256 .* expected 000000"):
        download(HubWeights(repository="yucornetto/RAR", file="rar_b.bin"), Progress())


@pytest.mark.parametrize(
    "failure",
    [LocalEntryNotFoundError("offline"), BROKEN("slow"), OSError("no space")],
)
def test_without_network_it_says_where_to_fetch(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*place: Any, **more: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        InputError, match=r"fetch https://huggingface.co/yucornetto/RAR/resolve/v1/rar_b.bin.*--weights"
    ):
        download(HubWeights(repository="yucornetto/RAR", file="rar_b.bin", revision="v1"), Progress())
