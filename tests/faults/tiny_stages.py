"""Two stages that do in milliseconds what real ones do in minutes: shards, then a checkpoint, a large file and a fact."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, KnownInputs
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import InputError
from pipeline.recipe import Recipe, load_recipe
from pipeline.runner import Options, run
from pipeline.runtime import Runtime
from pipeline.shards import map_shards
from pipeline.stage import External, Inputs, read, stage
from pipeline.store import Store
from smalti.arrays import ArraySpec, encode_shard, metadata_bytes

RECIPE = """
title: numbers and their sum
paths: {weights: null}
steps:
  sum: {stage: add, inputs: {numbers: numbers}}
  numbers: {stage: count}
"""


class Inner(Config):
    """A config inside a config."""

    kind: Literal["plain", "loud"] = Field("plain", description="how it counts")
    rate: float = Field(1e-3, description="a small number")


class CountConfig(Config):
    rows: int = Field(7, ge=1, description="how many numbers")
    shard_rows: int = Field(2, ge=1, description="numbers per shard")
    seed: int = Field(0, description="where to start")
    fault: Literal["none", "raise", "input", "io", "io-once", "die", "die-once", "slow"] = Field(
        "none", description="what goes wrong"
    )
    faulty: int = Field(1, description="the shard where it goes wrong")
    mark: str = Field("", description="file that tells how often it went wrong already, a byte each time")
    inner: Inner = Field(Inner(), description="settings inside settings")


class AddConfig(Config):
    scale: float = Field(2.0, description="factor of the sum")
    verbose: bool = Field(True, description="write a second file")
    seconds: float = Field(0.0, description="how long it takes")


@dataclass(frozen=True)
class CountSpec:
    array: ArraySpec
    config: CountConfig


def count_shard(spec: CountSpec, number: int) -> dict[str, bytes]:
    config = spec.config
    if number == config.faulty:
        misbehave(config)
    start, stop = spec.array.shard_range(number)
    block = (np.arange(start, stop, dtype=np.int32) + config.seed)[:, None]
    name, data = encode_shard(spec.array, number, block)
    return {f"numbers/{name}": data}


def misbehave(config: CountConfig) -> None:
    if config.fault == "slow":
        time.sleep(0.2)
    is_first = not config.mark or not Path(config.mark).exists()
    if config.fault in ("none", "slow") or (config.fault.endswith("-once") and not is_first):
        return
    if config.mark:
        with Path(config.mark).open("a") as file:
            file.write("x")
    if config.fault == "raise":
        raise RuntimeError("this shard never works")
    if config.fault == "input":
        raise InputError("row 3 is no number")
    if config.fault in ("io", "io-once"):
        raise OSError(5, "Input/output error")
    os.kill(os.getpid(), signal.SIGKILL)


def slow_process(number: int) -> int:
    """Which process computes this."""
    time.sleep(0.1)
    return os.getpid()


@stage("count", version=1, config=CountConfig, reads={}, writes="numbers", example="smalti count --rows 7")
def count(config: CountConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Write numbers, shard by shard.

    More about it on a second line.
    """
    spec = ArraySpec(shape=(config.rows, 1), dtype="int32", chunk_rows=1, shard_rows=config.shard_rows)
    sizes = [min(config.shard_rows, config.rows - start) for start in range(0, config.rows, config.shard_rows)]
    map_shards(out, run, count_shard, CountSpec(spec, config), sizes, label="count", unit="numbers")
    if not out.is_done("metadata"):
        out.put("metadata", {"numbers/zarr.json": metadata_bytes(spec)})
    out.figure = f"{config.rows} numbers"


def identify(config: AddConfig, path: Path) -> str:
    try:
        return str(path.stat().st_size)
    except OSError as error:
        raise InputError(f"the weights {path} are missing", path=path) from error


def foresee(config: AddConfig, inputs: KnownInputs) -> Facts:
    if config.scale == 0:
        raise InputError("a scale of 0 leaves nothing")
    return {}


@stage(
    "add",
    version=1,
    config=AddConfig,
    reads={"numbers": read("numbers", help="what to add"), "more": read("numbers", "sum", optional=True, many=True)},
    writes="sum",
    example="smalti add --numbers tiny/numbers",
    externals={"weights": External("a file of weights", identify=identify, needed=lambda config: config.scale < 0)},
    foresees=foresee,
    checks_inputs=True,
)
def add(config: AddConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Add numbers, with a checkpoint on the way."""
    files = [artifact.file(name) for artifact in [inputs["numbers"], *inputs.all("more")] for name in artifact.files]
    total = 0
    for step, path in enumerate(sorted(files)):
        total += sum(path.read_bytes())
        time.sleep(config.seconds / len(files))
        if not out.is_done(f"checkpoint-{step}"):
            out.put(f"checkpoint-{step}", {f"scratch/{step}.txt": str(total).encode()})
            if out.is_done(f"checkpoint-{step - 1}"):
                out.drop(f"checkpoint-{step - 1}")
    with out.writing("sum", "sum.txt") as path:
        path.write_text(str(total * config.scale))
    if config.verbose:
        out.put("words", {"deep/er/words.txt": b"a sum"})
    out.figure = f"sum {total}"


STAGES = {"count": count, "add": add}


def recipe_file(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipes" / "tiny.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(folder: Path, *settings: str, text: str = RECIPE) -> Recipe:
    return load_recipe(recipe_file(folder, text), STAGES, settings=settings)


def run_all(recipe: Recipe, root: Path, options: Options | None = None) -> dict[str, Artifact]:
    """Run the recipe; step -> artifact."""
    return {step.name: made.artifact for step, made in run(recipe, Store(root), options or Options())}
