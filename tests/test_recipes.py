"""Every recipe is right: it fits the schema that editors use, and it plans on an empty store, without data or torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from models.generators.config import CodeShape
from models.generators.generator import build_generator
from models.generators.gpt.memory import parameters as count_parameters
from pipeline.recipe import Recipe, dump_schema, load_recipe, recipe_name
from pipeline.recipe_text import parse_yaml, read_written
from pipeline.runner import plan
from pipeline.store import Store
from stages import stages
from stages.training.config import TrainingConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SCHEMA = ROOT / "recipes" / "schema.json"
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=recipe_name)


def load(path: Path) -> Recipe:
    return load_recipe(path, stages())


def named(recipe: Recipe) -> dict[str, dict[str, object]]:
    """The config of each step, as plain values."""
    return {step.name: step.config.model_dump() for step in recipe.steps}


def test_there_are_recipes_of_both_kinds() -> None:
    assert {path.parent.name for path in RECIPES} >= {"digits", "imagenet256"}


def test_the_schema_is_that_of_the_stages() -> None:
    assert SCHEMA.read_text() == dump_schema(stages()), "run: smalti schema > recipes/schema.json"


@each_recipe
def test_recipe_fits_the_schema(path: Path) -> None:
    text = path.read_text()
    assert re.match(r"# yaml-language-server: \$schema=\.\./schema\.json\n(base: \S+\n)?title: ", text)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(parse_yaml(text))


def test_the_schema_refuses_what_recipes_may_not_say() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    step = {"stage": "train-generator", "inputs": {"tokens": "t"}}
    rar = {"kind": "rar", "size": "b"}
    for config in ({"model": rar}, {"model": {"kind": "rar", "width": 8, "layers": 1, "heads": 1, "mlp_width": 8}}):
        assert validator.is_valid({"title": "t", "steps": {"g": {**step, "config": config}}})
    for config in (
        {"model": {**rar, "size": "m"}},
        {"model": {**rar, "witdh": 8}},
        {"modle": rar},
        {"training": {"step": 3}},
    ):
        assert not validator.is_valid({"title": "t", "steps": {"g": {**step, "config": config}}})
        assert not validator.is_valid({"base": "b.yaml", "steps": {"g": {**step, "config": config}}})


def test_the_schema_takes_what_differs_from_a_base() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    for change in (None, {"config": {"training": {"steps": 3, "clip": None}}}, {"inputs": {"held-out": None}}):
        assert validator.is_valid({"base": "b.yaml", "steps": {"g": change}})
        assert not validator.is_valid({"title": "t", "steps": {"g": change}})
    for wrong in ({"steps": {"g": {"inptus": {}}}}, {"steps": {"g": {"stage": "train-genrator"}}}, {"stpes": {}}):
        assert not validator.is_valid({"base": "b.yaml", **wrong})


@each_recipe
def test_recipe_plans_without_data(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    planned = plan(recipe, Store(tmp_path / "store"))
    assert len(planned) == len(recipe.steps) > 0
    asked = read_written(path, stages()).values.get("paths", {})
    for item in planned:
        if item.state == "missing":
            assert any(f"--{name} PATH" in item.reason or f"{name}=PATH" in item.reason for name in asked)
    first = {item.state for item in planned if not item.step.inputs and item.step.stage.name == "index"}
    assert first == ({"missing"} if asked.get("images", "") is None else {"run"})
    assert not (tmp_path / "store").exists()


@each_recipe
def test_recipe_is_called_by_its_own_name(path: Path) -> None:
    """A command in its comments is about itself, not about the recipe that it was made from."""
    text = path.read_text()
    assert all(
        line.split("recipes/")[1].startswith(f"{recipe_name(path)}.yaml")
        for line in text.splitlines()
        if "recipes/" in line
    )


DIGITS = {
    "rar": ("vector", "rar"),
    "ibq": ("index-backpropagation", "llama"),
    "open-magvit2": ("lookup-free", "factorized"),
}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_go_on_to_the_score_of_their_own_generator(name: str, tmp_path: Path) -> None:
    recipe = load(ROOT / "recipes" / "digits" / f"{name}.yaml")
    steps, configs = {step.name: step for step in recipe.steps}, named(recipe)
    assert (configs["tokenizer"]["model"]["quantizer"]["kind"], configs["generator"]["model"]["kind"]) == DIGITS[name]
    assert configs["generator"]["training"]["steps"] <= 800
    features = steps["score"].inputs["features"]
    samples = steps[steps[features].inputs["images"]].inputs["tokens"]
    assert steps[samples].inputs["generator"] == "generator"
    judged = {item.step.name: item.key for item in plan(load(ROOT / "recipes/digits/judges.yaml"), Store(tmp_path))}
    assert judged.items() <= {item.step.name: item.key for item in plan(recipe, Store(tmp_path))}.items()


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from cli.main import app\n"
        f"app(['plan', 'recipes/imagenet256/rar-b.yaml', '--store', {str(tmp_path)!r}], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lacks external data: give --images PATH" in done.stdout


# Rows of the published tables of tokenizers, on 50,000 validation images: recipe, and figures of its title.
TOKENIZERS = {
    "imagenet256/ibq-tokenizer-1024": "rFID 2.24, LPIPS 0.2580, 99 %",
    "imagenet256/ibq-tokenizer-8192": "rFID 1.87, LPIPS 0.2437, 98 %",
    "imagenet256/ibq-tokenizer-16384": "rFID 1.37, LPIPS 0.2235, 96 %",
    "imagenet256/ibq-tokenizer-262144": "rFID 1.00, LPIPS 0.2030, 84 %",
    "imagenet256/ibq-tokenizer-16384-pretrained": "rFID 2.06, PSNR 22.01, SSIM 0.61",
    "imagenet256/ibq-tokenizer-262144-pretrained": "rFID 1.53, PSNR 22.69, SSIM 0.64",
    "imagenet256/open-magvit2-tokenizer": "rFID 1.17, PSNR 21.90, 100 %",
    "imagenet128/open-magvit2-tokenizer": "rFID 1.18, PSNR 25.08, 100 %",
    "imagenet256/open-magvit2-tokenizer-128": "rFID 0.34, PSNR 26.19",
    "imagenet256/open-magvit2-tokenizer-16384-pretrained": "rFID 2.55, PSNR 22.21, SSIM 0.62",
    "imagenet256/open-magvit2-tokenizer-262144-pretrained": "rFID 1.67, PSNR 22.70, SSIM 0.64",
}


@pytest.mark.parametrize(("name", "figures"), TOKENIZERS.items())
def test_every_row_of_the_tokenizers_has_a_recipe_that_plans(name: str, figures: str, tmp_path: Path) -> None:
    recipe = load(ROOT / "recipes" / f"{name}.yaml")
    assert f"published: {figures}" in recipe.title
    assert [item.step.name for item in plan(recipe, Store(tmp_path / "store"))][-1] == "score"
    for step in recipe.steps:
        if step.stage.name == "index" and step.config.source.split == "train":
            assert step.config.without == ("n06596364/n06596364_9591.JPEG",)


# Published settings: guidance scale, guidance power, temperature (spec of arXiv 2411.00776, ImageNet 256).
RAR = {"b": (16.0, 2.75, 1.0), "l": (15.5, 2.5, 1.02), "xl": (6.9, 1.5, 1.02), "xxl": (8.0, 1.2, 1.02)}
FID = {"b": "1.95", "l": "1.70", "xl": "1.50", "xxl": "1.48"}


@pytest.mark.parametrize("size", RAR)
def test_rar_recipes_have_the_published_settings(size: str) -> None:
    from models.generators.config import SIZES

    recipe = load(ROOT / "recipes" / "imagenet256" / f"rar-{size}.yaml")
    configs = named(recipe)
    sampling = configs["images"]["sampling"]
    guidance = sampling["guidance"]
    assert guidance["kind"] == "power-cosine"
    assert ([*guidance["scale"], guidance["power"]], sampling["temperature"]) == ([*RAR[size][:2]], (RAR[size][2],))
    assert f"FID {FID[size]}" in recipe.title
    model = configs["generator"]["model"]
    assert {name: model[name] for name in SIZES[size]} == SIZES[size]


def test_rar_recipes_differ_in_size_and_sampling_alone() -> None:
    base = named(load(ROOT / "recipes" / "imagenet256" / "rar-b.yaml"))
    for size in RAR:
        other = named(load(ROOT / "recipes" / "imagenet256" / f"rar-{size}.yaml"))
        assert other.keys() == base.keys()
        assert {name for name in base if other[name] != base[name]} <= {"generator", "images"}
        assert _without_size(other["generator"]) == _without_size(base["generator"])
        assert {**other["images"], "sampling": 0} == {**base["images"], "sampling": 0}


def _without_size(generator: dict[str, Any]) -> dict[str, Any]:
    """What does not follow from the network's size: all but the network, and the rows that fit a GPU together."""
    return {**generator, "model": 0, "training": {**generator["training"], "rows_per_pass": 0}}


# Rows of the published tables: figures, guidance scales, temperatures, parameters.
GENERATORS = {
    "ibq-b": ("FID 2.88, IS 254.73", (2.25,), (1.1,), 342_994_944),
    "ibq-l": ("FID 2.45, IS 267.48", (2.0,), (1.0,), 649_640_960),
    "ibq-xl": ("FID 2.14, IS 278.99", (2.35,), (1.15,), 1_076_103_168),
    "ibq-xxl": ("FID 2.05, IS 286.73", (2.85,), (1.2,), 2_063_331_840),
    "open-magvit2-b": ("FID 3.08, IS 258.26", (1.9, 2.0), (1.0, 1.0), 343_570_432),
    "open-magvit2-l": ("FID 2.51, IS 271.70", (1.9, 1.9), (1.1, 1.0), 804_362_240),
    "open-magvit2-xl": ("FID 2.33, IS 271.77", (1.75, 1.85), (1.1, 1.0), 1_486_679_040),
}
PER_EPOCH = 1669  # steps of 768 of the 1,281,166 images


@pytest.mark.parametrize("name", GENERATORS)
def test_every_row_of_the_llama_style_generators_has_a_recipe_that_plans(name: str, tmp_path: Path) -> None:
    figures, scales, temperatures, parameters = GENERATORS[name]
    recipe = load(ROOT / "recipes" / "imagenet256" / f"{name}.yaml")
    assert figures in recipe.title
    assert {item.step.name for item in plan(recipe, Store(tmp_path / "store"))} >= {"tokens", "generator", "score"}
    configs = {step.name: step.config for step in recipe.steps}
    assert configs["train-images"].without == ("n06596364/n06596364_9591.JPEG",)
    sampling, images = configs["images"].sampling, configs["images"]
    assert (sampling.guidance.kind, sampling.guidance.scale, sampling.temperature) == ("constant", scales, temperatures)
    assert (images.images, images.labels, images.precision) == (50_000, "balanced", "float32")
    assert (sampling.top_k, sampling.top_p) == (None, None)
    codes = 2**18 if "magvit2" in name else 2**14
    with torch.device("meta"):
        network = build_generator(configs["generator"].model, CodeShape(codes=codes, grid=(16, 16), classes=1000))
    assert sum(one.numel() for one in network.parameters()) == parameters


