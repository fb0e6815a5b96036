"""Linear pieces in a row and side by side: exact in float64 at the borders too, or refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from doconv_core import Geometry, convolve, difference
from doconv_core.maths.geometry import same, settled
from doconv_core.maths.linear import (
    CHANNELS,
    COSTLIER,
    MODES,
    SHIFTED,
    SIZES,
    STRIDES,
    SUBSAMPLED,
    TWICE,
    UNIT,
    NotOne,
    Scale,
    Taps,
    plus,
    then,
)
from doconv_core.models.merge import APART, USED, Step, atom, search

EXACT = 1e-12
RNG = np.random.default_rng(0)


def taps(
    inputs, outputs, size, *, stride=1, dilation=1, pad=0, groups=1, bias=True, mode="zeros"
):  # fmt: skip
    """Return a random convolution; size and pad: an integer for all dimensions, or one for each."""
    size, pad = ((each,) * 2 if isinstance(each, int) else each for each in (size, pad))
    rank = len(size)
    kernel = RNG.standard_normal((outputs, inputs // groups, *size))
    geometry = Geometry((stride,) * rank, (dilation,) * rank, [(p, p) for p in pad], mode)
    return Taps(kernel, RNG.standard_normal(outputs) if bias else None, geometry, groups)


def norm(channels):
    return Scale(*RNG.standard_normal((2, channels)))


def pool(size, stride, pad=0):
    geometry = Geometry((stride,) * 2, (1, 1), [(pad, pad)] * 2)
    return Taps(np.full((1, 1, size, size), size**-2.0), None, geometry, alike=True)


def computed(piece, x):
    """Return what a piece is said to compute, one operation after the other."""
    if isinstance(piece, Scale):
        rows = (-1, *(1,) * (x.ndim - 2))
        factor = np.broadcast_to(piece.factor, x.shape[1]).reshape(rows)
        offset = 0 if piece.offset is None else piece.offset
        return x * factor + np.broadcast_to(offset, x.shape[1]).reshape(rows)
    kernel, bias, groups = piece.kernel, piece.bias, piece.groups
    if piece.alike:
        kernel, groups = np.repeat(kernel, x.shape[1], 0), x.shape[1]
    geometry = piece.geometry
    return convolve(
        x, kernel, bias, stride=geometry.stride, padding=geometry.padding,
        dilation=geometry.dilation, groups=groups, padding_mode=geometry.padding_mode,
    )  # fmt: skip


def check_row(first, second, channels, sizes=(11, 12)):
    for size in sizes:
        x = RNG.standard_normal((2, channels, *(size, size + 2)))
        found = computed(then(first, second), x)
        assert difference(found, computed(second, computed(first, x))).relative < EXACT


def check_sum(one, other, channels, sizes=(11, 12)):
    for size in sizes:
        x = RNG.standard_normal((2, channels, *(size, size + 2)))
        found = computed(plus(one, other), x)
        assert difference(found, computed(one, x) + computed(other, x)).relative < EXACT


ROWS = {
    "pointwise, 3x3": (taps(4, 6, 1, bias=False), taps(6, 4, 3, pad=1)),
    "pointwise with a bias, not padded": (taps(4, 6, 1), taps(6, 4, 3)),
    "3x3, pointwise": (taps(4, 6, 3, pad=1), taps(6, 4, 1)),
    "padded once in front": (taps(4, 6, 3, pad=2), taps(6, 4, 3)),
    "strides": (taps(4, 6, 3, stride=2, pad=1), taps(6, 4, 3, stride=2)),
    "a strided pointwise one, padded": (taps(4, 6, 1, stride=2, bias=False), taps(6, 4, 3, pad=1)),
    "dilations": (taps(4, 6, 3, dilation=2, pad=3), taps(6, 4, 2, dilation=3)),
    "groups": (taps(4, 8, 1, groups=2, bias=False), taps(8, 4, 3, groups=4, pad=1)),
    "depthwise, pointwise": (taps(4, 8, 3, groups=4, pad=1), taps(8, 6, 1)),
    "groups, depthwise": (taps(4, 8, 3, groups=2, pad=2), taps(8, 8, 3, groups=8)),
    "1x3, 3x1": (taps(4, 6, (1, 3), pad=(0, 1), bias=False), taps(6, 4, (3, 1), pad=(1, 0))),
    "pointwise, pooling": (taps(4, 6, 1), pool(2, 2)),
    "pooling, pointwise": (pool(3, 1, 1), taps(4, 6, 1)),
    "two poolings": (pool(3, 1, 1), pool(2, 2)),
    "conv, norm": (taps(4, 6, 3, pad=1), norm(6)),
    "norm, conv": (norm(4), taps(4, 6, 3, groups=2)),
    "norm, pointwise": (norm(4), taps(4, 6, 1)),
    "norm, reflected": (norm(4), taps(4, 6, 3, pad=1, mode="reflect")),
    "pointwise, reflected": (taps(4, 6, 1), taps(6, 4, 3, pad=1, mode="reflect")),
    "reflected, 3x3": (taps(4, 6, 3, pad=1, mode="reflect"), taps(6, 4, 3)),
    "norm, norm": (norm(4), norm(4)),
    "norm, pooling": (norm(4), pool(2, 2)),
    "a number, conv": (Scale(np.array(0.5)), taps(4, 6, 3, pad=1)),
    "a number added, conv": (Scale(np.array(2.0), np.array(1.0)), taps(4, 6, 3)),
}
SUMS = {
    "3x3, 1x1": (taps(4, 6, 3, pad=1), taps(4, 6, 1)),
    "3x3, identity": (taps(4, 4, 3, pad=1), UNIT),
    "3x3, norm": (taps(4, 4, 3, pad=1), norm(4)),
    "groups, norm": (taps(4, 4, 3, pad=1, groups=2), norm(4)),
    "depthwise, identity": (taps(4, 4, 5, pad=2, groups=4), UNIT),
    "depthwise, dense": (taps(4, 8, 3, pad=1, groups=4), taps(4, 8, 1)),
    "groups of 4 and 6": (taps(12, 12, 3, pad=1, groups=4), taps(12, 12, 1, groups=6)),
    "3x3, 1x3": (taps(4, 6, 3, pad=1), taps(4, 6, (1, 3), pad=(0, 1))),
    "3x1, 1x3": (taps(4, 6, (3, 1), pad=(1, 0)), taps(4, 6, (1, 3), pad=(0, 1))),
    "strides": (taps(4, 6, 3, stride=2, pad=1), taps(4, 6, 1, stride=2, bias=False)),
    "dilated": (taps(4, 6, 7, pad=3), taps(4, 6, 3, dilation=3, pad=3)),
    "both dilated": (taps(4, 6, 3, dilation=2, pad=2), taps(4, 6, 3, dilation=4, pad=4)),
    "dilated, 1x1": (taps(4, 6, 3, dilation=2, pad=2), taps(4, 6, 1)),
    "reflected, 1x1": (taps(4, 6, 3, pad=1, mode="reflect"), taps(4, 6, 1)),
    "conv, pooling": (taps(4, 4, 3, pad=1), pool(3, 1, 1)),
    "pooling, identity": (pool(3, 1, 1), UNIT),
    "norm, identity": (norm(4), UNIT),
}
NOT_ROWS = {
    "bias, zeros": (taps(4, 6, 1), taps(6, 4, 3, pad=1), SHIFTED),
    "norm, zeros": (norm(4), taps(4, 6, 3, pad=1), SHIFTED),
    "padded twice": (taps(4, 6, 3, pad=1, bias=False), taps(6, 4, 3, pad=1), TWICE),
    "behind 3x3": (taps(4, 6, 3, bias=False), taps(6, 4, 3, pad=1), TWICE),
    "reflected behind a stride": (
        taps(4, 6, 1, stride=2), taps(6, 4, 3, pad=1, mode="reflect"), SUBSAMPLED
    ),
    "several modes": (
        taps(4, 6, (1, 3), pad=(0, 1), bias=False, mode="circular"),
        taps(6, 4, (3, 1), pad=(1, 0)),
        MODES,
    ),
    "channels": (taps(4, 6, 1), taps(5, 4, 1), CHANNELS),
    "norm's channels": (taps(4, 6, 1), norm(5), CHANNELS),
}  # fmt: skip
NOT_SUMS = {
    "strides": (taps(4, 4, 3, stride=2, pad=1), taps(4, 4, 1), STRIDES),
    "a stride, identity": (taps(4, 4, 3, stride=2, pad=1), UNIT, STRIDES),
    "sizes": (taps(4, 4, 3), taps(4, 4, 1), SIZES),
    "outputs": (taps(4, 6, 1), taps(4, 1, 1), CHANNELS),
    "identity of other channels": (taps(4, 6, 3, pad=1), UNIT, CHANNELS),
    "modes": (taps(4, 4, 3, pad=1), taps(4, 4, 3, pad=1, mode="reflect"), MODES),
}


@pytest.mark.parametrize("case", ROWS)
def test_in_a_row(case):
    first, second = ROWS[case]
    check_row(first, second, 4)


@pytest.mark.parametrize("case", SUMS)
def test_side_by_side(case):
    one, other = SUMS[case]
    for pair in ((one, other), (other, one)):
        check_sum(*pair, channels=12 if case.startswith("groups of") else 4)


@pytest.mark.parametrize("case", NOT_ROWS)
def test_what_is_not_one_in_a_row(case):
    first, second, reason = NOT_ROWS[case]
    with pytest.raises(NotOne, match=f"^{reason}$"):
        then(first, second)


@pytest.mark.parametrize("case", NOT_SUMS)
def test_what_is_not_one_side_by_side(case):
    one, other, reason = NOT_SUMS[case]
    for pair in ((one, other), (other, one)):
        with pytest.raises(NotOne, match=f"^{reason}$"):
            plus(*pair)


@st.composite
def convolutions(draw, inputs, outputs, stride=None, kept=None, plain=False):
    """Draw a convolution; kept: of how many positions more or less its output is, before strides.

    plain: whether it has one tap and no bias.
    """
    size = (1, 1) if plain else draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pads = []
    for k, d, keep in zip(size, dilation, kept or (None, None), strict=True):
        whole = draw(st.integers(0, 6)) if keep is None else d * (k - 1) + 1 + keep
        assume(whole >= 0)
        before = draw(st.integers(0, whole))
        pads.append((0, 0) if plain else (before, whole - before))
    stride = stride or draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = RNG.standard_normal((outputs, inputs // groups, *size))
    bias = RNG.standard_normal(outputs) if not plain and draw(st.booleans()) else None
    return Taps(kernel, bias, Geometry(stride, dilation, pads), groups)


@st.composite
def rows(draw):
    plain = draw(st.booleans())
    second = draw(convolutions(8, 4))
    if not plain:
        second = replace(second, geometry=replace(second.geometry, padding=((0, 0), (0, 0))))
    return draw(convolutions(4, 8, plain=plain)), second


@st.composite
def sums(draw):
    one = draw(convolutions(4, 8))
    pads = one.geometry.padding
    kept = tuple(sum(p) - e for p, e in zip(pads, one.extent, strict=True))
    return one, draw(convolutions(4, 8, one.geometry.stride, kept))


@given(rows(), st.integers(40, 45))
def test_whatever_is_one_in_a_row_computes_the_same(pair, size):
    x = RNG.standard_normal((1, 4, size, size + 1))
    expected = computed(pair[1], computed(pair[0], x))
    assert difference(computed(then(*pair), x), expected).relative < EXACT


@given(sums(), st.integers(20, 25))
def test_whatever_is_one_side_by_side_computes_the_same(pair, size):
    x = RNG.standard_normal((1, 4, size, size + 1))
    expected = computed(pair[0], x) + computed(pair[1], x)
    assert difference(computed(plus(*pair), x), expected).relative < EXACT


def sized(size, stride, positions, word):
    """Return a random convolution of so many positions, padded as Keras does."""
    pads = same((size,), (stride,), (1,)) if word == "same" else ((0, 0),)
    found = settled(pads, (size,), (stride,), (1,), (positions,))
    return Taps(RNG.standard_normal((2, 2, size)), None, Geometry((stride,), (1,), found))


def of_positions(piece, x):
    """Return what a piece computes, without the positions that it crops."""
    ((before, after),) = piece.geometry.padding
    left = x[..., : x.shape[-1] + min(after, 0)]
    return computed(replace(piece, geometry=Geometry(
        piece.geometry.stride, piece.geometry.dilation, ((before, max(after, 0)),)
    )), left)  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("positions", [7, 8, 9, 10, 11])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_paddings_of_an_input_of_a_known_size(stride, positions, size):
    x = RNG.standard_normal((1, 2, positions))
    large, small = (sized(each, stride, positions, "same") for each in (size, 1))
    terms = [of_positions(each, x) for each in (large, small)]
    assert {term.shape[-1] for term in terms} == {-(-positions // stride)}
    assert difference(of_positions(plus(large, small), x), sum(terms)).relative < EXACT
    for word in ("same", "valid"):
        second = sized(2, 1, terms[1].shape[-1], word)
        row = of_positions(then(small, second), x)
        assert difference(row, of_positions(second, terms[1])).relative < EXACT
    valid = sized(size, stride, positions, "valid")
    first = of_positions(valid, x)
    assert first.shape[-1] == (positions - size) // stride + 1
    second = sized(1, 2, first.shape[-1], "valid")
    row = of_positions(then(valid, second), x)
    assert difference(row, of_positions(second, first)).relative < EXACT


def test_a_padding_that_depends_on_an_unknown_size_stays_in_words():
    pads = same((3, 3), (2, 1), (1, 1))
    assert settled(pads, (3, 3), (2, 1), (1, 1), (None, None)) == pads == ("same", (1, 1))


def test_zeros_of_a_bias_or_a_norm_are_no_shift():
    flat = Scale(np.ones(4), np.zeros(4))
    check_row(flat, taps(4, 6, 3, pad=1), 4)


def test_a_large_kernel_that_costs_more_is_computed_only_where_that_is_asked():
    wide = Taps(np.zeros((2048, 1, 7, 7)), None, Geometry((1, 1), (1, 1), [(3, 3)] * 2), 2048)
    point = Taps(np.zeros((2048, 2048, 1, 1)), None, Geometry((1, 1), (1, 1), [(0, 0)] * 2))
    with pytest.raises(NotOne, match=COSTLIER):
        then(wide, point)
    smaller = replace(point, kernel=np.ones((700, 700, 1, 1)))
    with pytest.raises(NotOne, match=COSTLIER):
        then(smaller, pool(3, 2))
    whole = then(smaller, pool(3, 2), any_cost=True).kernel
    assert whole.shape == (700, 700, 3, 3)
    assert np.allclose(whole, 1 / 9)


# The search: what of a forward pass becomes one convolution.
DENSE, POINT, BIASED = taps(4, 4, 3, pad=1), taps(4, 4, 1, bias=False), taps(4, 4, 1)
WISE = taps(4, 4, 3, pad=1, groups=4)


def step(key, source, piece):
    return Step(key, (source,), atom(piece))


def add(key, *inputs, signs=None):
    return Step(key, inputs, None, signs or (1,) * len(inputs))


def merges(steps, output):
    """Return, of every merge, its result and terms, those that are merged by their steps."""
    return {
        merge.key: [
            (t.sign, t.key if t.node is None else "".join(sorted(t.node.steps)))
            for t in merge.terms
        ]
        for merge in search(steps, output).merges
    }


def reasons(steps, output):
    return {refusal.key: refusal.reason for refusal in search(steps, output).refusals}


def test_branches_and_the_identity_are_one():
    steps = [step("a", "x", DENSE), step("b", "x", BIASED), add("c", "a", "b"), add("d", "c", "x")]
    assert merges(steps, "d") == {"d": [(1, "abcd")]}
    found = search(steps, "d").whole
    assert found is not None
    x = RNG.standard_normal((1, 4, 5, 5))
    expected = computed(DENSE, x) + computed(BIASED, x) + x
    assert difference(computed(found.piece, x), expected).relative < EXACT


def test_signs_and_scales():
    steps = [
        step("a", "x", WISE), step("b", "x", norm(4)), add("c", "a", "b", signs=(1, -1)),
        step("d", "c", Scale(np.array([1.0, 2.0, 3.0, 4.0]))), add("e", "x", "d"),
    ]  # fmt: skip
    assert merges(steps, "e") == {"e": [(1, "abcde")]}


def test_another_value_stays_a_term():
    steps = [
        step("a", "x", DENSE), Step("r", ("x",)), add("c", "r", "a", signs=(-1, 1)),
        step("b", "x", BIASED), add("d", "c", "b"),
    ]  # fmt: skip
    assert merges(steps, "d") == {"d": [(-1, "r"), (1, "ab")]}
    assert reasons(steps, "d") == {"c": APART, "d": APART}


def test_what_a_part_of_a_sum_is_the_sum_of():
    steps = [
        step("a", "x", DENSE), Step("r", ("x",)), add("c", "r", "a", signs=(1, -1)),
        step("b", "x", BIASED), add("d", "c", "b"),
    ]  # fmt: skip
    (merge,) = search(steps, "d").merges
    (node,) = merge.nodes
    assert sorted(node.ends) == [(-1, "a"), (1, "b")]
    (merge,) = search([steps[0], steps[3], add("d", "a", "b")], "d").merges
    assert merge.nodes[0].ends == [(1, "d")]


def test_the_reason_of_a_term_is_that_of_the_sum():
    steps = [Step("a", ("x",), reason="its size"), step("b", "x", BIASED), add("c", "a", "b")]
    assert reasons(steps, "c") == {"c": "its size"}


def test_a_sum_that_is_used_twice_is_one_for_itself():
    steps = [
        Step("r", ("x",)), step("a", "x", DENSE), step("b", "x", BIASED), add("c", "r", "a"),
        add("d", "c", "b"), add("e", "d", "d"), Step("out", ("e",)),
    ]  # fmt: skip
    assert merges(steps, "out") == {"d": [(1, "r"), (1, "ab")]}


def test_what_is_used_elsewhere_is_no_part():
    steps = [step("a", "x", DENSE), step("b", "x", BIASED), add("c", "a", "b"), Step("r", ("a",))]
    assert merges([*steps, Step("out", ("c", "r"))], None) == {}
    assert reasons([*steps, Step("out", ("c", "r"))], None) == {"c": USED}


def test_a_part_that_converges_again_is_one():
    steps = [
        step("a", "x", POINT), step("b", "a", norm(4)), step("c", "a", norm(4)), add("d", "b", "c")
    ]  # fmt: skip
    assert merges(steps, "d") == {"d": [(1, "abcd")]}


def test_two_in_a_row_are_one_where_that_is_cheaper():
    steps = [step("a", "x", taps(4, 16, 1, bias=False)), step("b", "a", taps(16, 4, 3, pad=1))]
    assert merges(steps, "b") == {"b": [(1, "ab")]}
    steps = [step("a", "x", taps(16, 16, 3, groups=16)), step("b", "a", taps(16, 16, 1))]
    assert merges(steps, "b") == {}


def test_a_costlier_pair_is_one_beside_what_costs_as_much():
    pair = [step("a", "x", POINT), step("b", "a", pool(3, 1, 1))]
    assert merges(pair, "b") == {}
    assert merges([*pair, step("c", "x", DENSE), add("d", "b", "c")], "d") == {"d": [(1, "abcd")]}


def test_what_costs_more_together_stays_apart():
    wide = taps(4, 4, 7, pad=3, groups=4)
    steps = [step("a", "x", POINT), step("b", "x", wide), add("c", "a", "b")]
    assert merges(steps, "c") == {}
    assert reasons(steps, "c") == {"c": COSTLIER}
    more = [*steps, step("d", "x", BIASED), add("e", "c", "d")]
    assert merges(more, "e") == {"e": [(1, "b"), (1, "ad")]}


def test_a_batch_norm_alone_is_no_reason():
    steps = [step("a", "x", DENSE), step("b", "a", norm(4))]
    assert merges(steps, "b") == {}
    assert search(steps, "b").whole is not None


def test_reasons_in_a_row():
    steps = [step("a", "x", POINT), step("b", "a", norm(4)), step("c", "b", DENSE)]
    assert reasons(steps, "c") == {"c": SHIFTED}
    assert reasons([step("a", "x", DENSE), step("b", "a", DENSE)], "b") == {"b": TWICE}


def test_what_returns_its_input_is_the_identity():
    assert search([], "x").whole.piece.passes
