"""The updates of recipes, as optimizers of MXNet's that a `Trainer` takes.

MXNet's own SGD keeps the learning rate inside of the velocity, and so goes elsewhere as soon as the
rate changes. What it has for a step without momentum, `w = (1 - rate·decay)·w - rate·scale·g` on
many arrays at once, is with other numbers in those places all that its momentum needs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import mxnet as mx
import numpy as np
from mxnet.ndarray import NDArray

from doconv_core.training.fields import ADAMW, NESTEROV
from doconv_core.training.recipe import Recipe

AT_ONCE = 50  # arrays that MXNet's operators for many take; there are some that crash at more
LARGE = 1 << 14  # entries of an array that is not taken with others: they would wait for it

Arrays = Sequence[NDArray]


class RecipeOptimizer(mx.optimizer.Optimizer):
    """A recipe's optimizer: SGD, Nesterov's or AdamW, with the updates of PyTorch.

    exempt: the numbers of the parameters that do not decay. What Gluon's parameters say of their
    own rate and decay, `lr_mult` and `wd_mult`, counts besides.

    steps: how many were taken. kept: the velocity of each parameter, or AdamW's two moments, by its
    number and context.
    """

    def __init__(self, recipe: Recipe, exempt: Container[int]) -> None:
        super().__init__(learning_rate=recipe.learning_rate, wd=recipe.weight_decay)
        self.aggregate_num = AT_ONCE
        self.recipe, self.exempt = recipe, exempt
        self.steps = 0
        self.kept: dict[tuple[int, mx.Context], list[NDArray]] = {}

    def begin(self, learning_rate: float) -> None:
        """Tell the rate of the step that follows."""
        self.set_learning_rate(learning_rate)
        self.steps += 1

    def create_state(self, index: int, weight: NDArray) -> list[NDArray]:
        """Return what is kept of a parameter, zeros where there is nothing yet."""
        count = 2 if self.recipe.optimizer == ADAMW else 1
        key = index, weight.context
        if key not in self.kept:
            self.kept[key] = [mx.nd.zeros_like(weight) for _ in range(count)]
        return self.kept[key]

    def update(
        self, index: Sequence[int], weight: Arrays, grad: Arrays, state: Sequence[Arrays]
    ) -> None:
        """Change several parameters, in place; see `doconv_core.training.optimizer.update`."""
        rates = self._get_lrs(index)
        decays = self._get_wds(index)
        decays = [0.0 if i in self.exempt else d for i, d in zip(index, decays, strict=True)]
        if self.recipe.optimizer == ADAMW:
            self._adamw(weight, grad, state, rates, decays)
        else:
            self._sgd(weight, grad, [velocity for (velocity,) in state], rates, decays)

    def _sgd(
        self, weights: Arrays, gradients: Arrays, velocities: Arrays, rates: list[float],
        decays: list[float],
    ) -> None:  # fmt: skip
        momentum, scale, count = self.recipe.momentum, self.rescale_grad, len(weights)
        _step(velocities, gradients, [-1.0] * count, [momentum - 1] * count, scale)
        if any(decays):
            _step(velocities, weights, [-decay for decay in decays])
        if self.recipe.optimizer == NESTEROV:
            _step(weights, gradients, rates, decays, scale)
            rates = [rate * momentum for rate in rates]
        _step(weights, velocities, rates)

    def _adamw(
        self, weights: Arrays, gradients: Arrays, moments: Sequence[Arrays], rates: list[float],
        decays: list[float],
    ) -> None:  # fmt: skip
        """Let MXNet's Adam, which corrects no bias, do it by another rate and epsilon.

        Its operator for many arrays at once is a hundred times less exact.
        """
        # As the operator takes them, which matters where they are near 1.
        beta1, beta2 = np.array([self.recipe.momentum, self.recipe.beta2], np.float32).tolist()
        root = (1 - beta2**self.steps) ** 0.5
        correction = root / (1 - beta1**self.steps)
        if any(decays):
            _step(weights, gradients, rates, decays, scale=0.0)
        for w, g, (mean, square), rate in zip(weights, gradients, moments, rates, strict=True):
            mx.nd.adam_update(
                w, g, mean, square, out=w, lr=rate * correction, beta1=beta1, beta2=beta2,
                epsilon=self.recipe.epsilon * root, rescale_grad=self.rescale_grad,
            )  # fmt: skip


def _step(
    arrays: Arrays, others: Arrays, rates: list[float], decays: list[float] | None = None,
    scale: float = 1.0,
) -> None:  # fmt: skip
    """Make each array `(1 - rate·decay)·array - rate·scale·other`, in place."""
    rows = list(zip(arrays, others, rates, decays or [0.0] * len(rates), strict=True))
    for array, other, rate, decay in rows:
        if array.size > LARGE:
            mx.nd.sgd_update(array, other, out=array, lr=rate, wd=decay, rescale_grad=scale)
    small = [row for row in rows if row[0].size <= LARGE]
    if small:
        mx.nd.multi_sgd_update(
            *(each for row in small for each in row[:2]), out=[row[0] for row in small],
            lrs=[row[2] for row in small], wds=[row[3] for row in small], rescale_grad=scale,
            num_weights=len(small),
        )  # fmt: skip


def average(averages: Arrays, arrays: Arrays, decay: float) -> None:
    """Let moving averages follow arrays, in place: `decay` of what they are, the rest of these."""
    for chunk in _chunks(len(averages)):
        part = averages[chunk]
        _step(part, arrays[chunk], [decay - 1] * len(part), [-1.0] * len(part))


def squares(arrays: Arrays) -> NDArray:
    """Return the sum of all entries' squares, without waiting for it.

    It is not finite where one of them is not: what looks for that itself is far slower.
    """
    parts = (arrays[chunk] for chunk in _chunks(len(arrays)))
    sums = [mx.nd.multi_sum_sq(*part, num_arrays=len(part)).sum() for part in parts]
    return mx.nd.add_n(*sums)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + AT_ONCE) for start in range(0, count, AT_ONCE))
