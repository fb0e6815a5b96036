"""A network's output and gradients, in NumPy alone: what every framework must agree with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.maths.numeric import as_floats
from doconv_core.networks.lowering import layers, lowered
from doconv_core.networks.nodes import Arrays, Block, Network, Node, Step
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
    return _step(network, state, x, training, keep=False).output


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
    output, back = _step(network, state, x, training, keep=True)
    dy = as_floats("output_gradient", output_gradient)
    if dy.shape != output.shape:
        raise ValueError(f"output_gradient must have shape {output.shape}; received {dy.shape}.")
    dx, found = back(dy.astype(x.dtype))
    return NetworkGradients(found, dx)


def _checked(x: ArrayLike) -> Array:
    x = as_floats("x", x)
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"x must be float32 or float64; received {x.dtype}.")
    if x.ndim != 4:
        raise ValueError(f"x must have axes (B, C, H, W); received shape {x.shape}.")
    return x


def _step(network: Network, state: State, x: Array, training: bool, keep: bool) -> Step:
    """Return the output; its gradients are by entry of the state. keep: whether there are any."""
    shape = x.shape[1:]
    fitted = fit_state(state, layers(network, shape), network=network.name, stacklevel=4)
    arrays = {
        path: {name: array.astype(x.dtype) for name, array in of_layer.items()}
        for path, of_layer in fitted.items()
    }

    def step(path: str, node: Node, x: Array) -> Step:
        if isinstance(node, Block):
            output, back = node.step(x, lambda name, *child: step(entry(path, name), *child))
        else:
            output, own = node.step(x, arrays.get(path, {}), training)

            def back(dy: Array) -> tuple[Array, Arrays]:
                dx, found = own(dy)
                return dx, {entry(path, name): gradient for name, gradient in found.items()}

        return Step(output, back if keep else _forgotten)

    return step("", lowered(network, shape).body, x)


def _forgotten(dy: Array) -> tuple[Array, Arrays]:
    """Hold on to no input, unlike what it stands for."""
    raise AssertionError("nobody asks for the gradients of an output alone")
