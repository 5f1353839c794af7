"""`probe`: how much of the class a linear model reads off the codes."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.draft import Draft
from pipeline.errors import CorruptError, InputError, UsageError
from pipeline.keys import canonical_bytes
from pipeline.known import Facts, KnownInputs
from pipeline.runtime import Runtime
from pipeline.stage import Inputs, read, stage
from smalti.counting import counted
from smalti.tokens import TokenSet, open_tokens
from stages.identity import check_same_tokenizer, tokenizer_identity
from stages.reservoir import smallest_rows

# N rows of a token set, T codes of a row, K codes of the codebook, D values of a centroid
METRICS = "metrics.json"


class ProbeConfig(Config):
    """What the linear model sees, and how it is fitted."""

    inputs: Literal["one-hot", "centroids"] = Field(
        default="one-hot", description="each position's code as one of K, or as its centroid (needs a codebook)"
    )
    inverse_penalty: float = Field(default=1.0, gt=0, description="C of the logistic regression: smaller is smoother")
    iterations: int = Field(default=500, ge=1, description="steps of L-BFGS at most")
    max_rows: int = Field(default=200_000, ge=2, description="training rows; of more, those of the smallest hash")
    seed: int = Field(default=0, ge=0, lt=2**53, description="seed of the choice of rows")


def check_inputs(config: ProbeConfig, inputs: Any) -> None:
    if (config.inputs == "centroids") != ("codebook" in inputs):
        raise UsageError(
            "probe lacks --codebook, which inputs=centroids needs"
            if config.inputs == "centroids"
            else "probe was given a codebook, which inputs=one-hot does not use; set inputs=centroids"
        )


def foresee(config: ProbeConfig, inputs: KnownInputs) -> Facts:
    """Both token sets are alike, of two classes at least, and the codebook is theirs."""
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


@stage(
    "probe",
    version=1,
    config=ProbeConfig,
    reads={
        "train": read("token-set", help="codes to learn from"),
        "held-out": read("token-set", help="codes to be judged on"),
        "codebook": read("codebook", help="centroids of the codes, for inputs=centroids", optional=True),
    },
    writes="metrics",
    example="smalti probe --train digits/rar/semantic-tokens --held-out digits/rar/semantic-tokens-held-out",
    check=check_inputs,
    foresees=foresee,
)
def probe_codes(config: ProbeConfig, inputs: Inputs, out: Draft, run: Runtime) -> None:
    """Fit a linear classifier on codes and judge it on held-out images.

    Multinomial logistic regression on the codes of every position, over all crops.  reads: two token sets of one
    tokenizer.  writes: metrics.json.  resumes: from the start.
    """
    if not out.is_done("metrics"):
        train, held_out = open_pair(inputs["train"], inputs["held-out"])
        metrics = measure(config, train, held_out, read_centroids(config, inputs), run)
        out.put("metrics", {METRICS: canonical_bytes(metrics) + b"\n"})
    metrics = json.loads((out.path / METRICS).read_bytes())
    out.facts |= metrics
    out.figure = f"probe accuracy {100 * metrics['accuracy']:.1f} %"


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
    from stages.tokenizing import load_codebook

    codebook = inputs["codebook"]
    found = open_tokens(inputs["train"].path).attributes.tokenizer
    check_same_tokenizer(
        tokenizer_identity(codebook), found, what=codebook.name, by=inputs["train"].name, path=codebook.path
    )
    centroids_KD: NDArray[np.float32] = load_codebook(codebook, "cpu").centroids_KD.numpy()
    return centroids_KD


def measure(
    config: ProbeConfig, train: TokenSet, held_out: TokenSet, centroids_KD: NDArray[np.float32] | None, run: Runtime
) -> dict[str, Any]:
    """Accuracies on both sets, exact and with one thread, so that they are the same everywhere they are computed."""
    from threadpoolctl import threadpool_limits

    rows_N = smallest_rows(len(train), config.max_rows, seed=config.seed)
    labels_N = train.labels_of(rows_N)
    if len(np.unique(labels_N)) < 2:
        raise InputError(f"{train.path} has images of one class, and a probe needs two", path=train.path)
    with threadpool_limits(1), run.progress.bar("probe", total=len(rows_N), unit="rows") as bar:
        model = fit(config, vectors(train, rows_N, centroids_KD), labels_N)
        bar.advance(len(rows_N))
        predicted_N = model.predict(vectors(train, rows_N, centroids_KD))
        rows_M = np.arange(len(held_out))
        predicted_M = model.predict(vectors(held_out, rows_M, centroids_KD))
    iterations = int(model.n_iter_.max())
    if iterations >= config.iterations:
        run.progress.say(f"  the probe stopped after {counted(iterations, 'step')} without having converged")
    return {
        "accuracy": share_right(predicted_M, held_out.labels_of(rows_M)),
        "train_accuracy": share_right(predicted_N, labels_N),
        "train_rows": len(rows_N),
        "held_out_rows": len(rows_M),
        "classes": held_out.attributes.classes,
        "inputs": config.inputs,
        "steps": iterations,
    }


def fit(config: ProbeConfig, inputs_NF: Any, labels_N: NDArray[np.int32]) -> Any:
    """A fitted scikit-learn model. It begins at zero and draws no random numbers."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in our own words
        return LogisticRegression(C=config.inverse_penalty, max_iter=config.iterations).fit(inputs_NF, labels_N)


def vectors(token_set: TokenSet, rows_N: NDArray[np.int64], centroids_KD: NDArray[np.float32] | None) -> Any:
    """What the model sees of each row: (N, T * K) sparse ones, or (N, T * D) centroids."""
    codes_NT = token_set.codes_of(rows_N).astype(np.int64)
    if centroids_KD is not None:
        return centroids_KD[codes_NT].reshape(len(rows_N), -1).astype(np.float64)
    return one_hot(codes_NT, token_set.codes)


def one_hot(codes_NT: NDArray[np.int64], codes: int) -> Any:
    """Sparse (N, T * K) with a one for the code of each position."""
    from scipy.sparse import csr_array

    rows, positions = codes_NT.shape
    columns = (codes_NT + np.arange(positions) * codes).reshape(-1)
    starts = np.arange(0, rows * positions + 1, positions)
    return csr_array((np.ones(len(columns)), columns, starts), shape=(rows, positions * codes))


def share_right(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    return round(float(np.mean(predicted == labels)), 6)
