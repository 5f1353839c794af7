"""Sampling of DiGIT's generators against the published implementation's numbers, and against the training forward pass."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from models.generators import key_cache
from models.generators.config import CodeShape, GptConfig
from models.generators.generator import build_decoder, build_generator
from models.generators.gpt.decoder import MaskedGptDecoder
from models.generators.gpt.network import Gpt
from models.generators.key_cache import KeyCache
from models.generators.step_graphs import Work
from models.sampling import masks
from models.sampling.config import ConstantGuidance, Filters, SamplingConfig
from models.sampling.loop import sample
from models.sampling.masks import sample_masks

from ..conformance import GeneratorConformance, teacher_forced
from ..digit_fixtures import arrays, as_published, codes_of, network, tolerance
from .test_network import BY_STEPS, condition_of

GREEDY = SamplingConfig(greedy=True)
CONDITIONS = CodeShape(codes=7, grid=(2, 4))


def tiny(**fields: object) -> Gpt:
    """With weights that say something."""
    given = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 24, "dropout": 0.0, "positions": 8}
    config = GptConfig.model_validate(given | fields)
    shape = CodeShape(
        codes=12,
        grid=(2, 3),
        classes=3 if config.condition == "class" else 0,
        condition=CONDITIONS if config.condition == "codes" else None,
    )
    model = build_generator(config, shape)
    assert isinstance(model, Gpt)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.head.weight *= 0.5
    return model.eval()


class GptConformance(GeneratorConformance):
    """Without guidance, and whatever the condition is."""

    fields: ClassVar[dict[str, object]]

    def build(self) -> Gpt:
        return tiny(**self.fields)

    def condition(self, model: Gpt, labels_B: Tensor) -> Tensor | None:
        if model.config.condition == "codes":
            return (labels_B[:, None] * 3 + torch.arange(CONDITIONS.tokens)) % CONDITIONS.codes
        return labels_B if model.config.condition == "class" else None

    def uncached(self, model: Gpt, codes_BT: Tensor, condition: Tensor | None) -> Tensor:
        logits_BTV: Tensor = model(codes_BT[:, :-1], condition)
        return logits_BTV


class TestSemantic(GptConformance):
    fields: ClassVar = {"norm": "post", "condition": "class"}


class TestPixels(GptConformance):
    fields: ClassVar = {"norm": "pre", "condition": "codes"}


class TestBaseline(GptConformance):
    fields: ClassVar = {"norm": "pre", "condition": "none"}


@pytest.mark.parametrize("name", BY_STEPS)
def test_cached_logits_are_the_published_ones(name: str) -> None:
    model, found = network(name), arrays(name)
    codes_BT = codes_of(found["out/target"][:, :-1])
    logits_BTV = teacher_forced(build_decoder(model, rows=2, guided=False), codes_BT, condition_of(name))
    expected = found.get("out/logits_incremental", found["out/logits"])[:, :-1]
    torch.testing.assert_close(as_published(logits_BTV), expected, atol=tolerance(name), rtol=0)


@pytest.mark.parametrize("name", BY_STEPS)
def test_greedy_codes_are_the_published_ones(name: str) -> None:
    decoder = build_decoder(network(name), rows=2, guided=False)
    codes_BT = sample(decoder, condition_of(name), torch.arange(2), config=GREEDY, seed=0)
    assert torch.equal(codes_BT, codes_of(arrays(name)["out/greedy_tokens"][:, :256]))


@pytest.mark.parametrize("few", [True, False])
def test_greedy_masks_are_the_published_ones(monkeypatch: pytest.MonkeyPatch, few: bool) -> None:
    """few: rows are drawn one after the other."""
    monkeypatch.setattr(masks, "LARGEST_PIECE", 1 if few else 2**24)
    found = arrays("stage2_nar")
    seen = watch(monkeypatch)
    decoder = build_decoder(network("stage2_nar"), rows=2, guided=False)
    codes_BT = sample_masks(decoder, condition_of("stage2_nar"), torch.arange(2), config=GREEDY, seed=0)
    assert torch.equal(codes_BT, codes_of(found["out/greedy/final_tokens"]))
    check_iterations(seen, "greedy")


def test_random_masks_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fixture's draws and its noise in the place of ours."""
    found, seen = arrays("stage2_nar"), watch(monkeypatch)
    drawn, noise = iter(codes_of(found["in/random/sampled_ids"])), iter(found["in/random/gumbel"])

    def given(logits: Tensor, uniforms_M: Tensor, filters: Filters, *, codes: int) -> Tensor:
        return next(drawn).flatten()

    monkeypatch.setattr(masks, "choose", given)
    monkeypatch.setattr(masks, "gumbel", lambda uniforms_BT: next(noise))
    decoder = build_decoder(network("stage2_nar"), rows=2, guided=False)
    codes_BT = sample_masks(decoder, condition_of("stage2_nar"), torch.arange(2), config=SamplingConfig(), seed=0)
    assert torch.equal(codes_BT, codes_of(found["out/random/final_tokens"]))
    check_iterations(seen, "random")


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Codes, masks and logits of each iteration as it begins."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    logits = MaskedGptDecoder.logits

    def watched(self: MaskedGptDecoder, codes_BT: Tensor, masks_BT: Tensor, condition: Tensor | None) -> Tensor:
        found = logits(self, codes_BT, masks_BT, condition)
        seen.append((codes_BT.clone(), masks_BT.clone(), found))
        return found

    monkeypatch.setattr(MaskedGptDecoder, "logits", watched)
    return seen


