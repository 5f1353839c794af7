"""Token sets outside of the store: every command and recipe takes their folder, which stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import cli.main
from pipeline import following
from pipeline.artifact import list_files
from pipeline.durable import hash_file
from pipeline.outside_tokens import open_outside
from pipeline.store import Store
from smalti import create_tokens
from stages.weights.cards import TokenizerCard

RECIPE = """
title: a generator of codes from elsewhere
paths: {codes: null}
steps:
  generator: {stage: train-generator, inputs: {tokens: ["{codes}/train"], held-out: "{codes}/train"}, config: CONFIG}
  samples: {stage: sample, inputs: {generator: generator, labels: "{codes}/train"}, config: {labels: like, images: 6}}
"""
CONFIG = "{model: {kind: rar, width: 16, layers: 1, heads: 1, mlp_width: 16}, training: {steps: 2, batch: 4}}"


def smalti(line: str, *words: object) -> Result:
    return CliRunner().invoke(cli.main.app, [*line.split(), *map(str, words)])


def made(line: str, *words: object) -> dict[str, Any]:
    done = smalti(f"{line} --json", *words)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def create(path: Path, *, seed: int = 0, **said: Any) -> Path:
    """24 images of 3 classes, 16 codes of 256 each."""
    codes_IT = np.random.default_rng(seed).integers(0, 256, (24, 16))
    facts = {"codes": 256, "grid": (4, 4), "name": "elsewhere", "resolution": 32, "shard_images": 128, **said}
    return create_tokens(path, codes_IT, labels=np.arange(24) % 3, **facts).path


def hashes(folder: Path) -> dict[str, str]:
    return {name: hash_file(folder / name) for name in list_files(folder)}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


TRAIN = ["train-generator", "--training.steps", "2", "--training.batch", "4", "--model.width", "16", "--model.layers", "1",
         "--model.heads", "1", "--model.mlp-width", "16", "--ref", "my/generator"]  # fmt: skip


def test_from_foreign_codes_to_images(tmp_path: Path) -> None:
    tokenizer = made(
        "train-tokenizer --images digits:held-out --training.steps 1 --training.batch 8 --ref my/tokenizer"
    )
    identity = TokenizerCard.of(Store(Path("store")).find(tokenizer["key"])).identity
    folder = create(tmp_path / "elsewhere", tokenizer=identity)
    before = hashes(folder)

    assert "would be made" in smalti(" ".join(TRAIN), "--tokens", folder, "--dry-run").stdout
    generator = made(" ".join(TRAIN), "--tokens", folder, "--held-out", folder)
    record = json.loads((Path(generator["path"]) / "manifest.json").read_text())["inputs"]["held-out"]
    assert (record["stage"], len(record["key"])) == ("external", 64)
    samples = made("sample --generator my/generator --images 6 --set labels=like --ref my/samples", "--labels", folder)
    assert samples["facts"]["classes"] == 3
    assert made("decode --tokens my/samples --tokenizer my/tokenizer")["facts"]["size"] == 32
    assert made("decode --tokenizer my/tokenizer", "--tokens", folder)["facts"]["images"] == 24
    assert made("probe --iterations 5", "--train", folder, "--held-out", folder)["facts"]["classes"] == 3

    assert hashes(folder) == before
    assert made("verify", folder)["verified"] == 1
    assert made("verify")["verified"] > 0
    assert generator["path"] not in {row["path"] for row in made("gc --older-than 0s")["garbage"]}


def test_other_processes_of_a_launch_open_it(tmp_path: Path) -> None:
    folder = create(tmp_path / "elsewhere")
    assert [one.key for one in following._opened([str(folder)])] == [open_outside(folder).key]


def test_its_content_is_its_name(tmp_path: Path) -> None:
    first = made(" ".join(TRAIN), "--tokens", create(tmp_path / "first"))
    shutil.move(tmp_path / "first", tmp_path / "moved")
    again = made(" ".join(TRAIN), "--tokens", tmp_path / "moved")
    assert (again["key"], again["reused"]) == (first["key"], True)
    other = made(" ".join(TRAIN), "--tokens", create(tmp_path / "first", seed=1))
    assert other["key"] != first["key"]


def test_damage_is_exit_code_4_and_moves_nothing(tmp_path: Path) -> None:
    folder = create(tmp_path / "elsewhere")
    shard = folder / "tokens" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[5] ^= 1  # a code; the checksum behind it stays
    shard.write_bytes(data)
    done = smalti(" ".join(TRAIN), "--tokens", folder)
    assert (done.exit_code, "crc32c" in done.stderr) == (4, True)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("CONFIG", CONFIG).replace("{codes}/train", "{codes}"))
    assert smalti("run recipe.yaml --path", f"codes={folder}").exit_code == 4
    assert shard.read_bytes() == bytes(data)
    assert smalti("verify", folder).exit_code == 4
    assert not list((tmp_path / "store").glob("external*"))


def test_a_recipe_names_it_by_a_path(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("CONFIG", CONFIG))
    planned = {row["step"]: row for row in made("plan recipe.yaml")["steps"]}
    assert planned["generator"]["reason"] == "step generator lacks external data: give --path codes=PATH"
    words = ["--path", f"codes={tmp_path}"]
    planned = {row["step"]: row for row in made("plan recipe.yaml", *words)["steps"]}
    assert planned["{codes}/train"]["state"] == "missing"
    assert smalti("run recipe.yaml -q", *words).exit_code == 3
    create(tmp_path / "train")
    done = {row["step"]: row for row in made("run recipe.yaml", *words)["steps"]}
    assert done["samples"]["facts"]["classes"] == 3
    assert {row["state"] for row in made("plan recipe.yaml", *words)["steps"]} == {"done"}
    assert not list((tmp_path / "store" / "refs").rglob("*codes*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((CONFIG, "{training: {batch: 4}}"), None),
        (("{codes}/train\"]", "{cods}/train\"]"), "did you mean 'codes'?"),
        (("inputs: {generator: generator", 'inputs: {generator: "{codes}/g"'), "only a token-set may lie outside"),
        (("images: 6", "images: 6, order: [1, 0]"), "order must name each of the positions 0 to 15 once, found 2 numbers"),
    ],
)  # fmt: skip
def test_a_recipe_with_it_is_checked_when_it_is_read(tmp_path: Path, change: tuple[str, str], said: str | None) -> None:
    create(tmp_path / "train")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("CONFIG", CONFIG).replace(*change))
    done = smalti("plan recipe.yaml", "--path", f"codes={tmp_path}")
    assert done.exit_code == (2 if said else 0), done.output
    assert said is None or said in done.stderr


def test_a_folder_that_is_not_a_token_set_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    assert smalti(" ".join(TRAIN), "--tokens", folder).exit_code == 3
    (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    done = smalti(" ".join(TRAIN), "--tokens", folder)
    assert (done.exit_code, "no attributes named smalti" in done.stderr) == (4, True)
