"""A weight file in the place of an artifact: it is imported first, said so, and then used like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cli.main import app
from models.generators.config import CodeShape, RarConfig
from models.generators.rar.network import Rar
from pipeline.store import Store
from smalti.tokens import open_tokens
from tests.hub import Hub
from tests.stages.conformance import draw_folder

ROOT = Path(__file__).parents[2]
MASKGIT = ROOT / "tests" / "golden" / "rar" / "maskgit_vqgan.safetensors"
CUT = ["--images", "4", "--rows-per-pass", "4", "--shard-images", "4", "--chunk-images", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rar.bin and maskgit.bin, which belong together."""
    folder = tmp_path_factory.mktemp("files")
    weights = {
        name.removeprefix("weights/"): tensor for name, tensor in load_file(MASKGIT).items() if "weights/" in name
    }
    torch.manual_seed(0)
    rar = Rar(RarConfig(width=16, layers=1, heads=2, mlp_width=16), CodeShape(codes=48, grid=(4, 4), classes=1000))
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
    assert "does not say which tokenizer made its codes" in done.stderr
    assert "smalti sample --tokenizer" in done.stderr


def test_a_file_of_no_known_layout(files: Path, tmp_path: Path) -> None:
    done = smalti("sample", "--generator", files / "other.bin", *CUT, "--store", tmp_path / "store")
    assert done.exit_code == 4
    assert "has none of the layouts rar, maskgit-vqgan" in done.stderr


def test_a_tokenizer_is_no_generator(files: Path, tmp_path: Path) -> None:
    done = smalti("sample", "--generator", files / "maskgit.bin", *CUT, "--store", tmp_path / "store")
    assert done.exit_code == 4
    assert f"{files / 'maskgit.bin'} holds a tokenizer (layout maskgit-vqgan), not a generator" in done.stderr


