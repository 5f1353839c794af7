"""The quantizers' cost against plain dense forms written straight from the formulas: time and extra peak memory.

    python -m benchmarks.quantizers                # all; some ten minutes on one thread
    python -m benchmarks.quantizers --only ibq     # lookup-free, ibq, ibq-large or search

Every figure is forward and backward in a process of its own: warmed up at a tiny size, then (first round) the peak of
the process above what it held before, then the fastest of three more rounds. The two forms take turns, and the medians
are compared. Seconds are those that the one
thread was running, so that a busy machine disturbs less; it still slows products more than sweeps over memory, so
quote figures of an idle one.

N tokens, K codes, D channels
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.quantizers.config import LookupFreeConfig
from models.quantizers.lookup_free import LookupFreeQuantizer
from models.quantizers.propagation import propagate
from models.quantizers.vector import nearest

TEMPERATURE, BETA, EPSILON = 0.01, 0.25, 1e-5
Work = Callable[[Tensor, Tensor], None]


class Case(NamedTuple):
    """What is measured: a form of a quantizer at a size; `spread` is the standard deviation of logits or latents."""

    form: str
    tokens: int
    codes: int
    dims: int
    spread: float
    rounds: int = 3


class Cost(NamedTuple):
    seconds: float
    mebibytes: float


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the quantizers on one thread.")
    parser.add_argument("--repeats", type=int, default=5, help="processes per form; the median counts")
    parser.add_argument("--only", choices=list(TABLES), help="one table")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a case as JSON: measure it in this process
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(Case(*json.loads(options.one)))))
        return
    print(f"torch {torch.__version__}, one thread, float32, forward and backward, median of {options.repeats}.")
    for name, table in TABLES.items():
        if options.only in (None, name):
            table(options.repeats)


def lookup_free_table(repeats: int) -> None:
    head("Lookup-free, 2^18 codes, 256 tokens: both entropies", "latents' std")
    for spread in (0.05, 1.0):
        compare(Case("lookup-free", 256, 2**18, 18, spread), repeats, bars=(100, None))


def ibq_table(repeats: int) -> None:
    for layout, others in (("rows of tokens", "dense-"), ("images, as published", "image-")):
        head(f"Index backpropagation, 512 x 16,384 x 256, entropy on; dense form over {layout}", "logits' std")
        for spread in (2.0, 1.6, 1.0, 0.3) if others == "dense-" else (1.6,):
            compare(Case("ibq", 512, 2**14, 256, spread), repeats, bars=(3, 0.2), others=others)


def ibq_large_table(repeats: int) -> None:
    """The dense form is left out: it would take 16 to 22 GiB."""
    print("\nIndex backpropagation, 2,048 x 262,144 x 256, entropy on (once)\n")
    print("| logits' std | s | extra MiB | bar |\n|---|---|---|---|")
    for spread in (1.6,):
        cost = in_a_process(Case("ibq", 2048, 2**18, 256, spread, rounds=1))
        holds = "holds" if cost.mebibytes <= 768 else "fails"
        print(f"| {spread} | {cost.seconds:.1f} | {cost.mebibytes:.0f} | <= 768 MiB: {holds} |", flush=True)


def search_table(repeats: int) -> None:
    head("Nearest code, 1,024 tokens x 262,144 codes x 64 (no gradient)", "latents' std")
    compare(Case("search", 1024, 2**18, 64, 1.0), repeats, bars=(1, 0.2))


TABLES = {"lookup-free": lookup_free_table, "ibq": ibq_table, "ibq-large": ibq_large_table, "search": search_table}


def head(title: str, spread: str) -> None:
    print(f"\n{title}\n\n| {spread} | dense s | ours s | ratio | dense MiB | ours MiB | share | bars |")
    print("|---|---|---|---|---|---|---|---|")


def compare(case: Case, repeats: int, *, bars: tuple[float, float | None], others: str = "dense-") -> None:
    """One line: both forms in turns, so that a busy machine slows both."""
    costs: dict[str, list[Cost]] = {others: [], "": []}
    for _ in range(repeats):
        for prefix, found in costs.items():
            found.append(in_a_process(case._replace(form=prefix + case.form)))
    dense, ours = (
        Cost(*(statistics.median(column) for column in zip(*found, strict=True))) for found in costs.values()
    )
    ratio, share = dense.seconds / ours.seconds, ours.mebibytes / dense.mebibytes
    verdicts = [f">= {bars[0]:g}: {'holds' if ratio >= bars[0] else 'fails'}"]
    if bars[1] is not None:
        verdicts.append(f"<= {bars[1]:.0%}: {'holds' if share <= bars[1] else 'fails'}")
    print(
        f"| {case.spread} | {dense.seconds:.3f} | {ours.seconds:.3f} | {ratio:.2f} | {dense.mebibytes:.0f} | "
        f"{ours.mebibytes:.0f} | {share:.1%} | {', '.join(verdicts)} |",
        flush=True,
    )


def in_a_process(case: Case) -> Cost:
    command = [sys.executable, "-m", "benchmarks.quantizers", "--one", json.dumps(case)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def measure(case: Case) -> Cost:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = FORMS[case.form]
    tiny = case._replace(tokens=256, codes=min(case.codes, 2**10), dims=min(case.dims, 10))
    for size in (tiny, tiny):
        work(*inputs(size))
    z_ND, codebook_KD = inputs(case)
    before = peak_mebibytes()
    work(z_ND, codebook_KD)
    peak = peak_mebibytes()
    assert peak > before, "the peak of this process was reached before the measurement"
    seconds = []
    for _ in range(case.rounds):
        z_ND.grad = codebook_KD.grad = None
        start = time.thread_time()
        work(z_ND, codebook_KD)
        seconds.append(time.thread_time() - start)
    return Cost(min(seconds), peak - before)


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Latents and a codebook that give logits of the spread; without a codebook the latents have it."""
    if case.form.endswith("lookup-free"):
        return (torch.randn(case.tokens, case.dims) * case.spread).requires_grad_(), torch.empty(0)
    codebook_KD = torch.randn(case.codes, case.dims).mul_(case.spread / case.dims**0.5)
    return torch.randn(case.tokens, case.dims).requires_grad_(), codebook_KD.requires_grad_()


