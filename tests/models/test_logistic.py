"""Logistic regression in batches: near the optimum of the exact solver, dense or sparse, in parts or whole."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from models.logistic import Part, StreamedLogistic

ROWS, INPUTS, CLASSES, BATCH = 400, 12, 4, 40


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    """Zeros and ones whose chances the class sets, and the classes."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, CLASSES, ROWS)
    return (rng.random((ROWS, INPUTS)) < rng.random((CLASSES, INPUTS))[labels_N]).astype(np.float32), labels_N


def fit(values_NF: np.ndarray, labels_N: np.ndarray, parts: int = 1, *, sparse: bool = False) -> StreamedLogistic:
    model = StreamedLogistic(inputs=INPUTS, classes=CLASSES, penalty=1 / ROWS, rate=1.0)
    places = [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(INPUTS), parts)]
    for turn in range(30):
        order = np.random.default_rng(turn).permutation(ROWS)
        for rows_B in np.split(order, ROWS // BATCH):
            found = [values_NF[rows_B][:, place] for place in places]
            given = [
                Part(csr_array(values) if sparse else values, place)
                for values, place in zip(found, places, strict=True)
            ]
            model.advance(given, labels_N[rows_B])
    return model


def test_near_the_optimum_of_the_exact_solver(data: tuple[np.ndarray, np.ndarray]) -> None:
    values_NF, labels_N = data
    exact = LogisticRegression(C=1.0, max_iter=500).fit(values_NF, labels_N)
    model = fit(values_NF, labels_N)

    def loss(weights_FL: np.ndarray, bias_L: np.ndarray) -> float:
        logits_NL = values_NF @ weights_FL + bias_L
        likely_N = logits_NL[np.arange(ROWS), labels_N] - np.log(np.exp(logits_NL).sum(1))
        return float(-likely_N.mean() + (weights_FL**2).sum() / 2 / ROWS)

    best = loss(exact.coef_.T, exact.intercept_)
    assert best <= loss(model.weights_FL, model.bias_L) <= 1.02 * best
    found = model.predict([Part(values_NF, slice(None))])
    assert (found == exact.predict(values_NF)).mean() > 0.95


def test_parts_and_sparse_rows_give_the_same(data: tuple[np.ndarray, np.ndarray]) -> None:
    whole = fit(*data)
    for other in (fit(*data, parts=3), fit(*data, parts=2, sparse=True)):
        np.testing.assert_allclose(other.weights_FL, whole.weights_FL, atol=1e-4)


def test_an_input_that_waited_gets_the_penalty_of_all_its_steps() -> None:
    model = StreamedLogistic(inputs=2, classes=2, penalty=0.1, rate=1.0)
    model.weights_FL[:] = 1
    for _ in range(3):
        model.advance([Part(np.zeros((1, 1), np.float32), np.array([0]))], np.array([0]))
    before = model.squares_F.copy()
    model.advance([Part(np.zeros((1, 1), np.float32), np.array([1]))], np.array([0]))
    assert model.squares_F[1] - before[1] == pytest.approx(2 * (4 * 0.1) ** 2)
