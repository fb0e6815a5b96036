"""Kernel composition in Keras: the kernel of W and D, and the W that a kernel becomes."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import keras
from keras import ops

from doconv_core.maths.spec import ConvSpec
from doconv_tf.private import has_onednn


class Rule(NamedTuple):
    """How W is cut for composition on TensorFlow.

    entries: of W, to be composed at a time; of a larger W, what lies between the operations would
    not stay in a processor's cache. product: the multiplications of one matrix product at most,
    unless a block had fewer columns then than these.
    """

    entries: int
    product: int
    columns: int = 64


class Cut(NamedTuple):
    """Into how many parts W is cut: pieces of its input channels, blocks of its output channels."""

    pieces: int
    blocks: int


# With oneDNN, which TensorFlow uses by default on processors with AVX-512, and without it: then a
# larger product is shared out among the threads by itself, one after the other, which takes longer
# than the product. Smaller pieces and products, or more of them, cost more in operations than they
# save. By benchmarks/training_step.py, with TF_ENABLE_ONEDNN_OPTS=1 and 0.
ONEDNN = Rule(5 * 2**17, 2**62)
EIGEN = Rule(9 * 2**15, 2**14)
MOST = 8  # pieces


def compose(weight: Any, depthwise: Any, spec: ConvSpec) -> Any:
    """Return `W + W·Dᵀ`, `(M, I/g, g, O/g)`: a product for each input channel, added to W.

    weight: in the layout of a convolution or a depthwise one; split by groups they are the same.
    depthwise: D, `(I, M, S)`. Types of half precision are composed in float32, and the kernel
    rounded once. Differentiable, any number of times.
    """
    dtype = keras.backend.standardize_dtype(weight.dtype)
    if dtype in ("float16", "bfloat16"):
        weight, depthwise = ops.cast(weight, "float32"), ops.cast(depthwise, "float32")
        return ops.cast(compose(weight, depthwise, spec), dtype)
    g, i, o = spec.groups, spec.in_channels_per_group, spec.out_channels_per_group
    w = ops.reshape(weight, (spec.depth_multiplier, i, g, o))
    d = ops.reshape(depthwise, (g, i, spec.taps, spec.depth_multiplier))
    count, blocks = cut(spec)
    if count == 1:
        return _composed(w, d, spec, blocks)
    # ops.split, because the gradient of each slice would be as large as the whole.
    bounds = [i * n // count for n in range(1, count)]
    parts = zip(ops.split(w, bounds, axis=1), ops.split(d, bounds, axis=1), strict=True)
    return ops.concatenate([_composed(*part, spec, blocks) for part in parts], axis=1)


def cut(spec: ConvSpec) -> Cut:
    """Return how W is cut for composition.

    On TensorFlow alone: JAX's compiler arranges the operations itself, and is slower with pieces.
    """
    if keras.backend.backend() != "tensorflow":
        return Cut(1, 1)
    i, o, by = spec.in_channels_per_group, spec.out_channels_per_group, rule()
    entries = spec.depth_multiplier * i * spec.out_channels
    square = spec.taps * spec.depth_multiplier
    counts = range(1, max(o // by.columns, 1) + 1)
    blocks = next((n for n in counts if o % n == 0 and square * o <= n * by.product), 1)
    return Cut(min(-(-entries // by.entries), MOST, i), blocks)


@cache
def rule() -> Rule:
    """Return the rule for this process's TensorFlow."""
    return ONEDNN if has_onednn() else EIGEN


def _composed(w: Any, d: Any, spec: ConvSpec, blocks: int) -> Any:
    """Return the kernel's `(M, i, g, o)` for W's `(S, i, g, o)` and D's `(g, i, M, S)`."""
    taps, tiles = spec.taps, spec.depth_multiplier // spec.taps
    back: tuple[int, ...]
    _, i, g, o = shape = w.shape
    if blocks == 1:
        w, back = ops.transpose(w, (2, 1, 0, 3)), (2, 1, 0, 3)
    else:  # another axis, of which each block has a product of its own
        w = ops.reshape(w, (*shape[:3], blocks, o // blocks))
        w, back, d = ops.transpose(w, (2, 1, 3, 0, 4)), (3, 1, 0, 2, 4), d[:, :, None]
    base = w
    if spec.depth_multiplier != taps:
        *outer, _, inner = w.shape
        rows = ops.reshape(w[..., : tiles * taps, :], (*outer, tiles, taps, inner))
        base = ops.sum(rows, axis=-3)
    # D is not added to the unit matrix: a processor that multiplies with fewer bits than float32
    # has (TensorFloat-32) would round W itself. Added before the axes are put back, while the
    # product is in the cache. The operator, because ops.matmul turns float64 into float32 where
    # Keras runs on PyTorch.
    kernel = ops.transpose(base + d @ w, back)
    return kernel if blocks == 1 else ops.reshape(kernel, (taps, i, g, o))


def as_weight(kernel: Any, spec: ConvSpec) -> Any:
    """Return the W that an ordinary kernel becomes, in the shape in which a layer keeps it."""
    if spec.parameter_shape == spec.kernel_shape:
        return kernel
    flat = ops.reshape(kernel, (spec.taps, *kernel.shape[-2:]))
    return ops.pad(flat, [(0, spec.depth_multiplier - spec.taps), (0, 0), (0, 0)])
