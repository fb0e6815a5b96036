"""Composition in Keras on TensorFlow: whole and in pieces, against the core, with derivatives."""

from __future__ import annotations

import numpy as np
import pytest
from cases import one_test
from equal import assert_same
from frameworks import need

need("tf")

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import ops  # noqa: E402
from keras_layers import array  # noqa: E402

from doconv_core import (  # noqa: E402
    ConvSpec,
    compose_gradient,
    difference,
    from_canonical,
    to_canonical,
)
from doconv_core import compose as expected_kernel  # noqa: E402
from doconv_tf import DOConv2D  # noqa: E402
from doconv_tf import compose as module  # noqa: E402

SPECS = [
    ConvSpec(7, 5, (3, 3)),
    ConvSpec(1, 13, (3, 3)),
    ConvSpec(11, 1, (2, 3)),
    ConvSpec(6, 10, (3,), 2),
    ConvSpec(15, 9, (3, 3), 3),
    ConvSpec(5, 10, (3, 3), 5),
    ConvSpec(5, 7, (2, 2, 3)),
    ConvSpec(7, 3, (3, 3), depth_multiplier=12),
    ConvSpec(10, 6, (2, 2), 2, 9),
    ConvSpec(5, 12, (3, 3)),
    ConvSpec(6, 8, (2, 2), 2, 9),
]
EACH = pytest.mark.parametrize("spec", SPECS, ids=str)
RULES = {
    "whole": module.ONEDNN, "pieces": module.Rule(100, 2**62), "channels": module.Rule(1, 2**62),
    "blocks": module.Rule(2**20, 250, 1), "both": module.Rule(100, 120, 1),
}  # fmt: skip


@pytest.fixture(params=RULES)
def rule(request, monkeypatch):
    monkeypatch.setattr(module, "rule", lambda: RULES[request.param])


with_rule = pytest.mark.usefixtures("rule")


def problem(spec, dtype="float64"):
    """Return W, D and a kernel's gradient in the core's layout."""
    rng = np.random.default_rng(0)
    shapes = (spec.weight_shape, spec.depthwise_shape, spec.kernel_shape)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def keras_weight(weight, spec):
    """Return W in Keras' layout, with its S in the place of the kernel's size."""
    return tf.constant(from_canonical(weight, "*IO", spec.groups))


def composed(weight, depthwise, spec):
    """Return the kernel in the shape `(M, I/g, O)`."""
    kernel = module.compose(weight, depthwise, spec)
    return ops.reshape(kernel, (spec.taps, spec.in_channels_per_group, spec.out_channels))


@with_rule
@one_test
@EACH
def test_kernel_and_gradients_are_the_cores(spec):
    weight, depthwise, gradient = problem(spec)
    w, d = keras_weight(weight, spec), tf.constant(depthwise)
    flat = gradient.reshape(*gradient.shape[:2], spec.taps)
    with tf.GradientTape() as tape:
        tape.watch([w, d])
        kernel = composed(w, d, spec)
    by_weight, by_depthwise = tape.gradient(kernel, [w, d], keras_weight(flat, spec))
    expected = expected_kernel(weight, depthwise, spec).reshape(flat.shape)
    assert difference(to_canonical(array(kernel), "*IO"), expected).relative < 1e-14
    expected = compose_gradient(weight, depthwise, gradient, spec)
    assert difference(to_canonical(array(by_weight), "*IO"), expected[0]).relative < 1e-14
    assert difference(array(by_depthwise), expected[1]).relative < 1e-14


@with_rule
@one_test
@EACH
def test_second_derivatives(spec):
    """K is bilinear: the derivative of `<G, K>` by W along U, by D, is that of `<G, U·Dᵀ>` by D."""
    weight, depthwise, gradient = problem(spec)
    w, d = keras_weight(weight, spec), tf.constant(depthwise)
    g = keras_weight(gradient.reshape(*gradient.shape[:2], spec.taps), spec)
    direction = np.random.default_rng(1).standard_normal(weight.shape)
    with tf.GradientTape() as second:
        second.watch(d)
        with tf.GradientTape() as first:
            first.watch(w)
            loss = ops.sum(composed(w, d, spec) * g)
        along = ops.sum(first.gradient(loss, w) * keras_weight(direction, spec))
    _, expected = compose_gradient(direction, depthwise, gradient, spec)
    assert difference(array(second.gradient(along, d)), expected).relative < 1e-13


