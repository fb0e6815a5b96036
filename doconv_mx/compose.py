"""Composition in MXNet's operators, which arrays and symbols share as `F`, `mx.nd` or `mx.sym`.

No shape here names the input channels: in a network that has seen no data they are unknown.
`last` is whether the layout is channels-last. W is then kept as `(O, S, I/g)`, not `(O, I/g, S)`.
"""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
from mxnet.ndarray import NDArray
from mxnet.util import is_np_array

from doconv_core.spec import ConvSpec


def compose(F: Any, weight: Any, depthwise: Any, spec: ConvSpec, last: bool, dtype: Any) -> Any:
    """Return `W·(E + D)ᵀ`, one matrix product for each input channel.

    Where `S == M` it is `W + W·Dᵀ`; where `S > M`, D is added to E in float32 or better.

    weight: W as the layer keeps it. depthwise: D, `(I, M, S)`. Both of `dtype`; float16, for which
    MXNet has no matrix product on the CPU, is composed in float32 and rounded once.
    Returns the ordinary kernel, `(O, I/g, *kernel_size)` or `(O, *kernel_size, I/g)`, in `dtype`.
    """
    half = np.dtype(dtype).itemsize < 4
    weight, depthwise = weight.as_nd_ndarray(), depthwise.as_nd_ndarray()
    if half:
        weight, depthwise = (F.cast(p, dtype="float32") for p in (weight, depthwise))
    if spec.depth_multiplier == spec.taps:
        kernel = weight + _product(F, weight, depthwise, spec, last)
    else:  # to sum W's tiles takes MXNet longer: benchmarks/gluon_composition.py
        depthwise = F.broadcast_add(depthwise, _identity(F, depthwise, spec))
        kernel = _product(F, weight, depthwise, spec, last)
    return native(F.cast(kernel, dtype=np.dtype(dtype).name) if half else kernel)


def tied(F: Any, x: Any, weight: Any, depthwise: Any, spec: ConvSpec, channel: int) -> Any:
    """Return W and D as they are, their shapes tied to that of `x` in the symbolic graph.

    A hybridized network that meets its first batch infers every shape from one graph. Matrix
    products, slices and sums pass no shape back to their inputs; elementwise operators do. Each
    parameter gets one whose other input has the right shape, and a value that is never used; but a
    W that is itself added to the kernel has such an operator already.

    x: the layer's input. channel: the axis of its channels. Of spec, in_channels is not used.
    """
    taps, multiplier, last = spec.taps, spec.depth_multiplier, channel != 1
    weight, depthwise = weight.as_nd_ndarray(), depthwise.as_nd_ndarray()
    tie = F._internal._identity_with_attr_like_rhs
    if multiplier != taps:
        end = tuple(None if axis == channel else 1 for axis in range(spec.rank + 2))
        like = F.slice(x.as_nd_ndarray(), begin=(0,) * len(end), end=end)
        like = F.slice_axis(F.reshape(like, shape=(spec.groups, -1)), axis=0, begin=0, end=1)
        # (1, I/g) -> (I/g, S) -> W's shape: MXNet is slow at broadcasting along inner axes.
        like = F.broadcast_axis(F.reshape(like, shape=(-1, 1)), axis=1, size=multiplier)
        like = F.broadcast_axis(F.reshape(like, shape=(1, -1)), axis=0, size=spec.out_channels)
        like = F.reshape(like, shape=(0, multiplier, -1) if last else (0, -1, multiplier))
        weight = tie(weight, like)
    # From W, not from x: MXNet would take D's being known before W for a contradiction.
    split = (spec.groups, spec.out_channels_per_group, -1)
    like = F.slice_axis(F.reshape(weight, shape=split), axis=1, begin=0, end=1)
    like = F.broadcast_axis(F.reshape(like, shape=(-1, 1, multiplier)), axis=1, size=taps)
    return weight, tie(depthwise, like)


def as_w(kernel: NDArray, spec: ConvSpec, last: bool, in_channels: int) -> NDArray:
    """Return the W that an ordinary kernel becomes, in the shape in which a layer keeps it.

    in_channels: 0 where they are unknown. Of spec, in_channels is not used.
    An array of any other shape than the ordinary kernel's is returned as it is.
    """
    if spec.depth_multiplier == spec.taps or kernel.ndim != spec.rank + 2:
        return kernel
    per_group = in_channels // spec.groups or kernel.shape[-1 if last else 1]
    body = (*spec.kernel_size, per_group) if last else (per_group, *spec.kernel_size)
    if kernel.shape != (spec.out_channels, *body):
        return kernel
    axis, kernel = 1 if last else 2, kernel.as_nd_ndarray()
    kernel = kernel.reshape((0, spec.taps, -1) if last else (0, 0, spec.taps))
    rest = list(kernel.shape)
    rest[axis] = spec.depth_multiplier - spec.taps
    zeros = mx.nd.zeros(rest, ctx=kernel.context, dtype=kernel.dtype)
    return native(mx.nd.concat(kernel, zeros, dim=axis))


def native(array: Any) -> Any:
    """Return an `mx.nd` array or symbol as the kind in use: `mx.np`'s after `mx.npx.set_np()`."""
    return array.as_np_ndarray() if is_np_array() else array


def _product(F: Any, weight: Any, depthwise: Any, spec: ConvSpec, last: bool) -> Any:
    """Return `W·Dᵀ` in the ordinary kernel's shape."""
    g, o = spec.groups, spec.out_channels_per_group
    # (g, o, i, s), or (g, o, s, i) -> (g, i, o, s) -> one (O/g, S) matrix for each input channel
    split = (g, o, spec.depth_multiplier, -1) if last else (g, o, -1, spec.depth_multiplier)
    w = F.transpose(F.reshape(weight, shape=split), axes=(0, 3, 1, 2) if last else (0, 2, 1, 3))
    w = F.reshape(w, shape=(-3, 0, 0))  # -3 joins two axes
    product = F.reshape(F.batch_dot(w, depthwise, transpose_b=True), shape=(g, -1, o, spec.taps))
    product = F.transpose(product, axes=(0, 2, 3, 1) if last else (0, 2, 1, 3))
    body = (*spec.kernel_size, -1) if last else (-1, *spec.kernel_size)
    return F.reshape(product, shape=(spec.out_channels, *body))


def _identity(F: Any, depthwise: Any, spec: ConvSpec) -> Any:
    """Return E, `(1, M, S)`, in the dtype and on the device of D, whatever they are."""
    tiles, rest = divmod(spec.depth_multiplier, spec.taps)
    like = F.slice_axis(depthwise, axis=0, begin=0, end=1)
    ones = F.ones_like(F.slice_axis(like, axis=2, begin=0, end=1))
    unit = F.linalg_makediag(F.reshape(ones, shape=(1, spec.taps)))
    parts = [unit] * tiles
    if rest:
        parts.append(F.zeros_like(F.slice_axis(like, axis=2, begin=0, end=rest)))
    return F.concat(*parts, dim=2)
