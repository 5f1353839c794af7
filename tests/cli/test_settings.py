"""One source of defaults: help, `smalti config`, the schema of recipes and the manifest say the same of every setting."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import cli.main
from pipeline.config import parse_config
from pipeline.errors import UsageError
from pipeline.keys import config_value
from pipeline.recipe import load_recipe, put_setting, recipe_schema
from pipeline.recipe_text import parse_yaml
from pipeline.settings import REQUIRED, settings_of, value_at
from pipeline.store import Store
from stages import stages
from stages.images.checks import check_step_sizes

COMMANDS = typer.main.get_command(cli.main.app).commands  # type: ignore[attr-defined]
SCHEMA = recipe_schema(stages())
NEEDED: dict[str, dict[str, Any]] = {"describe-tokens": {"layer": 1}, "import-weights": {"layout": "rar"}}
NESTED = [  # what help showed wrongly when it read the defaults of the classes
    ("train-tokenizer", "training.steps", 800),
    ("train-tokenizer", "training.batch", 32),
    ("train-tokenizer", "training.optimizer.learning_rate", 0.005),
    ("train-tokenizer", "loss.l2", 4.0),
    ("train-generator", "training.optimizer.weight_decay", 0.03),
    ("train-generator", "model.dropout", 0.0),
    ("train-tokenizer", "views.pixels", 1),
    ("finetune-decoder", "training.schedule.warmup", 20),
]


def smalti(line: str, *words: object) -> Result:
    return CliRunner().invoke(cli.main.app, [*line.split(), *map(str, words)])


def manifest_config(name: str) -> dict[str, Any]:
    """The config of a stage where nothing but what is needed is said, as a manifest holds it."""
    config = parse_config(stages()[name].config, NEEDED.get(name, {}), where=name)
    return config.model_dump(mode="json")


def shown_default(name: str, setting: str) -> str | None:
    """What --help says of a default; None where there is no option."""
    flag = f"--{setting.replace('_', '-')}"
    for param in COMMANDS[name].params:
        if flag in param.opts and (found := re.search(r"\[default(?: for the digits)?: (.*?)[\];]", param.help or "")):
            return found[1]
    return None


def schema_default(name: str, setting: str) -> Any:
    """The default in the schema of changes to a stage's config."""
    found: Any = SCHEMA["$defs"][f"{name}-config"]
    for word in setting.split("."):
        found = (found["anyOf"][0] if "anyOf" in found and "properties" in found["anyOf"][0] else found)["properties"]
        found = found.get(word, {})
    return found.get("default", REQUIRED)


@pytest.mark.parametrize("name", list(stages()))
def test_help_schema_and_manifest_agree_on_every_field(name: str) -> None:
    manifest, compared = manifest_config(name), 0
    for setting in stages()[name].settings(NEEDED.get(name)):
        if setting.parts or setting.within:
            continue
        value = value_at(manifest, setting.name)
        assert setting.value == value, setting.name
        said = shown_default(name, setting.name)
        if said is not None and setting.name not in NEEDED.get(name, {}):
            words = ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip('"')
            assert said == (words or "empty"), setting.name
            compared += 1
        if setting.key != "kind" and not setting.is_for_digits and setting.name not in NEEDED.get(name, {}):
            assert schema_default(name, setting.name) == value, setting.name
    assert compared or all(field.default is None for field in stages()[name].config.model_fields.values())


@pytest.mark.parametrize(("name", "setting", "value"), NESTED)
def test_nested_defaults_are_those_of_the_stage(name: str, setting: str, value: Any) -> None:
    assert value_at(manifest_config(name), setting) == value
    assert shown_default(name, setting) == str(value)
    assert schema_default(name, setting) == value


@pytest.mark.parametrize("name", list(stages()))
def test_every_setting_says_what_it_means(name: str) -> None:
    assert [setting.name for setting in settings_of(stages()[name].config) if not setting.text] == []


@pytest.mark.parametrize("name", list(stages()))
def test_what_config_prints_is_a_file_that_changes_nothing(name: str) -> None:
    done = smalti(f"config {name}")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    read = parse_yaml(done.stdout) | NEEDED.get(name, {})
    assert parse_config(stages()[name].config, read, where=name).model_dump(mode="json") == manifest_config(name)


def test_another_kind_has_its_own_settings() -> None:
    done = smalti("config pretokenize --set views.kind=ten-crop --json")
    found = {setting["name"]: setting for setting in json.loads(done.stdout)["settings"]}
    assert found["views.scale"]["default"] == 1.1
    assert found["views.size"]["needed"]
    assert found["views.kind"]["choices"][:3] == ["center", "center+flip", "ten-crop"]
    text = smalti("config pretokenize --set views.kind=ten-crop").stdout
    assert parse_yaml(text)["views"] == {"kind": "ten-crop", "scale": 1.1}
    assert "# size:" in text


def test_settings_of_other_kinds_are_options() -> None:
    """What differs by kind is said for each."""
    [power] = [param for param in COMMANDS["generate"].params if "--sampling.guidance.power" in param.opts]
    assert power.help == "power of the cosine's argument; 0 is constant [needed with kind power-cosine]"
    [filters] = [param for param in COMMANDS["pretokenize"].params if "--views.filter" in param.opts]
    assert "[default with kind eval-crop or resize: bicubic]" in filters.help
    assert re.search(r"\[default with kind random-crop[a-z -]*: bilinear\]", filters.help)


