"""Multinomial logistic regression on rows that are read in batches: memory is that of the weights and of one batch.

It minimizes the objective of the exact solvers, mean cross entropy + penalty / 2 x |weights|^2, by stochastic gradients, with
Adagrad's learning rates (Duchi et al. 2011, one sum per input). An input gets the penalty of all steps since its last
occurrence at once, so batches may be sparse.

B rows of a batch, F inputs, U inputs of a part, L classes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

STATE = ("weights_FL", "squares_F", "met_F", "bias_L", "bias_square", "step")


class Part(NamedTuple):
    """Some inputs of a batch: their values (B, U), dense or sparse, and which of the F inputs they are (U,)."""

    values_BU: Any
    inputs_U: NDArray[np.int64] | slice


class StreamedLogistic:
    """Weights (F, L) and bias (L,), all zero at first; `advance` learns from a batch, `predict` names classes."""

    def __init__(self, *, inputs: int, classes: int, penalty: float, rate: float):
        """penalty: 1 / (C x rows) of the exact solvers.  rate: the most that a weight changes in its first step."""
        self.penalty, self.rate = penalty, rate
        self.weights_FL = np.zeros((inputs, classes), np.float32)
        self.squares_F = np.zeros(inputs, np.float32)
        self.met_F = np.zeros(inputs, np.int64)
        self.bias_L, self.bias_square = np.zeros(classes, np.float32), np.zeros((), np.float32)
        self.step = np.zeros((), np.int64)

    def advance(self, parts: Sequence[Part], labels_B: NDArray[np.integer[Any]]) -> None:
        """One step on a batch whose inputs come in parts, none of them in two."""
        errors_BL = self._probabilities(parts)
        errors_BL[np.arange(len(labels_B)), labels_B] -= 1
        errors_BL /= len(labels_B)
        self.step += 1
        for values_BU, inputs_U in parts:
            weights_UL = self.weights_FL[inputs_U]
            waited_U = (self.step - self.met_F[inputs_U]).astype(np.float32)
            slopes_UL = np.asarray(values_BU.T @ errors_BL)
            slopes_UL += weights_UL * (self.penalty * waited_U)[:, None]
            self.squares_F[inputs_U] += (slopes_UL**2).sum(1)
            slopes_UL *= (self.rate / np.sqrt(self.squares_F[inputs_U] + np.float32(1e-30)))[:, None]
            self.weights_FL[inputs_U] = weights_UL - slopes_UL
            self.met_F[inputs_U] = self.step
        slope_L = errors_BL.sum(0)
        self.bias_square += (slope_L**2).sum()
        self.bias_L -= self.rate * slope_L / np.sqrt(self.bias_square + np.float32(1e-30))

    def predict(self, parts: Sequence[Part]) -> NDArray[np.int64]:
        """The most likely class of each row (B,)."""
        return self._logits(parts).argmax(1)

    def state(self) -> dict[str, NDArray[Any]]:
        """All that training changes, as arrays, for `load`."""
        return {name: getattr(self, name) for name in STATE}

    def load(self, state: Any) -> None:
        """Continue from a state."""
        for name in STATE:
            getattr(self, name)[...] = state[name]

    def _logits(self, parts: Sequence[Part]) -> NDArray[np.float32]:
        logits_BL = np.zeros((parts[0].values_BU.shape[0], len(self.bias_L)), np.float32) + self.bias_L
        for values_BU, inputs_U in parts:
            logits_BL += values_BU @ self.weights_FL[inputs_U]
        return logits_BL

    def _probabilities(self, parts: Sequence[Part]) -> NDArray[np.float32]:
        logits_BL = self._logits(parts)
        logits_BL -= logits_BL.max(1, keepdims=True)
        np.exp(logits_BL, out=logits_BL)
        return logits_BL / logits_BL.sum(1, keepdims=True)
