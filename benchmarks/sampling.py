"""How fast RAR samples: our decoder against a plain form of the same sampling, and against no cache at all.

    python -m benchmarks.sampling                 # one thread, float32, guidance on, random weights
    python -m benchmarks.sampling --repeats 1 --batches 4

The plain form is written straight from the equations: the cache grows by concatenation, every row computes its own
modulations, and both position tables are put together anew at each step. Both forms draw the same codes.
Last, the two ways in which our decoder can compute a step (libraries' products, and numba for few rows) at other widths.
Seconds are those that the one thread was running: on an idle machine the seconds of the clock, on a busy one less
disturbed. All of it takes about twenty-five minutes.

B rows, R = 2B streams, T tokens, D width, H heads, E = D / H, K codes
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.generators.config import CodeShape, RarConfig
from models.generators.generator import build_decoder
from models.generators.rar.core_step import RarCoreStep
from models.generators.rar.network import INIT_STD, Block, Rar
from models.generators.rar.step import RarStep
from models.layers.modulation import modulate
from models.sampling.choice import choose
from models.sampling.config import ConstantGuidance, SamplingConfig
from models.sampling.heads import CodeHead
from models.sampling.loop import guide, sample
from models.sampling.philox import uniforms

SAMPLING = SamplingConfig(guidance=ConstantGuidance(scale=(4.0,)))
MIDDLE = RarConfig(width=256, layers=6, heads=8, mlp_width=1024)
DIGITS = RarConfig(width=128, layers=4, heads=4, mlp_width=512)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description="Sampling speed of RAR on one thread.")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each form; the median counts")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], help="against the plain form"
    )
    parser.add_argument(
        "--only-plain", action="store_true", help="leave out all but the comparison with the plain form"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32, guidance on, random weights, median of {options.repeats}.")

    head("width 256, 6 layers, 8 heads, 256 tokens", "plain")
    middle = build(MIDDLE, CodeShape(codes=1024, grid=(16, 16), classes=1000))
    sample_ours(middle, torch.tensor([0]), torch.tensor([0]))  # numba compiles
    for batch in options.batches:
        compare(middle, batch, sample_plain, repeats=options.repeats)
    if options.only_plain:
        return
    head("the same, without cache", "uncached")
    compare(middle, 4, sample_uncached, repeats=1)
    head("width 128, 4 layers, 4 heads, 16 tokens (digits), without cache", "uncached")
    digits = build(DIGITS, CodeShape(codes=256, grid=(4, 4), classes=10))
    for batch in (64, 256):
        compare(digits, batch, sample_uncached, repeats=options.repeats)
    print("\n4 layers, 64 tokens:\n\n| width | batch | libraries s | numba s | ratio |\n|---|---|---|---|---|")
    for width in (256, 768, 1024, 1408):
        for batch in (1, 4, 8):
            compare_steps(width, batch, repeats=options.repeats)


def head(setting: str, other: str) -> None:
    print(f"\n{setting}:\n\n| batch | {other} s | ours s | ratio | images/s | same codes |\n|---|---|---|---|---|---|")


def build(config: RarConfig, shape: CodeShape) -> Rar:
    """A network with random weights, its modulations too: at their initial zeros no block would say anything."""
    torch.manual_seed(0)
    rar = Rar(config, shape)
    for name, parameter in rar.named_parameters():
        if name.endswith("adaLN_modulation.1.weight"):
            torch.nn.init.normal_(parameter, std=INIT_STD)
    return rar.eval()


def compare(model: Rar, batch: int, other: Callable[[Rar, Tensor, Tensor], Tensor], *, repeats: int) -> None:
    """Time both in turns, so that a busy machine slows both, and print one line."""
    labels_B = torch.randint(model.shape.classes, (batch,), generator=torch.Generator().manual_seed(batch))
    ids_B = torch.arange(batch)
    others, ours = [], []
    for _ in range(repeats):
        seconds, codes_BT = timed(lambda: other(model, labels_B, ids_B))
        others.append(seconds)
        seconds, ours_BT = timed(lambda: sample_ours(model, labels_B, ids_B))
        ours.append(seconds)
    slow, fast = statistics.median(others), statistics.median(ours)
    agreement = (codes_BT == ours_BT).float().mean()
    row = (f"{batch}", f"{slow:.3f}", f"{fast:.3f}", f"{slow / fast:.1f}", f"{batch / fast:.1f}", f"{agreement:.4f}")
    print(f"| {' | '.join(row)} |", flush=True)


def compare_steps(width: int, batch: int, *, repeats: int) -> None:
    config = RarConfig(width=width, layers=4, heads=8, mlp_width=4 * width)
    model = build(config, CodeShape(codes=1024, grid=(8, 8), classes=1000))
    labels_B = ids_B = torch.arange(batch)
    decoders = [build_decoder(model, rows=batch, guided=True) for _ in range(2)]
    with torch.inference_mode():
        for decoder, run in zip(
            decoders,
            (RarStep(model, streams=2 * batch, dtype=torch.float32), RarCoreStep(model, streams=2 * batch)),
            strict=True,
        ):
            decoder.run, decoder.head = run, CodeHead(run.logits)
    found: list[list[float]] = [[], []]
    for _ in range(repeats):
        for decoder, seconds in zip(decoders, found, strict=True):
            seconds.append(timed(lambda decoder=decoder: sample(decoder, labels_B, ids_B, config=SAMPLING, seed=0))[0])
    libraries, compiled = (statistics.median(seconds) for seconds in found)
    print(f"| {width} | {batch} | {libraries:.3f} | {compiled:.3f} | {libraries / compiled:.2f} |", flush=True)


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.thread_time()
    result = work()
    return time.thread_time() - start, result


def sample_ours(model: Rar, labels_B: Tensor, ids_B: Tensor) -> Tensor:
    """The decoder's set-up is part of the time."""
    decoder = build_decoder(model, rows=len(labels_B), guided=SAMPLING.guided)
    return sample(decoder, labels_B, ids_B, config=SAMPLING, seed=0)