def peak_mebibytes() -> float:
    """Of this program alone: what getrusage says goes back to that of whoever started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 2**10  # type: ignore[index]  # Linux always says it


def lookup_free(z_ND: Tensor, _: Tensor) -> None:
    config = LookupFreeConfig(temperature=TEMPERATURE, entropy_tokens=len(z_ND))
    sample, codebook = LookupFreeQuantizer(config, dim=z_ND.shape[1]).entropies(z_ND)
    (sample - codebook).backward()


def dense_lookup_free(z_ND: Tensor, _: Tensor) -> None:
    bits = torch.arange(z_ND.shape[1])
    codes_KD = ((torch.arange(2 ** len(bits))[:, None] >> bits) & 1) * 2.0 - 1
    logits_NK = 2 * z_ND @ codes_KD.T / TEMPERATURE
    sample, codebook = dense_entropies(logits_NK)
    (sample - codebook).backward()


def ibq(z_ND: Tensor, codebook_KD: Tensor) -> None:
    done = propagate(z_ND, codebook_KD, beta=BETA, temperature=TEMPERATURE)
    game = (done.z_ND * upstream(z_ND)).sum() + done.quantization
    (game + 0.05 * (done.sample_entropy - done.codebook_entropy_G[0])).backward()


def dense_ibq(z_ND: Tensor, codebook_KD: Tensor) -> None:
    logits_NK = z_ND @ codebook_KD.T
    p_NK = logits_NK.softmax(1)
    one_hot_NK = F.one_hot(p_NK.argmax(1), len(codebook_KD)).to(p_NK.dtype)
    chosen_ND = (one_hot_NK - p_NK.detach() + p_NK) @ codebook_KD
    plain_ND = one_hot_NK @ codebook_KD
    quantization = F.mse_loss(chosen_ND, z_ND) + F.mse_loss(plain_ND.detach(), z_ND)
    quantization = quantization + BETA * F.mse_loss(plain_ND, z_ND.detach())
    sample, codebook = dense_entropies(logits_NK / TEMPERATURE)
    ((chosen_ND * upstream(z_ND)).sum() + quantization + 0.05 * (sample - codebook)).backward()


def image_ibq(z_ND: Tensor, codebook_KD: Tensor) -> None:
    """The same over (B, K, h, w), the layout of the published code: codes are the second axis."""
    z_BDhw = z_ND.unflatten(0, (-1, 16, 16)).movedim(-1, 1)
    logits_BKhw = torch.einsum("bdhw,kd->bkhw", z_BDhw, codebook_KD)
    p_BKhw = logits_BKhw.softmax(1)
    one_hot_BKhw = F.one_hot(p_BKhw.argmax(1), len(codebook_KD)).movedim(-1, 1).to(p_BKhw.dtype)
    chosen_BDhw = torch.einsum("bkhw,kd->bdhw", one_hot_BKhw - p_BKhw.detach() + p_BKhw, codebook_KD)
    plain_BDhw = torch.einsum("bkhw,kd->bdhw", one_hot_BKhw, codebook_KD)
    quantization = F.mse_loss(chosen_BDhw, z_BDhw) + F.mse_loss(plain_BDhw.detach(), z_BDhw)
    quantization = quantization + BETA * F.mse_loss(plain_BDhw, z_BDhw.detach())
    sample, codebook = dense_entropies(logits_BKhw.movedim(1, -1).flatten(0, 2) / TEMPERATURE)
    ((chosen_BDhw * upstream(z_BDhw)).sum() + quantization + 0.05 * (sample - codebook)).backward()


def dense_entropies(logits_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The published form, whose epsilon in the log_softmax is without effect."""
    q_NK, log_q_NK = logits_NK.softmax(1), (logits_NK + EPSILON).log_softmax(1)
    mean_K = q_NK.mean(0)
    return -(q_NK * log_q_NK).sum(1).mean(), -(mean_K * (mean_K + EPSILON).log()).sum()


def upstream(z_ND: Tensor) -> Tensor:
    """The decoder's gradient."""
    return torch.randn(z_ND.shape, generator=torch.Generator().manual_seed(1)) / z_ND.numel()


def search(z_ND: Tensor, codebook_KD: Tensor) -> None:
    nearest(z_ND, codebook_KD)


@torch.no_grad()
def dense_search(z_ND: Tensor, codebook_KD: Tensor) -> None:
    norms = z_ND.square().sum(1, keepdim=True) + codebook_KD.square().sum(1)
    (norms - 2 * z_ND @ codebook_KD.T).argmin(1)


FORMS: dict[str, Work] = {
    "lookup-free": lookup_free,
    "dense-lookup-free": dense_lookup_free,
    "ibq": ibq,
    "dense-ibq": dense_ibq,
    "image-ibq": image_ibq,
    "search": search,
    "dense-search": dense_search,
}


if __name__ == "__main__":
    main(sys.argv[1:])
