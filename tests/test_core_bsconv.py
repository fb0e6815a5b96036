"""Properties of blueprint separable convolutions, over random sizes of every rank."""

from __future__ import annotations

from math import ceil, prod

import numpy as np
import pytest
from cases import refuses
from equal import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import bsconv_specs, bsconv_weights, geometries

from doconv_core import (
    BSConvSpec,
    bsconv_cost,
    compose_bsconv,
    compose_bsconv_gradient,
    convolve,
    merge_pointwise,
    merge_pointwise_gradient,
    mid_channels,
    orthonormality,
    orthonormality_gradient,
)

seeds = st.integers(0, 2**32 - 1)


def assert_slopes(function, arguments, gradients, rng):
    """Assert that gradients are the slopes of a function that is linear in each argument."""
    for position, gradient in enumerate(gradients):
        step, ends = rng.standard_normal(gradient.shape), []
        for sign in (1, -1):
            moved = list(arguments)
            moved[position] = moved[position] + sign * step
            ends.append(function(*moved))
        expected = (ends[0] - ends[1]) / 2
        assert np.isclose((gradient * step).sum(), expected, rtol=1e-9, atol=1e-10)


@given(st.integers(1, 3000), st.floats(0.001, 1), st.integers(1, 50))
def test_mid_channels_follow_the_rule(channels, p, least):
    mid = mid_channels(channels, p, least)
    assert mid == min(channels, max(least, ceil(p * channels)))
    assert 1 <= mid <= channels
    assert mid >= p * channels


test_mid_channels_refuse_what_gives_no_layer = refuses(
    lambda arguments: mid_channels(*arguments),
    ((8, 0), ValueError, "p must be above 0 and at most 1; received p=0"),
    ((8, -0.5), ValueError, "p must be above 0 and at most 1; received p=-0.5"),
    ((8, 1.5), ValueError, "p must be above 0 and at most 1; received p=1.5"),
    ((8, float("nan")), ValueError, "p must be finite; received p=nan"),
    ((8, "1/4"), TypeError, "p must be a number; received p='1/4'"),
    ((8, True), TypeError, "p must be a number; received p=True"),
    ((8, 0.5, 0), ValueError, "min_mid_channels must be at least 1; received"),
    ((8, 0.5, 1.5), TypeError, "min_mid_channels must be an integer; received"),
    ((0,), ValueError, "in_channels must be at least 1; received in_channels=0"),
)


test_a_spec_says_what_is_wrong = refuses(
    lambda change: BSConvSpec(
        **({"in_channels": 4, "out_channels": 6, "kernel_size": (3, 3)} | change)
    ),
    ({"variant": "x"}, ValueError, "variant must be one of 'u', 's'; received variant='x'"),
    ({"with_bn": 1}, TypeError, "with_bn must be True or False; received with_bn=1"),
    ({"kernel_size": 3}, TypeError, "kernel_size must be a sequence"),
    ({"out_channels": 0}, ValueError, "out_channels must be at least 1"),
    ({"p": 2}, ValueError, "p must be above 0"),
    ({"min_mid_channels": 0}, ValueError, "min_mid_channels must be at least 1"),
)


def test_a_spec_names_its_parts_in_order():
    sizes = (16, 8, (3, 3))
    assert BSConvSpec(*sizes).names == ("pointwise", "depthwise")
    assert BSConvSpec(*sizes, "u", with_bn=True).names == ("pointwise", "batch_norm", "depthwise")
    assert BSConvSpec(*sizes, "s").names == ("pointwise1", "pointwise2", "depthwise")
    assert BSConvSpec(*sizes, "s", with_bn=True).names == (
        "pointwise1", "batch_norm1", "pointwise2", "batch_norm2", "depthwise",
    )  # fmt: skip
    assert BSConvSpec(*sizes, "s").pointwise_shapes == ((4, 16), (8, 4))
    assert BSConvSpec(*sizes).mid_channels is None


@given(st.data())
def test_the_kernel_equals_the_convolutions_one_after_another(data):
    spec = data.draw(bsconv_specs(with_bn=False))
    rng = np.random.default_rng(data.draw(seeds))
    size, geometry = data.draw(geometries(spec))
    pointwise, dw = bsconv_weights(spec, rng)
    x, bias = rng.standard_normal((2, spec.in_channels, *size)), rng.standard_normal(len(dw))
    features = x
    for weight in pointwise:
        features = convolve(features, weight.reshape(*weight.shape, *(1,) * spec.rank))
    filters = dw.reshape(len(dw), 1, *spec.kernel_size)
    expected = convolve(features, filters, bias, groups=len(dw), **geometry)
    pw = pointwise[0] if spec.variant == "u" else merge_pointwise(*pointwise)
    found = convolve(x, compose_bsconv(pw, dw, spec), bias, **geometry)
    assert_close(found, expected, 1e-11)


