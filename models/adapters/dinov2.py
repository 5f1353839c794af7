"""Published DINOv2 weights (names of facebookresearch/dinov2) in timm's names."""

from __future__ import annotations

from torch import Tensor


def to_timm(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published state dict; one that is already in timm's names is returned unchanged.

    The class row of the position table is added into the class token, the mask token (training only) is dropped.
    """
    if "register_tokens" not in published:
        return dict(published)
    state = {name: tensor for name, tensor in published.items() if name not in {"register_tokens", "mask_token"}}
    state["reg_token"] = published["register_tokens"]
    state["cls_token"] = published["cls_token"] + published["pos_embed"][:, :1]
    state["pos_embed"] = published["pos_embed"][:, 1:]
    return state
