"""Runs side by side: each generator with its tokenizer, its size, what its samples scored, and how fast they were drawn.

Everything is read from finished artifacts: their manifests say what they were made from, down to the images, and the logs
of samples how long they took. Runs that differ in nothing but seeds are one row, with median and range of every figure.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.artifact import LOG, Artifact, read_manifest
from pipeline.errors import CorruptError
from pipeline.keys import canonical_bytes, sha256
from pipeline.store import Store
from stages.scoring.score import read_metrics
from stages.weights.cards import TokenizerCard, read_card

SEED = "seed"
GENERATOR, SCORE = "generator", "metrics"
FIGURES = {
    "loss": ("loss, held-out", "{:.3f}"),
    "ratio": ("distance / best", "{:.2f}"),
    "distance": ("distance", "{:.4g}"),
    "inception_score": ("inception score", "{:.2f}"),
    "consistency": ("consistency", "{:.1%}"),
    "parameters": ("parameters", "{:,.0f}"),
    "images_per_second": ("images/s", "{:.0f}"),
}
"""Figures of a run: name -> heading, and how a number is written."""
ALWAYS = ("run", "tokenizer", "generator")
WHERE_THEY_DIFFER = ("guidance", "protocol", "reference")


@dataclass(frozen=True)
class Run:
    """One generator, and one score of its samples if there is one.

    name: of the score, or of the generator.  identity: equal for runs that differ in seeds alone.  reference: of the
    distances; figures with different protocols or references cannot be compared.  figures: by the names in `FIGURES`.
    """

    name: str
    identity: str
    tokenizer: str
    generator: str
    guidance: str = ""
    protocol: str = ""
    reference: str = ""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """Runs that differ in seeds alone."""

    runs: tuple[Run, ...]

    @cached_property
    def figures(self) -> dict[str, tuple[float, float, float]]:
        """Median, least and largest value of each figure that all of the runs have."""
        found = {}
        for name in FIGURES:
            values = [run.figures[name] for run in self.runs if name in run.figures]
            if len(values) == len(self.runs):
                found[name] = (statistics.median(values), min(values), max(values))
        return found

    def as_json(self) -> dict[str, Any]:
        first, names = self.runs[0], ("median", "least", "largest")
        said = {name: getattr(first, name) for name in (*ALWAYS[1:], *WHERE_THEY_DIFFER)}
        figures = {name: dict(zip(names, values, strict=True)) for name, values in self.figures.items()}
        return {"runs": [run.name for run in self.runs], **said, "figures": figures}


def find_runs(named: Mapping[str, Artifact], store: Store) -> list[Run]:
    """A run for every score of a generator's samples, and for every generator that none of these scores is about.

    named: artifacts of any kind by what they are called; others are passed over.
    """
    lineage, told = Lineage(store), set()
    runs = []
    for kind in (SCORE, GENERATOR):
        for name, artifact in named.items():
            generator = lineage.generator(artifact) if artifact.kind == kind and artifact.key not in told else None
            if generator is not None:
                runs.append(_run_of(name, lineage, generator, artifact))
                told |= {artifact.key, generator.key}
    return runs


def group(runs: Iterable[Run]) -> list[Row]:
    """Rows in the order of their first runs."""
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.identity, []).append(run)
    return [Row(tuple(found)) for found in rows.values()]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: median (least to largest). Guidance, protocol and reference are shown where they differ."""
    said = [*ALWAYS, *(name for name in WHERE_THEY_DIFFER if len({_said(row, name) for row in rows} - {""}) > 1)]
    needs_distance = any("ratio" not in row.figures for row in rows if "distance" in row.figures)
    hidden = set() if needs_distance else {"distance"}
    shown = [name for name in FIGURES if name not in hidden and any(name in row.figures for row in rows)]
    cells = [[_said(row, name) for name in said] + [_cell(row, name) for name in shown] for row in rows]
    return [*said, *(FIGURES[name][0] for name in shown)], cells


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class Lineage:
    """What artifacts were made from, by their manifests, each of which is read once."""

    def __init__(self, store: Store):
        self._store = store
        self._parents: dict[str, list[Artifact]] = {}
        self._identities: dict[str, str] = {}

    def all(self, artifact: Artifact) -> list[Artifact]:
        """The artifact, and all that it was made from as far as it is there, the nearest first."""
        found = {artifact.path: artifact}
        waiting = [artifact]
        while waiting:
            for parent in self.parents(waiting.pop(0)):
                if parent.path not in found:
                    found[parent.path] = parent
                    waiting.append(parent)
        return list(found.values())

    def generator(self, artifact: Artifact) -> Artifact | None:
        """The nearest generator that it was made from, which may be the artifact itself."""
        return next((one for one in self.all(artifact) if one.kind == GENERATOR), None)

    def parents(self, artifact: Artifact) -> list[Artifact]:
        """What is there of its inputs: not what lies outside of the store, or was damaged or removed."""
        if artifact.key not in self._parents:
            self._parents[artifact.key] = []
            for record in _records(artifact.inputs):
                with suppress(CorruptError):
                    self._parents[artifact.key].append(read_manifest(self._store.path(record["stage"], record["key"])))
        return self._parents[artifact.key]

    def identity(self, artifact: Artifact) -> str:
        """A digest of what was asked for, without seeds, of the artifact and all that it was made from."""
        if artifact.key not in self._identities:
            known = {parent.key: self.identity(parent) for parent in self.parents(artifact)}
            inputs = {
                name: [known.get(record["key"], record["key"]) for record in _records({name: value})]
                for name, value in artifact.inputs.items()
            }
            asked = [artifact.stage, artifact.version, _without_seeds(artifact.config), inputs, artifact.externals]
            self._identities[artifact.key] = sha256(canonical_bytes(asked))
        return self._identities[artifact.key]