@pytest.mark.parametrize("size", ["B", "L", "XL", "XXL"])
def test_ibqs_generators_have_the_published_training(size: str) -> None:
    rows = json.loads((ROOT / "tests/golden/ibq/schedules.json").read_text())["schedules"][size]
    training = _training(f"ibq-{size.lower()}")
    _check_llama_style(training, steps=rows["epochs"] * PER_EPOCH)
    for row in rows["rows"]:
        step = row["iteration"]
        rate = training.schedule.rate(step, base=training.optimizer.learning_rate, steps=training.steps)
        assert rate == pytest.approx(row["lr"], rel=1e-9)
        decay = training.optimizer.decay(step, steps=training.steps)
        assert decay == pytest.approx(row["wd_decay_group"], rel=1e-9) == row["wd_nodecay_group"]


@pytest.mark.parametrize(("size", "epochs", "rate"), [("b", 300, 3e-4), ("l", 300, 3e-4), ("xl", 350, 2.4e-4)])
def test_open_magvit2s_generators_have_the_published_training(size: str, epochs: int, rate: float) -> None:
    training = _training(f"open-magvit2-{size}")
    _check_llama_style(training, steps=epochs * PER_EPOCH)
    assert (training.optimizer.learning_rate, training.optimizer.weight_decay_end) == (rate, None)
    schedule = training.schedule
    assert (schedule.kind, schedule.start, schedule.end) == ("warmup-plateau-linear", 0.005, 0.1)
    assert schedule.warmup == epochs // 50 * PER_EPOCH


