"""pretokenize: codes of codebooks and tokenizers as a token set, whatever the workers and interruptions; refusals."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import smalti
from models.tokenizer import Tokenizer
from models.tokenizer_config import TokenizerConfig
from pipeline.artifact import DIGEST, MANIFEST, Artifact, manifest_bytes, open_artifact
from pipeline.cluster import Cluster
from pipeline.draft import Draft, Request
from pipeline.errors import CorruptError, InputError, UsageError
from pipeline.images import ImageSet, imageset
from pipeline.images.views import RandomCropViews
from pipeline.keys import sha256
from smalti.arrays import MappedArray
from stages.codes import pretokenize
from stages.images import passes
from stages.weights.cards import TokenizerCard
from stages.weights.files import save_weights
from tests.stages.conformance import (
    check_every_crash,
    check_same_bytes,
    draw_folder,
    index_folder,
    run_stage,
    two_workers,
)

ENCODER = {"kind": "whitened-patches", "image_size": 16, "cells": 2, "patch": 8, "dims": 5}
TOKENIZER = {
    "autoencoder": {"kind": "convolutional", "widths": [8, 8, 8], "latent": 4},
    "quantizer": {"kind": "vector", "codes": 12},
}
SHIFTS = {"kind": "shifts", "size": 16, "pixels": 1}
TINY: dict[str, Any] = {"views": SHIFTS, "rows_per_pass": 5, "shard_images": 6, "chunk_images": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def images(root: Path) -> Artifact:
    return index_folder(draw_folder(root / "folder"), root)


@pytest.fixture(scope="module")
def features(images: Artifact, root: Path) -> Artifact:
    config = {"encoder": ENCODER, "shard_images": 4, "chunk_images": 2}
    return run_stage("extract", root, config, inputs={"images": images})


@pytest.fixture(scope="module")
def codebook(features: Artifact, root: Path) -> Artifact:
    return run_stage("kmeans", root, {"clusters": 6, "iterations": 4}, inputs={"features": features})


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Artifact:
    """A tokenizer artifact with random weights."""
    torch.manual_seed(0)
    config = TokenizerConfig.model_validate_json(json.dumps(TOKENIZER))
    draft = Draft.open(root / ".draft", Request("train-tokenizer", "tokenizer", 1, "k" * 64, {}, {}, {}))
    save_weights(draft, Tokenizer(config).state_dict(), config.model_dump(mode="json"))
    draft.facts["image_size"] = 16
    draft.commit(root / "tokenizer")
    return open_artifact(root / "tokenizer")


@pytest.fixture(scope="module")
def workers() -> Iterator[Cluster]:
    with two_workers() as cluster:
        yield cluster


def make(store: Path, images: Artifact, tokenizer: Artifact, config: dict[str, Any] = TINY, **options: Any) -> Artifact:
    return run_stage("pretokenize", store, config, inputs={"images": images, "tokenizer": tokenizer}, **options)


def test_codes_of_a_codebook_are_its_nearest_centroids(
    images: Artifact, features: Artifact, codebook: Artifact, tmp_path: Path
) -> None:
    token_set = smalti.verify_tokens(make(tmp_path, images, codebook, {}).path)
    features_ND = MappedArray(features.path / "features").read().reshape(-1, 5)
    centroids_KD = load_file(codebook.file("weights.safetensors"))["centroids_KD"].numpy()
    expected = ((features_ND[:, None] - centroids_KD) ** 2).sum(-1).argmin(1)
    assert token_set.tokens.read().reshape(-1).tolist() == expected.tolist()
    assert token_set.labels.tolist() == [0] * 8 + [1] * 8
    assert token_set.keys == ImageSet.open(images.path).keys


def test_codes_of_a_tokenizer_are_those_of_its_encoder(images: Artifact, tokenizer: Artifact, tmp_path: Path) -> None:
    artifact = make(tmp_path, images, tokenizer)
    token_set = smalti.verify_tokens(artifact.path)
    network = Tokenizer(TokenizerConfig.model_validate_json(json.dumps(TOKENIZER)))
    network.load_state_dict(load_file(tokenizer.file("weights.safetensors")))
    views_IVHWC = ImageSet.open(images.path).all_views(
        range(16), views=pretokenize.PretokenizeConfig.model_validate(TINY).views
    )
    pixels_RCHW = torch.from_numpy(views_IVHWC).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    expected_RT = network.eval().encode(pixels_RCHW).flatten(1).numpy()
    same = (token_set.tokens.read().reshape(144, -1) == expected_RT).mean()
    assert same > 0.99  # another pass length may move a code that lies between two
    assert artifact.facts["crops"] == 9
    assert artifact.figure.startswith("144 x 4 tokens, ")


def test_says_all_about_itself(images: Artifact, codebook: Artifact, tmp_path: Path) -> None:
    provenance = {"source": "Spots", "source_licence": "CC0-1.0", "licence": "CC0-1.0"}
    artifact = make(tmp_path, images, codebook, {**TINY, "name": "spots", "provenance": provenance})
    facts = smalti.open_tokens(artifact.path).attributes
    assert (facts.name, facts.n_images, facts.n_crops, facts.grid, facts.codes) == ("spots", 16, 9, (2, 2), 6)
    assert dict(facts.tokenizer) == TokenizerCard.of(codebook).identity
    assert facts.tokenizer["family"] == "kmeans"
    assert facts.class_names == ("class-0", "class-1")
    assert [crop["id"] for crop in facts.crops][:2] == ["shift+0+0", "shift-1-1"]
    assert (facts.resolution, facts.exif, facts.licence) == (16, "ignore", "CC0-1.0")
    assert facts.source["name"] == "Spots"
    assert len(facts.source["files_sha256"]) == 64
    assert facts.created_by == artifact.key
    assert {"README.md", "croissant.json", "SHA256SUMS"} <= set(artifact.files)


def test_figures_are_counts(images: Artifact, codebook: Artifact, tmp_path: Path) -> None:
    artifact = make(tmp_path, images, codebook)
    counts = np.bincount(smalti.open_tokens(artifact.path).tokens.read().reshape(-1), minlength=6)
    shares = counts[counts > 0] / counts.sum()
    assert artifact.facts["used"] == np.count_nonzero(counts)
    assert artifact.facts["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=1e-5)


def test_random_crops_have_boxes(images: Artifact, codebook: Artifact, tmp_path: Path) -> None:
    views = {"kind": "random-crop", "size": 16, "short_side": 20, "draws": 2, "flip": True}
    token_set = smalti.verify_tokens(make(tmp_path, images, codebook, {**TINY, "views": views}).path)
    assert token_set.boxes is not None
    boxes_ICB = token_set.boxes.read_rows(0, 16)
    assert boxes_ICB.shape == (16, 2, 5)
    assert boxes_ICB[..., :2].max() <= 4
    assert (boxes_ICB[..., 2:4] == 16).all()


def test_random_crops_decode_each_image_once(
    images: Artifact, codebook: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, really = [], imageset.decode
    monkeypatch.setattr(imageset, "decode", lambda *given, **how: decoded.append(how["name"]) or really(*given, **how))
    views = {"kind": "random-crop", "size": 16, "short_side": 20, "draws": 3}
    boxes = smalti.open_tokens(make(tmp_path, images, codebook, {**TINY, "views": views}).path).boxes
    assert len(decoded) == len(set(decoded)) == 16
    policy = RandomCropViews.model_validate(views)
    expected = [policy.boxes(ImageSet.open(images.path).image(index), index=index) for index in range(16)]
    assert boxes is not None
    assert np.array_equal(boxes.read_rows(0, 16), np.stack(expected))


def test_decoding_threads_change_no_byte(
    images: Artifact, codebook: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = {"kind": "random-crop", "size": 16, "short_side": 20, "draws": 1}
    made, together = {}, threading.Barrier(4)
    really = imageset.decode

    def meet(*given: Any, **how: Any) -> Any:
        together.wait(timeout=20)  # passes if four threads decode at once
        return really(*given, **how)

    for count in (1, 4):
        monkeypatch.setattr(passes, "own_cores", lambda count=count: count)
        if count == 4:
            monkeypatch.setattr(imageset, "decode", meet)
        made[count] = make(tmp_path / str(count), images, codebook, {"views": views, "rows_per_pass": 4})
    check_same_bytes(made[1], made[4])


def test_cut_does_not_change_codes(images: Artifact, codebook: Artifact, tmp_path: Path) -> None:
    one = smalti.open_tokens(make(tmp_path, images, codebook).path).tokens.read()
    whole = smalti.open_tokens(make(tmp_path, images, codebook, {**TINY, "shard_images": 18}).path).tokens.read()
    assert one.tobytes() == whole.tobytes()


def test_workers_give_the_same_bytes(images: Artifact, tokenizer: Artifact, workers: Cluster, tmp_path: Path) -> None:
    alone = make(tmp_path / "alone", images, tokenizer)
    check_same_bytes(alone, make(tmp_path / "shared", images, tokenizer, cluster=workers))


def test_every_crash(codebook: Artifact, tmp_path: Path) -> None:
    images = index_folder(draw_folder(tmp_path / "images", images=2), tmp_path)
    config = {"rows_per_pass": 2, "shard_images": 2, "chunk_images": 2}
    check_every_crash(lambda store: make(store, images, codebook, config), tmp_path)


def test_codes_out_of_range_are_refused(
    images: Artifact, codebook: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretokenize, "run_passes", lambda network, passes, device: np.full((6 * 9, 4), 6))
    with pytest.raises(CorruptError, match="holds code 6 at token 0, expected 0 to 5"):
        make(tmp_path, images, codebook, {**TINY, "shard_images": 6})


def test_names_a_corrupt_image_and_continues_when_it_is_repaired(codebook: Artifact, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "folder")
    images = index_folder(folder, tmp_path)
    bad = folder / "class-1" / "007.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60] + bytes(len(good) - 60))
    with pytest.raises(InputError, match=r"shard 2 of 3 failed, finished shards are kept: image .*class-1/007.png"):
        make(tmp_path, images, codebook)
    bad.write_bytes(good)
    assert make(tmp_path, images, codebook).facts["images"] == 16


def test_moved_images_are_a_sentence(codebook: Artifact, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "folder")
    images = index_folder(folder, tmp_path)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="does not exist"):
        make(tmp_path, images, codebook)


def test_refuses_views_of_another_size_before_it_begins(
    images: Artifact, codebook: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    for artifact, size in ((codebook, 32), (tokenizer, 15)):
        with pytest.raises(UsageError, match=f"{size}"):
            make(tmp_path / "store", images, artifact, {"views": {"kind": "center", "size": size}})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("centroids_KD"), "centroids of shape .6, 5., found none"),
        (lambda state: state.update(centroids_KD=torch.zeros(6, 4)), r"centroids of shape .6, 5., found shape .6, 4."),
        (lambda state: state["centroids_KD"].fill_(torch.nan), "not finite"),
        (lambda state: state.pop("encoder.mean_P"), "mean_P"),
    ],
)
def test_refuses_a_codebook_that_does_not_fit(
    change: Any, complaint: str, images: Artifact, codebook: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(CorruptError, match=complaint):
        make(tmp_path / "store", images, with_weights(codebook, tmp_path / "bad", change), TINY)


def test_refuses_another_kind_and_nonsense(images: Artifact, codebook: Artifact, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="tokenizer or codebook as tokenizer"):
        make(tmp_path, images, images)
    with pytest.raises(UsageError, match="shard_images 64 must be a multiple of chunk_images 128"):
        make(tmp_path, images, codebook, {"shard_images": 64})


def with_weights(artifact: Artifact, target: Path, change: Any) -> Artifact:
    """A copy of an artifact with other weights, in itself whole."""
    shutil.copytree(artifact.path, target)
    state = load_file(artifact.file("weights.safetensors"))
    change(state)
    save_file(state, target / "weights.safetensors")
    weights = (target / "weights.safetensors").read_bytes()
    manifest = json.loads((artifact.path / MANIFEST).read_bytes())
    for entry in manifest["files"]:
        if entry["path"] == "weights.safetensors":
            entry |= {"size": len(weights), "sha256": sha256(weights)}
    raw = manifest_bytes(manifest)
    (target / MANIFEST).write_bytes(raw)
    (target / DIGEST).write_bytes(sha256(raw).encode())
    return open_artifact(target)
