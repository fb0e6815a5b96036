"""What a layer may be, the shapes that follow, and what it costs."""

from __future__ import annotations

import dataclasses
from math import prod

import numpy as np
import pytest
from cases import one_test, refuses
from equal import assert_same
from hypothesis import given
from strategies import specs

from doconv_core import ConvSpec, Cost, from_canonical, layer_cost, to_canonical


@given(specs())
def test_shapes_follow_from_the_sizes(spec):
    taps = prod(spec.kernel_size)
    assert spec.taps == taps
    assert spec.rank == len(spec.kernel_size)
    assert spec.kernel_shape == (
        spec.out_channels,
        spec.in_channels // spec.groups,
        *spec.kernel_size,
    )
    assert spec.weight_shape == (*spec.kernel_shape[:2], spec.depth_multiplier)
    if taps == 1:
        assert not spec.over_parameterized
        assert spec.depthwise_shape is None
        assert spec.depth_multiplier == 1
    else:
        assert spec.depthwise_shape == (spec.in_channels, taps, spec.depth_multiplier)
    same = spec.depth_multiplier == taps
    assert spec.parameter_shape == (spec.kernel_shape if same else spec.weight_shape)


def test_defaults_and_normalised_values():
    spec = ConvSpec(np.int64(4), 6, np.array([3, 2]))
    assert spec == ConvSpec(4, 6, (3, 2), groups=1, depth_multiplier=6)
    assert type(spec.in_channels) is int
    assert hash(spec) == hash(ConvSpec(4, 6, (3, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.groups = 2


test_wrong_arguments_are_refused = refuses(
    lambda arguments: ConvSpec(*arguments),
    ((0, 6, (3,)), ValueError, "in_channels must be at least 1; received in_channels=0"),
    ((4, -6, (3,)), ValueError, "out_channels must be at least 1; received out_channels=-6"),
    ((4, 6, (3,), 0), ValueError, "groups must be at least 1; received groups=0"),
    ((4.0, 6, (3,)), TypeError, "in_channels must be an integer; received in_channels=4.0"),
    (("4", 6, (3,)), TypeError, "in_channels must be an integer; received in_channels='4'"),
    ((4, True, (3,)), TypeError, "out_channels must be an integer; received out_channels=True"),
    ((4, 6, (3,), None), TypeError, "groups must be an integer; received groups=None"),
    (
        (4, 6, (3,), 3),
        ValueError,
        "in_channels must be divisible by groups.*in_channels=4, groups=3",
    ),
    ((6, 4, (3,), 3), ValueError, "out_channels must be divisible by groups.*out_channels=4"),
    ((4, 6, 3), TypeError, "kernel_size must be a sequence of 1 to 3 integers.*kernel_size=3"),
    ((4, 6, {3, 5}), TypeError, "kernel_size must be a sequence"),
    ((4, 6, b"33"), TypeError, "kernel_size must be a sequence"),
    ((4, 6, np.array(3)), TypeError, "kernel_size must be a sequence"),
    ((np.True_, 6, (3,)), TypeError, "in_channels must be an integer"),
    ((4, 6, "33"), TypeError, "kernel_size must be a sequence.*kernel_size='33'"),
    ((4, 6, ()), ValueError, r"kernel_size must have 1 to 3 entries.*kernel_size=\(\)"),
    ((4, 6, (1, 2, 3, 4)), ValueError, r"1 to 3 entries.*kernel_size=\(1, 2, 3, 4\)"),
    ((4, 6, (3, 0)), ValueError, r"kernel_size\[1\] must be at least 1"),
    ((4, 6, (3, 1.5)), TypeError, r"kernel_size\[1\] must be an integer"),
    (
        (4, 6, (3, 3), 1, 8),
        ValueError,
        r"depth_multiplier must be at least the number of kernel taps.*depth_multiplier=8 for "
        r"kernel_size=\(3, 3\), which has 9 taps",
    ),
    ((4, 6, (3, 3), 1, 9.0), TypeError, "depth_multiplier must be an integer"),
    ((4, 6, (1, 1), 1, 0), ValueError, "depth_multiplier must be at least 1"),
)


def test_cost_in_each_form():
    # 3×3, 64 → 128 in 2 groups, S = 12, at 28×28 positions, batch 4; by hand from the definitions.
    cost = layer_cost(ConvSpec(64, 128, (3, 3), 2, 12), 28 * 28, batch=4)
    ordinary = Cost(128 * 32 * 9 + 128, 9 * 32 * 128 * 784 * 4)
    trained = 128 * 32 * 12 + 64 * 9 * 12 + 128
    assert cost.ordinary == cost.folded == ordinary
    assert cost.kernel_composed == Cost(trained, ordinary.macs + 12 * 9 * 64 * 64)
    assert cost.feature_composed == Cost(trained, 12 * 9 * 64 * 784 * 4 + 12 * 32 * 128 * 784 * 4)


def test_cost_of_one_tap_is_the_ordinary_one():
    cost = layer_cost(ConvSpec(4, 6, (1, 1), 2), 10, bias=False)
    assert set(cost) == {Cost(12, 120)}


def test_cost_refuses_what_is_no_size():
    with pytest.raises(ValueError, match="positions must be at least 1; received positions=0"):
        layer_cost(ConvSpec(1, 1, (3,)), 0)
    with pytest.raises(TypeError, match=r"batch must be an integer; received batch=1.5"):
        layer_cost(ConvSpec(1, 1, (3,)), 5, batch=1.5)


@one_test
@pytest.mark.parametrize(
    ("layout", "shape"), [("OI*", (6, 2, 3, 5)), ("O*I", (6, 3, 5, 2)), ("*IO", (3, 5, 2, 6))]
)
def test_layouts_and_back(layout, shape):
    weight = np.random.default_rng(0).standard_normal((6, 2, 3, 5))
    moved = from_canonical(weight, layout)
    assert moved.shape == shape
    assert_same(to_canonical(moved, layout), weight)


def test_depthwise_layout_and_back():
    weight = np.arange(6 * 15.0).reshape(6, 1, 3, 5)
    moved = from_canonical(weight, "*CN", groups=3)
    assert moved.shape == (3, 5, 3, 2)
    for channel in range(3):
        for n in range(2):  # output channel n of input channel c is c·N + n
            assert_same(moved[..., channel, n], weight[channel * 2 + n, 0])
    assert_same(to_canonical(moved, "*CN"), weight)


def test_wrong_layouts_are_refused():
    with pytest.raises(ValueError, match=r"layout must be one of OI\*, .*received 'NCHW'"):
        from_canonical(np.zeros((2, 2, 3)), "NCHW")
    with pytest.raises(ValueError, match="layout must be one of"):
        to_canonical(np.zeros((2, 2, 3)), "OIX")
    with pytest.raises(ValueError, match=r"depthwise weight must be \(O, 1, taps…\).*\(2, 2, 3\)"):
        from_canonical(np.zeros((2, 2, 3)), "*CN", groups=2)
