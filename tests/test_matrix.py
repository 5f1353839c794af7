"""Every tokenizer of the digits with every generator: each pair trains and samples, and what cannot work is refused.

The recipe runs once with tiny sizes; its table has a row for every pair.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import cli.main
from pipeline.compatibility import check_recipe
from pipeline.errors import UsageError
from pipeline.recipe import Recipe, load_recipe
from pipeline.runner import plan
from pipeline.store import Store
from stages import stages

RECIPES = Path(__file__).parents[1] / "recipes" / "digits"
TOKENIZERS = {"vector": "vector 256", "ibq": "index-backpropagation 256", "lfq": "lookup-free 1024"}
GENERATORS = ("rar", "llama", "factorized")
PAIRS = [(tokenizer, generator) for tokenizer in TOKENIZERS for generator in (*GENERATORS, "histogram")]
SIZES = ("width=16", "layers=1", "heads=2")
TINY = [
    "judge-*.training.steps=2",
    "tokenizer-*.training.steps=2",
    "tokenizer-*.model.autoencoder.widths=[8,8,8]",
    *(f"tokens-{tokenizer}.views.pixels=0" for tokenizer in TOKENIZERS),
    "codebook.iterations=2",
    "generator-*.training.steps=2",
    "generator-*-rar.model.mlp_width=16",
    *(f"generator-*-{generator}.model.{size}" for generator in GENERATORS for size in SIZES),
    "samples-*.images=80",
]
SEEDS = ("tokenizer-*.training.seed=1", "generator-*.training.seed=1", "samples-*.seed=1")


def load(*settings: str, name: str = "matrix") -> Recipe:
    return check_recipe(load_recipe(RECIPES / f"{name}.yaml", stages(), settings=settings))


def keys(recipe: Recipe, store: Path) -> dict[str, str | None]:
    return {item.step.name: item.key for item in plan(recipe, Store(store))}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def ran(store: Path) -> dict[str, Any]:
    """What `smalti run` says of the tiny matrix."""
    return smalti("run", str(RECIPES / "matrix.yaml"), *(word for one in TINY for word in ("--set", one)), store=store)


def smalti(*words: str, store: Path) -> dict[str, Any]:
    options = ["--store", str(store), "--json"]
    result = CliRunner().invoke(cli.main.app, [*words, *options, *(["--quiet"] if words[0] == "run" else [])])
    assert result.exit_code == 0, result.stdout
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize(("tokenizer", "generator"), PAIRS)
def test_each_pair_trains_samples_and_is_a_row(tokenizer: str, generator: str, ran: dict[str, Any]) -> None:
    row = next(row for row in ran["comparison"] if row["runs"] == [f"score-{tokenizer}-{generator}"])
    assert (row["tokenizer"], row["generator"]) == (TOKENIZERS[tokenizer], generator)
    assert row["guidance"] == ("none" if generator == "histogram" else "power-cosine 1.75")
    figures = row["figures"]
    assert figures.keys() >= {"distance", "ratio", "consistency", "parameters", "images_per_second"}
    assert ("loss" in figures) == (generator != "histogram")
    assert figures["images_per_second"]["median"] > 0


@pytest.mark.parametrize("generator", GENERATORS)
def test_codes_of_k_means_are_learnt_without_pictures(generator: str, ran: dict[str, Any]) -> None:
    row = next(row for row in ran["comparison"] if row["runs"] == [f"generator-kmeans-{generator}"])
    assert row["tokenizer"] == "kmeans 128"
    assert row["figures"].keys() == {"loss", "parameters"}


def test_compare_gives_the_table_again(store: Path, ran: dict[str, Any]) -> None:
    again = smalti("compare", "digits/matrix", store=store)["rows"]
    assert len(again) == len(ran["comparison"]) == len(PAIRS) + len(GENERATORS)
    figures = {row["runs"][0]: row["figures"] for row in again}
    assert all(figures[f"digits/matrix/{row['runs'][0]}"] == row["figures"] for row in ran["comparison"])


def test_compare_writes_markdown_and_names_what_it_cannot_compare(store: Path, ran: dict[str, Any]) -> None:
    def compare(*words: str) -> Result:
        return CliRunner().invoke(cli.main.app, ["compare", *words, "--store", str(store)])

    lines = compare("digits/matrix/score-ibq-llama", "digits/matrix/generator-kmeans-rar", "--markdown").stdout
    assert [line.split(" | ")[0] for line in lines.splitlines()[2:]] == [
        "| digits/matrix/score-ibq-llama", "| digits/matrix/generator-kmeans-rar",
    ]  # fmt: skip
    wrong, unknown = compare("digits/matrix/judge-1"), compare("digits/none")
    assert (wrong.exit_code, unknown.exit_code) == (2, 3)
    assert "digits/matrix/judge-1 is of kind classifier, expected a recipe" in wrong.stderr
    assert "'digits/none' names no artifact" in unknown.stderr


def test_one_budget_for_all_pairs() -> None:
    configs = {step.name: step.config for step in load().steps}
    trained = [configs[name] for name in configs if name.startswith("generator-") and "histogram" not in name]
    assert len(trained) == len(GENERATORS) * (len(TOKENIZERS) + 1)
    assert all(config.training == trained[0].training for config in trained)
    drawn = [configs[f"samples-{tokenizer}-{generator}"] for tokenizer in TOKENIZERS for generator in GENERATORS]
    assert all(config == drawn[0] for config in drawn)
    views = [configs[f"tokens-{tokenizer}"].views for tokenizer in TOKENIZERS]
    assert all(one == views[0] for one in views)


def test_the_tokenizers_and_judges_are_those_of_the_other_recipes(tmp_path: Path) -> None:
    """So that a store in which these have run trains none of them again."""
    matrix, *others = (keys(load(name=name), tmp_path) for name in ("matrix", "rar", "ibq", "open-magvit2"))
    for name, other in zip(TOKENIZERS, others, strict=True):
        assert matrix[f"tokenizer-{name}"] == other["tokenizer"]
        assert matrix[f"tokens-{name}"] == other["tokens"]
        assert matrix["best-score"] == other["best-score"]
    assert matrix["codebook"] == others[0]["codebook"]


def test_another_seed_changes_every_pair_and_no_judge(tmp_path: Path) -> None:
    first, second = keys(load(), tmp_path), keys(load(*SEEDS), tmp_path)
    alike = {name for name in first if first[name] == second[name]}
    assert {name.partition("-")[0] for name in alike} == {
        "train", "validation", "held", "judge", "reference", "best", "features", "codebook", "tokens",
    }  # fmt: skip
    assert {name for name in alike if name.startswith(("features", "tokens"))} == {
        "features", "tokens-kmeans", "tokens-kmeans-validation",
    }  # fmt: skip


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS, "kmeans"])
@pytest.mark.parametrize("factors", [[3, 5], [256], []])
def test_factors_that_make_no_code_are_refused(tokenizer: str, factors: list[int]) -> None:
    step = f"generator-{tokenizer}-factorized"
    reason = {2: "factors 3 x 5 multiply to 15, but there are", 1: "name one, of 256 values", 0: "have no factors"}
    with pytest.raises(UsageError, match=f"step {step} cannot train .* factorized: .*{reason[len(factors)]}"):
        load(f"{step}.model.factors={factors}")


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("drawn", ["kmeans", *TOKENIZERS])
def test_pictures_of_codes_without_a_decoder_are_refused(drawn: str, generator: str) -> None:
    inputs = f"samples-vector-{generator}.inputs"
    with pytest.raises(UsageError, match="a K-Means codebook and has no decoder"):
        load(f"{inputs}.generator=generator-{drawn}-{generator}", f"{inputs}.tokenizer=codebook")


@pytest.mark.parametrize("generator", [*GENERATORS, "histogram"])
@pytest.mark.parametrize(("drawn", "decoded"), [("vector", "ibq"), ("ibq", "lfq"), ("lfq", "vector")])
def test_codes_of_another_tokenizer_are_refused(drawn: str, decoded: str, generator: str) -> None:
    step = f"samples-{drawn}-{generator}"
    with pytest.raises(UsageError, match=f"step {step} cannot use .* codes of tokenizer-{decoded}"):
        load(f"{step}.inputs.tokenizer=tokenizer-{decoded}")


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_guidance_that_was_not_learnt_is_refused(tokenizer: str, generator: str) -> None:
    with pytest.raises(UsageError, match=f"step samples-{tokenizer}-{generator} cannot sample .* guidance needs"):
        load(f"generator-{tokenizer}-{generator}.model.label_dropout=0")


@pytest.mark.parametrize(
    ("generator", "values"), [("rar", [1, 2]), ("llama", [1, 2]), ("factorized", [1, 2, 3]), ("histogram", [1, 2])]
)
def test_settings_of_sub_tokens_that_are_not_drawn_are_refused(generator: str, values: list[int]) -> None:
    step = f"samples-lfq-{generator}"
    with pytest.raises(UsageError, match=f"step {step} cannot sample .* temperature has {len(values)} values"):
        load(f"{step}.sampling.temperature={values}")


@pytest.mark.parametrize("generator", ["llama", "factorized"])
def test_orders_that_a_generator_cannot_lay_are_refused(generator: str) -> None:
    with pytest.raises(UsageError, match=f"step samples-ibq-{generator} cannot sample .* in its own order only"):
        load(f"samples-ibq-{generator}.random_order=true")
