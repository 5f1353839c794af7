"""Decoding: the tokenizer's own images, byte for byte, and nobody else's codes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from models.tokenizer import to_bytes
from pipeline.artifact import Artifact
from pipeline.errors import CorruptError, InputError
from pipeline.images import ImageSet
from pipeline.images.views import EvalCropViews
from pipeline.runner import Options, make
from pipeline.stage import Inputs
from pipeline.store import Store
from stages.images.image_files import open_pictures
from stages.images.pictures import grid_png, interleave
from stages.sampling.config import DecodeConfig
from stages.sampling.decode import decode_tokens as decode
from stages.weights.files import save_weights
from stages.weights.networks import NetworkFile, load_tokenizer
from tests.stages.conformance import draw_folder, index_folder, run_stage, zarr_members
from tests.stages.small_artifacts import (
    CODES,
    SIZE,
    Backwards,
    Killed,
    digests,
    images_artifact,
    killed_at,
    made,
    token_artifact,
    tokenizer_artifact,
)

IMAGES, CROPS = 13, 2
CODES_ICT = np.random.default_rng(0).integers(0, CODES, (IMAGES, CROPS, 4))
LABELS_I = np.arange(IMAGES) % 3
CONFIG = DecodeConfig(rows_per_pass=3, shard_images=4, chunk_images=2, grid_images=12)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def tokenizer(origin: Store) -> Artifact:
    return tokenizer_artifact(origin)


@pytest.fixture(scope="module")
def tokens(origin: Store, tokenizer: Artifact) -> Artifact:
    return token_artifact(origin, tokenizer, CODES_ICT, LABELS_I, class_names=("zero", "one", "two"))


@pytest.fixture(scope="module")
def images(origin: Store, tokens: Artifact, tokenizer: Artifact) -> Artifact:
    return run(origin, tokens, tokenizer)


def run(
    store: Store,
    tokens: Artifact,
    tokenizer: Artifact,
    config: DecodeConfig = CONFIG,
    options: Options | None = None,
    **more: Artifact,
) -> Artifact:
    inputs = Inputs({"tokens": tokens, "tokenizer": tokenizer, **more})
    return make(store, decode, config, inputs, {}, options or Options()).artifact


def test_the_images_of_the_tokenizer_in_order(images: Artifact, tokenizer: Artifact) -> None:
    network = load_tokenizer(NetworkFile.of(tokenizer, "cpu"))
    expected_BCHW = to_bytes(network.decode(torch.from_numpy(CODES_ICT[:, 0].reshape(-1, 2, 2))), "round")
    found = open_pictures(images, size=None)
    difference = found.read(0, IMAGES).astype(int) - expected_BCHW.permute(0, 2, 3, 1).numpy()
    assert np.abs(difference).max() <= 1  # passes of another shape may round another way
    assert found.labels_I.tolist() == LABELS_I.tolist()
    assert found.class_names == ["zero", "one", "two"]


def test_plain_zarr_opens_it(images: Artifact) -> None:
    group = zarr.open_group(images.path, mode="r")
    assert group["images"].shape == (IMAGES, SIZE, SIZE, 3)
    assert group["labels"][:].tolist() == LABELS_I.tolist()
    assert zarr_members(images) == ["images", "labels"]


def test_a_grid_that_is_not_square(origin: Store, tokenizer: Artifact, tmp_path: Path) -> None:
    tokens = token_artifact(origin, tokenizer, CODES_ICT, LABELS_I, name="wide", grid=(1, 4), resolution=SIZE // 2)
    images = run(Store(tmp_path), tokens, tokenizer)
    assert zarr.open_group(images.path, mode="r")["images"].shape == (IMAGES, SIZE // 2, 2 * SIZE, 3)
    assert (images.facts["size"], images.facts["width"]) == (SIZE // 2, 2 * SIZE)
    assert Image.open(images.path / "grid.png").width > 0


def test_another_crop_gives_other_images(
    images: Artifact, tokens: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    other = run(Store(tmp_path), tokens, tokenizer, CONFIG.model_copy(update={"crop": 1}))
    assert (open_pictures(other, size=SIZE).read(0, IMAGES) != open_pictures(images, size=SIZE).read(0, IMAGES)).any()


@pytest.mark.parametrize("call", [1, 5, 9, 14, 20, 26, 31])
def test_interrupted_and_continued_gives_the_same_bytes(
    call: int, images: Artifact, tokens: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    with pytest.raises(Killed), killed_at(call):
        run(store, tokens, tokenizer)
    assert digests(run(store, tokens, tokenizer)) == digests(images)


def test_shards_in_any_order_elsewhere_give_the_same_bytes(
    images: Artifact, tokens: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    assert digests(run(Store(tmp_path), tokens, tokenizer, options=Options(cluster=Backwards()))) == digests(images)


def test_the_grid_says_how_it_was_made(images: Artifact) -> None:
    grid = Image.open(images.path / "grid.png")
    assert grid.size == (10 * 66 + 2, 2 * (64 + 12 + 2) + 2)
    assert json.loads(grid.text["config"])["grid_images"] == 12
    assert grid.text["smalti"] == images.key


def test_originals_stand_above_their_reconstructions(tokens: Artifact, tokenizer: Artifact, tmp_path: Path) -> None:
    store = Store(tmp_path)
    white = images_artifact(store, np.full((IMAGES, SIZE, SIZE, 3), 250, np.uint8), LABELS_I)
    grid = np.array(Image.open(run(store, tokens, tokenizer, originals=white).path / "grid.png"))
    rows = [grid[2 + row * 78 : 66 + row * 78, 2:66] for row in range(4)]
    assert [bool((row == 250).all()) for row in rows] == [True, False, True, False]


def test_originals_are_shown_in_the_views_that_were_encoded(tokenizer: Artifact, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    originals = index_folder(draw_folder(tmp_path / "images", images=3, pixels=40), store.root)
    views = EvalCropViews(size=SIZE, filter="opencv-bilinear")
    given = {"images": originals, "tokenizer": tokenizer}
    cut = {"shard_images": 8, "chunk_images": 4, "views": views.model_dump()}
    tokens = run_stage("pretokenize", store.root, cut, inputs=given)
    config = CONFIG.model_copy(update={"views": views})
    grid = np.array(Image.open(run(store, tokens, tokenizer, config, originals=originals).path / "grid.png"))
    shown = grid[2:66, 2:66].reshape(16, 4, 16, 4, 3)[:, 0, :, 0]
    assert np.array_equal(shown, views.apply(ImageSet.open(originals.path).image(0), 0, index=0))
    small = CONFIG.model_copy(update={"views": views.model_copy(update={"size": 8})})
    with pytest.raises(InputError, match="views of 8 pixels, expected 16"):
        run(store, tokens, tokenizer, small, originals=originals)


def test_originals_of_something_else_are_refused(tokens: Artifact, tokenizer: Artifact, tmp_path: Path) -> None:
    store = Store(tmp_path)
    fewer = images_artifact(store, np.zeros((5, SIZE, SIZE, 3), np.uint8), np.zeros(5))
    with pytest.raises(InputError, match="5 images, expected the 13 of the same keys"):
        run(store, tokens, tokenizer, originals=fewer)


def test_an_npz_as_the_evaluator_reads_it(
    images: Artifact, tokens: Artifact, tokenizer: Artifact, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"npz": True})
    found = [run(Store(tmp_path / name), tokens, tokenizer, config) for name in ("a", "b")]
    assert found[0].digest == found[1].digest
    with np.load(found[0].path / "samples.npz", allow_pickle=False) as file:
        assert (file["arr_0"] == open_pictures(images, size=SIZE).read(0, IMAGES)).all()


def test_codes_of_another_tokenizer_are_refused(origin: Store, tokens: Artifact, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="made with another tokenizer"):
        run(Store(tmp_path), tokens, tokenizer_artifact(origin, seed=1))


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"codes": CODES + 1}, "has 9 codes"),
        ({"grid": (1, 4)}, "grid of 1x4"),
        ({"resolution": 32}, "images of 32 pixels"),
    ],
)
def test_a_token_set_that_does_not_fit_is_refused(
    said: dict[str, object], sentence: str, origin: Store, tokenizer: Artifact, tmp_path: Path
) -> None:
    other = token_artifact(origin, tokenizer, CODES_ICT, LABELS_I, name=str(said), **said)
    with pytest.raises(CorruptError, match=sentence):
        run(Store(tmp_path), other, tokenizer)


def test_a_code_out_of_range_is_named_with_its_row(tokenizer: Artifact, tmp_path: Path) -> None:
    """The codes of a set of nine are put below the metadata of a set of eight, with a manifest that fits."""
    codes_ICT = CODES_ICT.copy()
    codes_ICT[6, 1, 2] = CODES
    more = token_artifact(Store(tmp_path / "nine"), tokenizer, codes_ICT, LABELS_I, codes=CODES + 1)
    eight = token_artifact(Store(tmp_path / "eight"), tokenizer, CODES_ICT, LABELS_I)
    files = {name: (more if name.startswith("tokens/c") else eight).file(name).read_bytes() for name in eight.files}
    forged = made(Store(tmp_path), "token-set", lambda out: out.put("all", files))
    with pytest.raises(CorruptError, match=r"row 13 .image 6, crop 1. holds code 8 at token 2, expected 0 to 7"):
        run(Store(tmp_path), forged, tokenizer)


def test_a_codebook_has_no_decoder(tokens: Artifact, tmp_path: Path) -> None:
    config = {"kind": "kmeans", "clusters": 8, "encoder": {"kind": "whitened-patches"}}
    codebook = made(Store(tmp_path), "codebook", lambda out: save_weights(out, {}, config))
    with pytest.raises(CorruptError, match="a K-Means codebook, which has no decoder"):
        run(Store(tmp_path), tokens, codebook)


def test_few_originals_still_have_a_row_of_their_own() -> None:
    ones, twos = np.full((3, 8, 8, 3), 1, np.uint8), np.full((3, 8, 8, 3), 2, np.uint8)
    images_NHW3, captions = interleave(twos, ones, ["a", "b", "c"])
    assert images_NHW3[:, 0, 0, 0].tolist() == [1] * 3 + [255] * 7 + [2] * 3 + [255] * 7
    assert captions == ["a", "b", "c"] + [""] * 17


def test_a_grid_cuts_long_captions_and_keeps_pixels() -> None:
    images_NHW3 = np.random.default_rng(1).integers(0, 256, (3, 80, 80, 3), np.uint8)
    png = grid_png(images_NHW3, ["a", "", "a very long name of a class indeed"], {"config": "{}"})
    grid = np.array(Image.open(io.BytesIO(png)))
    assert grid.shape == (2 + 80 + 12 + 2, 3 * 82 + 2, 3)
    assert (grid[2:82, 84:164] == images_NHW3[1]).all()
    assert (grid[:, -2:] == 255).all()
