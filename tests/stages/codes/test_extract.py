"""extract: features whatever the workers and interruptions, fitted and published encoders, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

from models.encoders.config import WhitenedPatchesConfig
from models.encoders.dinov2 import Dinov2
from models.encoders.whitened_patches import WhitenedPatches
from pipeline.artifact import Artifact
from pipeline.cluster import Cluster
from pipeline.durable import hash_file
from pipeline.errors import CorruptError, InputError, NumericError, StorageError, UsageError
from pipeline.images import ImageSet
from pipeline.images.views import CenterViews
from smalti.arrays import MappedArray
from stages.codes.reservoir import smallest_rows
from stages.images.passes import ImagesAt, view_passes
from tests.hub import Hub
from tests.stages.conformance import (
    check_every_crash,
    check_same_bytes,
    draw_folder,
    flip_bit,
    index_folder,
    run_stage,
    two_workers,
    zarr_members,
)

ENCODER = {"kind": "whitened-patches", "image_size": 16, "cells": 2, "patch": 8, "dims": 5}
TINY: dict[str, Any] = {"encoder": ENCODER, "rows_per_pass": 4, "shard_images": 6, "chunk_images": 2}
SHIFTS = {"kind": "shifts", "size": 16, "pixels": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("images")
    return index_folder(draw_folder(root / "folder"), root / "store")


@pytest.fixture(scope="module")
def workers() -> Iterator[Cluster]:
    with two_workers() as cluster:
        yield cluster


def read_features(artifact: Artifact) -> np.ndarray[Any, Any]:
    return MappedArray(artifact.path / "features", verify="crc").read()


def test_features_are_those_of_the_fitted_encoder(images: Artifact, tmp_path: Path) -> None:
    artifact = run_stage("extract", tmp_path, TINY, inputs={"images": images})
    encoder = WhitenedPatches(WhitenedPatchesConfig(**ENCODER))
    encoder.load_state_dict(load_file(artifact.file("encoder.safetensors")))
    pixels_NHWC = np.stack(ImageSet.open(images.path).batch(range(16)))
    expected = encoder(torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).float() / 255).numpy()
    np.testing.assert_allclose(read_features(artifact), expected, atol=1e-4)
    assert artifact.facts["grid"] == [2, 2]
    assert artifact.figure == "16 x 2 x 2 features of 5 values (whitened-patches)"
    np.testing.assert_allclose(expected.reshape(-1, 5).std(0), 1, atol=0.05)  # whitened over the whole set
    group = zarr.open_group(artifact.path, mode="r")
    assert np.asarray(group["labels"]).tolist() == [0] * 8 + [1] * 8
    assert zarr_members(artifact) == ["features", "labels"]


def test_all_views_are_rows(images: Artifact, tmp_path: Path) -> None:
    artifact = run_stage("extract", tmp_path, {**TINY, "views": SHIFTS}, inputs={"images": images})
    assert read_features(artifact).shape == (16 * 9, 2, 2, 5)
    assert len(list((artifact.path / "features" / "c").iterdir())) == 3


def test_cut_and_pass_do_not_meet(images: Artifact, tmp_path: Path) -> None:
    """Other shards, same bits: a pass is always as long, whatever stands in it."""
    config = {**TINY, "views": SHIFTS, "rows_per_pass": 7}
    one = read_features(run_stage("extract", tmp_path, config, inputs={"images": images}))
    two = read_features(run_stage("extract", tmp_path, {**config, "shard_images": 16}, inputs={"images": images}))
    assert one.tobytes() == two.tobytes()


def test_workers_give_the_same_bytes(images: Artifact, workers: Cluster, tmp_path: Path) -> None:
    alone = run_stage("extract", tmp_path / "alone", TINY, inputs={"images": images})
    shared = run_stage("extract", tmp_path / "shared", TINY, inputs={"images": images}, cluster=workers)
    check_same_bytes(alone, shared)


def test_every_crash(tmp_path: Path) -> None:
    images = index_folder(draw_folder(tmp_path / "images", images=4), tmp_path)
    config = {**TINY, "shard_images": 4, "rows_per_pass": 8}
    check_every_crash(lambda store: run_stage("extract", store, config, inputs={"images": images}), tmp_path)


def test_half_precision(images: Artifact, tmp_path: Path) -> None:
    whole = run_stage("extract", tmp_path, TINY, inputs={"images": images})
    half = run_stage("extract", tmp_path, {**TINY, "dtype": "float16"}, inputs={"images": images})
    assert read_features(half).dtype == np.float16
    np.testing.assert_array_equal(read_features(half), read_features(whole).astype(np.float16))


def test_some_features_of_some_images(images: Artifact, tmp_path: Path) -> None:
    """The images first, then their features; what is kept is what a whole extraction of these images has."""
    views = {"kind": "shifts", "size": 16, "pixels": 1}
    config = {**TINY, "views": views, "image_share": 0.6, "seed": 5}
    some = run_stage("extract", tmp_path, config, inputs={"images": images})
    few = run_stage("extract", tmp_path, {**config, "rows": 70}, inputs={"images": images})
    chosen = np.asarray(zarr.open_group(some.path, mode="r")["images"])
    assert len(chosen) == some.facts["images"] == 10
    np.testing.assert_array_equal(chosen, smallest_rows(16, 10, seed=5, stream=2))
    group = zarr.open_group(few.path, mode="r")
    rows = np.asarray(group["rows"])
    np.testing.assert_array_equal(rows, smallest_rows(10 * 9 * 4, 70, seed=5, stream=3))
    np.testing.assert_array_equal(read_features(few), read_features(some).reshape(-1, 5)[rows])
    np.testing.assert_array_equal(np.asarray(group["labels"]), ImageSet.open(images.path).labels[chosen])
    assert few.figure == "70 of 90 x 2 x 2 features of 5 values (whitened-patches)"
    assert zarr_members(few) == ["features", "images", "labels", "rows"]
    codebook = run_stage("kmeans", tmp_path, {"clusters": 3, "iterations": 2}, inputs={"features": few})
    assert codebook.facts["rows"] == 70


def test_only_images_with_a_kept_feature_are_encoded(
    images: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.codes import extract

    seen: list[int] = []
    sound = extract.view_passes

    def watched(source: ImagesAt, numbers: list[int], **options: Any) -> Any:
        seen.extend(numbers)
        return sound(source, numbers, **options)

    monkeypatch.setattr(extract, "view_passes", watched)
    run_stage("extract", tmp_path, {**TINY, "rows": 3}, inputs={"images": images})
    fitted, encoded = seen[:16], seen[16:]
    assert fitted == list(range(16))
    assert encoded == sorted(set((smallest_rows(64, 3, seed=0, stream=3) // 4).tolist()))


def test_passes_are_filled_up(images: Artifact) -> None:
    views = CenterViews(size=16)
    passes = list(view_passes(ImagesAt.of(images), range(1, 8), views=views, rows=3))
    assert [(seen.rows_RSS3.shape, seen.real) for seen in passes] == [((3, 16, 16, 3), 3)] * 2 + [((3, 16, 16, 3), 1)]
    expected = ImageSet.open(images.path).image(7)
    for row in passes[2].rows_RSS3:
        np.testing.assert_array_equal(row, expected)


def test_published_weights_come_from_a_file(images: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, state = tiny_dinov2(tmp_path, monkeypatch)
    config = {"encoder": DINOV2, "views": {"kind": "resize", "size": 28}, "shard_images": 16}
    artifact = run_stage("extract", tmp_path, config, inputs={"images": images}, paths={"weights": file})
    assert artifact.facts["grid"] == [2, 2]
    kept = load_file(artifact.file("encoder.safetensors"))
    torch.testing.assert_close(kept["transformer.blocks.0.norm1.weight"], state["blocks.0.norm1.weight"])
    assert (
        artifact.externals["weights"]
        == run_stage(
            "extract", tmp_path / "other", config, inputs={"images": images}, paths={"weights": file}
        ).externals["weights"]
    )


def test_refuses_weights_of_another_network(images: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, state = tiny_dinov2(tmp_path, monkeypatch)
    state.pop("blocks.0.norm1.weight")
    save_file(state, file)
    with pytest.raises(CorruptError, match=r"no weights of vit_small.*norm1"):
        run_stage("extract", tmp_path, {"encoder": DINOV2}, inputs={"images": images}, paths={"weights": file})


def test_weights_never_run_code(images: Artifact, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was-run",))

    torch.save({"weight": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(CorruptError, match="holds more than tensors, and was not opened"):
        run_stage(
            "extract", tmp_path, {"encoder": DINOV2}, inputs={"images": images}, paths={"weights": tmp_path / "bad.pth"}
        )
    assert not (tmp_path / "was-run").exists()


def test_published_weights_come_from_the_hub(
    images: Artifact, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a digest in the config, that of the file is in the key all the same."""
    file, _ = tiny_dinov2(tmp_path, monkeypatch)
    hub.keep("timm/vit_small_patch14_reg4_dinov2.lvd142m", "model.safetensors", file.read_bytes())
    config = {"encoder": DINOV2, "views": {"kind": "resize", "size": 28}, "shard_images": 16}
    artifact = run_stage("extract", tmp_path / "store", config, inputs={"images": images})
    assert artifact.externals == {"weights": hash_file(file)}


