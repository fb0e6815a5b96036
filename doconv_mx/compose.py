"""Composition in MXNet's operators, which arrays and symbols share as `F`, `mx.nd` or `mx.sym`.

No shape here names the input channels: in a network that has seen no data they are unknown.
`last` is whether the layout is channels-last. W is then kept as `(O, S, I/g)`, not `(O, I/g, S)`.
"""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
from mxnet.gluon import Parameter
from mxnet.ndarray import NDArray

from doconv_core.maths.spec import ConvSpec
from doconv_mx.parameter import native
from doconv_mx.private import has_values, tie

# From so many entries of W a convolution is the faster: benchmarks/gluon_composition.py
LARGE = 2**15


def compose(
    F: Any, weight: Any, depthwise: Any, spec: ConvSpec, last: bool, dtype: Any, channels: int = 0
) -> Any:
    """Return `W·(E + D)ᵀ`, one matrix product for each input channel.

    With `channels` these are one grouped convolution; without, one product of batches, to which W
    itself is added where `S == M`. In both D is added to E in float32 or better.

    weight: W as the layer keeps it. depthwise: D, `(I, M, S)`. Both of `dtype`; float16, for which
    MXNet has no matrix product on the CPU, is composed in float32 and rounded once.
    channels: what `grouped` says.
    Returns the ordinary kernel, `(O, I/g, *kernel_size)` or `(O, *kernel_size, I/g)`, in `dtype`.
    """
    half = np.dtype(dtype).itemsize < 4
    weight, depthwise = weight.as_nd_ndarray(), depthwise.as_nd_ndarray()
    if half:
        weight, depthwise = (F.cast(p, dtype="float32") for p in (weight, depthwise))
    if channels or spec.depth_multiplier != spec.taps:
        # A sum with W, or of W's tiles, takes MXNet longer: benchmarks/gluon_composition.py
        kernel = _product(F, weight, _plus_identity(F, depthwise, spec), spec, last, channels)
    else:
        kernel = weight + _product(F, weight, depthwise, spec, last, channels)
    return native(F.cast(kernel, dtype=np.dtype(dtype).name) if half else kernel)


def grouped(weight: Parameter, spec: ConvSpec, in_channels: int) -> int:
    """Return the number of groups, I, in which to compose by a convolution; 0 for batches.

    On the CPU, oneDNN's convolution shares the groups out among the threads, where MXNet multiplies
    the matrices of a batch one by one, by one thread; a small W is done before that pays. There is
    no oneDNN in float64, and where a group has a multiple of four channels, it keeps the filters in
    an order that MXNet 1.9 fails to convert.

    weight: the parameter W. in_channels: 0 where they are unknown, as long as W waits for them. Of
    spec, in_channels is not used.
    """
    size = spec.out_channels_per_group * in_channels * spec.depth_multiplier
    if size < LARGE or spec.depth_multiplier % 4 == 0 or np.dtype(weight.dtype).itemsize > 4:
        return 0
    on_cpu = has_values(weight) and all(c.device_type == "cpu" for c in weight.list_ctx())
    return in_channels if on_cpu else 0


def tied(F: Any, weight: Any, depthwise: Any, spec: ConvSpec) -> Any:
    """Return D as it is, its shape tied to that of W in the symbolic graph.

    weight: W as the layer keeps it. From W, not from the input: MXNet would take D's being known
    before W for a contradiction. Of spec, in_channels is not used.
    """
    taps, multiplier = spec.taps, spec.depth_multiplier
    split = (spec.groups, spec.out_channels_per_group, -1)
    like = F.reshape(weight.as_nd_ndarray(), shape=split)
    like = F.slice_axis(like, axis=1, begin=0, end=1)
    like = F.broadcast_axis(F.reshape(like, shape=(-1, 1, multiplier)), axis=1, size=taps)
    return tie(F, depthwise.as_nd_ndarray(), like)


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


def _product(F: Any, weight: Any, depthwise: Any, spec: ConvSpec, last: bool, channels: int) -> Any:
    """Return `W·Dᵀ` in the ordinary kernel's shape."""
    g, o = spec.groups, spec.out_channels_per_group

    def multiply(w: Any) -> Any:
        if channels:
            return _by_convolution(F, w, depthwise, spec, channels)
        return _by_batches(F, w, depthwise, spec)

    if g == 1 and not last:  # transposed as it is: a variable's reshape is a copy
        rest = 1 + spec.rank if spec.depth_multiplier == spec.taps else 2
        axes = (1, 0, *range(2, 1 + rest))
        product = multiply(F.transpose(weight, axes=axes))
        product = F.reshape(product, shape=(-1, o, *spec.kernel_size))
        return F.transpose(product, axes=(1, 0, *range(2, 2 + spec.rank)))
    # (g, o, i, s), or (g, o, s, i) -> (g, i, o, s) -> one (O/g, S) matrix for each input channel
    split = (g, o, spec.depth_multiplier, -1) if last else (g, o, -1, spec.depth_multiplier)
    w = F.transpose(F.reshape(weight, shape=split), axes=(0, 3, 1, 2) if last else (0, 2, 1, 3))
    product = F.reshape(multiply(w), shape=(g, -1, o, spec.taps))
    product = F.transpose(product, axes=(0, 2, 3, 1) if last else (0, 2, 1, 3))
    body = (*spec.kernel_size, -1) if last else (-1, *spec.kernel_size)
    return F.reshape(product, shape=(spec.out_channels, *body))


def _by_batches(F: Any, weight: Any, depthwise: Any, spec: ConvSpec) -> Any:
    """Return `W·Dᵀ`, `(I, O/g, M)`, of a W of I matrices `(O/g, S)`, in any shape."""
    matrices = F.reshape(weight, shape=(-1, spec.out_channels_per_group, spec.depth_multiplier))
    return F.batch_dot(matrices, depthwise, transpose_b=True)


def _by_convolution(F: Any, weight: Any, depthwise: Any, spec: ConvSpec, channels: int) -> Any:
    """Return what `_by_batches` does, as `(1, I·O/g, M)`.

    D's taps are the places of an image with a group of S channels for each input channel, and the
    rows of W are filters of one tap: so both are in the order in which a convolution reads them.
    """
    taps, multiplier = spec.taps, spec.depth_multiplier
    image = F.reshape(F.transpose(depthwise, axes=(0, 2, 1)), shape=(1, -1, taps))
    filters = F.reshape(weight, shape=(-1, multiplier, 1))
    return F.Convolution(
        image, filters, kernel=(1,), num_filter=channels * spec.out_channels_per_group,
        num_group=channels, no_bias=True,
    )  # fmt: skip


def _plus_identity(F: Any, depthwise: Any, spec: ConvSpec) -> Any:
    """Return `E + D`; E is made of D's shape alone, in its dtype and on its device."""
    tiles, rest = divmod(spec.depth_multiplier, spec.taps)
    # Of D's own shape and without a gradient: MXNet is slow at both broadcasting and summing.
    like = F.slice_axis(F.BlockGrad(depthwise), axis=2, begin=0, end=max(rest, 1))
    ones = F.ones_like(F.slice_axis(like, axis=2, begin=0, end=1))
    unit = F.linalg_makediag(F.reshape(ones, shape=(0, -1)))
    parts = [unit] * tiles + [F.zeros_like(like)] * (rest > 0)
    return depthwise + (F.concat(*parts, dim=2) if len(parts) > 1 else unit)
