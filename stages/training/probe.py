"""`probe`: how much of the class a linear model reads off the codes, or off the features that a generator makes of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline import ranks
from pipeline.artifact import Artifact
from pipeline.compatibility import Facts, KnownInputs
from pipeline.draft import SCRATCH, Draft
from pipeline.errors import CorruptError, InputError
from pipeline.keys import canonical_bytes
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from smalti.attributes import TokenAttributes
from smalti.counting import counted
from smalti.epoch import batches_of, exact_order
from smalti.tokens import TokenSet, open_tokens
from stages.codes.reservoir import smallest_rows
from stages.training.config import PUBLISHED_PROBE, ProbeConfig
from stages.training.inputs import check_batch
from stages.weights.cards import TokenizerCard
from stages.weights.identity import check_same_tokenizer

if TYPE_CHECKING:
    import torch

    from models.logistic import Part, StreamedLogistic

# N rows of a token set, T codes of a row, K codes of the codebook, D values of a centroid
METRICS = "metrics.json"
FEATURES = "features"
LBFGS_BYTES = 2**31  # more than that, and the weights are learned in batches
COPIES = 24  # of the weights, in L-BFGS: ten pairs of steps and slopes, weights, slope and work
BATCH = 1024  # rows
POSITIONS = 8  # whose codes go through the model together
RATE = 16.0  # of what a first step may add to a logit
CHECKPOINT = "probe-"
CALM_SECONDS = 60.0  # between checkpoints, which are as large as the weights

Predict = Callable[[NDArray[Any]], NDArray[Any]]
"""Codes (B, T) to classes (B,)."""


def foresee(config: ProbeConfig, inputs: KnownInputs) -> Facts:
    """Both token sets are alike, of two classes at least, and the codebook is theirs; or so are both sets of features."""
    train, held_out = inputs["train"], inputs["held-out"]
    if train.kind != held_out.kind:
        raise inputs.refusal(
            f"learns from {train.name}, a {train.kind}, and is judged on {held_out.name}, a {held_out.kind}"
        )
    if train.kind == FEATURES:
        return foresee_features(config, inputs)
    if config.training != PUBLISHED_PROBE:
        raise inputs.refusal(
            f"has settings of training, but {train.name} is a token set: training is for features alone"
        )
    facts = inputs.agree([inputs["train"], inputs["held-out"]], "tokenizer", "codes", "grid", "classes", "class_names")
    if facts.get("classes") == 1:
        raise inputs.refusal(f"needs images of two classes at least, but {inputs['train'].name} has one")
    if (config.inputs == "centroids") != ("codebook" in inputs):
        raise inputs.refusal(
            "has inputs: centroids, but reads no codebook"
            if config.inputs == "centroids"
            else f"reads the codebook {inputs['codebook'].name}, but has inputs: {config.inputs}; set inputs: centroids"
        )
    inputs.agree([inputs["train"], *inputs.all("codebook")], "tokenizer", "codes")
    return {}


def foresee_features(config: ProbeConfig, inputs: KnownInputs) -> Facts:
    """Both are hidden states of one layer of one generator."""
    both = [inputs["train"], inputs["held-out"]]
    for features in both:
        if "layer" not in features.facts:
            raise inputs.refusal(
                f"reads one feature per row, and {features.name} holds a grid of an encoder's: give features of describe-tokens"
            )
    if config.inputs == "centroids" or "codebook" in inputs:
        raise inputs.refusal("has a codebook or inputs: centroids, which are for token sets, but reads features")
    if inputs.agree(both, "generator", "layer", "classes", "class_names").get("classes") == 1:
        raise inputs.refusal(f"needs images of two classes at least, but {both[0].name} has one")
    check_batch(config.training, inputs, both[0])
    return {}


@stage(
    "probe",
    version=2,
    config=ProbeConfig,
    reads={
        "train": read("token-set", FEATURES, help="codes to learn from, or features of describe-tokens"),
        "held-out": read("token-set", FEATURES, help="codes or features to be judged on"),
        "codebook": read("codebook", help="centroids of the codes, for inputs=centroids", optional=True),
    },
    writes="metrics",
    example="smalti probe --train digits/rar/semantic-tokens --held-out digits/rar/semantic-tokens-held-out",
    trains=True,
    foresees=foresee,
    checks_inputs=True,
)
def probe_classes(config: ProbeConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Fit a linear classifier on codes or features and judge it on held-out images.

    On the codes of every position, over all crops, it is multinomial logistic regression: by L-BFGS, or, where that would
    take more than 2 GiB, by stochastic gradients in batches.  On features it is the published probe of DiGIT: one linear
    layer, trained as `training` says; crops of the images are its augmentation.  reads: two token sets of one tokenizer, or
    features of one layer of one generator.  writes: metrics.json.  resumes: L-BFGS from the start, batches and trainings from
    the last checkpoint.
    """
    metrics = (measure_features if inputs["train"].kind == FEATURES else measure_codes)(config, inputs, out, run)
    if ranks.rank():
        return
    if not out.is_done("metrics"):
        out.put("metrics", {METRICS: canonical_bytes(metrics) + b"\n"})
    out.facts |= metrics
    out.figure = f"probe accuracy {100 * metrics['accuracy']:.1f} %"


