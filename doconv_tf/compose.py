"""Kernel composition in Keras: the kernel of W and D, and the W that a kernel becomes."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from doconv_core.spec import ConvSpec

# So many entries of W are composed at a time: of a larger W, what lies between the operations would
# not stay in a processor's cache. Smaller pieces, or more of them, cost more in operations than
# they save. By benchmarks/training_step.py.
ENTRIES = 5 * 2**17
MOST = 8


def compose(weight: Any, depthwise: Any, spec: ConvSpec) -> Any:
    """Return `W + W·Dᵀ`, `(M, I/g, g, O/g)`: a product for each input channel, added to W.

    weight: in the layout of a convolution or a depthwise one; split by groups they are the same.
    depthwise: D, `(I, M, S)`. Types of half precision are composed in float32, and the kernel
    rounded once. Differentiable, any number of times.
    """
    dtype = keras.backend.standardize_dtype(weight.dtype)
    if dtype in ("float16", "bfloat16"):
        wide = (ops.cast(array, "float32") for array in (weight, depthwise))
        return ops.cast(compose(*wide, spec), dtype)
    g, i, o = spec.groups, spec.in_channels_per_group, spec.out_channels_per_group
    w = ops.reshape(weight, (spec.depth_multiplier, i, g, o))
    d = ops.reshape(depthwise, (g, i, spec.taps, spec.depth_multiplier))
    count = pieces(spec)
    if count == 1:
        return _composed(w, d, spec)
    # ops.split, because the gradient of each slice would be as large as the whole.
    bounds = [i * n // count for n in range(1, count)]
    parts = zip(ops.split(w, bounds, axis=1), ops.split(d, bounds, axis=1), strict=True)
    return ops.concatenate([_composed(*part, spec) for part in parts], axis=1)


def pieces(spec: ConvSpec) -> int:
    """Return into how many pieces, of neighbouring input channels, W is cut for composition.

    More than one on TensorFlow alone: JAX's compiler arranges the operations itself, and is slower
    with pieces.
    """
    if keras.backend.backend() != "tensorflow":
        return 1
    entries = spec.depth_multiplier * spec.in_channels_per_group * spec.out_channels
    return min(-(-entries // ENTRIES), MOST, spec.in_channels_per_group)


def _composed(w: Any, d: Any, spec: ConvSpec) -> Any:
    """Return the kernel's `(M, i, g, o)` for W's `(S, i, g, o)` and D's `(g, i, M, S)`."""
    taps, tiles = spec.taps, spec.depth_multiplier // spec.taps
    w = ops.transpose(w, (2, 1, 0, 3))
    base = w
    if spec.depth_multiplier != taps:
        g, i, _, o = w.shape
        base = ops.sum(ops.reshape(w[:, :, : tiles * taps], (g, i, tiles, taps, o)), axis=2)
    # D is not added to the unit matrix: a processor that multiplies with fewer bits than float32
    # has (TensorFloat-32) would round W itself. Added before the axes are put back, while the
    # product is in the cache. The operator, because ops.matmul turns float64 into float32 where
    # Keras runs on PyTorch.
    return ops.transpose(base + d @ w, (2, 1, 0, 3))


def as_weight(kernel: Any, spec: ConvSpec) -> Any:
    """Return the W that an ordinary kernel becomes, in the shape in which a layer keeps it."""
    if spec.parameter_shape == spec.kernel_shape:
        return kernel
    flat = ops.reshape(kernel, (spec.taps, *kernel.shape[-2:]))
    return ops.pad(flat, [(0, spec.depth_multiplier - spec.taps), (0, 0), (0, 0)])
