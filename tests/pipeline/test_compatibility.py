"""Steps of a recipe are compared when it is read, and again when a folder is indexed: nothing has been computed then."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from pipeline.compatibility import check_recipe
from pipeline.errors import UsageError
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe_text import parse_yaml
from pipeline.runner import Options, plan, run
from pipeline.store import Store
from stages import stages
from tests.stages.conformance import draw_folder

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
RECIPE = """
title: everything that two steps can say of each other
paths: {weights: /nowhere/weights.bin}
steps:
  train: {stage: index, config: {source: {kind: digits, split: train}}}
  held-out: {stage: index, config: {source: {kind: digits, split: held-out}}}
  features: {stage: extract, inputs: {images: train}}
  codebook: {stage: kmeans, inputs: {features: features}}
  semantic: {stage: pretokenize, inputs: {images: train, tokenizer: codebook}}
  semantic-held-out: {stage: pretokenize, inputs: {images: held-out, tokenizer: codebook}}
  probe: {stage: probe, inputs: {train: semantic, held-out: semantic-held-out}}
  tokenizer: {stage: train-tokenizer, inputs: {images: train}}
  same: {stage: train-tokenizer, inputs: {images: train}}
  other: {stage: train-tokenizer, inputs: {images: train}, config: {model: {quantizer: {codes: 128}}}}
  discriminator: {stage: train-discriminator, inputs: {images: train, tokenizer: tokenizer}}
  tuned: {stage: finetune-decoder, inputs: {images: train, tokenizer: tokenizer}}
  adversarial: {stage: finetune-decoder, inputs: {images: train, tokenizer: tokenizer, discriminator: discriminator}, config: {adversarial: {weight: 0.1}}}
  tokens: {stage: pretokenize, inputs: {images: train, tokenizer: tokenizer}}
  tokens-held-out: {stage: pretokenize, inputs: {images: held-out, tokenizer: same}}
  other-tokens: {stage: pretokenize, inputs: {images: held-out, tokenizer: other}}
  generator: {stage: train-generator, inputs: {tokens: tokens, held-out: tokens-held-out}}
  shown: {stage: train-generator, inputs: {tokens: tokens, tokenizer: tokenizer}, config: {samples: {every: 10}}}
  samples: {stage: sample, inputs: {generator: generator}, config: {images: 100}}
  like: {stage: sample, inputs: {generator: generator, labels: tokens}, config: {labels: like}}
  images: {stage: decode, inputs: {tokens: samples, tokenizer: tuned}}
  at-once: {stage: generate, inputs: {generator: generator, tokenizer: tokenizer}}
  reconstructions: {stage: decode, inputs: {tokens: tokens-held-out, tokenizer: tokenizer, originals: held-out}}
  judge: {stage: train-classifier, inputs: {images: train, held-out: held-out}}
  judge-2: {stage: train-classifier, inputs: {images: train}, config: {training: {seed: 2}}}
  reference: {stage: describe-images, inputs: {images: held-out, classifiers: [judge]}}
  train-features: {stage: describe-images, inputs: {images: train, classifiers: [judge]}}
  image-features: {stage: describe-images, inputs: {images: images, classifiers: [judge]}}
  pair-features: {stage: describe-images, inputs: {images: reconstructions, classifiers: [judge]}}
  best: {stage: score, inputs: {features: train-features, reference: reference}}
  score: {stage: score, inputs: {features: image-features, reference: reference, best: best, tokens: samples, training: tokens}}
  pairs: {stage: score, inputs: {features: pair-features, reference: reference, best: best, images: reconstructions, originals: held-out}}
  imported: {stage: import-weights, config: {layout: maskgit-vqgan}, paths: {weights: "{weights}"}}
  laid: {stage: import-weights, config: {layout: rar, class_names: imagenet}, paths: {weights: "{weights}"}}
  laid-samples: {stage: sample, inputs: {generator: laid, tokenizer: imported}}
  laid-images: {stage: decode, inputs: {tokens: laid-samples, tokenizer: imported}}
