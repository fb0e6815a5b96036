"""A network's output and gradients, in NumPy alone: what every framework must agree with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.maths.numeric import as_floats
from doconv_core.networks.layers import fitted
from doconv_core.networks.lowering import lowered
from doconv_core.networks.nodes import Concat, Network, Node, Residual, Scale, Sequence
from doconv_core.networks.operations import OPERATIONS, Array, Arrays, Step
from doconv_core.networks.shapes import children
from doconv_core.state.file import State, entry


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
    run, body = _start(network, state, x, training, keep=False)
    return run.step("", body, x).output


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
    run, body = _start(network, state, x, training, keep=True)
    output, back = run.step("", body, x)
    dy = as_floats("output_gradient", output_gradient)
    if dy.shape != output.shape:
        raise ValueError(f"output_gradient must have shape {output.shape}; received {dy.shape}.")
    dx, found = back(dy.astype(x.dtype))
    order = [entry(path, name) for path, arrays in run.arrays.items() for name in arrays]
    return NetworkGradients({name: found[name] for name in order if name in found}, dx)


def _checked(x: ArrayLike) -> Array:
    x = as_floats("x", x)
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"x must be float32 or float64; received {x.dtype}.")
    if x.ndim != 4:
        raise ValueError(f"x must have axes (B, C, H, W); received shape {x.shape}.")
    return x


@dataclass(frozen=True)
class _Run:
    """What all nodes of one evaluation share. keep: whether the way back will be asked for."""

    arrays: dict[str, Arrays]
    training: bool
    keep: bool

    def step(self, path: str, node: Node, x: Array) -> Step:
        """Return what the node at `path` makes of `x`; its gradients are by entry of the state."""
        if isinstance(node, Residual):
            return self.residual(path, node, x)
        if isinstance(node, Scale):
            return self.scale(path, node, x)
        if isinstance(node, Concat):
            return self.concat(path, node, x)
        if isinstance(node, Sequence):
            return self.sequence(path, node, x)
        output, back = OPERATIONS[type(node)](node, self.arrays.get(path, {}), x, self.training)

        def named(dy: Array) -> tuple[Array, Arrays]:
            dx, found = back(dy)
            return dx, {entry(path, name): gradient for name, gradient in found.items()}

        return Step(output, named)

    def sequence(self, path: str, node: Sequence, x: Array) -> Step:
        backs = []
        for name, child in node.children:
            x, back = self.step(entry(path, name), child, x)
            backs += [back] if self.keep else []  # which holds on to every input

        def through(dy: Array) -> tuple[Array, Arrays]:
            found: Arrays = {}
            for back in reversed(backs):
                dy, more = back(dy)
                found |= more
            return dy, found

        return Step(x, through)

    def residual(self, path: str, node: Residual, x: Array) -> Step:
        body, body_back = self.sequence(path, node.body, x)
        short, short_back = self.sequence(entry(path, "shortcut"), node.shortcut, x)

        def back(dy: Array) -> tuple[Array, Arrays]:
            of_short, found = short_back(dy)
            of_body, more = body_back(dy)
            return of_body + of_short, found | more

        return Step(body + short, back)

    def scale(self, path: str, node: Scale, x: Array) -> Step:
        factors, factors_back = self.sequence(path, node.body, x)

        def back(dy: Array) -> tuple[Array, Arrays]:
            dx, found = factors_back((dy * x).sum((2, 3), keepdims=True))
            return dx + dy * factors, found

        return Step(x * factors, back)

    def concat(self, path: str, node: Concat, x: Array) -> Step:
        steps = [self.step(entry(path, name), child, x) for name, child in children(node)]
        ends = np.cumsum([output.shape[1] for output, _ in steps])[:-1]

        def back(dy: Array) -> tuple[Array, Arrays]:
            parts = np.split(dy, ends, axis=1)
            dx, found = np.zeros_like(x), dict[str, Array]()
            for step, part in zip(steps, parts, strict=True):
                of_branch, more = step.back(part)
                dx, found = dx + of_branch, found | more
            return dx, found

        return Step(np.concatenate([output for output, _ in steps], axis=1), back)


def _start(
    network: Network, state: State, x: Array, training: bool, keep: bool
) -> tuple[_Run, Sequence]:
    shape = x.shape[1:]
    arrays = {
        path: {name: array.astype(x.dtype) for name, array in of_layer.items()}
        for path, of_layer in fitted(network, state, shape, stacklevel=4).items()
    }
    return _Run(arrays, training, keep), lowered(network, shape).body
