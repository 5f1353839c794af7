"""Images in the place of features are described first, as the features beside them were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner, Result

from cli.main import app
from pipeline.artifact import open_artifact
from pipeline.store import Store
from tests.stages.small_artifacts import CLASSES, SIZE, classifier_artifact, images_artifact


def test_images_are_described_as_the_reference(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 20, SIZE, SIZE, 3), dtype=np.uint8)
    ours, theirs = (
        images_artifact(store, some, np.arange(20) % CLASSES, name=name)
        for name, some in zip("ab", pictures, strict=True)
    )
    judge = classifier_artifact(store)

    def smalti(line: str) -> Result:
        return CliRunner().invoke(app, [*line.split(), "--store", str(store.root), "--json"])

    alone = smalti(f"score --features {ours.path} --reference {theirs.path}")
    assert alone.exit_code == 2
    assert "holds images, and there are no other features" in alone.stdout
    smalti(f"describe-images --images {theirs.path} --classifiers {judge.path} --ref mine/reference")
    line = f"score --features {ours.path} --reference mine/reference --splits 2 --subsets 2"
    planned = smalti(f"{line} --dry-run")
    assert json.loads(planned.stdout)["key"] is None
    scored = json.loads(smalti(line).stdout)
    record = open_artifact(Path(scored["path"])).inputs["features"]
    features = store.open(record["stage"], record["key"])
    assert features.inputs["images"]["key"] == ours.key
    assert features.inputs["classifiers"] == [{"stage": judge.stage, "key": judge.key, "digest": judge.content}]
    assert scored["facts"]["protocol"] == "classifier-8"
    assert json.loads(smalti(f"{line} --dry-run").stdout)["state"] == "done"