def _run_of(name: str, lineage: Lineage, generator: Artifact, last: Artifact) -> Run:
    """last: a score of its samples, or the generator itself."""
    made_from = lineage.all(last)
    card = read_card(generator)
    figures = {"parameters": float(generator.facts["parameters"])} if "parameters" in generator.facts else {}
    if "held_out" in generator.facts:
        figures["loss"] = float(generator.facts["held_out"]["loss"])
    said = {
        "name": name,
        "identity": lineage.identity(last),
        "tokenizer": _tokenizer(made_from) or f"{card.space.tokenizer.get('family', 'unknown')} {card.space.codes}",
        "generator": card.model.kind,
    }
    if last is generator:
        return Run(**said, figures=figures)
    metrics, reference = read_metrics(last), last.inputs["reference"]
    figures |= {name: value for name, value in metrics["values"].items() if name in FIGURES}
    drawn = [one for one in made_from if one.kind in ("token-set", "images") and generator in lineage.all(one)]
    seconds = [_seconds_of_an_image(one) for one in drawn]
    if seconds and None not in seconds:
        figures["images_per_second"] = 1 / sum(filter(None, seconds))
    return Run(
        **said,
        guidance=next((_guidance(one) for one in drawn if "sampling" in one.config), ""),
        protocol=metrics["protocol"],
        reference=f"{reference['stage']}/{reference['key'][:12]}",
        figures=figures,
    )


def _tokenizer(made_from: Sequence[Artifact]) -> str:
    cards = [TokenizerCard.of(one) for one in made_from if one.kind in ("tokenizer", "codebook")]
    return " + ".join(f"{card.identity['family']} {card.codes}" for card in cards)


def _guidance(drawn: Artifact) -> str:
    """Such as "power-cosine 1.75"."""
    guidance = drawn.config["sampling"]["guidance"]
    scales = guidance["scale"] if isinstance(guidance["scale"], list) else [guidance["scale"]]
    return "none" if set(scales) == {1} else f"{guidance['kind']} {', '.join(f'{scale:g}' for scale in scales)}"


def _seconds_of_an_image(drawn: Artifact) -> float | None:
    """As its log says of the last attempt; None where the log was removed."""
    return next(
        (1 / line["rate"] for line in reversed(_log(drawn)) if line.get("event") == "done" and line["rate"]), None
    )


def _log(artifact: Artifact) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (artifact.path / LOG / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _records(inputs: Mapping[str, Any]) -> list[dict[str, str]]:
    return [record for value in inputs.values() for record in (value if isinstance(value, list) else [value])]


def _without_seeds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_seeds(item) for name, item in value.items() if name != SEED}
    return [_without_seeds(item) for item in value] if isinstance(value, list) else value


def _said(row: Row, name: str) -> str:
    return str(getattr(row.runs[0], "name" if name == "run" else name))


def _cell(row: Row, name: str) -> str:
    if name not in row.figures:
        return "-"
    median, least, largest = (FIGURES[name][1].format(value) for value in row.figures[name])
    return median if least == largest else f"{median} ({least} to {largest})"