def measure_features(config: ProbeConfig, inputs: Inputs, out: Draft, run: Runtime) -> dict[str, Any]:
    """Accuracies of a linear layer that is trained on features; every process of a launch takes part."""
    from stages.training.engine import train
    from stages.training.linear_head import FeatureRows, LinearHeadTask

    rows, held_out = FeatureRows(inputs["train"]), FeatureRows(inputs["held-out"])
    if len(np.unique(rows.labels)) < 2:
        raise InputError(f"{inputs['train'].name} has images of one class, and a probe needs two")
    facts = inputs["train"].facts

    def make_task(device: torch.device) -> LinearHeadTask:
        return LinearHeadTask(config.training, rows, held_out, facts["classes"], device)

    outcome = train(make_task, config.training, out, run, label="probe")
    return {
        "accuracy": round(outcome.figures["accuracy"], 6),
        "train_accuracy": round(outcome.task.share_right(rows), 6),
        "train_rows": len(rows),
        "held_out_rows": len(held_out),
        "classes": facts["classes"],
        "inputs": FEATURES,
        "layer": facts["layer"],
        "solver": config.training.optimizer.kind,
        "steps": config.training.steps,
    }


def measure_codes(config: ProbeConfig, inputs: Inputs, out: Draft, run: Runtime) -> dict[str, Any]:
    """Accuracies of a logistic regression on codes, which one process makes alone; nothing in the others."""
    if ranks.rank():
        return {}
    if out.is_done("metrics"):
        return dict(json.loads((out.path / METRICS).read_bytes()))
    train, held_out = open_pair(inputs["train"], inputs["held-out"])
    return measure(config, train, held_out, read_centroids(config, inputs), out, run)


def open_pair(train: Artifact, held_out: Artifact) -> tuple[TokenSet, TokenSet]:
    """Both token sets; CorruptError unless one tokenizer made both and their classes are the same."""
    sets = open_tokens(train.path), open_tokens(held_out.path)
    first, second = (token_set.attributes for token_set in sets)
    check_same_tokenizer(second.tokenizer, first.tokenizer, what=held_out.name, by=train.name, path=held_out.path)
    for name in ("grid", "codes", "classes", "class_names"):
        if getattr(first, name) != getattr(second, name):
            raise CorruptError(
                f"{held_out.name} and {train.name} differ in {name}: "
                f"{str(getattr(second, name))[:60]}, expected {str(getattr(first, name))[:60]}",
                path=held_out.path,
            )
    return sets


def read_centroids(config: ProbeConfig, inputs: Inputs) -> NDArray[np.float32] | None:
    """Centroids (K, D) where the config asks for them; CorruptError if they are not those of the codes."""
    if config.inputs != "centroids":
        return None
    from stages.codes.tokenizing import load_codebook

    codebook = inputs["codebook"]
    found = open_tokens(inputs["train"].path).attributes.tokenizer
    check_same_tokenizer(
        TokenizerCard.of(codebook).identity, found, what=codebook.name, by=inputs["train"].name, path=codebook.path
    )
    centroids_KD: NDArray[np.float32] = load_codebook(codebook, "cpu").centroids_KD.numpy()
    return centroids_KD


