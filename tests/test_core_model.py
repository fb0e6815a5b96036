"""What the whole-model tools share: selection, report and comparison; batch norm's rule."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doconv_core import (
    Change,
    Converted,
    Difference,
    Left,
    NotFoldable,
    Report,
    Selection,
    convolve,
    difference,
    fuse_batchnorm,
    largest_difference,
)
from doconv_core.models.report import ONE_TAP, TRANSPOSED

PATHS = ["", "conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"]


def selected(where, layers=PATHS):
    selection = Selection(where)
    return [path for path in layers if selection(path, len(path))]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, PATHS),
        ("*", PATHS),
        ("layer1.*", PATHS[2:4]),
        ("*conv1", ["conv1", "layer1.0.conv1", "layer2.0.conv1"]),
        (["conv1", "layer2.*"], ["conv1", "layer2.0.conv1"]),
        (iter(["conv?"]), ["conv1"]),
        ("Layer1.*", []),
        (int, PATHS),
        ((str, int), PATHS),
        ([str, int], PATHS),
        ([str, bytes], []),
        (str, []),
        (lambda path, layer: layer == 5, ["conv1"]),
    ],
)
def test_a_selection_by_pattern_type_and_predicate(where, expected):
    assert selected(where) == expected


@pytest.mark.parametrize("where", [3, b"conv1", ["conv1", 3], [], {"conv1": 1}, (str, "conv1")])
def test_what_is_no_selection_is_refused(where):
    with pytest.raises(TypeError, match="where must be None, a glob pattern or several, a type"):
        Selection(where)


@pytest.mark.parametrize(
    ("where", "paths", "match"),
    [
        ("layr1*", PATHS, r"where matches no convolution: 'layr1\*'; the model has convolutions"),
        (["conv1", "layer3.*"], PATHS, r"where matches no convolution: 'layer3\.\*'"),
        (str, PATHS, "where selects none of the 5 convolutions, such as the model itself, 'conv1'"),
        (lambda path, layer: False, PATHS[:2], "where selects none of the 2 convolutions"),
        ("c*", [""], r"where matches no convolution: 'c\*'; .* such as the model itself\."),
        (None, [], "the model has no convolution that could be replaced"),
        ("*", [], "the model has no convolution that could be replaced"),
    ],
)
def test_a_selection_that_matches_nothing_warns(where, paths, match):
    selection = Selection(where)
    for path in paths:
        selection(path, len(path))
    with pytest.warns(UserWarning, match=match):
        selection.warn()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("where", [None, "*", ["conv1", "layer?.*"], int, lambda p, layer: layer])
def test_a_selection_that_matches_does_not_warn(where):
    selection = Selection(where)
    for path in PATHS:
        selection(path, len(path))
    selection.warn()


def test_a_report_can_be_read():
    changed = tuple(Change(f"layer{i}.conv", "Conv2d", "DOConv2d") for i in range(30))
    left = (Left("", "Conv2d", ONE_TAP), Left("a.b", "ConvTranspose2d", TRANSPOSED))
    text = str(Report("over-parameterized", changed, left, 1000, 1200))
    assert text.startswith(
        "over-parameterized 30 layers, left 2; parameters: 1,000 before, 1,200 after (+20.00%)\n"
    )
    assert "Conv2d -> DOConv2d (30)" in text
    for path in (f"layer{i}.conv" for i in range(30)):
        assert path in text
    assert f"Conv2d: {ONE_TAP} (1)\n    (the model itself)" in text
    assert "ConvTranspose2d: a transposed convolution (1)\n    a.b" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_report_of_nothing():
    text = str(Report("folded", (), (), 5, 5))
    assert text == "folded 0 layers, left 0; parameters: 5 before, 5 after"
    assert str(Report("folded", (Change("a", "b", "c"),), (), 0, 0)).startswith("folded 1 layer,")


def test_converted_unpacks():
    report = Report("folded", (), (), 1, 1)
    converted = Converted("model", report)
    model, found = converted
    assert (model, found) == ("model", report) == converted
    assert Converted[str](model="model", report=report) == converted
    assert type(pickle.loads(pickle.dumps(converted))) is Converted


def test_the_largest_difference_of_several_outputs():
    expected = {"a": np.array([1.0, 100.0]), "b": np.array([1e-3])}
    found = {"a": np.array([1.5, 100.0]), "b": np.array([2e-3])}
    assert largest_difference(found, expected) == Difference(0.5, 1.0)
    assert largest_difference(expected, expected) == Difference(0.0, 0.0)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ({"a": np.zeros(2)}, "different structures: 'a' and 'a', 'b'"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, r"output 'b': expected a result of shape \(2,\)"),
    ],
)
def test_outputs_that_cannot_be_compared(found, match):
    with pytest.raises(ValueError, match=match):
        largest_difference(found, {"a": np.zeros(2), "b": np.zeros(2)})
    with pytest.raises(ValueError, match="hold no arrays"):
        largest_difference({}, {})


def test_not_foldable_is_a_type_error():
    assert issubclass(NotFoldable, TypeError)


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(),
    st.integers(1, 2),
)  # fmt: skip
def test_a_fused_batch_norm_is_the_convolution_then_the_batch_norm(
    seed, rank, has_bias, has_scale, has_offset, groups
):
    rng = np.random.default_rng(seed)
    channels = 2 * groups
    kernel = rng.standard_normal((channels, 2, *(2,) * rank))
    bias = rng.standard_normal(channels) if has_bias else None
    norm = {"mean": rng.standard_normal(channels), "variance": rng.uniform(0.1, 3, channels)}
    scale = rng.standard_normal(channels) if has_scale else None
    offset = rng.standard_normal(channels) if has_offset else None
    x = rng.standard_normal((2, 2 * groups, *(4,) * rank))
    axes = (-1, *(1,) * rank)
    y = convolve(x, kernel, bias, groups=groups) - norm["mean"].reshape(axes)
    y = y / np.sqrt(norm["variance"].reshape(axes) + 1e-3)
    y = y * (1 if scale is None else scale.reshape(axes))
    y = y + (0 if offset is None else offset.reshape(axes))
    fused, fused_bias = fuse_batchnorm(
        kernel, bias, **norm, epsilon=1e-3, scale=scale, offset=offset
    )
    assert difference(convolve(x, fused, fused_bias, groups=groups), y).relative < 1e-12


def test_a_fused_batch_norm_keeps_the_dtype_and_refuses_wrong_shapes():
    kernel, ones = np.ones((3, 2, 1), np.float32), np.ones(3)
    fused, bias = fuse_batchnorm(kernel, None, mean=ones, variance=ones, epsilon=0.0)
    assert fused.dtype == bias.dtype == np.float32
    np.testing.assert_array_equal(bias, -ones)
    with pytest.raises(ValueError, match=r"mean must have shape \(3,\).* received \(2,\)"):
        fuse_batchnorm(kernel, None, mean=np.ones(2), variance=ones, epsilon=0.0)