WRONG = {
    "random.bin": bytes.fromhex("03a1b2c3d4e5f60718293a4b5c6d7e8f"),
    "empty.bin": b"",
    "text.pt": b"no weights at all",
    "page.bin": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "header.safetensors": b"\xff" * 8 + b"{}",
    "cut.ckpt": b"PK\x03\x04" + bytes(50),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("line", ["import-weights --layout rar --weights", "sample --weights", "sample --generator"])
def test_a_wrong_file_is_said_to_be_no_weights(line: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRONG[name])
    done = smalti(*line.split(), tmp_path / name, "--store", tmp_path / "store")
    assert done.exit_code == 4, done.output
    assert f"{tmp_path / name} is not a PyTorch or safetensors file: " in done.stderr
    assert "weights_only" not in done.stderr
    others = "; give published weights, as a file or by a name on the hub (rar_b.bin, owner/repository/file)"
    assert (others in done.stderr) == line.startswith("sample")


def test_a_weight_file_that_is_not_there(tmp_path: Path) -> None:
    for line in ("import-weights --layout rar --weights", "sample --weights", "sample --generator"):
        done = smalti(*line.split(), tmp_path / "absent.bin", "--store", tmp_path / "store")
        assert done.exit_code == 3, done.output
        assert f"there is no weight file {tmp_path / 'absent.bin'}" in done.stderr


RECIPE = """
title: weights from the hub, and a score by Inception
steps:
  images: {stage: index, config: {source: {kind: folder}}, paths: {images: FOLDER}}
  tokenizer:
    stage: import-weights
    config: {layout: maskgit-vqgan, resolution: 16, hub: {repository: somebody/things, file: maskgit.bin}}
  tokens: {stage: pretokenize, inputs: {images: images, tokenizer: tokenizer}}
  reconstructions: {stage: decode, inputs: {tokens: tokens, tokenizer: tokenizer, originals: images}}
  reference: {stage: describe-images, inputs: {images: images}, config: {extractor: inception, size: 16}}
  features: {stage: describe-images, inputs: {images: reconstructions}, config: {extractor: inception}}
  score:
    stage: score
    inputs: {features: features, reference: reference, images: reconstructions, originals: images}
    config: {figures: [lpips]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a command that name the recipe and a store; torch's cache is empty, and no server answers."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    folder = draw_folder(tmp_path / "folder")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    return [str(tmp_path / "recipe.yaml"), "--store", str(tmp_path / "store")]


def planned(recipe: list[str], *words: str) -> dict[str, dict[str, Any]]:
    return {step["step"]: step for step in answer("plan", *recipe, *words)["steps"]}


def test_plan_names_every_file_that_is_not_there(recipe: list[str], hub: Hub, tmp_path: Path) -> None:
    steps = planned(recipe)
    assert steps["tokenizer"]["reason"] == "digest unknown until maskgit.bin of somebody/things is downloaded"
    assert (steps["tokenizer"]["state"], steps["tokenizer"]["key"]) == ("run", None)
    assert steps["tokens"]["state"] == "waits"
    absent = {need["file"]: need["option"] for step in steps.values() for need in step["absent"]}
    assert absent == {
        "maskgit.bin": "--set tokenizer.paths.weights=FILE",
        "weights-inception-2015-12-05-6726825d.pth": "--set features.paths.weights=FILE",
        "vgg16-397923af.pth": "--set score.paths.perceptual=FILE",
    }
    said = smalti("plan", *recipe)
    assert "leave lpips out of figures" in said.stderr
    assert hub.asked == []
    lost = planned(recipe, "--set", "tokenizer.paths.weights=absent.bin")["tokenizer"]
    assert lost["state"] == "missing"
    assert lost["reason"] == "there is no weight file absent.bin; give another: --set tokenizer.paths.weights=FILE"
    (tmp_path / "page.bin").write_bytes(b"<html>Sign in</html>")
    wrong = planned(recipe, "--set", f"reference.paths.weights={tmp_path / 'page.bin'}")["reference"]
    assert wrong["state"] == "missing"
    assert "is not a PyTorch or safetensors file: it is an HTML page" in wrong["reason"]


def test_a_wrong_file_in_torchs_cache_is_named_too(recipe: list[str], hub: Hub, tmp_path: Path) -> None:
    wrong = tmp_path / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    wrong.parent.mkdir(parents=True)
    wrong.write_bytes(b"half of it")
    step = planned(recipe)["reference"]
    assert step["state"] == "missing"
    assert f"{wrong} is not weights-inception-2015-12-05-6726825d.pth (the Inception weights)" in step["reason"]
    assert "give another: --set reference.paths.weights=FILE" in step["reason"]


def test_run_says_it_before_anything_is_computed(recipe: list[str], hub: Hub, files: Path, tmp_path: Path) -> None:
    done = smalti("run", *recipe)
    assert done.exit_code == 74, done.output
    assert "maskgit.bin of somebody/things is not on this machine and cannot be downloaded" in done.stderr
    assert "give the file: --set tokenizer.paths.weights=FILE" in done.stderr
    hub.keep("somebody/things", "maskgit.bin", (files / "maskgit.bin").read_bytes())
    done = smalti("run", *recipe)
    assert done.exit_code == 74, done.output
    assert "(the Inception weights) is not on this machine" in done.stderr
    assert "--set reference.paths.weights=FILE --set features.paths.weights=FILE" in done.stderr
    assert "also not on this machine: vgg16-397923af.pth" in done.stderr
    lost = smalti("run", *recipe, "--set", "tokenizer.paths.weights=absent.bin")
    assert lost.exit_code == 3
    assert "step tokenizer: there is no absent.bin; give another: --set tokenizer.paths.weights=FILE" in lost.stderr
    assert Store(tmp_path / "store").artifacts() == []


def test_the_digest_of_a_download_is_in_the_keys_of_a_recipe(recipe: list[str], hub: Hub, files: Path) -> None:
    Path(recipe[0]).write_text(Path(recipe[0]).read_text().split("  tokens:")[0])
    sha256 = hub.keep("somebody/things", "maskgit.bin", (files / "maskgit.bin").read_bytes())
    made = answer("run", *recipe)["steps"][1]
    assert made["state"] == "made"
    assert json.loads((Path(made["path"]) / "manifest.json").read_bytes())["externals"] == {"weights": sha256}
    hub.forget()
    done = planned(recipe)["tokenizer"]
    assert done["state"] == "done"
    assert answer("run", *recipe)["steps"][1]["state"] == "done"
    pinned = planned(recipe, "--set", f"tokenizer.hub.sha256={'a' * 64}")["tokenizer"]
    assert pinned["key"] != done["key"]


def test_a_single_stage_names_its_own_options(tmp_path: Path, hub: Hub, recipe: list[str]) -> None:
    place = ["--set", "hub.repository=somebody/things", "--set", "hub.file=maskgit.bin"]
    line = ["import-weights", "--layout", "maskgit-vqgan", *place, "--store", str(tmp_path / "store")]
    assert "digest unknown until maskgit.bin of somebody/things is downloaded" in smalti(*line, "--dry-run").stdout
    done = smalti(*line)
    assert done.exit_code == 74
    assert "give the file: --weights FILE" in done.stderr
    lpips = ["train-tokenizer", "--images", "digits", "--set", "loss.perceptual=1", "--store", str(tmp_path / "store")]
    done = smalti(*lpips)
    assert done.exit_code == 74
    assert "give the file: --perceptual FILE; or do without LPIPS: set loss.perceptual to 0" in done.stderr


def test_offline_takes_seconds_and_logs_nothing(tmp_path: Path) -> None:
    """With the real client of the hub, and an address where nothing listens."""
    words = ["sample", "--weights", "somebody/things/rar.bin", "--store", str(tmp_path / "store")]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "hub")}
    started = time.monotonic()
    code = "import sys; from cli.main import app; sys.argv[0] = 'smalti'; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert time.monotonic() - started < 15  # alone about 2 s; the tests' machine may be busy
    assert done.returncode == 74, done.stderr
    said, *rest = done.stderr.strip().split("\n")
    assert said == "weights: rar.bin of somebody/things, from the Hugging Face hub"
    assert [line.split(":")[0] for line in rest] == ["error"]
    assert "give the file: --generator FILE" in done.stderr
