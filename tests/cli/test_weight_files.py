"""A weight file in the place of an artifact: it is imported first, said so, and then used like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cli.main import app
from models.generators.config import RarConfig
from models.generators.rar import Rar
from smalti.tokens import open_tokens

MASKGIT = Path(__file__).parents[1] / "golden" / "rar" / "maskgit_vqgan.safetensors"
CUT = ["--images", "4", "--rows-per-pass", "4", "--shard-images", "4", "--chunk-images", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rar.bin and maskgit.bin, which belong together."""
    folder = tmp_path_factory.mktemp("files")
    weights = {
        name.removeprefix("weights/"): tensor for name, tensor in load_file(MASKGIT).items() if "weights/" in name
    }
    torch.manual_seed(0)
    rar = Rar(RarConfig(width=16, layers=1, heads=2, mlp_width=16), codes=48, tokens=16, classes=1000)
    torch.save(weights, folder / "maskgit.bin")
    torch.save(rar.state_dict(), folder / "rar.bin")
    torch.save({"a": torch.zeros(1)}, folder / "other.bin")
    return folder


def smalti(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def answer(*words: object) -> dict[str, Any]:
    done = smalti(*words, "--json")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def test_from_two_weight_files_to_a_picture(files: Path, tmp_path: Path) -> None:
    store = ["--store", tmp_path / "store"]
    sampling = [
        "sample",
        "--generator",
        files / "rar.bin",
        "--tokenizer",
        files / "maskgit.bin",
        "--classes",
        "207,360",
        *CUT,
    ]
    done = smalti(*sampling, *store)
    assert done.exit_code == 0, done.output
    assert f"put {files / 'rar.bin'} into the store as import-weights/" in done.stderr
    samples = answer(*sampling, *store)
    assert samples["reused"]
    tokens = open_tokens(samples["path"])
    assert [tokens.attributes.class_names[label] for label in tokens.labels[:2]] == ["golden retriever", "otter"]
    decoded = answer("decode", "--tokens", samples["path"], "--tokenizer", files / "maskgit.bin", *store)
    assert (Path(decoded["path"]) / "grid.png").stat().st_size > 1000
    assert len(list((tmp_path / "store" / "import-weights").glob("*/manifest.json"))) == 2


def test_a_dry_run_says_it_and_writes_nothing(files: Path, tmp_path: Path) -> None:
    done = smalti("sample", "--generator", files / "rar.bin", *CUT, "--dry-run", "--store", tmp_path / "store")
    assert done.exit_code == 0, done.output
    assert f"{files / 'rar.bin'} would be put into the store" in done.stdout
    assert not (tmp_path / "store").exists()


def test_samples_without_a_tokenizer_cannot_be_decoded(files: Path, tmp_path: Path) -> None:
    store = ["--store", tmp_path / "store"]
    samples = answer("sample", "--generator", files / "rar.bin", *CUT, *store)
    done = smalti("decode", "--tokens", samples["path"], "--tokenizer", files / "maskgit.bin", *store)
    assert done.exit_code == 4
    assert "was made with another tokenizer" in done.stderr


def test_a_file_of_no_known_layout(files: Path, tmp_path: Path) -> None:
    done = smalti("sample", "--generator", files / "other.bin", *CUT, "--store", tmp_path / "store")
    assert done.exit_code == 4
    assert "has none of the layouts rar, maskgit-vqgan" in done.stderr


def test_a_tokenizer_is_no_generator(files: Path, tmp_path: Path) -> None:
    done = smalti("sample", "--generator", files / "maskgit.bin", *CUT, "--store", tmp_path / "store")
    assert done.exit_code == 4
    assert "sample reads a generator as generator" in done.stderr
