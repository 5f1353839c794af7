"""Reconstructions of a tokenizer while it is trained: a grid of images, of which every process makes its share."""

from __future__ import annotations

import numpy as np

from models.tokenizer import Tokenizer, to_bytes
from pipeline.keys import canonical_bytes, config_value
from stages.images.passes import to_images
from stages.images.pictures import grid_png, interleave
from stages.training.config import ReconstructionsConfig
from stages.training.images import TrainingImages
from stages.training.replicas import Replicas

# N images of the grid, P of this process's share, S pixels per side


def draw_reconstructions(
    config: ReconstructionsConfig, tokenizer: Tokenizer, judged: TrainingImages, replicas: Replicas, step: int
) -> bytes | None:
    """The PNG of a grid after `step` steps, in the first process; None in the others.

    The images are spread evenly over the set, so that a set in the order of its classes shows all of them.
    """
    count = min(config.images, len(judged))
    rows_N = np.arange(count) * len(judged) // count
    share = -(-count // replicas.world)
    rows_P = np.resize(rows_N, share * replicas.world)[share * replicas.rank :][:share]
    images_PCHW = to_images(judged.upright(rows_P), replicas.device)
    decoded_PCHW = tokenizer.decode(tokenizer.encode(images_PCHW))
    made_PSS3 = to_bytes(decoded_PCHW, tokenizer.rounding).permute(0, 2, 3, 1)
    made_NSS3 = replicas.gather(made_PSS3)[:count].cpu().numpy()
    if replicas.rank:
        return None
    names, labels_N = judged.image_set.classes, judged.image_set.labels[rows_N]
    rows, captions = interleave(made_NSS3, judged.upright(rows_N), [names[label] for label in labels_N])
    described = canonical_bytes(config_value(config)).decode()
    return grid_png(rows, captions, {"step": str(step), "reconstructions": described})
