"""Grids of images during a training, computed by all processes: reconstructions of a tokenizer, samples of a generator."""

from __future__ import annotations

import numpy as np
import torch

from models.generators.generator import Generator, build_decoder, loop_of
from models.tokenizer import Tokenizer, to_bytes
from pipeline.errors import NumericError
from pipeline.keys import canonical_bytes, config_value
from stages.images.passes import to_images
from stages.images.pictures import grid_png, interleave
from stages.training.config import ReconstructionsConfig, SamplesConfig
from stages.training.images import TrainingImages
from stages.training.replicas import Replicas
from stages.weights.cards import GeneratorCard
from stages.weights.networks import NetworkFile, load_tokenizer

SEED = 0

# N images of the grid, P of this process's share, S pixels per side, T tokens


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


def draw_samples(
    config: SamplesConfig,
    card: GeneratorCard,
    generator: Generator,
    tokenizer: NetworkFile,
    replicas: Replicas,
    step: int,
) -> bytes | None:
    """The PNG of a grid after `step` steps, in the first process; None in the others.

    A sample's random numbers are the same in all grids, and separate from the training's.
    """
    rows = -(-config.images // replicas.world)
    ids_P = torch.arange(rows) + rows * replicas.rank
    space = card.space
    asked = torch.tensor(config.classes or range(space.classes))
    labels_P = asked[ids_P % len(asked)] if card.model.conditions_on == "class" else None
    decoder = build_decoder(generator, rows=rows, guided=config.sampling.guided)
    try:
        codes_PT = loop_of(card.model)(decoder, labels_P, ids_P, config=config.sampling, seed=SEED)
    except FloatingPointError as error:
        raise NumericError(f"after step {step} no samples can be drawn: {error}") from error
    network = load_tokenizer(tokenizer)
    with torch.inference_mode():
        images_PCHW = network.decode(codes_PT.view(rows, *space.grid))
        drawn = to_bytes(images_PCHW, network.rounding).permute(0, 2, 3, 1)
        images_NHW3 = replicas.gather(drawn)[: config.images].cpu().numpy()
    if replicas.rank:
        return None
    labels_N = np.resize(asked.numpy(), config.images)
    captions = [space.class_names[label] if space.class_names else str(label) for label in labels_N]
    return grid_png(
        images_NHW3, captions, {"step": str(step), "samples": canonical_bytes(config_value(config)).decode()}
    )