def check_iterations(seen: list[tuple[Tensor, Tensor, Tensor]], way: str) -> None:
    """Logits of the first iteration; what each begins with is what the one before it left."""
    found = arrays("stage2_nar")
    first_TK = seen[0][2][0, :, :48].log_softmax(-1)
    published_TK = found[f"out/{way}/first_iter_logits"][0, :, 5:]
    torch.testing.assert_close(first_TK, published_TK, atol=tolerance("stage2_nar"), rtol=0)
    for (codes_BT, masks_BT, _), left, ids in zip(
        seen[1:], found[f"out/{way}/masked_after_iter"], found[f"out/{way}/tokens_after_iter"], strict=False
    ):
        assert torch.equal(masks_BT, left)
        assert torch.equal(codes_BT[~masks_BT], codes_of(ids)[~left])


def by_masks(condition: str) -> Gpt:
    torch.manual_seed(0)
    return tiny(norm="pre", condition=condition, sampling="masks")


def draw(model: Gpt, labels: list[int], ids: list[int], **fields: object) -> Tensor:
    decoder = build_decoder(model, rows=len(ids), guided=False)
    condition = GptConformance().condition(model, torch.tensor(labels))
    config = SamplingConfig.model_validate({"iterations": 4} | fields)
    return sample_masks(decoder, condition, torch.tensor(ids), config=config, seed=3)


@pytest.mark.parametrize("condition", ["none", "class", "codes"])
def test_a_masked_sample_depends_on_its_id_alone(condition: str) -> None:
    model = by_masks(condition)
    many, few = draw(model, [0, 1, 2, 1], [7, 8, 9, 10]), draw(model, [0, 0, 2, 0], [7, 1, 9, 2])
    assert torch.equal(many[[0, 2]], few[[0, 2]])
    assert not torch.equal(many[0], draw(model, [0], [8])[0])
    assert many.shape == (4, 6)
    assert 0 <= int(many.min()) <= int(many.max()) < 12


def test_masked_positions_see_what_is_behind_them() -> None:
    model = by_masks("none")
    codes_BT = torch.arange(6)[None]
    changed_BT = codes_BT.clone()
    changed_BT[0, 5] = 9
    assert not torch.equal(model(codes_BT, None)[:, 1], model(changed_BT, None)[:, 1])


def test_masked_codes_do_not_show() -> None:
    model, masks_BT = by_masks("none"), torch.tensor([[True, True, False, True, False, False]])
    decoder = build_decoder(model, rows=1, guided=False)
    codes_BT = torch.arange(6)[None]
    shown = decoder.logits(codes_BT, masks_BT, None)
    assert torch.equal(shown, decoder.logits(codes_BT.masked_fill(masks_BT, 11), masks_BT, None))


def test_the_masked_loss_can_be_learnt() -> None:
    model, codes_BT = by_masks("codes"), torch.arange(24).reshape(4, 6) % 12
    condition_BS = GptConformance().condition(model, torch.arange(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    masks_BT = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = model.loss(codes_BT, condition_BS, masks=masks_BT)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * losses[0]


def test_nonsense_is_not_hidden() -> None:
    model = by_masks("none")
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError):
        draw(model, [0], [0])


@pytest.mark.parametrize("sampling", ["steps", "masks"])
def test_bfloat16_is_near(sampling: str) -> None:
    torch.manual_seed(0)
    model = tiny(norm="pre", condition="codes", sampling=sampling)
    condition_BS = GptConformance().condition(model, torch.arange(2))
    exact, near = (build_decoder(model, rows=2, guided=False, dtype=dtype) for dtype in (None, torch.bfloat16))
    codes_BT = torch.arange(12).reshape(2, 6)
    if sampling == "steps":
        found, expected = (teacher_forced(decoder, codes_BT, condition_BS) for decoder in (near, exact))
    else:
        found, expected = (decoder.logits(codes_BT, codes_BT > 3, condition_BS) for decoder in (near, exact))
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.3, rtol=0.1)