def measure(
    config: ProbeConfig,
    train: TokenSet,
    held_out: TokenSet,
    centroids_KD: NDArray[np.float32] | None,
    out: Draft,
    run: Runtime,
) -> dict[str, Any]:
    """Accuracies on both sets, exact and with one thread, so that they are the same everywhere they are computed."""
    from threadpoolctl import threadpool_limits

    rows_N = smallest_rows(len(train), config.max_rows, seed=config.seed)
    if len(np.unique(train.labels_of(rows_N))) < 2:
        raise InputError(f"{train.path} has images of one class, and a probe needs two", path=train.path)
    is_exact = bytes_of_lbfgs(len(rows_N), train.attributes, centroids_KD) <= LBFGS_BYTES
    rows_M = np.arange(len(held_out))
    with threadpool_limits(1):
        solve = fit_exactly if is_exact else fit_in_batches
        predict, steps = solve(config, train, rows_N, centroids_KD, out, run)
        shares = [share_right(predict, *asked) for asked in ((held_out, rows_M), (train, rows_N))]
    if is_exact and steps >= config.iterations:
        run.progress.say(f"  the probe stopped after {counted(steps, 'step')} without having converged")
    return {
        "accuracy": shares[0],
        "train_accuracy": shares[1],
        "train_rows": len(rows_N),
        "held_out_rows": len(rows_M),
        "classes": held_out.attributes.classes,
        "inputs": config.inputs,
        "solver": "l-bfgs" if is_exact else "batches",
        "steps": steps,
    }


def bytes_of_lbfgs(rows: int, attributes: TokenAttributes, centroids_KD: NDArray[np.float32] | None) -> int:
    """Memory of the exact solver: the rows, and its copies of the weights in float64."""
    inputs = inputs_of(attributes, centroids_KD)
    of_rows = rows * (16 * attributes.tokens if centroids_KD is None else 16 * inputs)
    return of_rows + 8 * COPIES * inputs * attributes.classes


def inputs_of(attributes: TokenAttributes, centroids_KD: NDArray[np.float32] | None) -> int:
    """Inputs of the linear model."""
    return attributes.tokens * (attributes.codes if centroids_KD is None else centroids_KD.shape[1])


def fit_exactly(
    config: ProbeConfig,
    train: TokenSet,
    rows_N: NDArray[np.int64],
    centroids_KD: NDArray[np.float32] | None,
    out: Draft,
    run: Runtime,
) -> tuple[Predict, int]:
    """The optimum by L-BFGS, and its steps."""
    with run.progress.bar("probe", total=len(rows_N), unit="rows") as bar:
        model = fit(config, vectors(train.codes_of(rows_N), train.codes, centroids_KD), train.labels_of(rows_N))
        bar.advance(len(rows_N))
    return lambda codes_BT: model.predict(vectors(codes_BT, train.codes, centroids_KD)), int(model.n_iter_.max())


