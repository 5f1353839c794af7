"""How fast Llama-style generators sample and train, and what the cross entropy of many codes takes, against plain forms.

    python -m benchmarks.llama                            # one thread, float32, guidance on, random weights
    python -m benchmarks.llama --repeats 1 --batches 4 --kinds factorized

The plain form of sampling is written straight from the equations: caches grow by concatenation, every row computes its
modulations at every step, positions are rotated channel by channel. Both forms draw the same codes. The plain form of training
is the same network with whole logits, as plain PyTorch has them. Seconds are those that the one thread was running; a set-up
of a decoder is part of them. Memory is the resident set's, of a process of its own.

B rows, R = 2B streams, T tokens, J positions, D width, H heads, E = D / H, K codes, M rows of a product
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generators.config import CodeShape, FactorizedConfig, LlamaConfig
from models.generators.generator import build_decoder, build_generator
from models.generators.llama.network import Block, FactorizedHead, Llama, ModulatedBlock
from models.layers.modulation import modulate
from models.losses import head_cross_entropy
from models.sampling.choice import choose
from models.sampling.config import ConstantGuidance, SamplingConfig
from models.sampling.loop import guide, sample
from models.sampling.philox import uniforms

SAMPLING = SamplingConfig(guidance=ConstantGuidance(scale=(2.0,)))
KINDS = {
    "factorized": (
        FactorizedConfig(width=384, layers=8, head_layers=2, heads=6, factors=(64, 4096)),
        CodeShape(codes=2**18, grid=(16, 16), classes=1000),
    ),
    "llama": (LlamaConfig(width=256, layers=4, heads=4), CodeShape(codes=16384, grid=(16, 16), classes=1000)),
}
POSITIONS, CODES, WIDTH = 2048, 2**18, 256  # of the head and its loss
Cache = list[tuple[Tensor, Tensor]]


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of Llama-style generators on one thread.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each form; the median counts")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], help="rows of a pass")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--parts", nargs="*", default=["sampling", "training", "loss"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, float32, random weights, median of {options.repeats}.")
    for kind in options.kinds:
        model = build(kind)
        if "sampling" in options.parts:
            head(f"{kind}, sampling with guidance", "batch", "ms per step | same codes")
            for batch in options.batches:
                compare_sampling(model, batch, options.repeats)
        if "training" in options.parts:
            head(f"{kind}, forward and backward pass", "rows", "positions/s")
            compare_training(model, 4, options.repeats)
    if "loss" in options.parts:
        print(
            f"\nhead and loss, {POSITIONS} positions, {CODES} codes, width {WIDTH}:\n\n| form | s | MiB |\n|---|---|---|"
        )
        for form in ("plain", "ours"):
            seconds, mebibytes = in_a_process(form, options.repeats)
            print(f"| {form} | {seconds:.2f} | {mebibytes:.0f} |", flush=True)


def head(setting: str, rows: str, more: str) -> None:
    columns = f"| {rows} | plain s | ours s | ratio | {more} |"
    print(f"\n{setting}:\n\n{columns}\n{'|---' * (columns.count('|') - 1)}|")


def build(kind: str) -> Llama:
    torch.manual_seed(0)
    model = build_generator(*KINDS[kind])
    assert isinstance(model, Llama)
    for name, parameter in model.named_parameters():  # what starts at zero, or nearly so, says something
        if "linears" in name or "ada_lin" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def compare_sampling(model: Llama, batch: int, repeats: int) -> None:
    labels_B, ids_B = torch.arange(batch) * 7 % 1000, torch.arange(batch)
    forms: list[Callable[[], Tensor]] = [
        lambda: sample_plain(model, labels_B, ids_B),
        lambda: sample(build_decoder(model, rows=batch, guided=True), labels_B, ids_B, config=SAMPLING, seed=0),
    ]
    (slow, fast), (plain_BT, ours_BT) = in_turns(forms, repeats)
    agreement = float((plain_BT == ours_BT).float().mean())
    step = 1000 * fast / model.shape.tokens
    print(f"| {batch} | {slow:.2f} | {fast:.2f} | {slow / fast:.2f} | {step:.1f} | {agreement:.4f} |", flush=True)


def compare_training(model: Llama, rows: int, repeats: int) -> None:
    codes_BT = torch.randint(model.shape.codes, (rows, model.shape.tokens))
    labels_B = torch.arange(rows)

    def step(loss: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    forms: list[Callable[[], Tensor]] = [
        lambda: step(lambda: loss_plain(model, codes_BT, labels_B)),
        lambda: step(lambda: model.loss(codes_BT, labels_B)[0]),
    ]
    (slow, fast), values = in_turns(forms, repeats)
    torch.testing.assert_close(*values, atol=1e-4, rtol=1e-4)
    print(f"| {rows} | {slow:.2f} | {fast:.2f} | {slow / fast:.2f} | {codes_BT.numel() / fast:.0f} |", flush=True)


def in_turns(forms: Sequence[Callable[[], Tensor]], repeats: int) -> tuple[list[float], list[Tensor]]:
    """The median seconds of each, run in turns so that a busy machine slows all of them, and their last results."""
    found: list[list[float]] = [[] for _ in forms]
    for _ in range(repeats):
        results = []
        for form, seconds in zip(forms, found, strict=True):
            start = time.thread_time()
            results.append(form())
            seconds.append(time.thread_time() - start)
    return [statistics.median(seconds) for seconds in found], results


@torch.inference_mode()
def sample_plain(model: Llama, labels_B: Tensor, ids_B: Tensor) -> Tensor:
    labels_R = torch.cat([labels_B, torch.full_like(labels_B, model.shape.classes)])
    class_R1D = model.class_embedding(labels_R)[:, None]
    tokens, scale = model.shape.tokens, SAMPLING.guidance.scale[0]
    uniforms_NBT = [uniforms(0, ids_B, steps=tokens, subtoken=number) for number in range(len(model.factors))]
    cache, x_R1D, drawn = empty(model.blocks), class_R1D, []
    for position in range(tokens):
        hidden_R1D = x_R1D
        for index, block in enumerate(model.blocks):
            hidden_R1D = run_plain(block, hidden_R1D, F.silu(class_R1D), model.rope_TF2[position], cache, index)
        inner, x_R1D, given_R1D, code_B = empty(getattr(model.head, "blocks", [])), 0, hidden_R1D, 0
        for number, linear in enumerate(model.head.linears):
            logits_RK = linear(head_plain(model, given_R1D, F.silu(class_R1D), number, inner))[:, 0]
            value_B = choose(guide(logits_RK, scale), uniforms_NBT[number][:, position], SAMPLING.filters(number))
            given_R1D = model.embeddings[number](torch.cat([value_B, value_B]))[:, None]
            x_R1D, code_B = x_R1D + given_R1D, code_B + model.sizes[number] * value_B
        drawn.append(code_B)
    return torch.stack(drawn, dim=1)


def empty(blocks: Sequence[nn.Module]) -> Cache:
    return [(torch.empty(0), torch.empty(0)) for _ in blocks]


def head_plain(model: Llama, x_R1D: Tensor, activated_R1D: Tensor, number: int, cache: Cache) -> Tensor:
    """What the linear layer of a sub-token takes."""
    if not isinstance(model.head, FactorizedHead):
        return model.head(x_R1D, [], activated_R1D, None)[0]
    for index, block in enumerate(model.head.blocks):
        x_R1D = run_plain(block, x_R1D, activated_R1D, model.head.rope_NF2[number], cache, index)
    return model.head.norm(x_R1D)


def run_plain(
    block: nn.Module, x_R1D: Tensor, activated_R1D: Tensor, rope_F2: Tensor, cache: Cache, index: int
) -> Tensor:
    assert isinstance(block, Block)
    h1_R1D, gate1, gate2, scale2, shift2 = block.attention_norm(x_R1D), 1, 1, torch.zeros(()), torch.zeros(())
    if isinstance(block, ModulatedBlock):
        gate1, gate2, scale1, scale2, shift1, shift2 = block.ada_lin(activated_R1D).chunk(6, dim=-1)
        h1_R1D = modulate(h1_R1D, scale=scale1, shift=shift1)
    q_R1HE, k_R1HE, v_R1HE = block.attention.wqkv(h1_R1D).unflatten(-1, (3, block.attention.heads, -1)).unbind(2)
    q_RH1E, k_RHJE, v_RHJE = (
        part.transpose(1, 2) for part in (turn_plain(q_R1HE, rope_F2), turn_plain(k_R1HE, rope_F2), v_R1HE)
    )
    if cache[index][0].numel():
        k_RHJE, v_RHJE = (torch.cat([old, new], dim=2) for old, new in zip(cache[index], (k_RHJE, v_RHJE), strict=True))
    cache[index] = (k_RHJE, v_RHJE)
    y_R1D = F.scaled_dot_product_attention(q_RH1E, k_RHJE, v_RHJE).transpose(1, 2).flatten(2)
    x_R1D = x_R1D + gate1 * block.attention.wo(y_R1D)
    return x_R1D + gate2 * block.feed_forward(modulate(block.ffn_norm(x_R1D), scale=scale2, shift=shift2))


def turn_plain(x: Tensor, rope_F2: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos_F, sin_F = rope_F2.unbind(-1)
    return torch.stack([first * cos_F - second * sin_F, second * cos_F + first * sin_F], dim=-1).flatten(-2)


def loss_plain(model: Llama, codes_BT: Tensor, labels_B: Tensor) -> Tensor:
    logits = model(codes_BT, labels_B)
    parts = zip(logits, model.split(codes_BT), strict=True)
    return sum(F.cross_entropy(one.flatten(0, 1), values.flatten()) for one, values in parts)


def in_a_process(form: str, repeats: int) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_loss, (form, repeats))


def measure_loss(form: str, repeats: int) -> tuple[float, float]:
    """Median seconds of a forward and backward pass, and MiB that it takes beyond weight and inputs."""
    torch.set_num_threads(1)
    if form == "plain":
        head_cross_entropy.MANY_CODES = CODES + 1
    x_MD, linear = torch.randn(POSITIONS, WIDTH, requires_grad=True), nn.Linear(WIDTH, CODES, bias=False)
    targets_M, peak, seconds = torch.randint(CODES, (POSITIONS,)), Peak(), []
    with peak:
        for _ in range(repeats):
            x_MD.grad = linear.weight.grad = None
            start = time.thread_time()
            head_cross_entropy.head_cross_entropy(x_MD, linear, targets_M)[0].backward()
            seconds.append(time.thread_time() - start)
    return statistics.median(seconds), peak.extra / 2**20


class Peak:
    """How far the resident set rises, looked at every few milliseconds."""

    def __enter__(self) -> None:
        self.extra, self.before, self.is_over = 0, self.resident(), threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()

    def __exit__(self, *unused: object) -> None:
        self.is_over.set()
        self.watcher.join()

    def watch(self) -> None:
        while not self.is_over.wait(0.005):
            self.extra = max(self.extra, self.resident() - self.before)

    @staticmethod
    def resident() -> int:
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


if __name__ == "__main__":
    main(sys.argv[1:])
