"""Published weights of LPIPS: torchvision's vgg16 and the heads of the package `lpips`, or a tokenizer's checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torchvision.models.vgg import cfgs, make_layers

from models.adapters.layout import LayoutError, compare, shapes
from models.losses.perceptual import TAPS, WIDTHS

FEATURE = re.compile(r"(?:features|(?:loss\.perceptual_loss\.)?net\.slice\d)\.(\d+\.(?:weight|bias))")
HEAD = re.compile(r"(?:loss\.perceptual_loss\.)?lin(\d)\.model\.1\.weight")


def vgg_features(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions up to relu5_3, named by layer; other parts of the file are ignored. Raises LayoutError."""
    found = {match[1]: tensor for name, tensor in state.items() if (match := FEATURE.fullmatch(name))}
    with torch.device("meta"):
        wanted = shapes(make_layers(cfgs["D"])[: TAPS[-1] + 1].state_dict())
    differences = compare(shapes(found), wanted)
    if differences:
        raise LayoutError("the features of torchvision's vgg16", differences)
    return found


def lpips_heads(state: Mapping[str, Tensor]) -> list[Tensor]:
    """The five heads in order; other parts of the file are ignored. Raises LayoutError."""
    found = {
        f"lin{match[1]}.model.1.weight": tensor for name, tensor in state.items() if (match := HEAD.fullmatch(name))
    }
    wanted = {f"lin{index}.model.1.weight": (1, width, 1, 1) for index, width in enumerate(WIDTHS)}
    differences = compare(shapes(found), wanted)
    if differences:
        raise LayoutError("the LPIPS heads for vgg16", differences)
    return [found[name] for name in wanted]