@torch.inference_mode()
def sample_uncached(model: Rar, labels_B: Tensor, ids_B: Tensor) -> Tensor:
    """The same loop around the training forward pass, which reads the whole prefix at each step."""
    labels_R = torch.cat([labels_B, torch.full_like(labels_B, model.shape.classes)])

    def logits(codes_BN: Tensor) -> Tensor:
        return model(torch.cat([codes_BN, codes_BN]), labels_R)[:, -1]

    return draw(model, logits, ids_B)


@torch.inference_mode()
def sample_plain(model: Rar, labels_B: Tensor, ids_B: Tensor) -> Tensor:
    labels_R = torch.cat([labels_B, torch.full_like(labels_B, model.shape.classes)])
    caches: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0)) for _ in model.blocks]

    def logits(codes_BN: Tensor) -> Tensor:
        x_RJD, condition_RJD = embed_plain(model, torch.cat([codes_BN, codes_BN]), labels_R)
        fresh = 2 if codes_BN.shape[1] == 0 else 1
        x_RJD, activated_RJD = x_RJD[:, -fresh:], F.silu(condition_RJD[:, -fresh:])
        for index, block in enumerate(model.blocks):
            x_RJD, caches[index] = run_block_plain(block, x_RJD, activated_RJD, caches[index])
        return model.lm_head(model.adaln_before_head(x_RJD[:, -1:], activated_RJD[:, -1:], slice(None)))[:, 0]

    return draw(model, logits, ids_B)


def draw(model: Rar, logits: Callable[[Tensor], Tensor], ids_B: Tensor) -> Tensor:
    weights_T, filters = SAMPLING.weights(0, model.shape.tokens), SAMPLING.filters(0)
    uniforms_BT = uniforms(0, ids_B, steps=model.shape.tokens)
    codes_BN = torch.empty(len(ids_B), 0, dtype=torch.int64)
    for step in range(model.shape.tokens):
        logits_BK = guide(logits(codes_BN), float(weights_T[step]))
        codes_B = choose(logits_BK, uniforms_BT[:, step], filters)
        codes_BN = torch.cat([codes_BN, codes_B[:, None]], dim=1)
    return codes_BN


def embed_plain(model: Rar, codes_RN: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """The whole prefix and its conditions, from tables that are repeated for every row and put in order."""
    rows, given = codes_RN.shape
    pos, target = model.pos_embed.repeat(rows, 1, 1), model.target_aware_pos_embed.repeat(rows, 1, 1)
    places_RT = 2 + torch.arange(model.shape.tokens).expand(rows, -1)
    own_RND = pos.gather(1, places_RT[:, :given, None].expand(-1, -1, pos.shape[-1]))
    target_RND = target.gather(1, places_RT[:, : given + 1, None].expand(-1, -1, pos.shape[-1]))
    ids_RJ = torch.cat([model.condition_ids(labels_R)[:, None], codes_RN], dim=1)
    content_RJD = torch.cat([model.cls_token.expand(rows, -1, -1), model.embeddings(ids_RJ)], dim=1)
    where_RJD = torch.cat([pos[:, :2], own_RND], dim=1)
    aim_RJD = torch.cat([torch.zeros_like(pos[:, :1]), target_RND], dim=1)
    return content_RJD + where_RJD + aim_RJD, model.condition(labels_R, positions=given + 2)


def run_block_plain(
    block: Block, x_RJD: Tensor, activated_RJD: Tensor, cache: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(activated_RJD).chunk(6, dim=-1)
    h_RJD = modulate(block.norm1(x_RJD), scale=scale1, shift=shift1)
    q_RHJE, k_RHJE, v_RHJE = block.attn.qkv(h_RJD).unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    q_RHJE, k_RHJE = block.attn.q_norm(q_RHJE), block.attn.k_norm(k_RHJE)
    is_first = cache[0].numel() == 0
    if not is_first:
        k_RHJE, v_RHJE = torch.cat([cache[0], k_RHJE], dim=2), torch.cat([cache[1], v_RHJE], dim=2)
    y_RHJE = F.scaled_dot_product_attention(q_RHJE, k_RHJE, v_RHJE, is_causal=is_first)
    x_RJD = x_RJD + gate1 * block.attn.proj(y_RHJE.transpose(1, 2).flatten(2))
    x_RJD = x_RJD + gate2 * block.mlp(modulate(block.norm2(x_RJD), scale=scale2, shift=shift2))
    return x_RJD, (k_RHJE, v_RHJE)


if __name__ == "__main__":
    main(sys.argv[1:])
