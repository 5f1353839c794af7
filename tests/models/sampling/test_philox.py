"""Philox against the known answers of its authors' library (Random123, kat_vectors), and the uniforms made of it."""

from __future__ import annotations

import pytest
import torch

from models.sampling.philox import philox4x32, uniforms

ONES = 0xFFFFFFFF
KNOWN = [  # counter, key, answer
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer


def test_a_number_belongs_to_its_sample_alone() -> None:
    ids = torch.tensor([3, 2**40, 7, 3])
    together = uniforms(11, ids, steps=5)
    assert together.dtype == torch.float64
    assert torch.equal(together[0], together[3])
    assert torch.equal(together[1:2], uniforms(11, ids[1:2], steps=5))
    assert torch.equal(together[:, :3], uniforms(11, ids, steps=3))


def test_every_part_of_the_address_counts() -> None:
    base = uniforms(1, torch.tensor([0]), steps=4)
    assert base.unique().numel() == 4
    for other in (
        uniforms(2, torch.tensor([0]), steps=4),
        uniforms(1 + 2**32, torch.tensor([0]), steps=4),
        uniforms(1, torch.tensor([1]), steps=4),
        uniforms(1, torch.tensor([2**32]), steps=4),
        uniforms(1, torch.tensor([0]), steps=4, subtoken=1),
        uniforms(1, torch.tensor([0]), steps=4, stream=1),
    ):
        assert not torch.equal(base, other)


def test_uniforms_fill_the_unit_interval() -> None:
    drawn = uniforms(0, torch.arange(1000), steps=100)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    counts = torch.histc(drawn, bins=10, min=0, max=1)
    assert float((counts - 10_000).abs().max()) < 500  # five standard deviations are 474


def test_uniforms_have_53_bits() -> None:
    drawn = uniforms(0, torch.arange(100), steps=100) * 2.0**53
    assert torch.equal(drawn, drawn.floor())
    odd = drawn.to(torch.int64) & 1
    assert 0.45 < float(odd.double().mean()) < 0.55


def test_streams_do_not_correlate() -> None:
    one, other = (uniforms(0, torch.arange(1000), steps=10, stream=stream).flatten() for stream in (0, 1))
    correlation = float(torch.corrcoef(torch.stack([one, other]))[0, 1])
    assert abs(correlation) < 0.05  # five standard deviations
