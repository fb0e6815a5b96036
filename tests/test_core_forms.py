"""What a layer is in a state: kinds, sizes, geometry, and the order of a flattened image."""

from __future__ import annotations

import numpy as np
import pytest
from cases import one_test, refuses
from equal import assert_same
from hypothesis import given
from hypothesis import strategies as st

from doconv_core import (
    BatchNormSpec,
    ConvSpec,
    EmbeddingSpec,
    Geometry,
    GroupNormSpec,
    LayerForm,
    LayerNormSpec,
    LinearSpec,
    PReLUSpec,
    TransposedConvSpec,
    from_canonical,
    to_canonical,
)
from doconv_core.maths.geometry import causal, padded, same
from doconv_core.maths.layout import LAYOUTS, from_channels_first, to_channels_first

ORDINARY = ConvSpec(4, 6, (3, 3), 2)


@one_test
@pytest.mark.parametrize(
    ("form", "kind", "shapes"),
    [
        (LayerForm(ORDINARY), "convolution", {"weight": (6, 2, 9), "bias": (6,)}),
        (
            LayerForm(ORDINARY, over_parameterized=True, bias=False),
            "convolution",
            {"weight": (6, 2, 9), "depthwise_weight": (4, 9, 9)},
        ),
        (LayerForm(ConvSpec(6, 5, (1,)), True, False), "convolution", {"weight": (5, 6, 1)}),
        (
            LayerForm(TransposedConvSpec(4, 6, (3, 2), 2)),
            "transposed_convolution",
            {"weight": (4, 3, 6), "bias": (6,)},
        ),
        (LayerForm(LinearSpec(5, 3)), "linear", {"weight": (3, 5), "bias": (3,)}),
        (
            LayerForm(BatchNormSpec(5, 1e-5, 0.1)),
            "batch_norm",
            dict.fromkeys(("gamma", "beta", "running_mean", "running_var"), (5,)),
        ),
        (
            LayerForm(BatchNormSpec(5, 1e-5, 0.1), bias=False, scale=False),
            "batch_norm",
            dict.fromkeys(("running_mean", "running_var"), (5,)),
        ),
        (LayerForm(LayerNormSpec(5, 1e-6), bias=False), "layer_norm", {"gamma": (5,)}),
        (LayerForm(GroupNormSpec(6, 3, 1e-3), scale=False), "group_norm", {"beta": (6,)}),
        (LayerForm(PReLUSpec(1)), "prelu", {"alpha": (1,)}),
        (LayerForm(EmbeddingSpec(7, 3)), "embedding", {"weight": (7, 3)}),
    ],
)
def test_every_kind_has_its_entries(form, kind, shapes):
    assert (form.kind, form.shapes) == (kind, shapes)


def test_what_a_layer_of_the_kind_cannot_have_it_has_not():
    assert LayerForm(ConvSpec(6, 5, (1, 1)), over_parameterized=True) == LayerForm(
        ConvSpec(6, 5, (1, 1))
    )
    assert LayerForm(PReLUSpec(3)) == LayerForm(PReLUSpec(3), bias=False, scale=False)


test_what_is_no_layer_is_refused = refuses(
    lambda make: make(),
    (lambda: LayerForm(ORDINARY, bias="no"), TypeError, "bias must be True or False; received"),
    (
        lambda: LayerForm((4, 6)),
        TypeError,
        r"spec must be one of ConvSpec, .*, EmbeddingSpec; received \(4, 6\)",
    ),
    (
        lambda: LayerForm(ORDINARY, geometry="same"),
        TypeError,
        "geometry must be a Geometry or None; received 'same'",
    ),
    (
        lambda: LayerForm(PReLUSpec(1), geometry=Geometry(1, 1, ((0, 0),))),
        TypeError,
        "geometry must be None for a PReLUSpec",
    ),
    (
        lambda: LayerForm(ORDINARY, geometry=Geometry(1, 1, ((0, 0),))),
        ValueError,
        "geometry must be of the kernel's 2 dimensions; received 1",
    ),
    (
        lambda: LayerForm(ConvSpec(4, 6, (3, 3), 2, 12)),
        ValueError,
        "an ordinary convolution of 9 taps has no other depth_multiplier; received .*=12",
    ),
    (lambda: LayerForm(ORDINARY, flattening="x"), ValueError, "flattening must be one of None"),
    (lambda: LinearSpec(0, 3), ValueError, "in_features must be at least 1"),
    (lambda: EmbeddingSpec(1.5, 3), TypeError, "entries must be an integer"),
    (lambda: TransposedConvSpec(4, 5, (3,), 2), ValueError, "out_channels must be divisible"),
    (lambda: GroupNormSpec(6, 4, 1e-5), ValueError, "features must be divisible by groups; re"),
    (lambda: BatchNormSpec(6, "a", 0.1), TypeError, "epsilon must be a number; received epsil"),
    (lambda: BatchNormSpec(6, True, 0.1), TypeError, "epsilon must be a number"),
    (lambda: BatchNormSpec(6, 1e-5, np.nan), ValueError, "momentum must be finite and not neg"),
    (lambda: LayerNormSpec(6, -1e-5), ValueError, "epsilon must be finite and not negative"),
    (lambda: Geometry(1, 1, "same"), TypeError, "padding must be a sequence of pairs; received"),
    (lambda: Geometry(1, 1, (1,)), TypeError, r"padding\[0\] must be a pair \(before, after\)"),
    (lambda: Geometry(0, 1, ((0, 0),)), ValueError, "stride must be at least 1"),
    (lambda: Geometry(1, 1, ((0, 0),), "edge"), ValueError, "padding_mode must be one of zeros"),
)