def fit_in_batches(
    config: ProbeConfig,
    train: TokenSet,
    rows_N: NDArray[np.int64],
    centroids_KD: NDArray[np.float32] | None,
    out: Draft,
    run: Runtime,
) -> tuple[Predict, int]:
    """An approximation of the same optimum by stochastic gradients, with checkpoints, and the steps."""
    from models.logistic import StreamedLogistic

    batches = -(-len(rows_N) // BATCH)
    steps = config.passes * batches
    model = StreamedLogistic(
        inputs=inputs_of(train.attributes, centroids_KD),
        classes=train.attributes.classes,
        penalty=1 / (config.inverse_penalty * len(rows_N)),
        rate=RATE
        / train.attributes.tokens
        / (1 if centroids_KD is None else float(np.abs(centroids_KD).sum(1).mean())),
    )
    resume(model, out)
    saved = time.monotonic()
    with run.progress.bar("probe", total=steps * BATCH, unit="rows") as bar:
        bar.skip(int(model.step) * BATCH)
        for epoch in range(int(model.step) // batches, config.passes):
            order, start = exact_order(len(rows_N), seed=config.seed, epoch=epoch), int(model.step) % batches * BATCH
            for chosen_B in batches_of(order, BATCH, start=start, stop=len(rows_N)):
                rows_B = np.sort(rows_N[chosen_B])
                model.advance(parts(train.codes_of(rows_B), train.codes, centroids_KD), train.labels_of(rows_B))
                bar.advance(BATCH)
                if time.monotonic() - saved >= max(run.checkpoint_seconds, CALM_SECONDS):
                    save(model, out)
                    saved = time.monotonic()
    return lambda codes_BT: model.predict(parts(codes_BT, train.codes, centroids_KD)), steps


def resume(model: StreamedLogistic, out: Draft) -> None:
    """Continue from the last checkpoint of the draft, if there is one."""
    units = [unit for unit in out.units() if unit.startswith(CHECKPOINT)]
    if units:
        with np.load(out.files(units[-1])[0], allow_pickle=False) as state:
            model.load(state)


def save(model: StreamedLogistic, out: Draft) -> None:
    """Write a checkpoint, and drop the one before."""
    before, unit = [unit for unit in out.units() if unit.startswith(CHECKPOINT)], f"{CHECKPOINT}{int(model.step):08d}"
    with out.writing(unit, f"{SCRATCH}/{unit}.npz") as path, path.open("wb") as file:
        np.savez(file, **model.state())  # type: ignore[arg-type]  # numpy has an option among the names
    for old in before:
        out.drop(old)


def fit(config: ProbeConfig, inputs_NF: Any, labels_N: NDArray[np.int32]) -> Any:
    """A fitted scikit-learn model. It begins at zero and draws no random numbers."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # reported by the caller
        return LogisticRegression(C=config.inverse_penalty, max_iter=config.iterations).fit(inputs_NF, labels_N)


def vectors(codes_NT: NDArray[Any], codes: int, centroids_KD: NDArray[np.float32] | None) -> Any:
    """Inputs of the model: (N, T * K) sparse ones, or (N, T * D) centroids."""
    codes_NT = codes_NT.astype(np.int64)
    if centroids_KD is not None:
        return centroids_KD[codes_NT].reshape(len(codes_NT), -1).astype(np.float64)
    return one_hot(codes_NT, codes)


def one_hot(codes_NT: NDArray[np.int64], codes: int) -> Any:
    """Sparse (N, T * K) with a one for the code of each position."""
    return marks(codes_NT + np.arange(codes_NT.shape[1]) * codes, codes_NT.shape[1] * codes).astype(np.float64)


def marks(columns_NT: NDArray[np.int64], columns: int) -> Any:
    """Sparse (N, columns), float32, with a one in each of T columns."""
    from scipy.sparse import csr_array

    rows, each = columns_NT.shape
    starts = np.arange(0, rows * each + 1, each)
    return csr_array((np.ones(rows * each, np.float32), columns_NT.reshape(-1), starts), shape=(rows, columns))


def parts(codes_NT: NDArray[Any], codes: int, centroids_KD: NDArray[np.float32] | None) -> list[Part]:
    """The same in parts of some positions each: the codes that occur there, or one position's centroids."""
    from models.logistic import Part

    codes_NT = codes_NT.astype(np.int64)
    if centroids_KD is not None:
        width = centroids_KD.shape[1]
        places = [slice(place * width, (place + 1) * width) for place in range(codes_NT.shape[1])]
        return [Part(centroids_KD[codes_NT[:, number]], place) for number, place in enumerate(places)]
    found = []
    for first in range(0, codes_NT.shape[1], POSITIONS):
        some_NT = codes_NT[:, first : first + POSITIONS]
        inputs_U, columns = np.unique(some_NT + np.arange(first, first + some_NT.shape[1]) * codes, return_inverse=True)
        found.append(Part(marks(columns.reshape(some_NT.shape), len(inputs_U)), inputs_U))
    return found


def share_right(predict: Predict, token_set: TokenSet, rows_N: NDArray[np.int64]) -> float:
    """Share of rows whose class is predicted."""
    blocks = [rows_N[start : start + BATCH] for start in range(0, len(rows_N), BATCH)]
    right = sum(int((predict(token_set.codes_of(rows_B)) == token_set.labels_of(rows_B)).sum()) for rows_B in blocks)
    return round(right / len(rows_N), 6)
