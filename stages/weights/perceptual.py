"""The weights of LPIPS: torchvision's VGG16 out of torch's cache or a given file, and heads from the package `lpips`.

A given file may also be a published tokenizer's checkpoint, whose losses hold both.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import CorruptError, UsageError
from pipeline.stage import External
from pipeline.stage_cache import cached
from stages.devices import pick_device
from stages.weights.checkpoint_reader import identify_file, read_state
from stages.weights.places import VGG16

if TYPE_CHECKING:
    import torch

    from models.autoencoders.config import PixelRange
    from models.losses.perceptual import Lpips

PERCEPTUAL = "perceptual"
PERCEPTUAL_EXTERNAL = External(
    help="the VGG16 weights of LPIPS (torchvision's file, or an IBQ or Open-MAGVIT2 checkpoint), if not in torch's cache",
    identify=lambda config, path: identify_file(path),
    needed=lambda config: False,
    usual=(VGG16,),
    is_file=True,
)
"""The declaration that stages complete with `place` and `otherwise`."""


@cached(2)
def load_lpips(path: Path, device: str, pixel_range: PixelRange = "0..1") -> Lpips:
    """LPIPS for images in this range; once per process. CorruptError if the file holds no VGG16."""
    from models.adapters.layout import LayoutError
    from models.adapters.lpips import lpips_heads, vgg_features
    from models.losses.perceptual import Lpips

    state = read_state(path)
    try:
        features = vgg_features(state)
    except LayoutError as error:
        raise CorruptError(
            f"{path} holds no VGG16: {error}", path=path, hint=f"torchvision's file is {VGG16.url}"
        ) from error
    return Lpips(features, lpips_heads(package_heads()), pixel_range=pixel_range).to(pick_device(device))


def package_heads() -> dict[str, torch.Tensor]:
    """The five heads as the package `lpips` carries them (v0.1); UsageError if it is not installed."""
    found = find_spec("lpips")  # finds it without importing it, which takes seconds
    if found is None or not found.submodule_search_locations:
        raise UsageError("LPIPS needs the package lpips, which is not installed", hint="pip install lpips")
    return read_state(Path(found.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth")
