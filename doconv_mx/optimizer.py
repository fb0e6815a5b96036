"""The updates of recipes, as optimizers of MXNet's that a `Trainer` takes.

MXNet's own SGD has the learning rate inside of the velocity, `m = momentum·m - rate·g`, and so goes
elsewhere as soon as the rate changes. With `momentum·rate/former rate` as its momentum, `m` is
`-rate·v` of PyTorch's velocity v, and the weights go where they go there, by one operator that
reads each number once. What MXNet has for a step without momentum, `w = (1 - rate·decay)·w -
rate·scale·g`, is with other numbers in those places what Nesterov's needs besides.
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
# In place of a rate of zero, at which velocities would be lost: it moves no weight that counts.
LEAST_RATE = 1e-20
FORMER = -1.0  # the rate inside of velocities that were stored as PyTorch's

Arrays = Sequence[NDArray]


class RecipeOptimizer(mx.optimizer.Optimizer):
    """A recipe's optimizer: SGD, Nesterov's or AdamW, with the updates of PyTorch.

    exempt: the numbers of the parameters that do not decay. What Gluon's parameters say of their
    own rate and decay, `lr_mult` and `wd_mult`, counts besides.

    steps: how many were taken. inside: the rate in the velocities, that of the last step. kept: the
    velocity of each parameter, times minus that rate, or AdamW's two moments, by its number and
    context.
    """

    def __init__(self, recipe: Recipe, exempt: Container[int]) -> None:
        super().__init__(learning_rate=recipe.learning_rate, wd=recipe.weight_decay)
        self.aggregate_num = AT_ONCE
        self.recipe, self.exempt = recipe, exempt
        self.steps, self.inside, self.momentum = 0, 1.0, recipe.momentum
        self.kept: dict[tuple[int, mx.Context], list[NDArray]] = {}

    def begin(self, learning_rate: float) -> None:
        """Tell the rate of the step that follows."""
        former, self.inside = self.inside, learning_rate or LEAST_RATE
        self.momentum = self.recipe.momentum * self.inside / former
        self.set_learning_rate(learning_rate if self.recipe.optimizer == ADAMW else self.inside)
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
        """Add velocities to weights; Nesterov's way then goes on from there.

        With `m = momentum·former m - rate·(g + decay·w)`, that is from `w + m` to
        `w + momentum·m - rate·(g + decay·w)`.
        """
        scale, momentum = self.rescale_grad, self.recipe.momentum
        rows = list(zip(weights, gradients, velocities, rates, decays, strict=True))
        for w, g, m, rate, decay in rows:
            if w.size > LARGE:
                mx.nd.sgd_mom_update(
                    w, g, m, out=w, lr=rate, wd=decay, momentum=self.momentum, rescale_grad=scale
                )
        small = [row for row in rows if row[0].size <= LARGE]
        if small:
            mx.nd.multi_sgd_mom_update(
                *(each for row in small for each in row[:3]), out=[row[0] for row in small],
                lrs=[row[3] for row in small], wds=[row[4] for row in small],
                momentum=self.momentum, rescale_grad=scale, num_weights=len(small),
            )  # fmt: skip
        if self.recipe.optimizer == NESTEROV:
            _step(weights, gradients, rates, decays, scale)
            pairs = zip(rates, decays, strict=True)
            _step(weights, velocities, [1 - momentum - rate * decay for rate, decay in pairs])

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
    small = [array for array in arrays if array.size <= LARGE]
    parts = (small[chunk] for chunk in _chunks(len(small)))
    sums = [mx.nd.multi_sum_sq(*part, num_arrays=len(part)).sum() for part in parts]
    flat = (array.reshape(-1) for array in arrays if array.size > LARGE)
    return mx.nd.add_n(*sums, *(mx.nd.dot(array, array) for array in flat))


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + AT_ONCE) for start in range(0, count, AT_ONCE))
