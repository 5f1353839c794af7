"""The linear layer of a probe against the published implementation's numbers, and its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.adapters.dinov2 import to_timm
from models.encoders.config import Dinov2Config
from models.encoders.dinov2 import Dinov2
from pipeline.store import Store
from stages.codes.describe_tokens import mean_states
from stages.training.config import PUBLISHED_PROBE
from stages.training.linear_head import PART, FeatureRows, LinearHeadTask
from tests.models.generators.digit_fixtures import about, arrays, network, published_weights
from tests.stages.small_artifacts import features_artifact

CLASSES = 1000
HEADS = {0: "classifier_0_blocks", 1: "classifier_1_blocks"}


@pytest.mark.parametrize("pixels", [256, 224])
@torch.no_grad()
def test_semantic_codes_of_both_sizes(pixels: int) -> None:
    """Training images are resized as tensors, validation images come as they are."""
    weights = published_weights("linear_probe")
    encoder = Dinov2(Dinov2Config.model_validate({"size": "base"}), embed_dim=32, depth=5, num_heads=2).eval()
    prefix = "pretrained_encoder."
    encoder.load_weights(to_timm({key[len(prefix) :]: weights[key] for key in weights if key.startswith(prefix)}))
    source = arrays("linear_probe")["in/imgs224_uint8" if pixels == 224 else "in/imgs_uint8"]
    images_BCHW = source.float() / 255
    if pixels == 256:
        images_BCHW = F.interpolate(images_BCHW, scale_factor=0.875, mode="bicubic", antialias=False)
    codes_BT = torch.cdist(encoder(images_BCHW).flatten(1, 2), weights["centroids"].T).argmin(-1)
    assert torch.equal(codes_BT, arrays("linear_probe")[f"out/{pixels}/tokens_raw"])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("pixels", [256, 224])
@torch.no_grad()
def test_mean_states_logits_and_loss(tmp_path: Path, pixels: int, layer: int) -> None:
    found, bound = arrays("linear_probe"), about("linear_probe")["tolerance"]["decoder_logits_max_abs_cpu"]
    pooled_BD = mean_states(network("linear_probe"), found[f"out/{pixels}/tokens_raw"], layer)
    torch.testing.assert_close(pooled_BD, found[f"out/{pixels}/pooled_{layer}"], atol=bound, rtol=0)

    rows = FeatureRows(features_artifact(Store(tmp_path), pooled_BD.numpy(), found["in/labels"].numpy()))
    task = LinearHeadTask(PUBLISHED_PROBE, rows, rows, CLASSES, torch.device("cpu"))
    head = {
        name: published_weights("linear_probe")[f"linear_classifiers.{HEADS[layer]}.{name}"]
        for name in ("weight", "bias")
    }
    task.head.load_state_dict(head)
    published = f"out/{pixels}/{HEADS[layer]}"
    torch.testing.assert_close(task.head(pooled_BD), found[f"{published}/logits"], atol=bound, rtol=0)
    batch = task.batch(0, rows.read(np.arange(2)), slice(None))
    loss = task.losses(PART, {PART: task.head}, batch, 0).losses["cross_entropy"]
    torch.testing.assert_close(loss, found[f"{published}/loss"], atol=bound, rtol=0)


def test_the_published_training() -> None:
    rates = [PUBLISHED_PROBE.schedule.rate(step, base=0.4, steps=100_000) for step in (0, 50_000, 100_000)]
    assert rates == pytest.approx([0.4, 0.2, 0.0], abs=1e-12)
    optimizer = PUBLISHED_PROBE.optimizer.model_dump()
    assert (optimizer["kind"], optimizer["learning_rate"], optimizer["momentum"]) == ("sgd", 0.4, 0.9)
    assert (optimizer["weight_decay"], PUBLISHED_PROBE.clip, PUBLISHED_PROBE.steps) == (0.0, None, 100_000)


def test_the_first_head_is_drawn_as_published(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = FeatureRows(features_artifact(Store(tmp_path), np.zeros((4, 64), np.float32), np.zeros(4, np.int32)))
    head = LinearHeadTask(PUBLISHED_PROBE, rows, rows, CLASSES, torch.device("cpu")).head
    assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not head.bias.detach().any()


def test_every_row_has_the_label_of_its_image(tmp_path: Path) -> None:
    values_ND = np.arange(12, dtype=np.float16).reshape(6, 2)
    rows = FeatureRows(features_artifact(Store(tmp_path), values_ND, np.array([4, 7])))
    features_RD, labels_R = rows.read(np.array([5, 2, 3, 0]))
    assert (features_RD.dtype, labels_R.tolist()) == (np.float32, [7, 4, 7, 4])
    assert features_RD.tolist() == values_ND[[5, 2, 3, 0]].tolist()
