"""A network's output and gradients, in NumPy alone: what every framework must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.maths.numeric import as_floats
from doconv_core.networks.lowering import layers, lowered
from doconv_core.networks.nodes import Arrays, BatchNorm, Block, DynamicHeads, Network, Node, Pass
from doconv_core.state.file import Array, State, entry
from doconv_core.state.match import fit_state


class NetworkGradients(NamedTuple):
    """A loss's gradients: by entry of the state for what is trained, and of the input.

    >>> from doconv_core.networks.initialize import initialize
    >>> network, x = describe("cifar_resnet20"), np.zeros((1, 3, 32, 32))
    >>> found = gradients(network, initialize(network), x, np.ones((1, 100)))
    >>> found.x.shape, found.parameters["input_bn.gamma"].shape
    ((1, 3, 32, 32), (3,))
    """

    parameters: dict[str, Array]
    x: Array


class TrainingPass(NamedTuple):
    """What a network makes of a batch in training.

    output: as of `evaluate`. lasso: the sum over dynamic heads of their saliencies' lasso. running:
    the running statistics after the batch, by entry of the state. back: from the loss's gradient in
    the output to all of its gradients, which have those of the lasso by the nodes' own weight.

    >>> from doconv_core.networks.initialize import initialize
    >>> network = describe("cifar_resnet20")
    >>> training_pass(network, initialize(network), np.ones((2, 3, 32, 32))).lasso
    0.0
    """

    output: Array
    lasso: float
    running: dict[str, Array]
    back: Callable[[Array], NetworkGradients]


def evaluate(network: Network, state: State, x: ArrayLike, *, training: bool = False) -> Array:
    """Return the network's output for `x`, `(B, C, H, W)`, in x's dtype: float32 or float64.

    state: one of the network's, as `layers` describes it. training: whether batch norms use the
    batch's own statistics; the running ones are left as they are.
    Raises StateError for another network's state; ValueError and TypeError for an input that does
    not fit, and in training for a network with dropout.

    >>> from doconv_core.networks.initialize import initialize
    >>> network = describe("cifar_resnet20")
    >>> evaluate(network, initialize(network), np.zeros((2, 3, 32, 32))).shape
    (2, 100)
    """
    x = _checked(x)
    return _passed(network, state, x, training, keep=False).output


def gradients(
    network: Network,
    state: State,
    x: ArrayLike,
    output_gradient: ArrayLike,
    *,
    training: bool = False,
) -> NetworkGradients:
    """Return the gradients of a loss with respect to what is trained, and to `x`.

    output_gradient: the loss's gradient with respect to `evaluate`'s result, of its shape. The
    other arguments, and the errors, are those of `evaluate`. In training a batch norm's gradient
    goes through the batch's statistics. An ordinary convolution's state in a DO-Conv layer gives
    gradients of `weight` and `depthwise_weight`.

    >>> from doconv_core.networks.initialize import initialize
    >>> network, x = describe("cifar_resnet20"), np.zeros((1, 3, 32, 32))
    >>> gradients(network, initialize(network), x, np.ones((1, 100))).parameters["input_bn.beta"]
    array([0., 0., 0.])
    """
    x = _checked(x)
    found = _passed(network, state, x, training, keep=True)
    dy, shape = as_floats("output_gradient", output_gradient), found.output.shape
    if dy.shape != shape:
        raise ValueError(f"output_gradient must have shape {shape}; received {dy.shape}.")
    return found.back(dy.astype(x.dtype))


def training_pass(network: Network, state: State, x: ArrayLike) -> TrainingPass:
    """Return what a network makes of a batch in training, with the way back.

    The arguments, and the errors, are those of `evaluate`. The state is left as it is.

    >>> from doconv_core.networks.initialize import initialize
    >>> network = describe("cifar_resnet20")
    >>> found = training_pass(network, initialize(network), np.ones((2, 3, 32, 32)))
    >>> found.running["input_bn.running_mean"]
    array([0.1, 0.1, 0.1])
    """
    return _passed(network, state, _checked(x), True, keep=True)


def _checked(x: ArrayLike) -> Array:
    x = as_floats("x", x)
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"x must be float32 or float64; received {x.dtype}.")
    if x.ndim != 4:
        raise ValueError(f"x must have axes (B, C, H, W); received shape {x.shape}.")
    return x


def _passed(
    network: Network, state: State, x: Array, training: bool, *, keep: bool
) -> TrainingPass:
    """Return what the network makes of `x`.

    keep: whether there is a way back, which holds on to every layer's input.
    """
    shape = x.shape[1:]
    fitted = fit_state(state, layers(network, shape), network=network.name, stacklevel=4)
    found: dict[str, Arrays] = {path: {} for path in fitted}
    running: dict[str, Arrays] = {}
    lassos = []

    def step(path: str, node: Node, x: Array) -> Pass:
        if isinstance(node, Block):
            output, back = node.step(x, lambda name, *child: step(entry(path, name), *child))
        else:
            arrays = {name: each.astype(x.dtype) for name, each in fitted.get(path, {}).items()}
            output, back = node.step(x, arrays, found.get(path, {}), training)
            if training and isinstance(node, BatchNorm):
                running[path] = node.running(x, arrays)
            if training and isinstance(node, DynamicHeads):
                lassos.append(float(node.passed(x, arrays).lasso))
        return Pass(output, back if keep else _no_way_back)

    output, way_back = step("", lowered(network, shape).body, x)

    def back(dy: Array) -> NetworkGradients:
        dx = way_back(dy)
        return NetworkGradients(_by_entry(found), dx)

    return TrainingPass(output, math.fsum(lassos), _by_entry(running), back)


def _by_entry(arrays: dict[str, Arrays]) -> dict[str, Array]:
    named = ((path, *each) for path, own in arrays.items() for each in own.items())
    return {entry(path, name): array for path, name, array in named}


def _no_way_back(dy: Array) -> Array:
    raise AssertionError("an evaluation that keeps nothing has no gradients")
