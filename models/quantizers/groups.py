"""The groups of tokens over which entropies are taken, where a batch is split into passes.

The entropy of the mean distribution depends on the number of tokens in the mean. So it is taken over groups of a fixed
number of tokens, in the order of the batch, however the batch is split by accumulation and processes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from models.batch_part import BatchPart
from models.quantizers.usage import CountsUse

# Shapes: N tokens of a pass, K codes (in any shape that adds up), G groups of the batch


class Group(NamedTuple):
    """A group, or the part of it that a pass holds.

    number: in the batch.  rows: of the pass.  tokens: of the whole group.
    """

    number: int
    rows: slice
    tokens: int

    @property
    def is_whole(self) -> bool:
        return self.rows.stop - self.rows.start == self.tokens


def groups_of_pass(tokens: int, size: int, *, number: int, count: int) -> list[Group]:
    """The groups of `size` tokens that overlap pass `number` of `count` passes of `tokens` each.

    A batch of fewer tokens is one group; the last group of a batch may be smaller than the others.
    """
    first, total = number * tokens, count * tokens
    found = []
    for group in range(first // size, -(-(first + tokens) // size)):
        start, stop = group * size, min((group + 1) * size, total)
        found.append(Group(group, slice(max(start - first, 0), min(stop - first, tokens)), stop - start))
    return found


class GroupsTokens(CountsUse):
    """A quantizer whose loss has the entropy of mean distributions over groups of `entropy_tokens` tokens."""

    def __init__(self, codes: int, *, entropy_tokens: int, decay: float, dead_below: float):
        super().__init__(codes, decay=decay, dead_below=dead_below)
        self.entropy_tokens = entropy_tokens
        self._masses: dict[int, Tensor] = {}

    @abstractmethod
    def mass(self, z_ND: Tensor) -> Tensor:
        """The sum over tokens of their distributions over codes, without gradient."""

    def groups(self, tokens: int) -> list[Group]:
        """The groups of a pass of so many tokens; outside of training every pass is a batch of its own."""
        part = self.part if self.training else BatchPart()
        return groups_of_pass(tokens, self.entropy_tokens, number=part.number, count=part.count)

    def needs_survey(self, tokens: int) -> bool:
        """Whether some group spans several passes; the same for all passes of a batch."""
        return self.part.count > 1 and tokens % self.entropy_tokens != 0

    @torch.no_grad()
    def survey(self, z_ND: Tensor) -> None:
        """Compute the mass of every group that overlaps this process's share, over all processes."""
        part = self.part
        groups = groups_of_pass(len(z_ND), self.entropy_tokens, number=part.rank, count=part.world)
        self._masses = {group.number: self.mass(z_ND[group.rows]) for group in groups}
        if part.world == 1 or len(z_ND) % self.entropy_tokens == 0:
            return
        like = self._masses[groups[0].number]
        for number in range(-(-len(z_ND) * part.world // self.entropy_tokens)):
            mass = self._masses.get(number, torch.zeros_like(like))
            torch.distributed.all_reduce(mass)
            if number in self._masses:
                self._masses[number] = mass

    def mass_of_all_passes(self, group: Group) -> Tensor | None:
        """The mass of a group of which this pass holds a part; None where it holds the whole group."""
        return None if group.is_whole else self._masses[group.number]

    @staticmethod
    def mean_over_groups(entropies: list[Tensor], groups: list[Group]) -> Tensor:
        """The share of this pass in the mean over all groups, each weighed by its tokens.

        The mean over the passes of a batch is the mean over groups, in value and in gradient: a pass weighs the value of
        a group by the tokens that it holds, but its gradient, which reaches these tokens only, by all tokens of the group.
        """
        tokens = sum(group.rows.stop - group.rows.start for group in groups)
        terms = []
        for entropy, group in zip(entropies, groups, strict=True):
            held = group.rows.stop - group.rows.start
            terms.append((held * entropy.detach() + group.tokens * (entropy - entropy.detach())) / tokens)
        return torch.stack(terms).sum()
