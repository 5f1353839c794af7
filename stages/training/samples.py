"""Samples of a generator while it is trained: a grid of images, of which every process draws and decodes its share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.sampling.loop import sample
from models.tokenizer import to_bytes
from pipeline.errors import NumericError
from pipeline.keys import canonical_bytes, config_value
from stages.images.pictures import grid_png
from stages.training.config import SamplesConfig
from stages.training.replicas import Replicas
from stages.weights.networks import GeneratorCard, NetworkFile, load_tokenizer

SEED = 0

# P rows of this process's share, T tokens


def draw_samples(
    config: SamplesConfig, card: GeneratorCard, generator: Any, tokenizer: NetworkFile, replicas: Replicas, step: int
) -> bytes | None:
    """The PNG of a grid after `step` steps, in the first process; None in the others.

    A sample's random numbers are its own, so that all grids show the same ones, and none of them touches the training's.
    """
    rows = -(-config.images // replicas.world)
    ids_P = torch.arange(rows) + rows * replicas.rank
    asked = torch.tensor(config.classes or range(card.classes))
    decoder = generator.decoder(rows=rows, guided=config.sampling.guided)
    try:
        codes_PT = sample(decoder, asked[ids_P % len(asked)], ids_P, config=config.sampling, seed=SEED)
    except FloatingPointError as error:
        raise NumericError(f"after step {step} no samples can be drawn: {error}") from error
    network = load_tokenizer(tokenizer)
    with torch.inference_mode():
        images_PCHW = network.decode(codes_PT.view(rows, *card.grid))
        drawn = to_bytes(images_PCHW, network.rounding).permute(0, 2, 3, 1)
        images_NHW3 = replicas.gather(drawn)[: config.images].cpu().numpy()
    if replicas.rank:
        return None
    labels_N = np.resize(asked.numpy(), config.images)
    captions = [card.class_names[label] if card.class_names else str(label) for label in labels_N]
    return grid_png(
        images_NHW3, captions, {"step": str(step), "samples": canonical_bytes(config_value(config)).decode()}
    )
