"""Rows of a training pass: `auto` by an estimate of memory, and a check that a pass fits.

No torch here: `auto` is replaced before the key is computed, as a function of network and batch alone, so that it is the
same on all machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from models.generators.config import CodeShape
from models.generators.memory import training_bytes
from pipeline import ranks
from pipeline.errors import MemoryExhausted
from smalti.counting import counted
from stages.devices import free_bytes, pick_device
from stages.training.config import TrainGeneratorConfig, TrainingConfig
from stages.training.draws import passes_of

PASS_BYTES = 16e9  # of activations: RAR-B, or L with half the rows, then trains on a device of 24 GB
CPU_REFUSAL = "not enough memory: you tried to allocate"  # of torch's allocator, which has no error of its own
SURE = 0.85  # of an estimate: what lies above free memory even so does not fit


def settle_rows(config: TrainGeneratorConfig, shape: CodeShape) -> TrainGeneratorConfig:
    """The config with a number for `auto`: the most rows whose pass takes up to PASS_BYTES on a GPU, which share out the batch.

    A network that only counts has no passes: null. ValueError where the kind of generator has no estimate of its memory.
    """
    training = config.training

    def pass_bytes(rows: int) -> int:
        needed = needed_bytes(config, shape, rows, "cuda")
        if needed is None:
            raise ValueError(f"a generator of kind {config.model.kind} has no estimate of its memory")
        return needed

    rows = None
    if config.model.trained_by == "gradient":
        rows = next(
            rows for rows in fewer(training.batch) if rows == 1 or pass_bytes(rows) - pass_bytes(0) <= PASS_BYTES
        )
    return config.model_copy(update={"training": training.model_copy(update={"rows_per_pass": rows})})


def refuse_rows(config: TrainGeneratorConfig, shape: CodeShape, device: str) -> None:
    """MemoryExhausted (exit code 71) where a pass is sure not to fit into the free memory, with the setting that would."""
    picked = pick_device(device)
    sharing = ranks.local_world_size() if picked.type == "cpu" else 1
    free, training = free_bytes(picked) // sharing, config.training

    def needed(rows: int) -> int:
        return needed_bytes(config, shape, rows, picked.type) or 0

    rows = rows_together(training, ranks.world_size())
    if SURE * needed(rows) <= free:
        return
    fitting = next((fewer_rows for fewer_rows in fewer(training.batch) if needed(fewer_rows) <= free), None)
    raise MemoryExhausted(
        f"a pass of {counted(rows, 'row')} takes about {needed(rows) / 1e9:.3g} GB with parameters and optimizer, but "
        f"{picked} has {free / 1e9:.3g} GB free",
        hint=_advice(config, fitting, free / 1e9),
    )


def rows_together(training: TrainingConfig, world: int) -> int:
    """Rows of one pass, when each of `world` processes computes its share."""
    share = training.batch // world
    return share // passes_of(share, training.rows)


def fewer(batch: int) -> list[int]:
    """The numbers of rows that a batch is a multiple of, the largest first."""
    return [rows for rows in range(batch, 0, -1) if batch % rows == 0]


def needed_bytes(config: TrainGeneratorConfig, shape: CodeShape, rows: int, device_type: str) -> int | None:
    """Memory of one process that trains with passes of `rows`, by the network's own estimate, if it has one."""
    return training_bytes(
        config.model,
        shape,
        rows=rows,
        is_half=config.training.precision == "bfloat16",
        is_averaged=config.training.ema is not None,
        checkpoints_activations=config.checkpoints_activations,
        device_type=device_type,
    )


@contextmanager
def explain_out_of_memory(config: TrainingConfig, world: int) -> Iterator[None]:
    """A refused allocation becomes `MemoryExhausted` (exit code 71) that says what to lower."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _exhausted(config, world) from error
    except RuntimeError as error:
        if CPU_REFUSAL in str(error):
            raise _exhausted(config, world) from error
        raise


def _exhausted(config: TrainingConfig, world: int) -> MemoryExhausted:
    rows = rows_together(config, world)
    smaller = next(fewer_rows for fewer_rows in fewer(config.batch) if fewer_rows <= max(1, rows // 2))
    return MemoryExhausted(
        f"the device has not enough memory for {counted(rows, 'row')} at a time (training.batch {config.batch} over "
        f"{counted(world, 'process')})",
        hint=(f"set training.rows_per_pass to {smaller}, or " if rows > 1 else "")
        + "take training.precision bfloat16 or a smaller model",
    )


def _advice(config: TrainGeneratorConfig, fitting: int | None, free: float) -> str:
    if fitting is not None:
        return f"set training.rows_per_pass to {fitting} (training.batch stays {config.training.batch})"
    if not config.checkpoints_activations:
        return f"set training.rows_per_pass to 1 and checkpoints_activations to true, or take a device with more than {free:.3g} GB free"
    return f"not even one row fits: take a smaller network, or a device with more than {free:.3g} GB free"
