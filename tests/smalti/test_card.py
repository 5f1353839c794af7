"""Dataset card, croissant.json and SHA256SUMS: read back by the tools that they are for."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from datetime import date

import pytest
from ruamel.yaml import YAML

import smalti
from smalti.card import card_bytes, croissant_bytes, sums_bytes
from smalti.listing import FileEntry

ATTRIBUTES = smalti.TokenAttributes(
    name='odd: "name"',
    n_images=5_000,
    n_crops=4,
    grid=(16, 16),
    codes=262_144,
    classes=10,
    factors=(64, 4096),
    licence="notice | see terms",
    tokenizer={"family": "ibq"},
    source={"name": "pictures", "terms_url": "https://example.org/terms"},
)
FILES = [FileEntry("zarr.json", 12, "a" * 64), FileEntry("tokens/c/0/0/0", 34, "b" * 64)]


def test_card_has_a_header_that_hubs_read():
    _, header, body = card_bytes(ATTRIBUTES).decode().split("---\n", 2)
    found = YAML(typ="safe", pure=True).load(header)
    assert found["pretty_name"] == 'odd: "name"'
    assert found["size_categories"] == ["10K<n<100K"]
    assert found["license_name"] == "notice | see terms"
    for fact in ("16 x 16", "262144", "64 x 4096", "https://example.org/terms", "family ibq", "4294967295"):
        assert fact in body


def test_croissant_lists_the_files():
    found = json.loads(croissant_bytes(ATTRIBUTES, FILES, creator="A group", published=str(date(2026, 1, 2))))
    assert found["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    assert found["url"] == "https://example.org/terms"
    assert found["datePublished"] == "2026-01-02"
    first = found["distribution"][0]
    assert {name: first[name] for name in ("name", "contentUrl", "contentSize", "sha256")} == {
        "name": "tokens/c/0/0/0",
        "contentUrl": "tokens/c/0/0/0",
        "contentSize": "34 B",
        "sha256": "b" * 64,
    }
    assert first["encodingFormat"] == "application/octet-stream"


def test_croissant_of_a_set_agrees_with_its_files(token_set):
    listed = json.loads((token_set.path / "croissant.json").read_text())["distribution"]
    for entry in listed:
        data = (token_set.path / entry["contentUrl"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["contentSize"] == f"{len(data)} B"
    beside = {"README.md", "croissant.json", "SHA256SUMS"}
    on_disk = {path.relative_to(token_set.path).as_posix() for path in token_set.path.rglob("*") if path.is_file()}
    assert {entry["name"] for entry in listed} == on_disk - beside


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sums_are_read_by_sha256sum(token_set):
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=token_set.path, check=True)


def test_sums_are_sorted():
    assert sums_bytes(FILES).decode() == f"{'b' * 64}  tokens/c/0/0/0\n{'a' * 64}  zarr.json\n"
