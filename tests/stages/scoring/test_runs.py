"""Runs side by side: found by what scores were made from, seeds put together, figures where all have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import LOG, Artifact
from pipeline.draft import Request
from pipeline.keys import canonical_bytes, sha256
from pipeline.store import Store
from stages.scoring.runs import Run, find_runs, group, markdown, table
from stages.weights.files import CONFIG
from tests.stages.small_artifacts import CLASSES, CODES, GRID

CARD = {
    "model": {"kind": "histogram"},
    "space": {"codes": CODES, "grid": list(GRID), "classes": CLASSES, "tokenizer": {"family": "vector"}},
}


def make(store: Store, stage: str, kind: str, config: Any, inputs: Any = None, **more: Any) -> Artifact:
    """An artifact of these inputs. more: its `files` (name -> JSON), `facts`, and images per second as its log says."""
    read = {
        name: {"stage": one.stage, "key": one.key, "digest": one.content} if isinstance(one, Artifact) else one
        for name, one in (inputs or {}).items()
    }
    keys = {name: record["key"] for name, record in read.items()}
    key = sha256(canonical_bytes([stage, config, keys]))
    with store.draft(Request(stage, kind, 1, key, config, read, {})) as draft:
        if draft is None:  # there already
            return store.open(stage, key)
        draft.put("files", {name: canonical_bytes(value) for name, value in more.get("files", {}).items()})
        if "rate" in more:
            lines = [{"event": "loss", "step": 1}, {"event": "done", "rate": more["rate"]}]
            (draft.log / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        draft.facts = more.get("facts", {})
        draft.commit(store.path(stage, key))
    return store.open(stage, key)


def experiment(store: Store, seed: int, *, ratio: float = 1.5, **changes: Any) -> dict[str, Artifact]:
    """From codes of elsewhere to a score; the samples are drawn and decoded at 100 images per second each."""
    outside = {"stage": "external", "key": "0" * 64, "digest": "1" * 64}
    generator = make(
        store,
        "train-generator",
        "generator",
        {"training": {"steps": changes.get("steps", 3), "seed": seed}},
        {"tokens": outside},
        files={CONFIG: CARD},
        facts={"parameters": 7, "held_out": {"loss": 2.0 + seed}},
    )
    sampling = {"guidance": {"kind": "constant", "scale": changes.get("scale", [1.0])}}
    samples = make(
        store, "sample", "token-set", {"seed": seed, "sampling": sampling}, {"generator": generator}, rate=100.0
    )
    images = make(store, "decode", "images", {}, {"tokens": samples}, rate=100.0)
    features = make(store, "describe-images", "image-features", {}, {"images": images})
    reference = make(store, "describe-images", "image-features", {"of": changes.get("reference", "reference")})
    values = {"distance": ratio / 3, "ratio": ratio, "consistency": 0.5, "recall": 0.1}
    metrics = {"format": 1, "each": [], "protocol": "classifier-64", "values": values}
    read = {"features": features, "reference": reference, "tokens": samples}
    score = make(store, "score", "metrics", {}, read, files={"metrics.json": metrics})
    return {"generator": generator, "samples": samples, "images": images, "score": score}


def test_a_run_is_found_from_its_score(tmp_path: Path) -> None:
    (run,) = find_runs(experiment(Store(tmp_path), 0), Store(tmp_path))
    assert (run.name, run.tokenizer, run.generator, run.guidance) == ("score", "vector 8", "histogram", "none")
    assert run.protocol == "classifier-64"
    assert run.figures == {
        "parameters": 7, "loss": 2.0, "distance": 0.5, "ratio": 1.5, "consistency": 0.5,
        "images_per_second": pytest.approx(50.0),
    }  # fmt: skip


def test_a_generator_without_a_score_has_its_loss(tmp_path: Path) -> None:
    made = experiment(Store(tmp_path), 0)
    (run,) = find_runs({"g": made["generator"], "images": made["images"]}, Store(tmp_path))
    assert (run.name, run.protocol, run.figures) == ("g", "", {"parameters": 7, "loss": 2.0})


def test_a_score_of_real_images_is_no_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    features = make(store, "describe-images", "image-features", {})
    best = make(store, "score", "metrics", {}, {"features": features, "reference": features})
    assert find_runs({"best": best}, store) == []


def test_runs_that_differ_in_seeds_alone_are_one_row(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ratios = {0: 1.2, 1: 2.0, 2: 1.4}
    runs = [experiment(store, seed, ratio=ratio)["score"] for seed, ratio in ratios.items()]
    longer = experiment(store, 0, steps=4)["score"]
    named = {f"r@seed{seed}/score": score for seed, score in enumerate(runs)} | {"longer": longer}
    rows = group(find_runs(named, store))
    assert [[run.name for run in row.runs] for row in rows] == [list(named)[:3], ["longer"]]
    assert rows[0].figures["ratio"] == (1.4, 1.2, 2.0)
    assert rows[0].figures["loss"] == (3.0, 2.0, 4.0)
    assert rows[0].as_json()["figures"]["ratio"] == {"median": 1.4, "least": 1.2, "largest": 2.0}


def test_one_score_under_two_names_is_one_run(tmp_path: Path) -> None:
    score = experiment(Store(tmp_path), 0)["score"]
    assert [run.name for run in find_runs({"one": score, "two": score}, Store(tmp_path))] == ["one"]


def test_without_a_log_the_speed_is_not_known(tmp_path: Path) -> None:
    made = experiment(Store(tmp_path), 0)
    (made["images"].path / LOG / "metrics.jsonl").unlink()
    (run,) = find_runs({"score": made["score"]}, Store(tmp_path))
    assert "images_per_second" not in run.figures


def run_of(name: str, **said: Any) -> Run:
    return Run(**{"name": name, "identity": name, "tokenizer": "t", "generator": "g", **said})


def test_the_table_has_median_and_range() -> None:
    runs = [run_of("a", identity="x", figures={"ratio": ratio, "consistency": 0.98}) for ratio in (1.5, 1.25, 1.75)]
    columns, cells = table(group(runs))
    assert columns == ["run", "tokenizer", "generator", "distance / best", "consistency"]
    assert cells == [["a", "t", "g", "1.50 (1.25 to 1.75)", "98.0%"]]
    assert markdown(columns, cells).splitlines()[1:] == [
        "| --- | --- | --- | --- | --- |",
        "| a | t | g | 1.50 (1.25 to 1.75) | 98.0% |",
    ]


def test_what_cannot_be_compared_is_marked() -> None:
    """Distances to another reference or of another protocol stand beside its name."""
    runs = [run_of("a", reference="one", protocol="p"), run_of("b", reference="two", protocol="p"), run_of("c")]
    columns, cells = table(group(runs))
    assert columns == ["run", "tokenizer", "generator", "reference"]
    assert [row[-1] for row in cells] == ["one", "two", ""]


def test_distances_stand_beside_ratios_only_where_a_ratio_is_missing() -> None:
    runs = [run_of("a", figures={"distance": 0.5, "ratio": 1.5}), run_of("b", figures={"distance": 0.7})]
    assert table(group(runs[:1]))[0][3:] == ["distance / best"]
    assert table(group(runs))[0][3:] == ["distance / best", "distance"]
    assert table(group(runs))[1][1][3:] == ["-", "0.7"]
