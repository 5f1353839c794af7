"""`smalti run`, `plan` and `schema`: recipes as a whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cli import options
from cli.output import guarded, print_json, print_table, readable_bytes, say
from pipeline.artifact import Artifact
from pipeline.recipe import Recipe, Step, dump_schema, load_recipe
from pipeline.runlog import total_seconds
from pipeline.runner import Made, Planned
from pipeline.runner import plan as plan_recipe
from pipeline.runner import run as run_recipe
from pipeline.store import Store
from stages import stages
from stages.foresight import check_recipe

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, such as recipes/digits/rar.yaml.")]
ImagesOption = Annotated[
    Path | None, typer.Option("--images", help="Folder of images, for recipes that read one (with train/ and val/).")
]
PathOption = Annotated[
    list[str] | None, typer.Option("--path", metavar="NAME=PATH", help="Other external data of the recipe. Repeatable.")
]


@guarded
def run(
    recipe: RecipeArgument,
    images: ImagesOption = None,
    path: PathOption = None,
    set: options.SetOption = None,
    store: options.StoreOption = options.DEFAULT_STORE,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = 0,
    workers: options.WorkersOption = 0,
    scheduler: options.SchedulerOption = None,
    checkpoint_seconds: options.CheckpointOption = 30.0,
    no_wait: options.NoWaitOption = False,
    force: options.ForceOption = False,
    dry_run: options.DryRunOption = False,
    quiet: options.QuietOption = False,
    json: options.JsonOption = False,
) -> None:
    """Run a recipe: every step that is not done, in order; an interrupted run continues where it was.

    Example: smalti run recipes/digits/rar.yaml --store store
    """
    values = dict(locals())
    loaded = _load(recipe, set, path, images)
    if dry_run:
        _show_plan(loaded, plan_recipe(loaded, Store(store)), json)
        return
    started = time.monotonic()
    say(f"{loaded.name}: {loaded.title}", quiet=quiet)
    with options.running(values) as running:
        results = list(run_recipe(loaded, Store(store), running))
    _show_results(loaded, results, time.monotonic() - started, json, quiet)


@guarded
def plan(
    recipe: RecipeArgument,
    images: ImagesOption = None,
    path: PathOption = None,
    set: options.SetOption = None,
    store: options.StoreOption = options.DEFAULT_STORE,
    json: options.JsonOption = False,
) -> None:
    """Say for each step of a recipe: done, or why it will run, or what it lacks. Computes nothing.

    Example: smalti plan recipes/digits/rar.yaml --set generator.training.steps=100
    """
    loaded = _load(recipe, set, path, images)
    _show_plan(loaded, plan_recipe(loaded, Store(store)), json)


@guarded
def schema(json: options.JsonOption = False) -> None:
    """Print the JSON schema of recipes, for editors.

    Example: smalti schema > recipes/schema.json
    """
    typer.echo(dump_schema(stages()), nl=False)


def _load(recipe: Path, settings: list[str] | None, pairs: list[str] | None, images: Path | None) -> Recipe:
    loaded = load_recipe(recipe, stages(), settings=settings or [], paths=options.parse_paths(pairs, images))
    return check_recipe(loaded)


def _show_plan(recipe: Recipe, planned: list[Planned], as_json: bool) -> None:
    if as_json:
        print_json({"recipe": recipe.name, "title": recipe.title, "steps": [item.as_json() for item in planned]})
        return
    rows = [[item.step.name, item.step.stage.name, item.state, item.reason] for item in planned]
    print_table(f"{recipe.name}: {recipe.title}", ["step", "stage", "state", "reason"], rows)
    left = sum(item.state != "done" for item in planned)
    say(f"{left} of {len(planned)} steps to do" if left else f"nothing to do: all {len(planned)} steps are done")


def _show_results(recipe: Recipe, results: list[tuple[Step, Made]], seconds: float, as_json: bool, quiet: bool) -> None:
    if as_json:
        steps = [_result_json(step, made) for step, made in results]
        print_json(
            {"recipe": recipe.name, "seconds": round(seconds, 1), "steps": steps, "pictures": _pictures(results)}
        )
        return
    rows = [
        [step.name, _state(made), _seconds(made.artifact), made.artifact.name, made.artifact.figure]
        for step, made in results
    ]
    print_table(f"{recipe.name}: {recipe.title}", ["step", "state", "seconds", "artifact", "figure"], rows)
    for name, path in _pictures(results).items():
        typer.echo(f"{name}: {path}")
    made_now = sum(not made.reused for _, made in results)
    total = sum(_tree_bytes(made.artifact) for _, made in results)
    if made_now:
        say(f"{made_now} of {len(results)} steps made in {seconds:.0f} s, {readable_bytes(total)} in all", quiet=quiet)
    else:
        say(f"nothing to do: all {len(results)} steps are done ({readable_bytes(total)})", quiet=quiet)


def _result_json(step: Step, made: Made) -> dict[str, Any]:
    return {
        "step": step.name,
        "stage": step.stage.name,
        "state": _state(made),
        "key": made.artifact.key,
        "path": str(made.artifact.path),
        "seconds": total_seconds(made.artifact.path / "log"),
        "facts": made.artifact.facts,
        "figure": made.artifact.figure,
    }


def _pictures(results: list[tuple[Step, Made]]) -> dict[str, str]:
    return {
        f"{step.name} {Path(name).stem}": str(made.artifact.path / name)
        for step, made in results
        for name in made.artifact.files
        if name.endswith(".png")
    }


def _state(made: Made) -> str:
    return "done" if made.reused else "made"


def _seconds(artifact: Artifact) -> str:
    return f"{total_seconds(artifact.path / 'log'):.1f}"


def _tree_bytes(artifact: Artifact) -> int:
    return sum(entry.size for entry in artifact.files.values())
