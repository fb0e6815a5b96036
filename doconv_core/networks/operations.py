"""What each kind of node without children computes, in NumPy, and its gradient.

Each function takes the node, its arrays by name, the input, `(B, C, H, W)` or `(B, features)`, and
whether the network is in training; it returns a `Step`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from doconv_core.kinds.base import composed_by
from doconv_core.maths.convolve import convolve, convolve_gradient, pad_gradient
from doconv_core.networks.lowering import conv_spec
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Conv,
    Dropout,
    Flatten,
    GlobalPool,
    Linear,
    Node,
    Pool,
)
from doconv_core.networks.shapes import padding

Array = NDArray[Any]
Arrays = dict[str, Array]


class Step(NamedTuple):
    """A node's output, and `back`: from its gradient to the input's, and to those of the arrays."""

    output: Array
    back: Callable[[Array], tuple[Array, Arrays]]


def convolution(node: Conv, arrays: Arrays, x: Array, training: bool) -> Step:
    """The convolution with the kernel, which a composed layer composes of its weights."""
    conv = conv_spec(node, x.shape[1:])
    kind = composed_by(node.kind, conv)
    weights = {name: array for name, array in arrays.items() if name != "bias"}
    if kind is None:
        kernel = weights["weight"].reshape(conv.kernel_shape)
    else:
        kernel = kind.compose(weights, kind.spec(conv))
    how: Any = {"stride": node.stride, "padding": padding(node), "groups": conv.groups}

    def back(dy: Array) -> tuple[Array, Arrays]:
        dx, dkernel, dbias = convolve_gradient(x, kernel, dy, **how)
        if kind is None:
            found = {"weight": dkernel.reshape(weights["weight"].shape)}
        else:
            found = kind.gradient(weights, dkernel, kind.spec(conv))
        return dx, found | ({"bias": dbias} if "bias" in arrays else {})

    return Step(convolve(x, kernel, arrays.get("bias"), **how), back)


def batch_norm(node: BatchNorm, arrays: Arrays, x: Array, training: bool) -> Step:
    """In training with the batch's own mean and biased variance, else with the running ones."""
    axes = (0, *range(2, x.ndim))
    gamma = _along_channels(arrays.get("gamma", np.ones(x.shape[1], x.dtype)), x)
    if training:
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    else:
        mean, variance = (_along_channels(arrays[f"running_{s}"], x) for s in ("mean", "var"))
    factor = 1 / np.sqrt(variance + x.dtype.type(node.epsilon))
    normal = (x - mean) * factor
    output = normal * gamma
    if node.affine:
        output = output + _along_channels(arrays["beta"], x)

    def back(dy: Array) -> tuple[Array, Arrays]:
        dx = dy * gamma
        if training:  # the statistics depend on x too
            dx = dx - dx.mean(axes, keepdims=True) - normal * _mean_product(dx, normal, axes)
        found = {"gamma": (dy * normal).sum(axes), "beta": dy.sum(axes)} if node.affine else {}
        return dx * factor, found

    return Step(output, back)


def _mean_product(a: Array, b: Array, axes: tuple[int, ...]) -> Any:
    return (a * b).mean(axes, keepdims=True)


def _along_channels(vector: Array, x: Array) -> Array:
    return vector.reshape(-1, *(1,) * (x.ndim - 2))


def activation(node: Activation, arrays: Arrays, x: Array, training: bool) -> Step:
    """tanh; ReLU; ReLU6 = min(ReLU, 6); hard sigmoid = ReLU6(x + 3) / 6; hard swish: x times it."""
    name, zero, six = node.name, x.dtype.type(0), x.dtype.type(6)
    if name == "relu":
        return Step(np.maximum(x, zero), lambda dy: (dy * (x > 0), {}))
    if name == "relu6":
        return Step(np.clip(x, zero, six), lambda dy: (dy * ((x > 0) & (x < 6)), {}))
    if name == "tanh":
        output = np.tanh(x)
        return Step(output, lambda dy: (dy * (1 - output**2), {}))
    sigmoid = np.clip(x + six / 2, zero, six) / six
    slope = ((x > -3) & (x < 3)) / six
    if name == "hard_sigmoid":
        return Step(sigmoid, lambda dy: (dy * slope, {}))
    return Step(x * sigmoid, lambda dy: (dy * (sigmoid + x * slope), {}))


