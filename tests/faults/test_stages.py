"""Row 1 of the promised faults, on the real stages: killed anywhere, the same call ends with the same bytes.

Each stage of the tiny digits recipe is made alone, on the inputs of a finished run, in a forked process that is killed: at
every call of the commit protocol, and by SIGKILL at `--kills` seeded moments.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sweep import Run, check_store, store_digests, sweep

from pipeline.artifact import Artifact
from pipeline.recipe import Recipe, load_recipe
from pipeline.runner import Options, make, run
from pipeline.stage import Inputs
from pipeline.store import Store
from stages import stages
from tests.tiny import SETTINGS

RECIPE = Path(__file__).parents[2] / "recipes" / "digits" / "rar.yaml"
SHARDS = ["samples.shard_images=64", "images.shard_images=64", "features.shard_images=1024"]
STEPS = [
    "train-images",
    "features",
    "codebook",
    "semantic-tokens-held-out",
    "probe",
    "judge-1",
    "tokenizer",
    "generator",
]
STEPS += ["samples", "images", "image-features", "score"]


@dataclass
class Finished:
    """A recipe that ran, and what each step made."""

    recipe: Recipe
    made: dict[str, Artifact]

    def alone(self, name: str) -> Run:
        """Make one step again, in another store, on the inputs that are there."""
        step = next(step for step in self.recipe.steps if step.name == name)
        chosen = {
            key: [self.made[item] for item in value] if isinstance(value, list) else self.made[value]
            for key, value in step.inputs.items()
        }

        def again(store: Path) -> dict[str, str]:
            artifact = make(Store(store), step.stage, step.config, Inputs(chosen), {}, Options(threads=1)).artifact
            return {name: artifact.digest}

        return again


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    recipe = load_recipe(RECIPE, stages(), settings=[*SETTINGS, *SHARDS])
    store = Store(tmp_path_factory.mktemp("finished") / "store")
    yield Finished(recipe, {step.name: made.artifact for step, made in run(recipe, store, Options(threads=1))})
    torch.set_num_threads(before)


def test_every_stage_of_the_recipe_is_killed_here(finished: Finished) -> None:
    tested = {step.stage.name for step in finished.recipe.steps if step.name in STEPS}
    assert tested == {step.stage.name for step in finished.recipe.steps}


@pytest.mark.parametrize("name", ["samples", "images", "generator"])
def test_killed_at_every_call_of_the_commit_protocol(finished: Finished, name: str, tmp_path: Path) -> None:
    assert sweep(finished.alone(name), tmp_path) > 10


@pytest.mark.crash
@pytest.mark.parametrize("name", STEPS)
def test_killed_at_seeded_moments(
    finished: Finished, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    again, chance = finished.alone(name), random.Random(name)
    started = time.monotonic()
    again(tmp_path / "undisturbed")
    seconds, want = time.monotonic() - started, store_digests(tmp_path / "undisturbed")
    for kill in range(request.config.getoption("--kills")):
        store = tmp_path / f"kill-{kill}"
        kill_after(lambda store=store: again(store), chance.uniform(0.0, seconds))
        again(store)
        check_store(store, want)
        shutil.rmtree(store)


def kill_after(action: Callable[[], object], seconds: float) -> None:
    """Run `action` in a forked process and SIGKILL it after a while, if it is not done by then."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
