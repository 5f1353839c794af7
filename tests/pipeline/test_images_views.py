"""Views: the published crops to the pixel, and the laws that every policy obeys."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import InputError
from pipeline.images import resampling
from pipeline.images.views import RandomCropViews, RandomResizedCropViews, ViewPolicy, Views

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "rar" / "augment.npz", allow_pickle=False)
SIZE = 32
POLICIES: list[dict[str, Any]] = [
    {"kind": "none"},
    {"kind": "resize"},
    {"kind": "center"},
    {"kind": "center+flip"},
    {"kind": "eval-crop"},
    {"kind": "ten-crop"},
    {"kind": "shifts", "pixels": 2, "fill": 7},
    {"kind": "random-crop", "short_side": 40, "draws": 5, "flip": True, "seed": 3},
    {"kind": "random-resized-crop", "draws": 5, "seed": 3},
]


def policy(kind: str, **fields: object) -> ViewPolicy:
    views: ViewPolicy = TypeAdapter(Views).validate_python({"kind": kind, "size": SIZE, **fields})
    return views


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("case", [0, 1, 2])
class TestPublished:
    """Exact with the Pillow version that made the fixture; its note allows one level for other versions."""

    def check(self, case: int, name: str, found: NDArray[np.uint8]) -> None:
        expected = GOLDEN[f"out__{name}_{case}"]
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert (found == expected).mean() > 0.99

    def image(self, case: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = GOLDEN[f"in__image_{case}"]
        return image

    def test_adm_crop(self, case: int) -> None:
        self.check(case, "adm_crop", policy("center").apply(self.image(case), 0, index=0))

    def test_adm_crop_110(self, case: int) -> None:
        self.check(case, "adm_crop_110", resampling.adm_crop(self.image(case), int(1.1 * SIZE)))

    def test_ten_crop(self, case: int) -> None:
        self.check(case, "ten_crop", policy("ten-crop").apply_all(self.image(case), index=0))

    def test_eval_crop(self, case: int) -> None:
        self.check(case, "eval_crop", policy("eval-crop").apply(self.image(case), 0, index=0))


@pytest.mark.parametrize("fields", POLICIES, ids=lambda fields: fields["kind"])
class TestLaws:
    def image(self, fields: dict[str, Any]) -> NDArray[np.uint8]:
        return noise(SIZE, SIZE) if fields["kind"] == "none" else noise(50, 90)

    def test_count_size_and_names_agree(self, fields: dict[str, Any]) -> None:
        views = policy(**fields)
        assert views.apply_all(self.image(fields), index=4).shape == (views.count, SIZE, SIZE, 3)
        assert views.apply_all(self.image(fields), index=4).dtype == np.uint8
        assert len({view["id"] for view in views.describe()}) == views.count
        assert all({"id", "kind", "flip", "scale"} <= view.keys() for view in views.describe())
        assert not views.describe()[views.upright]["flip"]

    def test_one_by_one_is_all_at_once(self, fields: dict[str, Any]) -> None:
        views, image = policy(**fields), self.image(fields)
        backwards = [views.apply(image, view, index=4) for view in reversed(range(views.count))]
        np.testing.assert_array_equal(np.stack(backwards[::-1]), views.apply_all(image, index=4))

    def test_image_is_left_alone(self, fields: dict[str, Any]) -> None:
        image = self.image(fields)
        policy(**fields).apply_all(image, index=4)
        np.testing.assert_array_equal(image, self.image(fields))


def test_every_policy_is_under_the_laws() -> None:
    kinds = TypeAdapter(Views).json_schema()["discriminator"]["mapping"].keys()
    assert kinds == {fields["kind"] for fields in POLICIES}


@pytest.mark.parametrize("kind", ["resize", "center", "eval-crop", "ten-crop", "shifts"])
@pytest.mark.parametrize("sides", [(1, 1), (1, 3000), (3000, 1), (2, 65_000)])
def test_extreme_sides_are_resized(kind: str, sides: tuple[int, int]) -> None:
    views = policy(kind, size=64)
    image = np.full((*sides, 3), 90, dtype=np.uint8)
    pixels = views.apply_all(image, index=0)[views.upright]
    assert pixels.shape == (64, 64, 3)
    assert (pixels == 90).all()


def test_extreme_sides_keep_the_centre() -> None:
    image = np.zeros((1, 3001, 3), dtype=np.uint8)
    image[:, 1492:1508] = 255
    assert (policy("center").apply(image, 0, index=0) == 255).all()


def test_center_flip_is_a_mirror() -> None:
    upright, mirrored = policy("center+flip").apply_all(noise(40, 33), index=0)
    np.testing.assert_array_equal(mirrored, upright[:, ::-1])


def test_ten_crop_of_the_real_size_cuts_281_pixels() -> None:
    image = noise(300, 281)
    crops = policy("ten-crop", size=256).apply_all(image, index=0)
    top = (300 - 281) // 2
    np.testing.assert_array_equal(crops[0], image[top : top + 256, :256])
    np.testing.assert_array_equal(crops[3], image[top + 25 : top + 281, 25:])
    np.testing.assert_array_equal(crops[4], image[top + 12 : top + 268, 12:268])
    assert policy("ten-crop").describe()[5]["id"] == "top-left+flip"
    np.testing.assert_array_equal(crops[5], crops[1][:, ::-1])


def test_shifts_move_the_image_and_fill() -> None:
    image, views = noise(SIZE, SIZE), policy("shifts", pixels=1, fill=7)
    np.testing.assert_array_equal(views.apply(image, views.upright, index=0), image)
    moved = {view["id"]: views.apply(image, row, index=0) for row, view in enumerate(views.describe())}
    np.testing.assert_array_equal(moved["shift+1-1"][1:, :-1], image[:-1, 1:])
    assert (moved["shift+1-1"][0] == 7).all()
    assert (moved["shift+1-1"][:, -1] == 7).all()
    assert views.count == 9


def test_random_crops_depend_on_seed_image_and_draw() -> None:
    image = noise(60, 100)
    views = RandomCropViews(size=SIZE, short_side=40, draws=20, flip=True)
    boxes = views.boxes(image, index=0)
    assert boxes.dtype == np.float32
    assert (boxes[:, 0] + SIZE <= 66).all()  # int(40 * 100 / 60)
    assert (boxes[:, 1] + SIZE <= 40).all()
    assert {0.0, 1.0} == set(boxes[:, 4])
    assert len(np.unique(boxes, axis=0)) > 10
    assert not np.array_equal(boxes, views.boxes(image, index=1))
    other = RandomCropViews(size=SIZE, short_side=40, draws=20, flip=True, seed=1)
    assert not np.array_equal(boxes, other.boxes(image, index=0))


def test_random_crop_is_what_its_box_says() -> None:
    image = noise(60, 100)
    views = RandomCropViews(size=SIZE, short_side=40, draws=6, flip=True)
    resized = resampling.resize_short_side(image, 40, "bilinear")
    for (x, y, w, h, flip), pixels in zip(
        views.boxes(image, index=9).astype(int),
        views.apply_all(image, index=9),
        strict=True,
    ):
        cut = resized[y : y + h, x : x + w]
        np.testing.assert_array_equal(pixels, cut[:, ::-1] if flip else cut)


def test_centered_crops_differ_in_their_mirrors_alone() -> None:
    image = noise(60, 100)
    views = RandomCropViews(size=SIZE, short_side=40, draws=8, flip=True, centered=True, filter="bicubic")
    upright = policy("eval-crop", short_side=40).apply(image, 0, index=0)
    flips = views.boxes(image, index=2)[:, 4]
    assert set(flips) == {0.0, 1.0}
    for flip, pixels in zip(flips, views.apply_all(image, index=2), strict=True):
        np.testing.assert_array_equal(pixels, upright[:, ::-1] if flip else upright)


def test_eval_crop_of_a_larger_short_side_is_its_centre() -> None:
    image = noise(60, 100)
    wide = policy("eval-crop", size=40).apply(image, 0, index=0)
    np.testing.assert_array_equal(policy("eval-crop", short_side=40).apply(image, 0, index=0), wide[4:36, 4:36])


def test_random_resized_crops_are_distributed_as_torchvisions() -> None:
    """Shares of the area, ratios and places of both; the streams differ, so quantiles are compared."""
    torch = pytest.importorskip("torch")
    from torchvision.transforms import RandomResizedCrop

    views = RandomResizedCropViews(size=SIZE, draws=1024)
    ours = np.concatenate([views.boxes(noise(120, 90), index=index)[:, :4] for index in range(2)])
    torch.manual_seed(0)
    blank = torch.zeros(1, 120, 90)
    theirs = np.array([RandomResizedCrop.get_params(blank, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(2048)])
    theirs = theirs[:, [1, 0, 3, 2]]  # top, left, height, width
    quantiles = (0.1, 0.5, 0.9)
    np.testing.assert_allclose(np.quantile(ours, quantiles, axis=0), np.quantile(theirs, quantiles, axis=0), atol=5)


def test_random_resized_crop_is_what_its_box_says() -> None:
    from PIL import Image

    image = noise(60, 100)
    views = RandomResizedCropViews(size=SIZE, draws=6, flip=True)
    for (x, y, w, h, flip), pixels in zip(
        views.boxes(image, index=9).astype(int), views.apply_all(image, index=9), strict=True
    ):
        cut = Image.fromarray(image[y : y + h, x : x + w]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(pixels, np.asarray(cut)[:, ::-1] if flip else np.asarray(cut))


def test_random_resized_crop_of_a_strip_is_the_largest_allowed_centre() -> None:
    (box,) = RandomResizedCropViews(size=SIZE).boxes(noise(2, 400), index=0)
    assert box.tolist() == [198, 0, 3, 2, 0]  # as torchvision: round(2 * 4 / 3) wide


def test_random_places_are_pinned() -> None:
    """Places must never move: token sets made with them would no longer fit their key."""
    views = RandomCropViews(short_side=256, draws=4, flip=True, seed=5, size=32)
    boxes = views.boxes(np.zeros((256, 512, 3), dtype=np.uint8), index=77)
    assert hashlib.sha256(boxes.astype("<f4").tobytes()).hexdigest()[:16] == "5a95b130152e0453"


def test_none_refuses_another_size() -> None:
    with pytest.raises(InputError, match="40x33 pixels, but views of kind none need 32x32"):
        policy("none").apply(noise(33, 40), 0, index=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "centre", "size": 32},
        {"kind": "center", "size": 0},
        {"kind": "center"},
        {"kind": "center", "size": "32"},
        {"kind": "random-crop", "size": 32, "short_side": 31},
        {"kind": "shifts", "size": 32, "pixel": 1},
    ],
)
def test_wrong_policies_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Views).validate_python(fields)


# cv2.resize(IMAGE, (columns, rows), interpolation=cv2.INTER_LINEAR) of opencv-python-headless 5.0.0
OPENCV_IMAGE = (np.arange(5 * 7 * 3).reshape(5, 7, 3) * 37 % 251).astype(np.uint8)
SMALLER = [
    [[49, 86, 124], [212, 30, 67], [187, 151, 41], [130, 167, 152]],
    [[90, 127, 164], [33, 70, 107], [227, 45, 82], [170, 207, 88]],
    [[129, 166, 109], [73, 110, 126], [47, 84, 100], [106, 90, 127]],
]
LARGER_RED = [
    [0, 74, 160, 191, 82, 168, 115, 90, 164],
    [18, 92, 178, 209, 100, 186, 133, 108, 182],
    [38, 112, 133, 115, 120, 206, 153, 128, 202],
    [58, 132, 107, 53, 140, 145, 127, 148, 222],
    [78, 152, 127, 73, 160, 51, 82, 147, 179],
    [96, 170, 145, 92, 178, 69, 100, 102, 9],
]


def test_the_bilinear_filter_of_opencv_to_the_bit() -> None:
    assert resampling.resize(OPENCV_IMAGE, 3, 4, "opencv-bilinear").tolist() == SMALLER
    assert resampling.resize(OPENCV_IMAGE, 6, 9, "opencv-bilinear")[..., 0].tolist() == LARGER_RED


def test_albumentations_rounds_sides_and_centre_in_its_own_way() -> None:
    """SmallestMaxSize rounds the long side to nearest where torchvision cuts it, and halves of a pixel down."""
    assert resampling.short_side_sizes(noise(100, 141), 32, "opencv-bilinear") == (32, 45)  # 45.12
    assert resampling.short_side_sizes(noise(100, 143), 32, "opencv-bilinear") == (32, 46)  # 45.76
    assert resampling.short_side_sizes(noise(100, 143), 32, "bilinear") == (32, 45)
    square = noise(32, 35)  # 3 pixels to spare: 1 to the left; torchvision takes round(1.5) = 2
    assert np.array_equal(policy("eval-crop", filter="opencv-bilinear").apply(square, 0, index=0), square[:, 1:33])
    assert np.array_equal(policy("eval-crop", filter="bilinear").apply(square, 0, index=0), square[:, 2:34])
