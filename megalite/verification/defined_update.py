"""What every update has to equal: AdamW and Muon on whole tensors, as their papers write them.

Part of `megalite.verification.definition`; it shares nothing with the live code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import TrainConfig

Weights = dict[str, Tensor]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
AMPLIFICATION = NEWTON_SCHULZ[0] ** NEWTON_SCHULZ_STEPS
"""Of singular values near 0: 485. It is the most by which five steps make an error larger, and what
they do to much of it: gradients of few tokens have singular values that are all rounding."""

LARGEST_SINGULAR_VALUE = 1.21
"""After the five steps; so no element is larger."""


@dataclass(frozen=True)
class DefinedUpdate:
    """One update.

    Attributes:
        weights: after it.
        error_scale: by name, for each element: by how much a weight moves for an error of each
            gradient so far.
        largest: by name: the size of a step.
        directions: what was orthogonalised, by name; empty under AdamW.
    """

    weights: Weights
    error_scale: Weights
    largest: dict[str, float]
    directions: Weights


class DefinedOptimizer:
    """AdamW, or Muon of the layers' matrices and AdamW of the rest.

    Args:
        train: hyper-parameters.
        weights: of the shapes of all tensors, by name.
    """

    def __init__(self, train: TrainConfig, weights: Weights):
        self._train = train
        self._m = {name: torch.zeros_like(w) for name, w in weights.items()}
        self._v = {name: torch.zeros_like(w) for name, w in weights.items()}
        self._reach = dict.fromkeys(weights, 0.0)
        self._updates = 0

    def update(
        self,
        weights: Weights,
        gradients: Weights,
        norm: float,
        rates: dict[str, float],
        decays: dict[str, float],
    ) -> DefinedUpdate:
        """Clip by the norm, and move every weight that has a gradient."""
        train = self._train
        self._updates += 1
        clip = min(1.0, train.clip_grad / (norm + 1e-6)) if train.clip_grad else 1.0
        done = DefinedUpdate({}, {}, {}, {})
        for name, gradient in gradients.items():
            lr = rates[name]
            if train.optimizer == "muon" and name.endswith("_proj.weight"):
                move = self._muon(done, name, gradient * clip, clip, lr)
            else:
                move = self._adamw(done, name, gradient * clip, lr)
            done.weights[name] = (1 - lr * decays[name]) * weights[name] - move
        return done

    def _adamw(self, done: DefinedUpdate, name: str, g: Tensor, lr: float) -> Tensor:
        """Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2."""
        beta1, beta2 = self._train.adam_beta1, self._train.adam_beta2
        self._m[name] = beta1 * self._m[name] + (1 - beta1) * g
        self._v[name] = beta2 * self._v[name] + (1 - beta2) * g * g
        m = self._m[name] / (1 - beta1**self._updates)
        v = self._v[name] / (1 - beta2**self._updates)
        done.error_scale[name] = lr / (v.sqrt() + self._train.adam_eps)
        done.largest[name] = lr
        return done.error_scale[name] * m

    def _muon(self, done: DefinedUpdate, name: str, g: Tensor, clip: float, lr: float) -> Tensor:
        """Sources: Jordan et al., "Muon", 2024; Liu et al., arXiv:2502.16982, section 2.2.

        A direction N = G + mu M is a sum of the gradients so far, times factors that add up to
        `reach`. Independent errors of N, of one size, become errors of U f(S) V^T of that size
        times the amplification / |N|: each of those is a sum of the former, times factors whose
        squares add up to no more than the square of that.
        """
        mu = self._train.muon_momentum
        self._m[name] = mu * self._m[name] + g
        self._reach[name] = mu * self._reach[name] + clip
        direction = done.directions[name] = g + mu * self._m[name]
        reach = clip + mu * self._reach[name]
        size = lr * 0.2 * math.sqrt(max(direction.shape))
        scale = size * AMPLIFICATION * reach / (direction.norm() + 1e-7)
        done.error_scale[name] = scale.expand_as(direction)
        done.largest[name] = size * LARGEST_SINGULAR_VALUE
        return size * orthogonalized(direction)


def orthogonalized(matrix: Tensor) -> Tensor:
    """U f(S) V^T of the matrix |X| U S V^T, f being five steps of Newton and Schulz."""
    a, b, c = NEWTON_SCHULZ
    u, s, vt = torch.linalg.svd(matrix / (matrix.norm() + 1e-7), full_matrices=False)
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt
