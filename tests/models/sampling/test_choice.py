"""Filters and the inverse of the cumulative distribution, on distributions small enough to work out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.sampling.choice import choose, invert, keep_top_k, keep_top_p, non_decreasing
from models.sampling.config import Filters

GOLDEN = Path(__file__).parents[2] / "golden"
PLAIN, GREEDY = Filters(1.0, None, None, greedy=False), Filters(1.0, None, None, greedy=True)
LARGEST = 1 - 2.0**-53  # the largest uniform


def test_the_inverse_goes_in_code_order() -> None:
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]])
    answers = {0.0: 0, 0.2499: 0, 0.25: 2, 0.7499: 2, 0.75: 3, LARGEST: 3}
    for uniform, code in answers.items():
        assert invert(probabilities, torch.tensor([uniform], dtype=torch.float64)).item() == code


@pytest.mark.parametrize("total", [1e-3, 1.0, 3.0])
def test_codes_of_probability_zero_are_never_drawn(total: float) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(500, 9, generator=generator) * (torch.rand(500, 9, generator=generator) < 0.4)
    probabilities[:, 4] += 1e-3
    probabilities *= total
    for uniforms in (
        torch.zeros(500),
        torch.full((500,), LARGEST, dtype=torch.float64),
        torch.rand(500, generator=generator, dtype=torch.float64),
    ):
        assert (probabilities.gather(1, invert(probabilities, uniforms)[:, None]) > 0).all()


def test_every_code_of_a_large_vocabulary_can_be_drawn() -> None:
    """262,144 codes whose logits have standard deviation 3: a uniform in the middle of each code's share draws it."""
    logits = 3 * torch.randn(1, 2**18, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(-1)
    cumulative = probabilities[0].double().cumsum(0)
    middles = (cumulative - probabilities[0].double() / 2) / cumulative[-1]
    uniforms = (middles * 2**53).floor() * 2.0**-53
    drawn = torch.cat([invert(probabilities.expand(256, -1), part) for part in uniforms[::64].split(256)])
    assert torch.equal(drawn, torch.arange(0, 2**18, 64))


def test_a_scan_that_falls_draws_no_code_of_probability_zero() -> None:
    """As on devices that add blocks of codes: sums may fall a little, and rise where there is no probability."""
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]])
    scanned = torch.tensor([[1e-9, 0.5, 0.5 + 1e-9, 0.75, 1.0, 1 - 1e-9]], dtype=torch.float64)
    assert non_decreasing(scanned, probabilities).tolist() == [[0.0, 0.5, 0.5, 0.75, 1.0, 1.0]]


def test_shares_are_the_probabilities() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    uniforms = (torch.arange(10_000) + 0.5) / 10_000
    codes = choose(logits.expand(10_000, -1), uniforms, Filters(0.7, None, None, greedy=False))
    shares = torch.bincount(codes, minlength=4) / 10_000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(0), atol=2e-4, rtol=0)


def test_top_k_keeps_the_largest_and_what_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 2.0]])
    assert keep_top_k(logits, 2).isfinite().tolist() == [[False, True, True, False], [True, True, True, True]]
    assert torch.equal(keep_top_k(logits, 99), logits)


def test_top_p_keeps_the_code_that_crosses() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.3, 0.1]])
    assert (keep_top_p(probabilities, 0.01) > 0).tolist() == [[False, True, False, False]]
    assert (keep_top_p(probabilities, 0.6) > 0).tolist() == [[False, True, True, False]]
    assert (keep_top_p(probabilities, 0.85) > 0).tolist() == [[True, True, True, False]]
    assert torch.equal(keep_top_p(probabilities, 1.0), probabilities)


def test_greedy_takes_the_largest_whatever_the_uniform() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 5.0]])
    assert choose(logits, torch.tensor([0.0, LARGEST]), GREEDY).tolist() == [1, 0]


@pytest.mark.parametrize("filters", [PLAIN, GREEDY, PLAIN._replace(top_k=2, top_p=0.5)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_the_impossible_code(filters: Filters, bad: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 9.0, -torch.inf]])
    codes = choose(logits, torch.tensor([0.5, 0.5]), filters)
    assert codes.tolist() == [3, 1]


def published_filters() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "digit" / "vq_baseline.safetensors")


@pytest.mark.parametrize(("name", "p"), [("topp_0.8", 0.8), ("topp_300.0", 300.0)])
def test_the_published_top_p(name: str, p: float) -> None:
    """The fixture's probabilities do not sum to 1: the first are those of codes, and banned ones have the rest."""
    found = published_filters()
    probabilities = found["in/filter_logprobs"].exp()
    kept = keep_top_p(probabilities, p)
    expected = torch.zeros_like(kept).scatter_add(1, found[f"out/{name}/indices"], found[f"out/{name}/probs"])
    torch.testing.assert_close(kept, expected, atol=1e-7, rtol=0)


def test_the_published_top_k() -> None:
    found = published_filters()
    kept = keep_top_k(found["in/filter_logprobs"], 7)
    expected = torch.zeros_like(kept).scatter(1, found["out/topk_7/indices"], found["out/topk_7/probs"])
    torch.testing.assert_close(kept.exp(), expected, atol=1e-7, rtol=0)


def test_what_is_banned_has_its_share_of_top_p() -> None:
    """As published: codes are added up to p of all probability, not of that of the codes."""
    logits = torch.tensor([[0.4, 0.3, 0.1, 0.2]]).log()
    filters, uniforms = Filters(1.0, None, 0.75, greedy=False), torch.tensor([LARGEST], dtype=torch.float64)
    assert choose(logits, uniforms, filters, codes=3).item() == 2  # 0.4 + 0.3 is less than 0.75 of all
    assert choose(logits[:, :3], uniforms, filters).item() == 1  # but more than 0.75 of 0.8
    assert choose(logits, uniforms, Filters(1.0, 2, None, greedy=False), codes=3).item() == 1
    banned = torch.tensor([[0.0, 1.0, 9.0]])
    assert choose(banned, uniforms, GREEDY, codes=2).item() == 1
    assert choose(banned, uniforms, PLAIN, codes=2).item() == 1
    assert choose(torch.full((1, 3), torch.nan), uniforms, PLAIN, codes=2).item() == 2