def test_a_geometry_is_without_what_makes_no_difference():
    assert Geometry(1, 1, ((0, 0),), "reflect") == Geometry(1, 1, ((0, 0),))
    form = LayerForm(ConvSpec(4, 6, (1, 3)), geometry=Geometry(2, 2, ((0, 0), (1, 1))))
    assert form.geometry == Geometry((2, 2), (1, 2), ((0, 0), (1, 1)))


@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 20))
def test_same_padding_keeps_the_positions(size, dilation, positions):
    ((before, after),) = same((size,), (1,), (dilation,))
    extent = (size - 1) * dilation + 1
    assert positions + before + after - extent + 1 == positions
    assert after - before in (0, 1)
    ((first, last),) = causal((size,), (dilation,))
    assert (first, last) == (before + after, 0)


def test_same_padding_of_a_strided_kernel_depends_on_the_input():
    assert same((3, 1, 3), (2, 2, 1), (1, 1, 2)) == ("same", (0, 0), (2, 2))


@one_test
@pytest.mark.parametrize(
    ("own", "uses", "mode", "expected"),
    [
        (((1, 1),), [], "zeros", ((1, 1),)),
        (((1, 1),), [()], "zeros", ((1, 1),)),
        (((1, 1),), [((2, 3),)], "zeros", ((3, 4),)),
        (("same",), [((2, 3),)], "zeros", ("same after zeros (2, 3)",)),
        (("same",), [((0, 0),)], "zeros", ("same",)),
        (((1, 1),), [((2, 3),)], "reflect", ("(1, 1) after zeros (2, 3)",)),
        (((0, 0),), [((2, 3),)], "reflect", ((2, 3),)),
        (((1, 1),), [(), ((0, 0),)], "zeros", ((1, 1),)),
        (((1, 1),), [((1, 0),), ()], "zeros", ("(1, 1) or (2, 1)",)),
    ],
)
def test_zeros_before_a_layer_count_as_its_padding(own, uses, mode, expected):
    assert padded(own, uses, mode) == expected


@one_test
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_leads_there_and_back(layout):
    rng = np.random.default_rng(0)
    body = () if len(layout) == 2 else (3, 5)
    weight = rng.standard_normal((6, 1 if layout == "*CN" else 4, *body))
    kept = from_canonical(weight, layout, 3)
    assert_same(to_canonical(kept, layout), weight)
    sizes = {"O": 6, "I": 4, "C": 3, "N": 2}
    if layout in ("IO*", "I*O", "*OI"):  # whose canonical order begins with I
        sizes |= {"O": 4, "I": 6}
    expected = tuple(n for sign in layout for n in (body if sign == "*" else (sizes[sign],)))
    assert kept.shape == expected


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4), st.booleans())
def test_a_flattened_image_is_reordered_by_its_axes(positions, channels, vector):
    image = np.arange(2 * channels * np.prod(positions)).reshape(2, *positions, channels)
    if vector:
        image = image[0]
    first = image.ndim - len(positions) - 1
    flat = image.reshape(*image.shape[:first], -1)
    expected = np.moveaxis(image, -1, first).reshape(flat.shape)
    found = to_channels_first(flat, tuple(positions))
    assert_same(found, expected)
    assert_same(from_channels_first(found, tuple(positions)), flat)