def _training(name: str) -> TrainingConfig:
    recipe = load(ROOT / "recipes" / "imagenet256" / f"{name}.yaml")
    training: TrainingConfig = next(step for step in recipe.steps if step.name == "generator").config.training  # type: ignore[attr-defined]
    return training


def _check_llama_style(training: TrainingConfig, *, steps: int) -> None:
    """What all published trainings of IBQ's and Open-MAGVIT2's generators have in common."""
    assert (training.steps, training.batch, training.clip, training.ema) == (steps, 768, 1.0, None)
    optimizer = training.optimizer
    assert (optimizer.betas, optimizer.weight_decay, optimizer.decays) == ((0.9, 0.95), 0.05, "all")


# DiGIT's table: figures of the title, parameters of stages 1 and 2, epochs of both, top-k of stage 1.
DIGIT: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], int | None]] = {
    "digit-base": ("FID 9.13, IS 73.85", (219_377_664, 214_144_000), (400, 400), 200),
    "digit-base-cond": ("FID 4.79, IS 142.87", (220_401_664, 214_144_000), (400, 400), 300),
    "digit-base-nar": ("FID 9.04, IS 75.04", (219_377_664, 214_144_000), (200, 200), 200),
    "digit-base-nar-cond": ("FID 4.62, IS 146.19", (220_401_664, 214_144_000), (200, 200), 300),
    "digit-large": ("FID 4.59, IS 141.29", (731_879_424, 222_532_608), (200, 200), 400),
    "digit-large-cond": ("FID 3.39, IS 205.96", (733_415_424, 222_532_608), (200, 200), 400),
    "vq-baseline": ("FID 24.38, IS 30.93", (204_699_648,), (200,), None),
    "vq-baseline-cond": ("FID 18.65, IS 80.4", (205_723_648,), (300,), None),
}


@pytest.mark.parametrize("name", DIGIT)
def test_every_row_of_digit_has_a_recipe_with_the_published_settings(name: str, tmp_path: Path) -> None:
    figures, parameters, epochs, top_k = DIGIT[name]
    recipe = load(ROOT / "recipes" / "imagenet256" / f"{name}.yaml")
    assert f"published: {figures} (" in recipe.title
    assert "score" in {item.step.name for item in plan(recipe, Store(tmp_path / "store"))}
    steps = {step.name: step for step in recipe.steps}
    semantic = CodeShape(codes=16384 if "large" in name else 8192, grid=(16, 16), classes=1000)
    pixels = CodeShape(codes=1024, grid=(16, 16), classes=1000, condition=semantic if top_k else None)
    trained = [("semantic-generator", semantic, 3e-4), ("generator", pixels, 5e-4)][-len(parameters) :]
    for (step, shape, rate), count, passes in zip(trained, parameters, epochs, strict=True):
        config: Any = steps[step].config
        assert count_parameters(config.model, shape) == count
        assert round(config.training.steps * config.training.batch / 1_281_167) == passes
        assert config.training.optimizer.model_dump(exclude_none=True) == {
            "kind": "adamw", "learning_rate": rate, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.01, "decays": "all",
        }  # fmt: skip
        assert config.training.schedule.model_dump() == {"kind": "inverse-sqrt", "warmup": 6250, "start": 1e-7}
        assert (config.training.clip, config.model.label_smoothing, config.model.dropout) == (1.0, 0.1, 0.1)
    images: Any = steps["images"].config
    is_masked = "nar" in name
    assert images.sampling.top_p == ((0.8,) if top_k and not is_masked else None)
    assert (images.images, images.sampling.guided, images.sampling.iterations, images.sampling.noise) == (
        50000,
        False,
        8,
        4.5,
    )
    assert (steps["generator"].config.model.sampled_by == "masks") == is_masked
    if top_k:
        drawn: Any = steps["semantic-samples"].config
        assert (drawn.images, drawn.sampling.top_k) == (50000, (top_k,))
        assert steps["semantic-generator"].config.model.conditions_on == ("class" if "cond" in name else "none")
        assert steps["semantic-tokens"].config.views == steps["tokens"].config.views
    assert ("probe" in steps) == (name in ("digit-base", "digit-base-nar", "digit-large"))


