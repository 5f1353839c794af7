"""LPIPS against both published implementations, with VGG weights made by formula (the real ones are 500 MB)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.adapters.layout import LayoutError
from models.adapters.lpips import lpips_heads, vgg_features
from models.losses.config import ReconstructionConfig
from models.losses.perceptual import Lpips
from models.losses.reconstruction import ReconstructionLoss

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(system: str) -> tuple[dict[str, Tensor], dict]:
    return load_file(GOLDEN / system / "lpips.safetensors"), json.loads((GOLDEN / system / "lpips.json").read_text())


def weights(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weights/"): tensor for name, tensor in arrays.items() if name.startswith("weights/")}


def of_sines(spec: dict) -> dict[str, Tensor]:
    state = {}
    for name, shape, index, fan_in in spec["vgg_parameters_name_shape_k_fan"]:
        gain = math.sqrt(4 / fan_in) if fan_in else 0.1
        flat = np.sin(np.arange(math.prod(shape)) * 0.7390851 + 1.3 * index) * gain
        state[f"net.{name}"] = torch.from_numpy(flat.reshape(shape).astype(np.float32))
    return state


def of_normals(spec: dict) -> dict[str, Tensor]:
    state = {}
    for index, (name, shape) in enumerate(spec["vgg_keys"]):
        gain = math.sqrt(2 / (shape[1] * 9)) if len(shape) == 4 else 0.05
        drawn = np.random.RandomState(spec["config"]["seed"] + index).standard_normal(shape) * gain
        state[f"loss.perceptual_loss.net.{name}"] = torch.from_numpy(drawn.astype(np.float32))
    return state


def test_ibq() -> None:
    arrays, spec = golden("ibq")
    lpips = Lpips(vgg_features(of_sines(spec)), lpips_heads(weights(arrays)), pixel_range="-1..1")
    y_BCHW = arrays["in/y"].clone().requires_grad_()
    distances_B = lpips(arrays["in/x"], y_BCHW)
    torch.testing.assert_close(distances_B, arrays["out/lpips"].flatten(), atol=spec["tolerances"]["out/lpips"], rtol=0)
    (gradient,) = torch.autograd.grad(distances_B.sum(), y_BCHW)
    assert relative(gradient, arrays["out/grad_y"]) < 1e-3


def test_open_magvit2() -> None:
    arrays, spec = golden("open_magvit2")
    state = weights(arrays) | of_normals(spec)
    lpips = Lpips(vgg_features(state), lpips_heads(state), pixel_range="-1..1")
    b_BCHW = arrays["in/b"].clone().requires_grad_()
    distances_B = lpips(arrays["in/a"], b_BCHW)
    torch.testing.assert_close(distances_B, arrays["out/lpips"].flatten(), atol=spec["tolerances"]["lpips"], rtol=0)
    (gradient,) = torch.autograd.grad(distances_B.sum(), b_BCHW)
    assert relative(gradient, arrays["out/grad_b"]) < 1e-3
    unit_range = Lpips(vgg_features(state), lpips_heads(state), pixel_range="0..1")
    halved = unit_range((arrays["in/a"] + 1) / 2, (arrays["in/b"] + 1) / 2)
    torch.testing.assert_close(halved, distances_B.detach(), atol=1e-5, rtol=0)
    features_are_close(lpips, arrays, spec["tolerances"]["features"])


def features_are_close(lpips: Lpips, arrays: dict[str, Tensor], tolerance: float) -> None:
    network = lpips.frozen[0]
    x_BFhw = (arrays["in/a"] - network.shift) / network.scale
    means = []
    for index, layer in enumerate(network.layers):
        x_BFhw = layer(x_BFhw)
        if index in (3, 8, 15, 22, 29):
            means.append(x_BFhw.mean((2, 3)))
    for tap, mean in enumerate(means):
        torch.testing.assert_close(mean, arrays[f"out/feat_mean/{tap}"], atol=tolerance, rtol=0)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Of the norms: at the kink of a single ReLU or maximum, float32 kernels may fall on either side."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def empty() -> Lpips:
    arrays, spec = golden("ibq")
    features = {f"net.{name}": torch.zeros(shape) for name, shape, *_ in spec["vgg_parameters_name_shape_k_fan"]}
    return Lpips(vgg_features(features), lpips_heads(weights(arrays)), pixel_range="-1..1")


def test_frozen_network_is_no_part_of_the_training(empty: Lpips) -> None:
    loss = ReconstructionLoss(ReconstructionConfig(l1=1.0, l2=0.0, perceptual=1.0), perceptual=empty)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert loss.double().perceptual.frozen[0].heads[0].dtype == torch.float64
    loss.float()


def test_features_that_are_all_zero_have_a_gradient(empty: Lpips) -> None:
    pixels_BCHW = torch.rand(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(empty(pixels_BCHW, torch.rand(1, 3, 32, 32)).sum(), pixels_BCHW)
    assert bool(gradient.isfinite().all())


def test_torchvision_names_are_known_and_others_refused() -> None:
    _, spec = golden("ibq")
    names = {name.split(".", 1)[1]: torch.zeros(shape) for name, shape, *_ in spec["vgg_parameters_name_shape_k_fan"]}
    published = {f"features.{name}": tensor for name, tensor in names.items()} | {"classifier.0.weight": torch.zeros(1)}
    assert vgg_features(published).keys() == names.keys()
    del published["features.28.bias"]
    with pytest.raises(LayoutError, match=r"missing +28\.bias"):
        vgg_features(published)
    with pytest.raises(LayoutError, match=r"lin4\.model\.1\.weight"):
        lpips_heads({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)})


def test_a_missing_network_is_told() -> None:
    with pytest.raises(ValueError, match="set perceptual to 0"):
        ReconstructionLoss(ReconstructionConfig(l1=1.0, l2=0.0, perceptual=1.0))


def test_heads_of_the_package_fit() -> None:
    """The heads of the package `lpips` are those that the tokenizers were trained with."""
    package = pytest.importorskip("lpips", reason="the package lpips comes with the extra `metrics`")
    heads = torch.load(
        Path(package.__file__).parent / "weights" / "v0.1" / "vgg.pth", weights_only=True, map_location="cpu"
    )
    arrays, _ = golden("ibq")
    for ours, theirs in zip(lpips_heads(heads), lpips_heads(weights(arrays)), strict=True):
        assert torch.equal(ours, theirs)