"""


def load(folder: Path, changes: dict[str, Any] | None = None, text: str = RECIPE) -> Recipe:
    """The recipe with other values at dotted places; None takes one away."""
    document = parse_yaml(text)
    for place, value in (changes or {}).items():
        *way, last = place.split(".")
        part = document["steps"]
        for name in way:
            part = part.setdefault(name, {})
        part[last] = value
        if value is None:
            del part[last]
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(document, sort_keys=True))
    return load_recipe(path, stages())


@pytest.mark.parametrize("path", RECIPES, ids=[f"{path.parent.name}/{path.stem}" for path in RECIPES])
def test_every_recipe_fits_together(path: Path) -> None:
    check_recipe(load_recipe(path, stages()))


def test_a_recipe_that_fits(tmp_path: Path) -> None:
    assert check_recipe(load(tmp_path)) == load(tmp_path)


LARGER = {"views": {"kind": "center", "size": 64}}
NEVER_UNLABELLED = {"kind": "rar", "width": 16, "layers": 1, "heads": 1, "mlp_width": 16, "label_dropout": 0.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # kinds
        ({"generator.inputs.tokens": ["tokenizer"]}, "step generator reads a token-set as tokens, but tokenizer makes a tok"),
        # tokenizers, vocabularies, grids, sizes
        ({"generator.inputs.held-out": "other-tokens"}, "step generator cannot use tokens and other-tokens together: codes"),
        ({"generator.inputs.tokens": ["tokens", "other-tokens"]}, "codes of other in other-tokens, but codes of tokenizer"),
        ({"generator.inputs.tokens": []}, "step generator has no token set"),
        ({"tokens-held-out.config": LARGER}, "images of 64 pixels in tokens-held-out, but images of 32"),
        ({"tokens-held-out.config": {"views": {"kind": "center", "size": 36}}}, "a code of same is 8 pixels wide"),
        ({"semantic.config": LARGER}, "step semantic sees images at 64 pixels .* codebook takes images of 32 pixels"),
        ({"tuned.config": {"views": {"kind": "center", "size": 36}}}, "step tuned sees images at 36 pixels"),
        ({"images.inputs.tokenizer": "other"}, "step images cannot use samples and other together"),
        ({"images.inputs.tokenizer": "codebook"}, "step images decodes with codebook, which makes a K-Means codebook"),
        ({"score.inputs.tokens": "like"}, "looks for copies in the codes of like \\(tokens\\), but image-features describes images of those of samples"),
        ({"images.config": {"crop": 1}}, "step images decodes crop 1, but samples has 1 crops"),
        ({"at-once.inputs.tokenizer": "other"}, "step at-once cannot use generator and other together"),
        ({"laid-samples.inputs.tokenizer": None}, "step laid-images cannot decode the codes of laid-samples, which do not"),
        ({"imported.inputs": {"tokenizer": "tokenizer"}}, "step imported imports a tokenizer"),
        ({"train.config.source.size": 48, "features.config": {"views": {"kind": "none", "size": 32}}}, "at 32 pixels, but those of train have 48"),
        ({"tokenizer.config": {"model": {"autoencoder": {"channels": 1}}}}, "step tokenizer has model.autoencoder.channels 1"),
        ({"codebook.config": {"clusters": 30000}}, "wants 30,000 clusters, but features has 20,112 features of 1,257 images"),
        ({"adversarial.config": None}, "step adversarial reads the discriminator of discriminator, but its adversarial"),
        ({"adversarial.config.adversarial.discriminator": {"kind": "patch", "layers": 1}}, "step adversarial has adversarial"),
        # labels
        ({"samples.config": {"classes": [3, 10]}}, "step samples asks for class 10, but there are 10 classes"),
        ({"at-once.config": {"classes": [-1]}}, "step at-once asks for class -1"),
        ({"shown.config.samples.classes": [12]}, "step shown asks for class 12, but there are 10 classes"),
        ({"laid-samples.config": {"classes": [1000]}}, "there are 1000 classes"),
        ({"like.config": {"labels": "balanced"}}, "step like reads the labels of tokens, but has labels: balanced"),
        ({"like.inputs.labels": None}, "step like has labels: like, but reads no token set"),
        ({"judge.config": {"model": {"classes": 9}}}, "step judge has model.classes 9, but train has 10 classes"),
        # what a step needs besides
        ({"samples.config": {"order": [1, 0]}}, "order must name each of the positions 0 to 15 once, found 2 numbers"),
        ({"shown.inputs.tokenizer": None}, r"step shown shows samples on the way \(samples\), but reads no tokenizer"),
        ({"generator.inputs.tokenizer": "tokenizer"}, "reads the tokenizer tokenizer, but shows no samples on the way"),
        (
            {"generator.config": {"model": NEVER_UNLABELLED}, "samples.config": {"sampling": {"guidance": {"kind": "constant", "scale": 2.0}}}},
            "step samples cannot sample generator: guidance needs a generator that also learnt without labels",
        ),
        ({"probe.inputs.codebook": "codebook"}, "step probe reads the codebook codebook, but has inputs: one-hot"),
        ({"probe.config": {"inputs": "centroids"}}, "step probe has inputs: centroids, but reads no codebook"),
        ({"probe.inputs.held-out": "tokens-held-out"}, "step probe cannot use semantic and tokens-held-out together"),
        ({"reconstructions.inputs.originals": "train"}, "step reconstructions cannot use tokens-held-out and train together"),
        ({"images.inputs.originals": "held-out"}, "step images shows held-out as originals, but the codes of samples are"),
        ({"generator.config": {"training": {"batch": 1438}}}, "step generator has training.batch 1438, but .* rows to train on in tokens"),
        ({"judge.config.training.batch": 1440}, "step judge has training.batch 1440"),
        ({"tuned.config.training.batch": 1440}, "step tuned has training.batch 1440, but there are only 1,.* rows to train on in train"),
        # scores
        ({"judge.config": {"views": {"size": 64}}}, "images of 32 pixels in reconstructions, but judge judges 64 pixels"),
        ({"image-features.config": {"size": 64}}, "images of 32 pixels in images, but size is 64"),
        ({"image-features.inputs.classifiers": ["judge", "judge-2"]}, "image-features describes by judge, judge-2, but reference by judge"),
        ({"train-features.config": {"views": {"kind": "shifts", "size": 32}}}, "train-features describes in views .*shifts.* but reference in views .*center"),
        ({"image-features.inputs.classifiers": []}, "step image-features describes by classifiers .*, but reads none"),
        ({"score.inputs.reference": "train-features"}, "step score scores against train-features, but its best score best scores against ref"),
        ({"score.inputs.features": "images"}, "step score reads a image-features as features, but images makes a images"),
        ({"score.inputs.best": "probe"}, "step score reads probe as the best score, but it measures something else"),
        ({"score.inputs.tokens": None}, "step score looks for copies .* but reads only training"),
        ({"score.inputs.tokens": "other-tokens"}, "step score cannot use other-tokens and tokens together"),
        ({"pairs.config.figures": ["usage"]}, "step pairs measures the usage of the codebook"),
        ({"pairs.inputs.originals": "train"}, "reads train as originals, but reference describes held-out"),
        (
            {"pairs.inputs.originals": "train", "pairs.inputs.reference": "train-features", "pairs.inputs.best": None},
            "cannot use pair-features and train-features together",
        ),
        ({"pairs.inputs.images": None}, "step pairs compares reconstructions .* but reads only one of them"),
        (
            {"score.inputs.images": "images", "score.inputs.originals": "held-out"},
            "step score compares pairs, but image-features describes samples, not reconstructions",
        ),
        ({"samples.config": {"images": 60}}, "features, which needs at least 64 images, but image-features has 60"),
        (
            {f"{step}.config": {"extractor": "inception"} for step in ("reference", "train-features")},
            "2048 features, which needs at least 2048 images, but train-features has 1257",
        ),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    recipe = load(tmp_path, changes)
    with pytest.raises(UsageError, match=said):
        check_recipe(recipe)


def test_planning_says_it_with_exit_code_2(tmp_path: Path) -> None:
    load(tmp_path)
    words = ["plan", str(tmp_path / "recipe.yaml"), "--store", str(tmp_path / "store")]
    assert CliRunner().invoke(app, words).exit_code == 0
    done = CliRunner().invoke(app, [*words, "--set", "samples.classes=[10]"])
    assert done.exit_code == 2
    assert "there are 10 classes" in done.stderr


def test_no_torch_is_needed() -> None:
    code = "import sys; import pipeline.compatibility, stages; stages.stages(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


FOLDER = """
title: a folder of pictures
paths: {images: null}
steps:
  judge: {stage: train-classifier, inputs: {images: train, held-out: held-out}, config: {training: {steps: 2, batch: 8}, model: {features: 8}}}
  tokenizer: {stage: train-tokenizer, inputs: {images: train}, config: {views: {kind: center, size: 64}, training: {steps: 2, batch: 8}}}
  tokens: {stage: pretokenize, inputs: {images: train, tokenizer: tokenizer}}
  generator: {stage: train-generator, inputs: {tokens: tokens}, config: {training: {steps: 2, batch: 8}}}
  samples: {stage: sample, inputs: {generator: generator, labels: tokens}, config: {labels: like, images: 18}}
  images: {stage: decode, inputs: {tokens: samples, tokenizer: tokenizer}}
  reference: {stage: describe-images, inputs: {images: held-out, classifiers: [judge]}}
  train-features: {stage: describe-images, inputs: {images: train, classifiers: [judge]}}
  image-features: {stage: describe-images, inputs: {images: images, classifiers: [judge]}}
  best: {stage: score, inputs: {features: train-features, reference: reference}, config: &few {splits: 2, subsets: 2, subset_size: 8}}
  score: {stage: score, inputs: {features: image-features, reference: reference, best: best}, config: *few}
  train: {stage: index, config: {source: {kind: folder, split: train}}, paths: {images: "{images}"}}
  held-out: {stage: index, config: {source: {kind: folder, split: val}}, paths: {images: "{images}"}}