# FID of RAR-L without adaLN by the epochs between which orders are annealed (625 steps each), and by the order that remains.
ANNEALED = {
    "0-0": 3.08, "0-100": 2.68, "0-200": 2.41, "0-300": 2.40, "0-400": 2.43, "100-100": 2.48, "100-200": 2.28,
    "100-300": 2.33, "100-400": 2.39, "200-200": 2.39, "200-300": 2.18, "200-400": 2.55, "300-300": 2.41, "300-400": 2.74,
    "400-400": 3.01,
}  # fmt: skip
SCANS = {"z-curve": 2.29, "subsample": 2.39, "spiral-out": 2.46, "alternate": 2.48, "spiral-in": 2.50}
ABLATION = ROOT / "recipes" / "imagenet256" / "rar-l-ablation.yaml"


@pytest.mark.parametrize(("row", "fid"), [*ANNEALED.items(), *SCANS.items()])
def test_every_row_of_rars_ablations_plans(row: str, fid: float, tmp_path: Path) -> None:
    settings = [f"generator.model.orders.scan={row}"]
    if row in ANNEALED:
        steps = [625 * int(epoch) for epoch in row.split("-")]
        places = ("start", "end")
        settings = [f"generator.model.orders.{name}={step}" for name, step in zip(places, steps, strict=True)]
    recipe = load_recipe(ABLATION, stages(), settings=[*settings, f"images.random_order={row == '400-400'}".lower()])
    assert re.search(rf"\b{row} {fid:.2f}\b", ABLATION.read_text())
    assert plan(recipe, Store(tmp_path / "store"))[-1].step.name == "score"
    configs = {step.name: step.config for step in recipe.steps}
    model = configs["generator"].model
    assert not model.modulated
    assert model.orders.scan == (row if row in SCANS else "raster")
    assert configs["images"].sampling.guidance.kind == "linear"
    assert configs["tokens"].views.kind == "center+flip"


def test_what_the_ablations_recipe_is_alone_is_the_best_row() -> None:
    recipe = load(ABLATION)
    orders = {step.name: step.config for step in recipe.steps}["generator"].model.orders
    assert (orders.start, orders.end, orders.scan) == (625 * 200, 625 * 300, "raster")
    assert "FID 2.18" in recipe.title


def test_rar_training_is_the_published_one() -> None:
    steps = {step.name: step.config for step in load(ROOT / "recipes" / "imagenet256" / "rar-b.yaml").steps}
    config = steps["generator"]
    training = config.training
    assert (training.steps, training.batch, training.clip, training.ema) == (250_000, 2048, 1.0, None)
    assert (training.optimizer.betas, training.optimizer.eps, training.optimizer.weight_decay) == (
        (0.9, 0.96),
        1e-8,
        0.03,
    )
    assert (config.model.orders.start, config.model.orders.end) == (125_000, 187_500)
    rate = [
        training.schedule.rate(step, base=training.optimizer.learning_rate, steps=250_000)
        for step in (0, 62_500, 250_000)
    ]
    assert rate == pytest.approx([0, 4e-4, 1e-5])
    assert steps["tokens"].views.count == 10
    assert (steps["images"].images, steps["images"].labels, steps["images"].npz) == (50_000, "balanced", True)
