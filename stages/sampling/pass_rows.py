"""Rows of a sampling pass: as many as make the device faster and fit into its free memory."""

from __future__ import annotations

from models.generators.memory import sampling_bytes
from pipeline.artifact import Artifact
from pipeline.errors import UsageError
from pipeline.stage import Inputs, Proposal
from stages.devices import free_bytes, pick_device, sharing
from stages.sampling.config import GenerateConfig, SampleConfig
from stages.weights.cards import GeneratorCard, TokenizerCard, read_card
from stages.weights.files import WEIGHTS

SHARE = 0.8  # of free memory: the rest is for allocators and other processes
CPU_ROWS, DEVICE_ROWS = 64, 512  # rows beyond which the time per sample hardly falls

KEPT_LAYERS = 4  # results of layers that a decoder holds at a time: input, shortcut, normalised, output


def propose_rows(config: SampleConfig, inputs: Inputs, device: str, processes: int, *, reserved: int = 0) -> Proposal:
    """Rows for the generator among the inputs, when `processes` share the devices that `device` means.

    reserved: bytes of each process for other things.
    """
    picked = pick_device(device)
    free = max(0, free_bytes(picked) // sharing(picked, processes) - reserved)
    card = read_card(inputs["generator"])
    wanted = min(config.images, config.shard_images, CPU_ROWS if picked.type == "cpu" else DEVICE_ROWS)
    choices = [wanted, *(2**power for power in reversed(range(wanted.bit_length())) if 2**power < wanted)]
    fitting = [rows for rows in choices if needed_bytes(card, config, rows, picked.type) <= SHARE * free]
    rows = fitting[0] if fitting else 1
    needed = needed_bytes(card, config, rows, picked.type)
    return Proposal(
        rows, f"a pass of these takes about {needed / 1e9:.2g} GB of the {free / 1e9:.2g} GB free on {picked}"
    )


def propose_rows_beside_decoding(config: GenerateConfig, inputs: Inputs, device: str, processes: int) -> Proposal:
    """The same where a pass is decoded while the next one is sampled."""
    side = read_card(inputs["generator"]).space.grid[0]
    reserved = decoding_bytes(inputs["tokenizer"], side, config.rows_per_decoding)
    return propose_rows(config, inputs, device, processes, reserved=reserved)


def decoding_bytes(tokenizer: Artifact, side: int, rows: int) -> int:
    """Memory that decodes `rows` images of side x side codes: the weights, and what is widest, at full resolution."""
    config = TokenizerCard.of(tokenizer).decoder
    pixels = (side * config.downsample) ** 2
    return tokenizer.files[WEIGHTS].size + KEPT_LAYERS * 4 * rows * pixels * config.autoencoder.widths[0]


def needed_bytes(card: GeneratorCard, config: SampleConfig, rows: int, device_type: str) -> int:
    """Memory of one process that samples passes of `rows`; UsageError where the kind of generator has no estimate."""
    needed = sampling_bytes(
        card.model,
        card.shape,
        rows=rows,
        guided=config.sampling.guided,
        bytes_per_number=2 if config.precision == "bfloat16" else 4,
        device_type=device_type,
    )
    if needed is None:
        raise UsageError(
            f"rows_per_pass is auto, but a generator of kind {card.model.kind} has no estimate of its memory",
            hint="give rows_per_pass a number",
        )
    return needed
