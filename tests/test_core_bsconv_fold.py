"""Folding BSConv: exact where it is done, refused where it would not be; and the reports."""

from __future__ import annotations

import numpy as np
import pytest
from cases import refuses
from hypothesis import given
from hypothesis import strategies as st
from strategies import bsconv_specs, bsconv_weights, geometries

from doconv_core import (
    BSConvReport,
    BSConvSpec,
    Change,
    Explained,
    FoldReport,
    Geometry,
    Normalization,
    NotFoldable,
    Pointwise,
    check_dense,
    convolve,
    difference,
    fold_dense,
    fold_pointwise,
)
from doconv_core.kinds.bsconv import BSCONV, as_kernel_sizes, batch_norm_options, form_costs
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.models.fold import forms_of
from doconv_core.models.report import Choice


def normalization(channels, rng):
    mean, scale, offset = rng.standard_normal((3, channels))
    return Normalization(mean, rng.uniform(0.5, 2, channels), 1e-3, scale, offset)


def steps_of(spec, pointwise, rng):
    steps = []
    for weight in pointwise:
        steps.append(Pointwise(weight))
        if spec.with_bn:
            steps.append(normalization(len(weight), rng))
    return steps


def run(steps, x):
    shape = (-1, *(1,) * (x.ndim - 2))
    for step in steps:
        if isinstance(step, Pointwise):
            x = convolve(x, step.weight.reshape(*step.weight.shape, *shape[1:]), step.bias)
        else:
            factor = step.scale / np.sqrt(step.variance + step.epsilon)
            x = (x - step.mean.reshape(shape)) * factor.reshape(shape) + step.offset.reshape(shape)
    return x


@given(st.data())
def test_folding_changes_nothing(data):
    spec = data.draw(bsconv_specs())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size, geometry = data.draw(geometries(spec))
    pointwise, dw = bsconv_weights(spec, rng)
    steps, bias = steps_of(spec, pointwise, rng), rng.standard_normal(len(dw))
    x = rng.standard_normal((2, spec.in_channels, *size))
    filters = dw.reshape(len(dw), 1, *spec.kernel_size)
    expected = convolve(run(steps, x), filters, bias, groups=len(dw), **geometry)
    merged = fold_pointwise(steps)
    kernel = merged.kernel.reshape(*merged.kernel.shape, *(1,) * spec.rank)
    features = convolve(x, kernel, merged.bias)
    found = convolve(features, filters, bias, groups=len(dw), **geometry)
    assert difference(found, expected).relative <= 1e-10
    meets = Geometry(
        geometry["stride"], geometry["dilation"], geometry["padding"], geometry["padding_mode"]
    )
    if spec.with_bn and meets.padding_mode == "zeros" and any(map(any, meets.padding)):
        with pytest.raises(NotFoldable, match="meets zero padding"):
            fold_dense(merged, dw, bias, meets)
    else:
        dense = fold_dense(merged, dw, bias, meets)
        kernel = dense.kernel.reshape(spec.dense.kernel_shape)
        assert difference(convolve(x, kernel, dense.bias, **geometry), expected).relative <= 1e-10


def test_a_bias_comes_of_batch_norms_and_pointwise_biases_alone():
    one, geometry = Pointwise(np.eye(3)), Geometry((1,), (1,), ((0, 0),))
    assert fold_pointwise([one, one]).bias is None
    assert fold_dense(fold_pointwise([one]), np.ones((3, 2)), None, geometry).bias is None
    both = fold_pointwise([one._replace(bias=np.ones(3)), one._replace(bias=np.full(3, 2.0))])
    np.testing.assert_array_equal(both.bias, [3, 3, 3])
    dense = fold_dense(both, np.full((3, 2), 2.0), None, geometry)
    np.testing.assert_array_equal(dense.bias, [12, 12, 12])


def test_zero_padding_in_words_is_refused_too():
    with pytest.raises(NotFoldable, match=r"meets zero padding .*'same'.*use form='merge'"):
        check_dense(Geometry((2,), (1,), ("same",)))
    check_dense(Geometry((2,), (1,), ((1, 1),), "circular"))


