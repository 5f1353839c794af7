"""How many samples to draw together: as many as are of use to the device, and as its free memory holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.generators.config import BUILDERS
from models.registry import load_class
from pipeline.stage import Inputs, Proposal
from stages.devices import free_bytes, pick_device
from stages.networks import GeneratorCard, read_card

if TYPE_CHECKING:
    from stages.sample import SampleConfig

SHARE = 0.8  # of free memory: allocators keep blocks of their own, and others may want some too
CPU_ROWS, DEVICE_ROWS = 64, 512  # rows beyond which a pass gains next to nothing per sample


def propose_rows(config: SampleConfig, inputs: Inputs, device: str, processes: int) -> Proposal:
    """Rows for the generator among the inputs, when `processes` share this device."""
    picked = pick_device(device)
    free = free_bytes(picked) // processes
    card = read_card(inputs["generator"])
    wanted = min(config.images, config.shard_images, CPU_ROWS if picked.type == "cpu" else DEVICE_ROWS)
    choices = [wanted, *(2**power for power in reversed(range(wanted.bit_length())) if 2**power < wanted)]
    fitting = [rows for rows in choices if needed_bytes(card, config, rows, picked.type) <= SHARE * free]
    rows = fitting[0] if fitting else 1
    needed = needed_bytes(card, config, rows, picked.type)
    return Proposal(
        rows, f"a pass of these takes about {needed / 1e9:.2g} GB of the {free / 1e9:.2g} GB free on {picked}"
    )


def needed_bytes(card: GeneratorCard, config: SampleConfig, rows: int, device_type: str) -> int:
    """Memory of one process that samples passes of `rows`: weights, what the sampler makes of them, cache, work."""
    return int(
        load_class(card.model, BUILDERS).sampling_bytes(
            card.model,
            codes=card.codes,
            tokens=card.tokens,
            classes=card.classes,
            rows=rows,
            guided=config.sampling.guided,
            bytes_per_number=2 if config.precision == "bfloat16" else 4,
            device_type=device_type,
        )
    )
