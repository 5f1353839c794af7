"""`smalti run`, `plan` and `schema`: recipes as a whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import filesize
from typer.core import TyperCommand

from cli import options
from cli.comparison import print_rows, rows_of
from cli.output import guarded, pictures_of, print_json, print_table, say
from pipeline.artifact import Artifact
from pipeline.compatibility import check_recipe
from pipeline.config import unknown_key
from pipeline.errors import UsageError
from pipeline.externals import absent_sentences
from pipeline.recipe import STEP_NAME, Recipe, Step, dump_schema, load_recipe
from pipeline.runlog import total_seconds
from pipeline.runner import Made, Planned
from pipeline.runner import plan as plan_recipe
from pipeline.runner import run as run_recipe
from pipeline.store import Store
from pipeline.trees import Memory
from smalti.counting import counted
from stages import stages
from stages.images.checks import check_step_sizes
from stages.scoring.runs import Row

ALL = "all"

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe, such as recipes/digits/rar.yaml.")]
ImagesOption = Annotated[
    Path | None, typer.Option("--images", help="Folder of images, for recipes that read one (with train/ and val/).")
]
PathOption = Annotated[
    list[str] | None, typer.Option("--path", metavar="NAME=PATH", help="Other external data of the recipe. Repeatable.")
]

VariantOption = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="NAME",
        help="Name of this variant: its refs are <recipe>@NAME/<step>; other refs do not change.",
    ),
]
ForceStepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--force",
        metavar="[STEP]",
        help=f"Make this step again even if it exists; the old artifact is replaced. Repeatable; alone or {ALL}: every step.",
    ),
]


class RunCommand(TyperCommand):
    """`--force` without a step means every step: typer has no options with an optional value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], "-"]
        pairs = [
            [word, ALL] if word == "--force" and not STEP_NAME.fullmatch(after) else [word]
            for word, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, [word for pair in pairs for word in pair])


@guarded
def run(
    recipe: RecipeArgument,
    images: ImagesOption = None,
    path: PathOption = None,
    set: options.SetOption = None,
    variant: VariantOption = None,
    store: options.StoreOption = options.DEFAULT_STORE,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = 0,
    workers: options.WorkersOption = 0,
    scheduler: options.SchedulerOption = None,
    checkpoint_seconds: options.CheckpointOption = 30.0,
    no_wait: options.NoWaitOption = False,
    force: ForceStepOption = None,
    rescan: options.RescanOption = False,
    dry_run: options.DryRunOption = False,
    quiet: options.QuietOption = False,
    json: options.JsonOption = False,
) -> None:
    """Run a recipe: every step that is not done, in order; an interrupted run is continued.

    Example: smalti run recipes/digits/rar.yaml --store store
    """
    values = dict(locals()) | {"force": False}
    loaded = _load(recipe, set, path, images, variant)
    forced = _forced(loaded, force or [])
    if dry_run:
        _show_plan(loaded, plan_recipe(loaded, Store(store), _memory(store, rescan), force=forced), json)
        return
    started = time.monotonic()
    say(f"{loaded.name}: {loaded.title}", quiet=quiet)
    with options.running(values) as running:
        results = {step.name: (step, made) for step, made in run_recipe(loaded, Store(store), running, force=forced)}
    rows = rows_of({name: made.artifact for name, (_, made) in results.items()}, Store(store))
    _show_results(loaded, list(results.values()), rows, time.monotonic() - started, json, quiet)


@guarded
def plan(
    recipe: RecipeArgument,
    images: ImagesOption = None,
    path: PathOption = None,
    set: options.SetOption = None,
    variant: VariantOption = None,
    store: options.StoreOption = options.DEFAULT_STORE,
    rescan: options.RescanOption = False,
    json: options.JsonOption = False,
) -> None:
    """Print for each step of a recipe: done, or why it will run, or what it lacks. Computes nothing.

    Example: smalti plan recipes/digits/rar.yaml --set generator.training.steps=100
    """
    loaded = _load(recipe, set, path, images, variant)
    _show_plan(loaded, plan_recipe(loaded, Store(store), _memory(store, rescan)), json)


@guarded
def schema(json: options.JsonOption = False) -> None:
    """Print the JSON schema of recipes, for editors.

    Example: smalti schema > recipes/schema.json
    """
    typer.echo(dump_schema(stages()), nl=False)


def _load(
    recipe: Path, settings: list[str] | None, pairs: list[str] | None, images: Path | None, variant: str | None
) -> Recipe:
    loaded = load_recipe(recipe, stages(), settings=settings or [], paths=options.parse_paths(pairs, images))
    check_step_sizes(loaded)
    checked = check_recipe(loaded)
    return checked if variant is None else checked.variant(variant)


def _memory(store: Path, rescan: bool) -> Memory:
    return Memory(Store(store).root, rescan=rescan)


def _forced(recipe: Recipe, words: list[str]) -> list[str]:
    """The steps of --force."""
    names = [step.name for step in recipe.steps]
    for word in words:
        if word not in (ALL, *names):
            raise UsageError(unknown_key(word, f"--force of {recipe.name}", [*names, ALL]))
    return names if ALL in words else words


def _show_plan(recipe: Recipe, planned: list[Planned], as_json: bool) -> None:
    if as_json:
        print_json({"recipe": recipe.name, "title": recipe.title, "steps": [item.as_json() for item in planned]})
        return
    rows = [[item.step.name, item.step.stage.name, item.state, item.reason] for item in planned]
    print_table(f"{recipe.name}: {recipe.title}", ["step", "stage", "state", "reason"], rows)
    for sentence in absent_sentences([need for item in planned for need in item.absent]):
        say(sentence)
    left = sum(item.state != "done" for item in planned)
    say(f"{left} of {counted(len(planned), 'step')} to do" if left else _all_done(len(planned)))


def _show_results(
    recipe: Recipe, results: list[tuple[Step, Made]], runs: list[Row], seconds: float, as_json: bool, quiet: bool
) -> None:
    if as_json:
        steps = [_result_json(step, made) for step, made in results]
        found = {"recipe": recipe.name, "seconds": round(seconds, 1), "steps": steps, "pictures": _pictures(results)}
        print_json({**found, "comparison": [row.as_json() for row in runs]})
        return
    rows = [
        [step.name, _state(made), _seconds(made.artifact), made.artifact.name, made.artifact.figure]
        for step, made in results
    ]
    print_table(f"{recipe.name}: {recipe.title}", ["step", "state", "seconds", "artifact", "figure"], rows)
    for name, path in _pictures(results).items():
        typer.echo(f"{name}: {path}")
    if runs:
        print_rows(runs)
    made_now = sum(not made.reused for _, made in results)
    total = sum(_tree_bytes(made.artifact) for _, made in results)
    if made_now:
        say(
            f"{made_now} of {counted(len(results), 'step')} made in {seconds:.0f} s, {filesize.decimal(total)} in all",
            quiet=quiet,
        )
    else:
        say(f"{_all_done(len(results))} ({filesize.decimal(total)})", quiet=quiet)


def _all_done(steps: int) -> str:
    return "nothing to do: " + ("the step is done" if steps == 1 else f"all {steps} steps are done")


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
    return {f"{step.name} {name}": path for step, made in results for name, path in pictures_of(made.artifact).items()}


def _state(made: Made) -> str:
    return "done" if made.reused else "made"


def _seconds(artifact: Artifact) -> str:
    return f"{total_seconds(artifact.path / 'log'):.1f}"


def _tree_bytes(artifact: Artifact) -> int:
    return sum(entry.size for entry in artifact.files.values())
