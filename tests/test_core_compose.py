"""Properties of composition and convolution, over random layers of every rank."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cases import one_test, refuses
from equal import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries, layers, specs, weights

from doconv_core import (
    ConvSpec,
    compose,
    compose_gradient,
    convolve,
    convolve_gradient,
    difference,
    feature_compose,
    from_kernel,
    identity,
    pad,
    pad_gradient,
)

EXACT = 1e-12  # relative, for two ways to the same float64 result


@given(st.data())
def test_kernel_composition_equals_feature_composition(data):
    spec, weight, depthwise, rng = data.draw(layers())
    size, geometry = data.draw(geometries(spec))
    x = rng.standard_normal((2, spec.in_channels, *size))
    bias = rng.standard_normal(spec.out_channels)
    kernel = compose(weight, depthwise, spec)
    by_kernel = convolve(x, kernel, bias, groups=spec.groups, **geometry)
    by_features = feature_compose(x, weight, depthwise, spec, bias, **geometry)
    assert_close(by_features, by_kernel, EXACT)


@given(layers())
def test_zero_depthwise_weight_is_the_ordinary_convolution_exactly(layer):
    spec, weight, depthwise, _ = layer
    zero = None if depthwise is None else np.zeros_like(depthwise)
    tiles = spec.depth_multiplier // spec.taps
    whole = weight[..., : tiles * spec.taps].reshape(*weight.shape[:2], tiles, spec.taps)
    kernel = compose(weight, zero, spec).reshape(*weight.shape[:2], spec.taps)
    assert_same(kernel, whole.sum(axis=2))


@given(layers())
def test_linear_in_weight(layer):
    spec, weight, depthwise, rng = layer
    other = rng.standard_normal(weight.shape)
    together = compose(2 * weight - 3 * other, depthwise, spec)
    apart = 2 * compose(weight, depthwise, spec) - 3 * compose(other, depthwise, spec)
    assert_close(together, apart, EXACT)


@given(layers(min_taps=2))
def test_affine_in_depthwise_weight(layer):
    spec, weight, depthwise, rng = layer
    other = rng.standard_normal(depthwise.shape)
    middle = compose(weight, (depthwise + other) / 2, spec)
    ends = compose(weight, depthwise, spec) + compose(weight, other, spec)
    assert_close(middle, ends / 2, EXACT)


@given(layers())
def test_a_grouped_layer_is_its_groups_one_by_one(layer):
    spec, weight, depthwise, _ = layer
    o, i = spec.out_channels_per_group, spec.in_channels_per_group
    alone = ConvSpec(i, o, spec.kernel_size, 1, spec.depth_multiplier)
    kernels = [
        compose(
            weight[n * o : (n + 1) * o],
            None if depthwise is None else depthwise[n * i : (n + 1) * i],
            alone,
        )
        for n in range(spec.groups)
    ]
    assert_close(compose(weight, depthwise, spec), np.concatenate(kernels), EXACT)


@given(layers())
def test_gradient_equals_finite_differences(layer):
    spec, weight, depthwise, rng = layer
    dk = rng.standard_normal(spec.kernel_shape)
    dw, dd = compose_gradient(weight, depthwise, dk, spec)
    # The map is linear in W and affine in D, so a central difference has no error but rounding.
    step = rng.standard_normal(weight.shape)
    ends = [compose(weight + sign * step, depthwise, spec) for sign in (1, -1)]
    scale = np.abs(dk).sum() * np.abs(ends[0]).max()
    assert abs((dw * step).sum() - (dk * (ends[0] - ends[1])).sum() / 2) <= EXACT * scale
    if depthwise is None:
        assert dd is None
        return
    step = rng.standard_normal(depthwise.shape)
    ends = [compose(weight, depthwise + sign * step, spec) for sign in (1, -1)]
    scale = np.abs(dk).sum() * max(np.abs(e).max() for e in ends)
    assert abs((dd * step).sum() - (dk * (ends[0] - ends[1])).sum() / 2) <= EXACT * scale


@given(specs(), st.integers(0, 2**32 - 1), st.sampled_from(["float16", "float32", "float64"]))
def test_taking_over_a_kernel_and_composing_returns_it_exactly(spec, seed, dtype):
    kernel = np.random.default_rng(seed).standard_normal(spec.kernel_shape).astype(dtype)
    weight, depthwise = from_kernel(kernel, spec)
    assert weight.shape == spec.weight_shape
    assert weight.dtype == dtype
    assert (depthwise is None) == (spec.depthwise_shape is None)
    returned = compose(weight, depthwise, spec)
    assert_same(returned, kernel)


@given(layers(min_taps=2))
def test_every_kernel_is_reached_where_the_depthwise_weight_has_full_rank(layer):
    spec, _, depthwise, rng = layer
    operators = identity(spec) + depthwise
    least = np.linalg.svd(operators, compute_uv=False)[:, -1].min()
    if least < 1e-3:  # near a singular matrix, which random ones meet too; the next test's matter
        depthwise = np.zeros_like(depthwise)
        operators = identity(spec) + depthwise
    target = rng.standard_normal(spec.kernel_shape)
    weight = solve_weight(operators, target, spec)
    assert difference(compose(weight, depthwise, spec), target).relative <= 1e-8


@given(layers(min_taps=2))
def test_below_full_rank_some_kernel_is_out_of_reach(layer):
    spec, _, depthwise, rng = layer
    # Take one direction v out of the range of E + D in one input channel.
    channel = rng.integers(spec.in_channels)
    v = rng.standard_normal(spec.taps)
    v /= np.linalg.norm(v)
    operators = identity(spec) + depthwise
    operators[channel] -= np.outer(v, v @ operators[channel])
    depthwise = operators - identity(spec)
    weight = rng.standard_normal(spec.weight_shape)
    kernel = compose(weight, depthwise, spec).reshape(
        spec.groups, -1, *weight.shape[1:2], spec.taps
    )
    group, i = divmod(channel, spec.in_channels_per_group)
    # Whatever W is, the kernels that read this channel have nothing in the direction v …
    assert np.abs(kernel[group, :, i] @ v).max() <= 1e-9 * np.abs(kernel).max()
    # … so the best approximation of v itself is zero.
    target = np.zeros(spec.kernel_shape)
    target.reshape(kernel.shape)[group, :, i] = v
    best = compose(solve_weight(operators, target, spec), depthwise, spec)
    assert np.linalg.norm(best - target) >= 0.999 * np.linalg.norm(target)


def solve_weight(operators, target, spec):
    """Return the W whose kernel comes nearest to `target`, by least squares in each channel."""
    # Of a direction taken out of the range rounding leaves a singular value of about 1e-16, by
    # which nothing is to be divided.
    inverse = np.linalg.pinv(operators, rcond=1e-12)  # (I, S, M)
    grouped = target.reshape(spec.groups, -1, spec.in_channels_per_group, spec.taps)
    inverse = inverse.reshape(spec.groups, spec.in_channels_per_group, -1, spec.taps)
    return np.einsum("gism,goim->gois", inverse, grouped).reshape(spec.weight_shape)


@one_test
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("multiplier", [None, 12, 18, 19])
def test_half_types_are_composed_in_float32_and_rounded_once(dtype, multiplier):
    spec = ConvSpec(4, 6, (3, 3), 2, multiplier)
    weight, depthwise = weights(spec, np.random.default_rng(0))
    weight, depthwise = weight.astype(dtype), depthwise.astype(dtype)
    wide = compose(weight.astype(np.float32), depthwise.astype(np.float32), spec)
    kernel = compose(weight, depthwise, spec)
    assert_same(kernel, wide.astype(dtype))


@one_test
@pytest.mark.parametrize("multiplier", [4, 6, 8, 9])
def test_identity_is_tiled(multiplier):
    spec = ConvSpec(1, 1, (2, 2), 1, multiplier)
    tiles = multiplier // 4
    expected = np.hstack([np.eye(4)] * tiles + [np.zeros((4, multiplier - 4 * tiles))])
    assert_same(identity(spec), expected)


def refused_pair(weight=None, depthwise=None, spec=None, call=compose):
    """Call with a W and a D of a grouped 3×3 layer, or others; D may be a function of that one."""
    of = ConvSpec(4, 6, (3, 3), 2)
    w, d = weights(of, np.random.default_rng(0))
    weight, depthwise = w if weight is None else weight, depthwise(d) if depthwise else d
    return call(weight, depthwise, spec or of)


def with_its_gradient(weight, depthwise, spec):
    return compose_gradient(weight, depthwise, weight, spec)


test_wrong_arrays_are_named = refuses(
    lambda given: refused_pair(**given),
    ({"weight": np.zeros((6, 4, 9))}, ValueError,
     r"weight must have shape \(6, 2, 9\); received \(6, 4, 9\)"),
    ({"depthwise": np.transpose}, ValueError,
     r"depthwise must have shape \(4, 9, 9\); received \(9, 9, 4\)"),
    ({"depthwise": lambda d: None}, ValueError,
     r"depthwise must have shape \(4, 9, 9\); received None"),
    ({"call": with_its_gradient}, ValueError, r"kernel_gradient must have shape \(6, 2, 3, 3\)"),
    ({"call": lambda weight, d, spec: from_kernel(weight, spec)}, ValueError,
     r"kernel must have shape \(6, 2, 3, 3\)"),
    ({"weight": np.zeros((6, 2, 1)), "spec": ConvSpec(4, 6, (1, 1), 2)}, ValueError,
     "one tap has no depthwise weight"),
    ({"weight": np.zeros((6, 2, 9), int)}, TypeError,
     "weight must be an array of floats; received dtype int64"),
    ({"depthwise": np.float32}, TypeError, "same dtype; received float64 and float32"),
)  # fmt: skip


# The reference convolution itself is held against its definition, one product at a time.


def convolve_by_definition(x, kernel, bias, stride, padding, dilation, groups, padding_mode):
    x = pad(x, padding, padding_mode)
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel.shape[2:], stride, dilation, strict=True)
    ]
    y = np.zeros((len(x), len(kernel), *out))
    per_group = kernel.shape[1]
    for b, o, *at in np.ndindex(*y.shape):
        first = o // (len(kernel) // groups) * per_group
        for i, *tap in np.ndindex(*kernel.shape[1:]):
            where = [p * s + t * d for p, s, t, d in zip(at, stride, tap, dilation, strict=True)]
            y[(b, o, *at)] += kernel[(o, i, *tap)] * x[(b, first + i, *where)]
        y[(b, o, *at)] += bias[o]
    return y


@given(st.data())
def test_convolve_is_its_definition(data):
    spec, weight, depthwise, rng = data.draw(layers())
    size, geometry = data.draw(geometries(spec))
    x = rng.standard_normal((2, spec.in_channels, *size))
    kernel, bias = compose(weight, depthwise, spec), rng.standard_normal(spec.out_channels)
    found = convolve(x, kernel, bias, groups=spec.groups, **geometry)
    assert_close(
        found, convolve_by_definition(x, kernel, bias, groups=spec.groups, **geometry), EXACT
    )


@given(st.data())
def test_convolve_gradient_equals_finite_differences(data):
    spec, weight, depthwise, rng = data.draw(layers())
    size, geometry = data.draw(geometries(spec))
    x = rng.standard_normal((2, spec.in_channels, *size))
    kernel, bias = compose(weight, depthwise, spec), rng.standard_normal(spec.out_channels)
    geometry["groups"] = spec.groups
    dy = rng.standard_normal(convolve(x, kernel, bias, **geometry).shape)
    gradients = convolve_gradient(x, kernel, dy, **geometry)
    arguments = [x, kernel, bias]
    for position, gradient in enumerate(gradients):
        step = rng.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(arguments)
            moved[position] = moved[position] + sign * step
            ends.append(convolve(*moved, **geometry))
        slope = (dy * (ends[0] - ends[1])).sum() / 2
        scale = np.abs(dy).sum() * max(np.abs(e).max() for e in ends)
        assert abs((gradient * step).sum() - slope) <= EXACT * scale


@one_test
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_pad_gradient_is_the_transpose_of_pad(mode):
    rng = np.random.default_rng(0)
    x, padding = rng.standard_normal((2, 3, 5, 4)), ((2, 1), (0, 3))
    padded = pad(x, padding, mode)
    dy = rng.standard_normal(padded.shape)
    assert np.isclose((padded * dy).sum(), (x * pad_gradient(dy, (5, 4), padding, mode)).sum())


test_convolve_says_what_does_not_fit = refuses(
    lambda change: convolve(
        **{"x": np.zeros((2, 3, 5, 5)), "kernel": np.zeros((4, 3, 3, 3)), **change}
    ),
    ({"x": np.zeros((2, 3, 5, 5), int)}, TypeError, "x must be an array of floats.*int64"),
    ({"kernel": np.zeros((4, 3, 3, 3), complex)}, TypeError, "kernel must be.*complex128"),
    ({"bias": np.zeros(4, bool)}, TypeError, "bias must be an array of floats.*bool"),
    ({"kernel": np.zeros((4, 3, 0, 3))}, ValueError, "kernel must have no axis of length 0"),
    ({"kernel": np.zeros((4, 3))}, ValueError, r"kernel must have 3 to 5 axes.*\(4, 3\)"),
    ({"x": np.zeros((2, 3, 5))}, ValueError, r"x must have 4 axes.*\(2, 3, 5\)"),
    ({"x": np.zeros((2, 4, 5, 5))}, ValueError, r"x must have 3 channels.*\(2, 4, 5, 5\)"),
    ({"groups": 3}, ValueError, r"x must have 9 channels.*groups=3"),
    ({"groups": 0}, ValueError, "groups must be at least 1; received groups=0"),
    ({"bias": np.zeros(3)}, ValueError, r"bias must have shape \(4,\); received \(3,\)"),
    ({"stride": 0}, ValueError, "stride must be at least 1; received stride=0"),
    ({"stride": (1, 2, 3)}, ValueError, r"stride must be one integer or 2.*\(1, 2, 3\)"),
    ({"dilation": 1.5}, TypeError, "dilation must be an integer; received dilation=1.5"),
    ({"dilation": 9}, ValueError, r"padded input, \(5, 5\), is smaller.*\(19, 19\)"),
    ({"padding": "same"}, ValueError, "padding must be one integer, or 2.*'same'"),
    ({"padding": (1, 2, 3)}, ValueError, r"padding must be one integer, or 2.*\(1, 2, 3\)"),
    ({"padding": ((1, 2, 3), 1)}, ValueError, r"padding\[0\].*pair.*\(1, 2, 3\)"),
    ({"padding": -1}, ValueError, r"padding\[0\] must be at least 0"),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of zeros.*'mirror'"),
    (
        {"padding": 5, "padding_mode": "reflect"},
        ValueError,
        r"reflect padding must be at most 4 for an input of size 5; received \(5, 5\)",
    ),
)


def test_an_empty_batch_has_an_empty_result_and_zero_gradients():
    x, kernel = np.zeros((0, 4, 5, 5)), np.ones((6, 2, 3, 3))
    y = convolve(x, kernel, groups=2)
    gradients = convolve_gradient(x, kernel, y, groups=2)
    assert y.shape == (0, 6, 3, 3)
    assert gradients.x.shape == x.shape
    assert not gradients.kernel.any()
    assert not gradients.bias.any()


def test_padding_says_what_does_not_fit():
    with pytest.raises(ValueError, match=r"x must have axes \(B, C, \*spatial\); received.*\(3,\)"):
        pad(np.ones(3), 1)
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        pad_gradient(np.ones((1, 1, 5)), (3,), 1, "mirror")
    with pytest.raises(ValueError, match=r"spatial sizes \(5,\); received \(1, 1, 9\)"):
        pad_gradient(np.ones((1, 1, 9)), (3,), 1)


def test_a_kernel_of_one_tap_is_a_copy():
    weight = np.ones((6, 2, 1))
    compose(weight, None, ConvSpec(4, 6, (1, 1), 2))[:] = 7
    assert (weight == 1).all()


def test_convolve_gradient_says_which_shape_was_right():
    with pytest.raises(
        ValueError, match=r"must have shape \(2, 4, 3, 3\); received \(2, 4, 5, 5\)"
    ):
        convolve_gradient(np.zeros((2, 3, 5, 5)), np.zeros((4, 3, 3, 3)), np.zeros((2, 4, 5, 5)))