@with_rule
@one_test
@EACH
def test_without_d_the_kernel_is_w_bit_for_bit(spec):
    weight, depthwise, _ = problem(spec, "float32")
    depthwise = np.zeros_like(depthwise)
    kernel = composed(keras_weight(weight, spec), tf.constant(depthwise), spec)
    expected = expected_kernel(weight, depthwise, spec)
    expected = expected.reshape(*expected.shape[:2], spec.taps)
    assert_same(to_canonical(array(kernel), "*IO"), expected)


@with_rule
@one_test
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_composed_in_float32_and_rounded_once(dtype):
    layer, wide = DOConv2D(6, 3, groups=2, dtype=dtype), DOConv2D(6, 3, groups=2, dtype="float32")
    rng = np.random.default_rng(0)
    for each in (layer, wide):
        each.build((None, 8, 8, 10))
    for ours, theirs in zip(layer.weights, wide.weights, strict=True):
        ours.assign(rng.standard_normal(ours.shape))
        theirs.assign(ops.cast(ours, "float32"))
    kernel = layer.composed_kernel()
    assert keras.backend.standardize_dtype(kernel.dtype) == dtype
    assert_same(kernel, ops.cast(wide.composed_kernel(), dtype))


@one_test
@pytest.mark.parametrize(
    ("rule", "products"),
    [(module.EIGEN, [(7, 5)]), (module.Rule(30, 2**62), [(1, 5)] * 7),
     (module.Rule(150, 2**62), [(2, 5), (2, 5), (3, 5)]), (module.Rule(2**20, 81, 1), [(7, 5, 1)]),
     (module.Rule(2**20, 80, 1), [(7, 5)])],
)  # fmt: skip
def test_each_piece_is_one_product_of_its_blocks(monkeypatch, rule, products):
    monkeypatch.setattr(module, "rule", lambda: rule)
    spec = ConvSpec(7, 5, (3, 3))
    _, d, _ = problem(spec)
    signature = tf.TensorSpec((9, 7, 5), "float64"), tf.TensorSpec(d.shape, "float64")
    graph = tf.function(lambda w, d: composed(w, d, spec)).get_concrete_function(*signature).graph
    nodes = [node for node in graph.get_operations() if node.type == "BatchMatMulV2"]
    # Of (g, i, M, O/g), or of (g, i, blocks, M, O/g/blocks).
    shapes = [tuple(node.outputs[0].shape) for node in nodes]
    assert [(shape[1], *shape[2:-2], shape[-1]) for shape in shapes] == products


def test_w_is_cut_where_it_is_larger_than_a_cache(monkeypatch):
    def cuts(rule, *channels):
        monkeypatch.setattr(module, "rule", lambda: rule)
        return {c: tuple(module.cut(ConvSpec(c, c, (3, 3)))) for c in channels}

    large = cuts(module.ONEDNN, 1, 64, 256, 512, 4096)
    assert large == {1: (1, 1), 64: (1, 1), 256: (1, 1), 512: (4, 1), 4096: (8, 1)}
    large = cuts(module.EIGEN, 1, 128, 256, 512, 509, 4096)
    assert large == {1: (1, 1), 128: (1, 1), 256: (2, 2), 512: (8, 4), 509: (8, 1), 4096: (8, 32)}
    assert module.cut(ConvSpec(1, 2**20, (3, 3))).pieces == 1  # one input channel is not cut
    assert module.cut(ConvSpec(64, 64, (7, 7))) == (1, 1)  # for products of too few columns
    assert module.cut(ConvSpec(512, 512, (3, 3), 512)) == (1, 1)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert module.cut(ConvSpec(512, 512, (3, 3))) == (1, 1)


@pytest.mark.parametrize("onednn", [True, False])
def test_the_rule_is_that_of_the_process(monkeypatch, onednn):
    from tensorflow.python.util import _pywrap_util_port

    monkeypatch.setattr(_pywrap_util_port, "IsMklEnabled", lambda: onednn)
    assert module.rule.__wrapped__() == (module.ONEDNN if onednn else module.EIGEN)
