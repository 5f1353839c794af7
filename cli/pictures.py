"""`--weights` of `smalti sample` and `generate`, and `sample --out`: from weight files to a PNG in one command.

    smalti sample --weights rar_b.bin --tokenizer maskgit-vqgan-imagenet-f16-256.bin --images 3 --rows-per-pass auto \\
      --classes otter --sampling.guidance.scale 4 --out otters.png
    smalti sample --weights ibq_b.ckpt --classes 207,360 --out dogs.png

A file that holds its tokenizer, as those of IBQ and Open-MAGVIT2, needs no other one.
Samples and images are artifacts of the store; the PNG is a copy of the images' grid. The samples are those of the same
command without --out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer

from cli.options import running
from cli.output import print_json, say
from cli.single import Values, check_asked, config_values, make_stage, parameter, run_stage, show_plan, stage_command
from cli.sources import bring, holds_tokenizer
from pipeline.artifact import Artifact
from pipeline.config import parse_config
from pipeline.durable import write_file
from pipeline.errors import CannotWrite, UsageError
from pipeline.runner import Made, Options, make
from pipeline.stage import Inputs, Stage, read
from pipeline.store import Store
from stages.sampling.decoding import GRID

ROWS = 8  # images that are decoded together
WEIGHTS = "weights"


def sample_command(sample: Stage, decode: Stage) -> Callable[..., None]:
    """The command of `sample`."""
    out = parameter("out", Path | None, "Decode the samples too, and write their grid here (.png)", flag="out")
    return stage_command(sample, run=partial(_sample, decode), more=[_weights(), out])


def generate_command(generate: Stage) -> Callable[..., None]:
    """The command of `generate`."""
    return stage_command(generate, run=_generate, more=[_weights()])


def _weights() -> inspect.Parameter:
    text = "The generator as published weights: file, or name on the hub"
    return parameter(WEIGHTS, str | None, text, flag=WEIGHTS)


def _generate(generate: Stage, values: Values) -> None:
    take_weights(values)
    values["tokenizer"] = tokenizer_word(values)
    run_stage(generate, values)


def _sample(decode: Stage, sample: Stage, values: Values) -> None:
    take_weights(values)
    out = values.pop("out")
    if out is None:
        run_stage(sample, values)
        return
    settings = config_values(sample, values)
    paths = check_asked(sample, settings, values)
    own = None if values["tokenizer"] else tokenizer_word(values)
    check_out(out, values["tokenizer"] or own)
    store = Store(values["store"])
    if values["dry_run"]:
        show_plan(sample, settings, values, paths, store)
        return
    with running(values) as options:
        tokenizer = bring(own, read("tokenizer"), store, options, flag="tokenizer") if own else None
        samples = make_stage(sample, settings, values, paths, store, options)
        tokenizer = tokenizer or _tokenizer_of(samples.artifact, store)
        images = make_images(decode, samples.artifact, tokenizer, store, options)
    _copy(images.artifact.file(GRID), out)
    _show(out, samples, images, values)


def take_weights(values: Values) -> None:
    """Use published weights as the generator."""
    weights = values.pop(WEIGHTS)
    if weights and values["generator"]:
        raise UsageError("--generator and --weights both name the generator; give one of them")
    values["generator"] = values["generator"] or weights


def tokenizer_word(values: Values) -> str | None:
    """The given tokenizer, or that in the generator's file; None if the file holds none."""
    generator: str | None = values["generator"]
    return values["tokenizer"] or (generator if generator and holds_tokenizer(generator) else None)


def check_out(out: Path, tokenizer: str | None) -> None:
    """Check, before any work, that the PNG can be made and written."""
    if not tokenizer:
        raise UsageError(f"--out {out} needs the tokenizer of the codes to decode them: give --tokenizer")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: expected a name that ends in .png")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise CannotWrite(f"cannot write {out}: {'it is' if out.is_dir() else 'there is no'} folder", path=out)


def make_images(decode: Stage, samples: Artifact, tokenizer: Artifact, store: Store, options: Options) -> Made:
    """The samples as images, with their grid."""
    settings = {"rows_per_pass": min(samples.facts["images"], ROWS)}
    config = parse_config(decode.config, settings, where=decode.name)
    return make(store, decode, config, Inputs({"tokens": samples, "tokenizer": tokenizer}), {}, options)


def _tokenizer_of(samples: Artifact, store: Store) -> Artifact:
    """The tokenizer that was an input of the samples."""
    record = samples.inputs["tokenizer"]
    return store.open(record["stage"], record["key"])


def _copy(grid: Path, out: Path) -> None:
    write_file(out, grid.read_bytes())


def _show(out: Path, samples: Made, images: Made, values: Values) -> None:
    if values["json"]:
        named = {"samples": samples.artifact, "images": images.artifact}
        keys = {
            name: {"key": one.key, "path": str(one.path), "facts": one.facts, "figure": one.figure}
            for name, one in named.items()
        }
        print_json({"out": str(out), "reused": samples.reused and images.reused, **keys})
        return
    typer.echo(str(out))
    _say(values, f"{images.artifact.figure}; their codes: {samples.artifact.name}")


def _say(values: Values, text: str) -> None:
    say(text, quiet=values["quiet"] or values["json"])
