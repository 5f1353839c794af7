"""What a step does does not depend on how its batch is cut: losses, gradients, running use, the first codebook."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.batch_part import BatchPart
from models.quantizers.config import IndexBackpropagationConfig, LookupFreeConfig, VectorConfig
from models.quantizers.groups import groups_of_pass
from models.quantizers.index_backpropagation import IndexBackpropagationQuantizer
from models.quantizers.lookup_free import LookupFreeQuantizer
from models.quantizers.quantizer import Quantizer
from models.quantizers.vector import VectorQuantizer

IMAGES, DIM = 32, 6
BUILD: dict[str, Callable[[int], Quantizer]] = {
    "lookup-free": lambda tokens: LookupFreeQuantizer(
        LookupFreeConfig(temperature=0.5, entropy_tokens=tokens, usage_decay=0.5), dim=DIM
    ),
    "index-backpropagation": lambda tokens: IndexBackpropagationQuantizer(
        IndexBackpropagationConfig(codes=24, temperature=0.5, entropy_tokens=tokens, usage_decay=0.5), dim=DIM
    ),
    "vector": lambda tokens: VectorQuantizer(
        VectorConfig(codes=24, usage_decay=0.5, revive_every=2, revive_until=8, revive_below=0.9), dim=DIM
    ),
}


def build(kind: str, tokens: int) -> Quantizer:
    torch.manual_seed(0)
    return BUILD[kind](tokens).double().train()


def step(quantizer: Quantizer, z_BDhw: Tensor, *, pieces: int, seed: int) -> tuple[Tensor, Tensor]:
    """(objective, its gradient in the latents) of one training step, as the engine makes it."""
    torch.manual_seed(seed)
    z_BDhw = z_BDhw.clone().requires_grad_()
    parts = z_BDhw.chunk(pieces)
    quantizer.part = BatchPart(0, pieces)
    if pieces > 1 and quantizer.needs_survey(parts[0][:, 0].numel()):
        quantizer.survey(z_BDhw.detach().movedim(1, -1).flatten(0, 2))
    total = z_BDhw.new_zeros(())
    for number, part_BDhw in enumerate(parts):
        quantizer.part = BatchPart(number, pieces)
        total = total + torch.stack([*quantizer(part_BDhw).losses.values()]).sum() / pieces
    (gradient,) = torch.autograd.grad(total, z_BDhw)
    return total.detach(), gradient


@pytest.mark.parametrize("tokens", [128, 96, 512, 100_000], ids=["whole groups", "odd groups", "the batch", "more"])
@pytest.mark.parametrize("pieces", [4, 32])
@pytest.mark.parametrize("kind", BUILD)
def test_pieces_change_nothing(kind: str, pieces: int, tokens: int) -> None:
    """16 tokens an image: groups lie within pieces, across them, or are the whole batch."""
    batches = torch.randn(5, IMAGES, DIM, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, cut = build(kind, tokens), build(kind, tokens)
    for seed, z_BDhw in enumerate(batches):
        (ours, our_gradient), (theirs, their_gradient) = (
            step(one, z_BDhw, pieces=count, seed=seed) for one, count in ((cut, pieces), (whole, 1))
        )
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(our_gradient, their_gradient)
        for (name, our_state), their_state in zip(cut.state_dict().items(), whole.state_dict().values(), strict=True):
            torch.testing.assert_close(our_state, their_state, msg=name)
    assert int(whole.step) == int(cut.step) == len(batches)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "size", "count"), [(512, 128, 4), (30, 7, 3), (5, 100, 2), (8, 3, 1)])
def test_groups_cover_the_batch_once(tokens: int, size: int, count: int) -> None:
    held: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for number in range(count):
        groups = groups_of_pass(tokens, size, number=number, count=count)
        assert [row for group in groups for row in range(group.rows.start, group.rows.stop)] == list(range(tokens))
        for group in groups:
            held[group.number] = held.get(group.number, 0) + group.rows.stop - group.rows.start
            sizes[group.number] = group.tokens
    assert held == sizes
    assert sum(sizes.values()) == tokens * count
    assert all(one == min(size, tokens * count) for one in list(sizes.values())[:-1])


def test_the_entropy_of_a_group_is_that_of_its_tokens_alone() -> None:
    """Two groups: the codebook entropy is the mean of what each would have as a batch of its own."""
    z_ND = torch.randn(64, DIM, generator=torch.Generator().manual_seed(2))
    quantizer = LookupFreeQuantizer(LookupFreeConfig(temperature=0.5, entropy_tokens=32), dim=DIM)
    halves = torch.stack([quantizer.entropies(half_ND)[1] for half_ND in z_ND.chunk(2)])
    torch.testing.assert_close(quantizer.entropies(z_ND)[1], halves.mean())