def test_guidance_and_orders_are_refused() -> None:
    model = tiny(norm="post", condition="class")
    assert not model.config.can_be_guided
    with pytest.raises(ValueError, match="cannot be guided"):
        build_decoder(model, rows=1, guided=SamplingConfig(guidance=ConstantGuidance(scale=(2.0,))).guided)
    with pytest.raises(ValueError, match="raster order only"):
        build_decoder(model, rows=1, guided=False, orders=torch.arange(6))


def test_a_pass_has_as_many_rows_as_its_decoder() -> None:
    decoder = build_decoder(by_masks("class"), rows=2, guided=False)
    with pytest.raises(ValueError, match="2 rows"):
        sample_masks(decoder, torch.zeros(3, dtype=torch.int64), torch.arange(2), config=SamplingConfig(), seed=0)


def test_the_codes_of_a_condition_pass_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    attend_first, attend = KeyCache.attend_first, KeyCache.attend

    def first(self: KeyCache, block: int, qkv_RNO: Tensor) -> Tensor:
        fed.append(qkv_RNO.shape[1])
        return attend_first(self, block, qkv_RNO)

    def one(self: KeyCache, block: int, position: int, qkv_RO: Tensor) -> Tensor:
        fed.append(1)
        return attend(self, block, position, qkv_RO)

    monkeypatch.setattr(KeyCache, "attend_first", first)
    monkeypatch.setattr(KeyCache, "attend", one)
    model = tiny(norm="pre", condition="codes")
    decoder = build_decoder(model, rows=2, guided=False)
    decoder.prefill(GptConformance().condition(model, torch.arange(2)))
    decoder.step(torch.arange(2))
    assert fed == [9, 9, 1, 1]  # eight codes and the start, then one, in two blocks


@pytest.mark.parametrize("condition", ["class", "codes"])
@pytest.mark.parametrize("few", [0, 8])
def test_buffers_that_never_move_change_nothing(monkeypatch: pytest.MonkeyPatch, condition: str, few: int) -> None:
    """What graphs replay, here by running it again. few: rows up to which attention is the compiled one."""
    monkeypatch.setattr(key_cache, "FEW_STREAMS", few)
    recorded: list[Work] = []

    def record(work: Work) -> Work:
        recorded.append(work)
        return work

    model = tiny(norm="post", condition=condition)
    buffered, plain = (build_decoder(model, rows=2, guided=False) for _ in range(2))
    buffered.use_graphs(record)
    for labels in ([0, 2], [1, 1], [2, 0], [0, 2]):
        given = GptConformance().condition(model, torch.tensor(labels))
        found, expected = (
            sample(one, given, torch.arange(2), config=SamplingConfig(), seed=3) for one in (buffered, plain)
        )
        assert torch.equal(found, expected)
    assert len(recorded) == (5 if condition == "codes" else 6)  # a prefix is not recorded


@pytest.mark.parametrize("positions", [6, 40])
def test_both_ways_to_attend_are_the_same(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    qkv_JRO = torch.randn(positions, 3, 24, generator=torch.Generator().manual_seed(0))
    found = []
    for few in (0, 8):
        monkeypatch.setattr(key_cache, "FEW_STREAMS", few)
        cache = KeyCache(
            blocks=1,
            streams=3,
            heads=2,
            positions=positions,
            width=8,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        assert cache.is_compiled is (few > 0)
        cache.attend_first(0, qkv_JRO[:3].transpose(0, 1).contiguous())
        found.append(torch.stack([cache.attend(0, 3 + j, qkv_RO) for j, qkv_RO in enumerate(qkv_JRO[3:])]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("condition", ["class", "codes"])
def test_graphs_draw_the_codes_of_single_kernels(dtype: torch.dtype, condition: str) -> None:
    model = tiny(norm="pre", condition=condition).cuda()
    graphs, plain = (build_decoder(model, rows=4, guided=False, dtype=dtype) for _ in range(2))
    assert graphs.graphs is not None
    plain.graphs = None
    for labels in ([0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 0, 1], [0, 1, 2, 0]):
        given = GptConformance().condition(model, torch.tensor(labels))
        found, expected = (
            sample(one, given, torch.arange(4), config=SamplingConfig(), seed=3) for one in (graphs, plain)
        )
        assert torch.equal(found, expected)