def pool(node: Pool, arrays: Arrays, x: Array, training: bool) -> Step:
    """The largest entry of each window, the first of equals; or the mean of those not padded."""
    shares, windows = _shares(node, x)  # of each entry in its window: (B, C, *out, taps)
    output = (shares * np.where(shares > 0, windows, 0)).sum(-1)

    def back(dy: Array) -> tuple[Array, Arrays]:
        around, (rows, columns) = node.padding, x.shape[2:]
        dx = np.zeros((*x.shape[:2], rows + 2 * around, columns + 2 * around), x.dtype)
        for tap, (i, j) in enumerate(product(range(node.size), repeat=2)):
            at: Any = tuple(
                slice(first, first + node.stride * (n - 1) + 1, node.stride)
                for first, n in zip((i, j), dy.shape[2:], strict=True)
            )
            dx[(..., *at)] += dy * shares[..., tap]
        return pad_gradient(dx, (rows, columns), around), {}

    return Step(output, back)


def _shares(node: Pool, x: Array) -> tuple[Array, Array]:
    """Return how much each entry of each window counts, and the windows."""
    windows = _windows(x, node, -np.inf)
    if node.name == "max":
        chosen = np.arange(windows.shape[-1]) == windows.argmax(-1)[..., None]
        return chosen.astype(x.dtype), windows
    inside = _windows(np.ones((1, 1, *x.shape[2:]), x.dtype), node, 0)
    return np.broadcast_to(inside / inside.sum(-1, keepdims=True), windows.shape), windows


def _windows(x: Array, node: Pool, outside: float) -> Array:
    pairs = ((0, 0), (0, 0), *((node.padding, node.padding),) * 2)
    padded = np.pad(x, pairs, constant_values=outside)
    axes: Any = (2, 3)  # the stubs know a single axis only
    windows: Array = sliding_window_view(padded, (node.size, node.size), axes)
    windows = windows[:, :, :: node.stride, :: node.stride]
    return windows.reshape(*windows.shape[:4], -1)


def global_pool(node: GlobalPool, arrays: Arrays, x: Array, training: bool) -> Step:
    """The mean over all positions, which stay as two axes of length 1."""
    share = x.dtype.type(1 / (x.shape[2] * x.shape[3]))
    output = x.mean((2, 3), keepdims=True)
    return Step(output, lambda dy: (np.broadcast_to(dy * share, x.shape), {}))


def flatten(node: Flatten, arrays: Arrays, x: Array, training: bool) -> Step:
    """All but the batch axis in one."""
    return Step(x.reshape(len(x), -1), lambda dy: (dy.reshape(x.shape), {}))


def dropout(node: Dropout, arrays: Arrays, x: Array, training: bool) -> Step:
    """Nothing, in inference; in training it is random, which no evaluation can agree on."""
    if training and node.rate:
        raise ValueError(
            "dropout is random in training, so that no output is the right one; evaluate with "
            f"training=False, or a network with rate 0; received rate={node.rate}."
        )
    return Step(x, lambda dy: (dy, {}))


def linear(node: Linear, arrays: Arrays, x: Array, training: bool) -> Step:
    """The product with the weight, `(out, in)`, and the bias."""
    weight, bias = arrays["weight"], arrays.get("bias")

    def back(dy: Array) -> tuple[Array, Arrays]:
        found = {"weight": dy.T @ x}
        return dy @ weight, found | ({} if bias is None else {"bias": dy.sum(0)})

    output = x @ weight.T
    return Step(output if bias is None else output + bias, back)


OPERATIONS: dict[type[Node], Callable[[Any, Arrays, Array, bool], Step]] = {
    Conv: convolution,
    BatchNorm: batch_norm,
    Activation: activation,
    Pool: pool,
    GlobalPool: global_pool,
    Flatten: flatten,
    Dropout: dropout,
    Linear: linear,
}