@given(bsconv_specs(), seeds)
def test_the_kernels_gradient_is_its_slope(spec, seed):
    rng = np.random.default_rng(seed)
    shapes = (spec.out_channels, spec.in_channels), spec.depthwise_shape
    arguments = [rng.standard_normal(shape) for shape in shapes]
    dkernel = rng.standard_normal(spec.dense.kernel_shape)
    gradients = compose_bsconv_gradient(*arguments, dkernel, spec)
    assert_slopes(
        lambda pw, dw: (compose_bsconv(pw, dw, spec) * dkernel).sum(), arguments, gradients, rng
    )


@given(bsconv_specs(variants="s"), seeds)
def test_the_merged_weights_gradient_is_its_slope(spec, seed):
    rng = np.random.default_rng(seed)
    arguments, _ = bsconv_weights(spec, rng)
    dmerged = rng.standard_normal((spec.out_channels, spec.in_channels))
    gradients = merge_pointwise_gradient(*arguments, dmerged)
    assert_slopes(
        lambda w1, w2: (merge_pointwise(w1, w2) * dmerged).sum(), arguments, gradients, rng
    )


@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_orthonormalitys_gradient_is_its_slope(mid, channels, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((mid, channels))
    step = rng.standard_normal(weight.shape)
    h = 1e-6
    expected = (orthonormality(weight + h * step) - orthonormality(weight - h * step)) / (2 * h)
    found = (orthonormality_gradient(weight) * step).sum()
    # Away from the kink, where the norm is zero, the slope is that of a smooth function.
    if orthonormality(weight) > 1e-2:
        assert np.isclose(found, expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.integers(0, 4), seeds)
def test_orthonormal_rows_have_no_loss(mid, more, seed):
    square = np.random.default_rng(seed).standard_normal((mid + more, mid + more))
    rows = np.linalg.qr(square)[0][:mid]
    assert orthonormality(rows) <= 1e-13
    assert np.isclose(orthonormality(2 * rows), 3 * np.sqrt(mid))


def test_orthonormality_has_no_gradient_at_its_kink():
    gradient = orthonormality_gradient(np.eye(3, 5, dtype=np.float32))
    assert_same(gradient, np.zeros((3, 5), np.float32))


@given(bsconv_specs(), st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_costs_are_those_of_the_layers(spec, positions, input_positions, bias):
    cost = bsconv_cost(spec, positions, input_positions=input_positions, bias=bias)
    parts = [prod(shape) for shape in spec.pointwise_shapes]
    norms = [2 * shape[0] for shape in spec.pointwise_shapes] if spec.with_bn else []
    outer, taps = spec.out_channels, spec.taps
    assert cost.keep.parameters == sum(parts) + sum(norms) + outer * taps + outer * bias
    assert cost.keep.macs == sum(parts) * input_positions + outer * taps * positions
    assert cost.dense.macs == spec.in_channels * outer * taps * positions
    assert cost.merge.macs == (
        spec.in_channels * outer * input_positions + outer * taps * positions
    )
    if spec.variant == "u" and not spec.with_bn:
        assert cost.merge == cost.keep


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_dtypes_are_kept(dtype):
    spec = BSConvSpec(4, 6, (3,), "s", 0.5)
    pointwise, dw = bsconv_weights(spec, np.random.default_rng(0))
    w1, w2, dw = (array.astype(dtype) for array in (*pointwise, dw))
    pw = merge_pointwise(w1, w2)
    assert {pw.dtype, compose_bsconv(pw, dw, spec).dtype} == {np.dtype(dtype)}


test_shapes_that_disagree_are_refused = refuses(
    lambda call: call(BSConvSpec(4, 6, (3, 3))),
    (
        lambda s: compose_bsconv(np.ones((6, 3)), np.ones((6, 9)), s),
        ValueError,
        r"pointwise must have sh",
    ),
    (
        lambda s: compose_bsconv(np.ones((6, 4)), np.ones((6, 3)), s),
        ValueError,
        r"depthwise must have sh",
    ),
    (
        lambda s: merge_pointwise(np.ones((2, 4)), np.ones((6, 3))),
        ValueError,
        "second must have 2 input",
    ),
    (
        lambda s: orthonormality(np.ones((2, 4, 1))),
        ValueError,
        r"weight must have shape \(output, input\)",
    ),
    (
        lambda s: compose_bsconv_gradient(np.ones((6, 4)), np.ones((6, 9)), np.ones((6, 4, 9)), s),
        ValueError,
        r"kernel_gradient must have shape \(6, 4, 3, 3\); received \(6, 4, 9\)",
    ),
)
