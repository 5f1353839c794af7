"""Figures from features: torch-fidelity's distances, and figures that it lacks.

N images, M of the reference, E features, L classes
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from pipeline.errors import UsageError
from stages.scoring.features import Extracted
from stages.scoring.neighbours import precision_and_recall

if TYPE_CHECKING:
    from models.losses.perceptual import Lpips

SEED = 2020  # torch-fidelity's, of KID subsets and of the shuffle before IS splits
PSNR_LIMIT = 100.0  # dB; two equal images have no finite value
DIGITS = 8  # significant digits that are kept of a figure


def distances(
    ours: Extracted,
    reference: Extracted,
    *,
    splits: int,
    shuffle: bool,
    subsets: int,
    subset_size: int,
    neighbours: int,
) -> dict[str, float]:
    """Frechet distance, Inception score, kernel distance, precision and recall under one extractor.

    Without the distances between rows if one side is published statistics, which have none.
    """
    statistics = [{"mu": one.mean_E, "sigma": one.covariance_EE} for one in (ours, reference)]
    found = {"distance": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]}
    if ours.logits_NL is not None:
        logits_NL = torch.from_numpy(ours.logits_NL)  # torch-fidelity makes float64 of them
        score = isc_features_to_metric(logits_NL, splits=splits, shuffle=shuffle, rng_seed=SEED)
        found |= {"inception_score": score["inception_score_mean"], "inception_score_std": score["inception_score_std"]}
    if ours.features_NE is None or reference.features_NE is None:
        return found
    precision, recall = precision_and_recall(ours.features_NE, reference.features_NE, neighbours=neighbours)
    kernel = kid_features_to_metric(
        _double(ours.features_NE),
        _double(reference.features_NE),
        kid_subsets=subsets,
        kid_subset_size=min(subset_size, len(ours.features_NE), len(reference.features_NE)),
        rng_seed=SEED,
        verbose=False,
    )
    return found | {
        "kernel_distance": kernel["kernel_inception_distance_mean"],
        "kernel_distance_std": kernel["kernel_inception_distance_std"],
        "precision": precision,
        "recall": recall,
    }


def consistency(logits_NL: NDArray[np.float32], labels_N: NDArray[np.int32]) -> float:
    """Share of images that the classifier assigns to their class."""
    return float((logits_NL.argmax(1) == labels_N).mean())


def psnr_each(images_NHW3: NDArray[np.uint8], originals_NHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The peak signal-to-noise ratio of each pair (N,) in dB, at most 100."""
    errors_N = ((images_NHW3.astype(np.float64) - originals_NHW3) ** 2).mean((1, 2, 3))
    smallest = 255**2 * 10 ** (-PSNR_LIMIT / 10)
    decibels_N: NDArray[np.float64] = 10 * np.log10(255**2 / np.maximum(errors_N, smallest))
    return decibels_N


def ssim_each(images_NHW3: NDArray[np.uint8], originals_NHW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Structural similarity of each pair (N,): windows of 7x7 with equal weights, mean over channels and places.

    UsageError if scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity
    except ModuleNotFoundError as error:
        raise UsageError(
            "SSIM needs the package scikit-image, which is not installed", hint="pip install scikit-image"
        ) from error
    pairs = zip(images_NHW3 / 255, originals_NHW3 / 255, strict=True)
    similarity: Any = structural_similarity  # without types
    return np.array([similarity(*pair, data_range=1, channel_axis=-1) for pair in pairs])


def lpips_each(
    lpips: Lpips, images_NHW3: NDArray[np.uint8], originals_NHW3: NDArray[np.uint8], *, rows: int
) -> NDArray[np.float64]:
    """Perceptual distance of each pair (N,): passes of exactly `rows` pairs, the last padded with its first one."""
    device = next(iter(lpips.frozen[0].parameters())).device
    blocks: list[NDArray[np.float64]] = []
    for start in range(0, len(images_NHW3), rows):
        pair = [_padded(side[start : start + rows], rows) for side in (images_NHW3, originals_NHW3)]
        distances_B = lpips(*(torch.from_numpy(side).permute(0, 3, 1, 2).to(device).float() / 255 for side in pair))
        blocks.append(distances_B[: len(images_NHW3) - start].double().cpu().numpy())
    return np.concatenate(blocks)


def nearness(ours_N: NDArray[np.float64], unseen_M: NDArray[np.float64]) -> dict[str, float]:
    """Signs of memory: shares of images nearer to a training image than the median (5 % quantile) unseen image is.

    Given are Euclidean distances to the nearest training image. Like unseen data are 0.50 and 0.05; the training images
    themselves give 1.
    """
    return {
        "nn_med": float((ours_N < np.quantile(unseen_M, 0.5)).mean()),
        "nn_p05": float((ours_N < np.quantile(unseen_M, 0.05)).mean()),
    }


def copies(codes_NT: NDArray[Any], training: Iterable[NDArray[Any]]) -> float:
    """Share of code sequences that equal a training sequence. training: blocks (R, T), of which one is held at a time."""
    ours = _sequences(codes_NT)
    known, found = set(ours), set[bytes]()
    for block_RT in training:
        found |= known.intersection(_sequences(block_RT))
    return float(np.mean([sequence in found for sequence in ours]))


def rounded(value: float) -> float:
    """A figure rounded to the digits that do not depend on the order of summation."""
    return 0.0 if value == 0 else round(value, DIGITS - 1 - math.floor(math.log10(abs(value))))


def _padded(block_BHW3: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    return np.concatenate([block_BHW3, block_BHW3[:1].repeat(rows - len(block_BHW3), axis=0)])


def _double(values_NE: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(values_NE).double()


def _sequences(codes_NT: NDArray[Any]) -> list[bytes]:
    rows_NT = np.ascontiguousarray(codes_NT, "<u4")
    found: list[bytes] = rows_NT.view(f"V{rows_NT.itemsize * rows_NT.shape[1]}")[:, 0].tolist()
    return found