def test_steps_that_do_not_follow_are_refused():
    with pytest.raises(ValueError, match="steps must begin with a pointwise convolution"):
        fold_pointwise([normalization(3, np.random.default_rng(0))])
    with pytest.raises(ValueError, match="of 2 input channels follows one of 3 output channels"):
        fold_pointwise([Pointwise(np.ones((3, 4))), Pointwise(np.ones((5, 2)))])
    with pytest.raises(NotFoldable, match="would not be finite"):
        fold_pointwise([Pointwise(np.full((3, 4), np.inf))])


def test_kernel_sizes_are_sizes_or_integers_for_every_rank():
    assert as_kernel_sizes(((3, 3), (5, 5))) == {(3, 3), (5, 5)}
    assert as_kernel_sizes([3, (1, 5)]) == {(3,), (3, 3), (3, 3, 3), (1, 5)}


test_other_kernel_sizes_are_refused = refuses(
    as_kernel_sizes,
    (3, TypeError, "kernel_sizes must be a sequence of kernel sizes.*received kernel_sizes=3"),
    ((), TypeError, "kernel_sizes must be a sequence of kernel sizes"),
    ("3x3", TypeError, "kernel_sizes must be a sequence of kernel sizes"),
    (((3, 3, 3, 3),), ValueError, r"kernel_sizes\[0\] must have 1 to 3 entries"),
    (((3, 0),), ValueError, r"kernel_sizes\[0\]\[1\] must be at least 1"),
    ((3.5,), TypeError, r"kernel_sizes\[0\] must be an integer"),
)


def test_batch_norm_options_are_checked():
    assert batch_norm_options(False, None, ("eps",)) == {}
    assert batch_norm_options(True, {"eps": 1.0}, ("eps",)) == {"eps": 1.0}
    with pytest.raises(TypeError, match="bn_options may have eps; received 'epsilon'"):
        batch_norm_options(True, {"epsilon": 1.0}, ("eps",))
    with pytest.raises(TypeError, match=r"bn_options must be a dict.*received bn_options=3"):
        batch_norm_options(True, 3, ("eps",))
    with pytest.raises(ValueError, match="are for batch norms; give with_bn=True"):
        batch_norm_options(False, {"eps": 1.0}, ("eps",))


def test_forms_are_named():
    own = {"doconv": DO_CONV, "bsconv": BSCONV}
    assert forms_of(None, own) == {"doconv": "dense", "bsconv": "keep"}
    for form in ("keep", "merge", "dense"):
        assert forms_of(form, own) == {"doconv": "dense", "bsconv": form}
        assert forms_of({"bsconv": form}, own) == {"doconv": "dense", "bsconv": form}
    for form, error, message in (
        ("deploy", ValueError, "form must be one of 'keep', 'merge', 'dense'; received form='dep"),
        ({"bsconv": "deploy"}, ValueError, "form of 'bsconv' must be one of 'keep', 'merge', 'den"),
        ({"doconv": "keep"}, ValueError, "form of 'doconv' must be one of 'dense'; received 'keep"),
        ({"conv": "keep"}, ValueError, "form must be of the kinds 'doconv', 'bsconv'; received f"),
        (3, TypeError, "form must be a name, or a mapping from kinds to names.*received form=3"),
    ):
        with pytest.raises(error, match=message):
            forms_of(form, own)


def test_the_reports_tell_of_variance_and_cost():
    change = (Change("a", "Conv2d", "BSConvS2d"), Change("", "Conv2d", "BSConvS2d"))
    explained = (Explained("a", 0.5), Explained("", 0.25))
    text = str(BSConvReport("replaced", change, (), 100, 20, explained))
    assert "parameters: 100 before, 20 after" in text
    assert "explained variance of the kernels before, 37.5% on average:" in text
    assert "   50.0%  a\n   25.0%  (the model itself)" in text
    spec = BSConvSpec(16, 32, (3, 3), "s")
    cost = form_costs(spec, (2, 1), bias=False)
    costs = tuple(Choice(path, "BSConvS2d", spec, cost) for path in ("a", "b"))
    text = str(FoldReport("folded", (), (), 1, 1, {"bsconv": "merge"}, costs))
    assert "folded bsconv with form='merge'; each" in text
    # 4·16 + 32·4 weights at two input positions for each output position, and 32·9 at one
    assert "keep 480 and 672; merge 800 and 1,312; dense 4,608 and 4,608 (2)\n    a, b" in text
    assert str(costs[0]).startswith("BSConvS2d 16 -> 32")