"""


SCORES = ("best-score", "reconstruction-score", "score", "histogram-score")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64-pixel pictures in nine classes."""
    root = tmp_path_factory.mktemp("pictures")
    draw_folder(root / "train", classes=9, images=3, pixels=64)
    draw_folder(root / "val", classes=9, images=2, pixels=64, seed=1)
    return root


def run_folder(folder: Path, pictures: Path, *settings: str, text: str = FOLDER) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    recipe = load_recipe(path, stages(), settings=settings, paths={"images": str(pictures)})
    check_recipe(recipe)
    plan(recipe, Store(folder / "store"))
    return {step.name: made.artifact for step, made in run(recipe, Store(folder / "store"), Options(device="cpu"))}


TINY = ["judge.model.features=8", "samples.images=18", "histogram-samples.images=18"]
TINY += [f"{step}.training={{steps: 2, batch: 8}}" for step in ("judge", "tokenizer", "generator")]
TINY += ["generator.model={kind: rar, width: 16, layers: 1, heads: 1, mlp_width: 16}"]
TINY += [f"{step}.{name}=2" for step in SCORES for name in ("splits", "subsets", "subset_size")]


def test_the_recipe_of_the_documentation_takes_a_folder_from_images_to_scores(tmp_path: Path, pictures: Path) -> None:
    """Nine classes, of which the recipe says nothing."""
    text = (ROOT / "docs" / "recipes.md").read_text().split("```yaml file=pictures.yaml\n")[1].split("```")[0]
    made = run_folder(tmp_path, pictures, *TINY, text=text)
    model = made["judge"].config["model"]
    assert (model["classes"], model["image_size"], made["judge"].config["views"]["size"]) == (9, 64, 64)
    assert made["images"].facts["size"] == 64
    assert all(made[step].facts["values"]["ratio"] > 0 for step in SCORES if step != "best-score")
    recipe = load_recipe(tmp_path / "recipe.yaml", stages(), settings=TINY, paths={"images": str(pictures)})
    assert {one.state for one in plan(recipe, Store(tmp_path / "store"))} == {"done"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("judge.model.classes=10", "step judge has model.classes 10, but train has 9 classes"),
        ("judge.views.size=32", "images of 64 pixels in images, but judge judges 32 pixels"),
        ("tokenizer.views.size=32", "images of 32 pixels in images, but judge judges 64 pixels"),
        ("samples.config={images: 18, classes: [9]}", "step samples (asks for class 9|reads the labels)"),
        ("samples.images=7", "features, which needs at least 8 images, but image-features has 7"),
        ("judge.model.features=28", "28 features, which needs at least 28 images, but image-features has 18"),
        (
            "tokenizer.views={kind: none, size: 32}",
            "step tokenizer sees images as they are .* but those of train have 64",
        ),
    ],
)
def test_what_contradicts_a_folder_stops_before_anything_is_trained(
    tmp_path: Path, pictures: Path, setting: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        run_folder(tmp_path, pictures, setting)
    stages_begun = {path.name for path in (tmp_path / "store").glob("*")} if (tmp_path / "store").is_dir() else set()
    assert stages_begun <= {"index", "refs"}


def test_a_judge_of_pictures_of_many_sizes_asks_for_views(tmp_path: Path, pictures: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    draw_folder(root / "train" / "more", classes=1, images=2, pixels=48)
    with pytest.raises(UsageError, match="are not squares of one size: set views"):
        run_folder(tmp_path, root)