@pytest.mark.parametrize(
    ("options", "said"),
    [("kind power-cosine --sampling.guidance.scale 4 --sampling.guidance.power 2.75", "'x' names no artifact"),
     ("power 2", "generate.sampling.guidance.power belongs to kind power-cosine, but generate.sampling.guidance.kind is constant"),
     ("kind linear --sampling.guidance.scale 4 --sampling.guidance.power 2", "power belongs to kind power-cosine"),
     ("kind power-cosine --sampling.guidance.power 2", "generate.sampling.guidance.scale is missing")],
)  # fmt: skip
def test_a_setting_of_another_kind_needs_that_kind(options: str, said: str, tmp_path: Path) -> None:
    done = smalti(f"generate --generator x --tokenizer x --store {tmp_path} --sampling.guidance.{options}")
    assert said in done.stderr


def test_a_published_size_shows_its_numbers() -> None:
    text = smalti("config train-generator --set model.kind=rar --set model.size=b").stdout
    assert parse_yaml(text)["model"]["layers"] == 24


@pytest.mark.parametrize(
    ("line", "said"),
    [("config indx", "did you mean 'index'?"), ("config index --set source.knd=folder", "did you mean 'kind'?"),
     ("config index --set source.kind=foldr", "did you mean 'folder'?")],
)  # fmt: skip
def test_config_refuses_what_is_unknown(line: str, said: str) -> None:
    done = smalti(line)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("name", "flags"),
    [("index", ["--source.kind"]), ("pretokenize", ["--views.kind", "--views.size"]),
     ("train-tokenizer", ["--views.kind", "--views.size", "--model.autoencoder.kind", "--training.schedule.kind"]),
     ("train-generator", ["--model.kind", "--model.width", "--training.schedule.warmup"]), ("extract", ["--encoder.kind"])],
)  # fmt: skip
def test_what_is_needed_first_is_an_option(name: str, flags: list[str]) -> None:
    known = {text for param in COMMANDS[name].params for text in param.opts}
    assert set(flags) <= known


# Sizes of images.


@pytest.fixture
def own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 48-pixel images, and an empty folder to work in."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)
    for number, image_HW3 in enumerate(pixels):
        path = tmp_path / "own" / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HW3).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own"


SIZED = ["train-tokenizer", "extract"]


@pytest.mark.parametrize("name", SIZED)
def test_own_images_are_never_shrunk_to_the_size_of_the_digits(name: str, own_images: Path) -> None:
    (setting,) = stages()[name].digits_defaults
    for line in (f"{name} --images own --dry-run", f"{name} --images own -q", f"{name} --images own --dry-run"):
        done = smalti(line)
        assert done.exit_code == 2, done.output
        assert f"{name} lacks {setting}" in done.stderr
        assert f"--set {setting}=N" in done.stderr
    assert "other images of 48x48 pixels" in done.stderr
    assert {path.parent.name for path in Store(Path("store")).artifacts()} == {"index"}


def test_a_size_that_is_given_is_in_the_config(own_images: Path) -> None:
    done = smalti("train-tokenizer --images own --views.size 48 --dry-run")
    assert done.exit_code == 0, done.output
    assert parse_yaml(done.stdout)["views"]["size"] == 48


def test_the_digits_keep_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    smalti("index --ref d -q")
    done = smalti("train-tokenizer --images d --dry-run")
    assert parse_yaml(done.stdout)["views"]["size"] == 32
    assert smalti("train-tokenizer --images digits:held-out --dry-run").exit_code == 0


RECIPE = """
title: own images
paths: {images: null}
steps:
  images: {stage: index, config: {source: {kind: KIND}}, paths: {images: "{images}"}}
  tokenizer: {stage: train-tokenizer, inputs: {images: images}}
"""


def test_a_recipe_for_own_images_says_their_size(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE.replace("KIND", "folder"))
    with pytest.raises(UsageError, match=r"step tokenizer lacks views.size.*--set tokenizer.views.size=N"):
        check_step_sizes(load_recipe(path, stages()))
    sized = load_recipe(path, stages(), settings=["tokenizer.views.size=48"])
    check_step_sizes(sized)
    assert sized.steps[1].config.views.size == 48  # type: ignore[attr-defined]
    path.write_text(RECIPE.replace("{kind: KIND}", "{kind: digits}").replace(', paths: {images: "{images}"}', ""))
    check_step_sizes(load_recipe(path, stages()))


# Dry runs.


def test_a_dry_run_prints_the_config_that_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = smalti("index --source.split held-out --dry-run")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].endswith(": would be made")
    Path("full.yaml").write_text(done.stdout)
    made = json.loads(smalti("index --config full.yaml --json").stdout)
    assert made["key"] in done.stdout
    again = json.loads(smalti("index --source.split held-out --dry-run --json").stdout)
    assert (again["key"], again["state"]) == (made["key"], "done")
    manifest = json.loads((Path(made["path"]) / "manifest.json").read_text())
    assert again["config"] == parse_yaml(done.stdout)
    shown = parse_config(stages()["index"].config, again["config"], where="index")
    assert manifest["config"] == config_value(shown)  # the manifest lacks later fields at their defaults


def test_a_setting_of_a_kind_is_named_without_the_kind() -> None:
    given: dict[str, Any] = {}
    put_setting(given, ["views", "kind"], "center")
    with pytest.raises(UsageError, match=r"^train-tokenizer\.views\.size is missing"):
        parse_config(stages()["train-tokenizer"].config, given, where="train-tokenizer")
