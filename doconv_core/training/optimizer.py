"""The updates of a step in NumPy: what every framework's must agree with.

They work on dicts of arrays, by the names of a state's entries, whose last part tells the role:
that is what decides about the decay. PyTorch's rules hold everywhere: the learning rate is outside
of the momentum, and the decay of SGD inside of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.numeric import Array
from doconv_core.state.layers import BatchNormSpec
from doconv_core.training.fields import ADAMW, BIASES, DEPTHWISE, NESTEROV, NORMS
from doconv_core.training.recipe import Recipe

Arrays = Mapping[str, Array]
_BUFFERS = ("running_mean", "running_var", "inactive")
TINY = 1e-6  # which PyTorch adds to the norm when it clips


class Moments(NamedTuple):
    """What an optimizer keeps between steps, by entry.

    first: the velocity of SGD, or AdamW's mean of the gradients. second: AdamW's mean of their
    squares. steps: how many were taken.
    """

    first: Arrays = MappingProxyType({})
    second: Arrays = MappingProxyType({})
    steps: int = 0


def role(name: str) -> str | None:
    """Return the role of a state's entry: "norms", "biases" or "depthwise"; None for a weight.

    name: of the entry, or its last part.

    >>> role("stage1.unit1.bn.gamma"), role("fc.weight")
    ('norms', None)
    """
    last = name.rpartition(".")[2]
    if last in BatchNormSpec.vectors:
        return NORMS
    if last.endswith("bias"):
        return BIASES
    return DEPTHWISE if last in DO_CONV.names[1:] else None


def trained(name: str) -> bool:
    """Return whether a state's entry is trained: all but running statistics, and what counts.

    >>> trained("bn.running_mean")
    False
    """
    return name.rpartition(".")[2] not in _BUFFERS


def decay(recipe: Recipe, name: str) -> float:
    """Return the weight decay of a state's entry: the recipe's, or 0 where its role is exempt.

    >>> decay(recipe("dgc_cifar", decay_exempt=("biases",)), "fc.bias")
    0.0
    """
    return 0.0 if role(name) in recipe.decay_exempt else recipe.weight_decay


def update(
    recipe: Recipe, weights: Arrays, gradients: Arrays, moments: Moments, learning_rate: float
) -> tuple[dict[str, Array], Moments]:
    """Return the weights after a step, and what the optimizer keeps for the next.

    weights: all that is trained; gradients: of each of them, clipped if the recipe clips.

    SGD: `g += decay·w`, `v = momentum·v + g`, `w -= rate·v`; Nesterov: `w -= rate·(g +
    momentum·v)`. AdamW: `w -= rate·decay·w`, then `w -= rate·m / (sqrt(s) + epsilon)`, where `m`
    and `s` are the means of the gradients and of their squares, each divided by `1 - beta^steps`.
    Source: PyTorch's SGD and AdamW; Nesterov's momentum: Sutskever and others 2013; AdamW: arXiv
    1711.05101.

    >>> mine = recipe("digits", optimizer="sgd", weight_decay=0)
    >>> update(mine, {"w": np.ones(1)}, {"w": np.ones(1)}, Moments(), 0.1)[0]
    {'w': array([0.9])}
    """
    rule = _adamw if recipe.optimizer == ADAMW else _sgd
    return rule(recipe, weights, gradients, moments, learning_rate)


def _sgd(
    recipe: Recipe, weights: Arrays, gradients: Arrays, moments: Moments, rate: float
) -> tuple[dict[str, Array], Moments]:
    momentum, found, velocities = recipe.momentum, {}, {}
    for name, w in weights.items():
        g = gradients[name] + decay(recipe, name) * w
        v = g + momentum * moments.first.get(name, 0.0)
        found[name] = w - rate * (g + momentum * v if recipe.optimizer == NESTEROV else v)
        velocities[name] = v
    return found, Moments(velocities, {}, moments.steps + 1)


def _adamw(
    recipe: Recipe, weights: Arrays, gradients: Arrays, moments: Moments, rate: float
) -> tuple[dict[str, Array], Moments]:
    beta1, beta2, steps = recipe.momentum, recipe.beta2, moments.steps + 1
    found, means, squares = {}, {}, {}
    for name, w in weights.items():
        g = gradients[name]
        m = beta1 * moments.first.get(name, 0.0) + (1 - beta1) * g
        s = beta2 * moments.second.get(name, 0.0) + (1 - beta2) * g**2
        spread = np.sqrt(s / (1 - beta2**steps)) + recipe.epsilon
        shrunk = w - rate * decay(recipe, name) * w
        found[name] = shrunk - rate * m / (1 - beta1**steps) / spread
        means[name], squares[name] = m, s
    return found, Moments(means, squares, steps)


def clipped(gradients: Arrays, norm: float | None) -> dict[str, Array]:
    """Return the gradients, scaled so that their norm together is at most `norm`; None for any.

    Source: PyTorch's `clip_grad_norm_`.

    >>> clipped({"a": np.array([3.0]), "b": np.array([4.0])}, norm=1)["b"].round(4)
    array([0.8])
    """
    if norm is None:
        return dict(gradients)
    total = float(np.sqrt(sum(np.square(each).sum() for each in gradients.values())))
    factor = min(1.0, norm / (total + TINY))
    return {name: each * factor for name, each in gradients.items()}


def averaged(average: Arrays, arrays: Arrays, decay: float) -> dict[str, Array]:
    """Return the moving average after a step: `decay` of the former, and the rest of the new.

    >>> averaged({"w": np.ones(1)}, {"w": np.zeros(1)}, decay=0.75)
    {'w': array([0.75])}
    """
    return {name: decay * average[name] + (1 - decay) * each for name, each in arrays.items()}
