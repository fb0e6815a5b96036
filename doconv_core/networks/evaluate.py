"""A network's output and gradients, in NumPy alone: what every framework must agree with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.maths.numeric import as_floats
from doconv_core.networks.lowering import layers, lowered
from doconv_core.networks.nodes import Arrays, Block, Network, Node, Pass
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
    return _passed(network, state, x, training, keep=False)[0].output


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
    (output, back), found = _passed(network, state, x, training, keep=True)
    dy = as_floats("output_gradient", output_gradient)
    if dy.shape != output.shape:
        raise ValueError(f"output_gradient must have shape {output.shape}; received {dy.shape}.")
    dx = back(dy.astype(x.dtype))
    named = ((path, *each) for path, arrays in found.items() for each in arrays.items())
    return NetworkGradients({entry(path, name): array for path, name, array in named}, dx)


def _checked(x: ArrayLike) -> Array:
    x = as_floats("x", x)
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"x must be float32 or float64; received {x.dtype}.")
    if x.ndim != 4:
        raise ValueError(f"x must have axes (B, C, H, W); received shape {x.shape}.")
    return x


def _passed(
    network: Network, state: State, x: Array, training: bool, *, keep: bool
) -> tuple[Pass, dict[str, Arrays]]:
    """Return what the network makes of `x`, and where its `back` puts gradients of the arrays.

    keep: whether there is a way back, which holds on to every layer's input.
    """
    shape = x.shape[1:]
    fitted = fit_state(state, layers(network, shape), network=network.name, stacklevel=4)
    found: dict[str, Arrays] = {path: {} for path in fitted}

    def step(path: str, node: Node, x: Array) -> Pass:
        if isinstance(node, Block):
            output, back = node.step(x, lambda name, *child: step(entry(path, name), *child))
        else:
            arrays = {name: each.astype(x.dtype) for name, each in fitted.get(path, {}).items()}
            output, back = node.step(x, arrays, found.get(path, {}), training)
        return Pass(output, back if keep else _no_way_back)

    return step("", lowered(network, shape).body, x), found


def _no_way_back(dy: Array) -> Array:
    raise AssertionError("an evaluation that keeps nothing has no gradients")
