"""The names of commands and of the options that all share: changing one is a decision, seen here.

A stage's own options are its config fields, inputs and external data: pinned through the recipes' keys and schema.
"""

from __future__ import annotations

import typer

import cli.main
from cli.options import COMMON
from cli.single import optional_settings
from stages import stages

APP = typer.main.get_command(cli.main.app)
COMMON_FLAGS = {
    "--store", "--device", "--threads", "--workers", "--scheduler", "--checkpoint-seconds", "--no-wait", "--force",
    "--rescan", "--dry-run", "--quiet", "--json",
}  # fmt: skip
STAGES = ["index", "extract", "kmeans", "import-codebook", "import-weights", "train-tokenizer", "train-discriminator",
          "finetune-decoder", "pretokenize", "train-generator", "describe-tokens", "sample", "decode", "generate",
          "train-classifier", "describe-images", "score", "probe"]  # fmt: skip
OTHERS = {
    "run": {"--images", "--path", "--set", "--as", *COMMON_FLAGS},
    "plan": {"--images", "--path", "--set", "--as", "--store", "--rescan", "--json"},
    "schema": {"--json"},
    "compare": {"--markdown", "--store", "--json"},
    "config": {"--set", "--config", "--json"},
    "path": {"--store", "--json"},
    "status": {"--kind", "--store", "--json"},
    "verify": {"--store", "--json"},
    "gc": {"--yes", "--older-than", "--drafts", "--store", "--json"},
    "doctor": {"--store", "--json"},
}
READS = {
    "index": [],
    "extract": ["images"],
    "kmeans": ["features"],
    "decode": ["tokens", "tokenizer"],
    "score": ["features", "reference"],
}


def flags(name: str) -> set[str]:
    params = APP.commands[name].params  # type: ignore[attr-defined]
    return {text for param in params for text in param.opts if text.startswith("--")}


def test_commands() -> None:
    assert list(stages()) == STAGES
    assert set(APP.commands) == {*STAGES, *OTHERS}  # type: ignore[attr-defined]


def test_options_of_recipes_and_stores() -> None:
    assert {name: flags(name) for name in OTHERS} == OTHERS
    assert {f"--{name.replace('_', '-')}" for name in COMMON} == COMMON_FLAGS


def test_options_of_stages_are_their_inputs_fields_and_the_common_ones() -> None:
    for name, declared in stages().items():
        own = [*declared.reads, *declared.externals, *(setting.name for setting, _ in optional_settings(declared))]
        assert flags(name) == {f"--{word.replace('_', '-')}" for word in own} | COMMON_FLAGS | {
            "--set",
            "--config",
            "--ref",
            *{"sample": ("--weights", "--out"), "generate": ("--weights",)}.get(name, ()),
        }
    found = {name: [word for word, item in stages()[name].reads.items() if not item.optional] for name in READS}
    assert {name: found[name][: len(words)] for name, words in READS.items()} == READS