def test_says_how_to_get_weights(images: Artifact, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(
        StorageError, match=r"timm/vit_small_patch14_reg4_dinov2.lvd142m.*--weights FILE.*whitened-patches"
    ):
        run_stage("extract", tmp_path, {"encoder": DINOV2}, inputs={"images": images})


def test_names_a_corrupt_image(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "folder")
    bad = folder / "class-1" / "002.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(InputError, match=r"class-1/002.png"):
        run_stage("extract", tmp_path, TINY, inputs={"images": index_folder(folder, tmp_path)})


def test_a_failing_shard_is_named_and_the_others_are_kept(
    tmp_path: Path, images: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.codes import extract

    whole = run_stage("extract", tmp_path / "whole", TINY, inputs={"images": images})
    sound = extract.run_passes

    def poisoned(*arguments: Any, **options: Any) -> Any:
        features = sound(*arguments, **options)
        if len(features) == 4:  # the last shard
            features[1, 0, 0, 2] = np.nan
        return features

    monkeypatch.setattr(extract, "run_passes", poisoned)
    with pytest.raises(NumericError, match=r"shard 2 of 3 failed.*class-1/005.png"):
        run_stage("extract", tmp_path / "store", TINY, inputs={"images": images})
    monkeypatch.undo()
    (draft,) = (tmp_path / "store" / "extract").glob(".*.partial")
    units = [json.loads(line)["unit"] for line in (draft / "journal.jsonl").read_text().splitlines()]
    assert units == ["encoder", "shard-000000", "shard-000001"]
    check_same_bytes(whole, run_stage("extract", tmp_path / "store", TINY, inputs={"images": images}))


def test_a_single_value_cannot_be_whitened(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "folder", images=1)
    for file in folder.rglob("*.png"):
        file.write_bytes(flat_png())
    with pytest.raises(NumericError, match="do not vary"):
        run_stage("extract", tmp_path, TINY, inputs={"images": index_folder(folder, tmp_path)})


def test_a_damaged_image_set_is_refused(tmp_path: Path) -> None:
    images = index_folder(draw_folder(tmp_path / "folder"), tmp_path)
    flip_bit(images.file("labels.npy"), place=130)
    with pytest.raises(CorruptError, match=r"labels\.npy"):
        run_stage("extract", tmp_path, TINY, inputs={"images": images})


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({**TINY, "views": {"kind": "center", "size": 8}}, "must be what the encoder takes: 16 pixels"),
        ({**TINY, "shard_images": 5}, "multiple of chunk_images"),
        ({**TINY, "rows_per_pass": 0}, "greater than or equal to 1"),
        ({**TINY, "dtype": "float64"}, "float32"),
        ({**TINY, "hub": {"repository": "a/b"}}, "is fitted on the images"),
        ({**TINY, "encoder": {"kind": "dinov3"}}, "dinov2"),
    ],
)
def test_refuses_nonsense(config: dict[str, Any], complaint: str, images: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=complaint):
        run_stage("extract", tmp_path, config, inputs={"images": images})


def test_refuses_weights_for_a_fitted_encoder(images: Artifact, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UsageError, match="reads no weights"):
        run_stage("extract", tmp_path, TINY, inputs={"images": images}, paths={"weights": tmp_path / "weights.pth"})


DINOV2 = {"kind": "dinov2", "size": "small", "image_size": 28, "block": -1}


def tiny_dinov2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, torch.Tensor]]:
    """A weight file of a transformer of two narrow blocks, and dinov2 patched to be that one."""
    import timm

    whole = timm.create_model

    def tiny(name: str, **options: Any) -> Any:
        return whole(name, **{**options, "embed_dim": 12, "depth": 2, "num_heads": 2})

    monkeypatch.setattr(timm, "create_model", tiny)
    torch.manual_seed(0)
    from models.encoders.config import Dinov2Config

    state = Dinov2(Dinov2Config(size="small", image_size=28)).transformer.state_dict()
    save_file(state, tmp_path / "dinov2.safetensors")
    return tmp_path / "dinov2.safetensors", dict(state)


def flat_png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (40, 40, 40)).save(buffer, "png")
    return buffer.getvalue()
