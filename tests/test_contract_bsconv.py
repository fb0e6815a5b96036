"""The contract of BSConv layers: every backend that has them, against the core in float64."""

from __future__ import annotations

from functools import partial

import contract
import ml_dtypes
import numpy as np
import pytest
from contract import FLOAT32_TOLERANCE, ask, check, rounded
from contract_bsconv import (
    ARGUMENT,
    CASES,
    FORMS,
    TAIL,
    adapter_of,
    bsconv_case,
    check_refused,
    in_form,
    make_problem,
    put,
    say,
    snapshot,
    solve,
)
from equal import assert_close, assert_same
from frameworks import BACKENDS

from doconv_core import (
    NotFoldable,
    compose_bsconv,
    orthonormality,
    orthonormality_gradient,
    pad,
)
from doconv_core.networks.nodes import Flatten, Linear, Network, sequence


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


def usual(variant="s", **options):
    return bsconv_case(8, 6, (3, 3), (7, 8), **{"padding": 1, **options}, variant=variant)


def built(adapter, case, problem=None, dtype="float32"):
    return contract.built(adapter, case, problem or make_problem(case), dtype)


def class_of(adapter, name):
    return getattr(adapter.package, say(adapter, name + "{d}"))


def test_the_table_covers_what_it_promises():
    assert len(set(map(str, CASES))) == len(CASES) >= 50
    for variant in "us":
        cases = [case for case in CASES if case.spec.variant == variant]
        assert {case.spec.rank for case in cases} == {1, 2, 3}
        assert {case.spec.with_bn for case in cases} == {True, False}
        assert {case.dense for case in cases if case.spec.with_bn} == {True, False}
        assert {case.padding_mode for case in cases} == {
            "zeros", "reflect", "replicate", "circular",
        }  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.exhaustive] * (case in TAIL)) for case in CASES],
    ids=str,
)
def test_a_layer_is_the_cores_in_every_form(adapter, case, tmp_path):
    """Its state, its output and gradients, what it is saved as, and what it folds to."""
    problem = make_problem(case)
    expected = solve(case, problem)
    layer, x = built(adapter, case, problem)
    output = adapter.forward(layer, x)
    fresh = adapter.build(case if adapter.pads(case) else case.padded_outside())
    loaded = adapter.round_trip(layer, fresh, x, tmp_path)
    for what, each in (("layer", layer), ("loaded", loaded)):
        assert type(each) is type(layer), what
        shapes = case.spec.pointwise_shapes
        assert (each.spec, each.spec.pointwise_shapes) == (layer.spec, shapes), what
        arrays = adapter.package.export_state(each).arrays
        assert arrays.keys() == problem.arrays.keys(), what
        for name, values in problem.arrays.items():
            np.testing.assert_array_equal(arrays[name], values, f"{what}: {name}")
    np.testing.assert_array_equal(adapter.forward(loaded, x), output, "output of the loaded one")

    for form in FORMS:
        if form == "dense" and not case.dense:
            with pytest.raises(NotFoldable, match=f"meets zero padding .* use {ARGUMENT}='merge'"):
                layer.fold(**in_form(form))
            continue
        folded = layer.fold(**in_form(form))
        assert adapter.is_ordinary(folded, form), form
        assert_close(adapter.forward(folded, x), expected.output, FLOAT32_TOLERANCE, form)
        if form == "keep":
            np.testing.assert_array_equal(adapter.forward(folded, x), output, form)

    check(ask(adapter, layer, x, case, problem), expected, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("variant", "us")
def test_the_composed_kernel_is_that_of_the_layer_and_has_its_gradients(adapter, variant):
    for padding in (0, 1):
        case = usual(variant, padding=padding)
        problem = make_problem(case)
        layer, _ = built(adapter, case, problem, adapter.DOUBLE)
        x, dy = (each.astype(adapter.DOUBLE) for each in (problem.x, problem.dy))
        x, expected = pad(x, case.padding, "zeros"), solve(case, problem)
        found = adapter.gradients(layer, x, dy, composed=True)
        assert_close(found.output, expected.output, adapter.EXACT, "output")
        for name, gradient in expected.arrays.items():
            assert_close(found.arrays[name], gradient, adapter.EXACT, name)
    with pytest.raises(NotFoldable, match="with batch norms is no mere kernel; fold"):
        built(adapter, usual(variant, with_bn=True))[0].composed_kernel()


@pytest.mark.parametrize("variant", "us")
def test_half_types_are_composed_and_folded_with_one_rounding(adapter, variant):
    case = usual(variant)
    for dtype in adapter.HALF_TYPES:
        problem = make_problem(case)
        arrays = {name: rounded(array, dtype) for name, array in problem.arrays.items()}
        layer, _ = built(adapter, case, problem._replace(arrays=arrays), dtype)
        *pointwise, depthwise = [
            arrays[f"{name}.weight"].astype("float64") for name in case.spec.names
        ]
        weights = [each[..., 0] for each in pointwise]
        pw = weights[0] if variant == "u" else weights[1] @ weights[0]
        exact = compose_bsconv(pw, depthwise.reshape(case.spec.depthwise_shape), case.spec)
        exact = exact.reshape(case.spec.dense.kernel_shape)
        folded = layer.fold(**in_form("dense"))
        assert adapter.dtypes(folded) == {dtype}
        kernel = adapter.package.export_state(folded).arrays["weight"].astype("float32")
        once = exact.astype(getattr(ml_dtypes, dtype, dtype)).astype("float32")
        np.testing.assert_array_equal(kernel.reshape(once.shape), once, dtype)
        composed, name = adapter.composed_kernel(layer)
        assert dtype in name
        allowed = {"float16": (1e-3, 1e-5), "bfloat16": (2**-7, 1e-5)}[dtype]
        np.testing.assert_allclose(composed, once, *allowed, err_msg=dtype)


def test_arguments_that_give_no_layer_are_refused(adapter):
    rows = [
        ("u", {"groups": 2}, ValueError, "BSConvU2{d} takes groups=1 alone.*groups=2"),
        ("s", {"p": 0}, ValueError, "p must be above 0 and at most 1; received p=0"),
        ("s", {"min_mid_channels": 0}, ValueError, "min_mid_channels must be at least 1"),
        ("u", {"stride": 0}, ValueError, "{stride} must be at least 1"),
        ("u", {"padding": -1}, ValueError, "{padding} must be at least 0"),
        ("u", {"with_bn": None}, TypeError, "with_bn must be True or False"),
        ("u", {"bn_options": {"eps": 1}}, ValueError, "give with_bn=True as well"),
        (
            "u",
            {"with_bn": True, "bn_options": {"wrong": 1}},
            TypeError,
            "bn_options may have {norms}.*received '{wrong}'",
        ),
    ]
    make, words = adapter.make, partial(say, adapter)
    check_refused(
        *(
            (partial(make, variant, 8, 6, 3, **words(options)), error, words(message))
            for variant, options, error, message in rows
        )
    )


def test_what_may_compute_something_else_is_not_folded(adapter):
    def changed(change):
        layer = built(adapter, usual(padding=0, with_bn=True, p=0.5))[0]
        change(layer)
        return layer

    def fold(change, form):
        return changed(change).fold(**in_form(form))

    own = say(adapter, "has a {call} of its own")
    check_refused(
        *((partial(fold, change, "dense"), NotFoldable, m) for change, m in adapter.NOT_FOLDABLE),
        *((partial(fold, adapter.own_call, f), NotFoldable, own) for f in adapter.REFUSE_OWN_CALLS),
    )
    layer = built(adapter, usual())[0]
    with pytest.raises(ValueError, match=f"{ARGUMENT} must be one of 'keep', 'merge', 'dense'"):
        layer.fold(**in_form("deploy"))


@pytest.mark.parametrize("variant", "us")
def test_the_depthwise_part_may_be_a_do_layer(adapter, variant):
    for case, multiplier in ((usual(variant), None), (usual(variant), 30), (CUBE[variant], 30)):
        problem = make_problem(case)
        layer, x = built(adapter, case, problem, adapter.DOUBLE)
        options = {"depth_multiplier": multiplier}
        made, report = adapter.package.over_parameterize(layer, **options)
        assert [change.path for change in report.changed] == ["depthwise"]
        assert type(made.depthwise).__name__.startswith("DO")
        shape = (6, case.spec.taps, multiplier or case.spec.taps)
        d = 0.1 * np.random.default_rng(1).standard_normal(shape)
        put(adapter, made, {"depthwise.depthwise_weight": d.astype("float32")})
        x = x.astype(adapter.DOUBLE)
        output = adapter.forward(made, x)
        dy, padded = np.zeros_like(output), pad(x, case.padding, "zeros")
        found = adapter.gradients(made, padded, dy, composed=True)
        assert_close(found.output, output, adapter.EXACT, "composed kernel")
        for form in FORMS:
            folded = made.fold(**in_form(form))
            assert adapter.is_ordinary(folded, form), form
            assert_close(adapter.forward(folded, x), output, adapter.EXACT, form)


CUBE = {v: bsconv_case(4, 6, (3, 3, 3), (5, 5, 5), variant=v) for v in "us"}


def test_from_conv_says_what_it_takes(adapter):
    take, conv = class_of(adapter, "BSConvU2").from_conv, partial(adapter.make, "conv", 4, 4, 3)
    known, other = "start must be one of 'weights', 'random'", "BSConvU2{d}.from_conv takes over a "
    check_refused(
        (lambda: take(conv(rank=1)), TypeError, say(adapter, other + "{conv}")),
        (lambda: take(conv(groups=2)), ValueError, "takes groups=1 alone.*received groups=2"),
        (lambda: take(conv(), start="zeros"), ValueError, known),
    )


@pytest.mark.parametrize("with_bn", [False, True])
def test_from_conv_starts_from_the_weights(adapter, with_bn):
    for case in (CUBE["u"], usual("u", padding=0, dilation=2)):
        layer, x = built(adapter, case, dtype=adapter.DOUBLE)
        conv = layer.fold(**in_form("dense"))
        options = say(adapter, {"bn_options": {"eps": 1e-9}}) if with_bn else {}
        found = type(layer).from_conv(conv, with_bn=with_bn, **options)
        assert found.explained == pytest.approx(1)
        x = x.astype(adapter.DOUBLE)
        close = max(adapter.EXACT, 1e-8)  # as batch norms' epsilon is
        assert_close(adapter.forward(found, x), adapter.forward(conv, x), close, str(case))
        random = type(layer).from_conv(conv, start="random")
        assert random.explained is None
        assert np.abs(adapter.forward(random, x)).max() > 0
        arrays = [adapter.package.export_state(each).arrays for each in (random, conv)]
        np.testing.assert_array_equal(arrays[0]["depthwise.bias"], arrays[1]["bias"])


def test_the_loss_and_its_gradient_are_the_cores(adapter):
    model = adapter.chain(("s", 8, 8, 3), ("s", 8, 4, 3))
    weights = {
        name: array[..., 0]
        for name, array in snapshot(adapter.package, model).arrays.items()
        if name.endswith("pointwise1.weight")
    }
    loss, found = adapter.penalty(model, 0.5)
    assert loss == pytest.approx(0.5 * sum(map(orthonormality, weights.values())), rel=1e-6)
    assert list(weights) == ["0.pointwise1.weight", "1.pointwise1.weight"]
    for name, weight in weights.items():
        expected = 0.5 * orthonormality_gradient(weight)
        np.testing.assert_allclose(found[name][..., 0], expected, rtol=1e-5, atol=1e-6)
        assert not found[name.replace("1.w", "2.w")].any()
    # Of orthonormal rows it is zero.
    layer = built(adapter, usual())[0]
    put(adapter, layer, {"pointwise1.weight": np.eye(*layer.spec.pointwise_shapes[0])[..., None]})
    loss, found = adapter.penalty(layer, 1)
    assert loss == 0
    np.testing.assert_array_equal(found["pointwise1.weight"], 0)


def test_marked_convolutions_count_once_wherever_they_are(adapter):
    model = adapter.chain(("conv", 6, 6, 1), 0, ("conv", 6, 4, 1), ("s", 4, 4, 3))
    layers, mark = adapter.walk(model), adapter.package.mark_orthonormal
    alone = adapter.penalty(model, 1)[0]
    assert mark(layers["0"]) is layers["0"]
    both = adapter.penalty(model, 1)[0]
    weight = adapter.package.export_state(model).arrays["0.weight"][..., 0]
    assert both == pytest.approx(alone + orthonormality(weight), rel=1e-6)
    mark(layers["3"].pointwise1)  # which counts already
    assert adapter.penalty(model, 1)[0] == both
    assert adapter.penalty(adapter.copied(model), 1)[0] == both


def test_what_has_no_loss_is_refused(adapter):
    loss, mark = adapter.package.orthonormality_loss, adapter.package.mark_orthonormal
    layer, conv = built(adapter, usual())[0], partial(adapter.make, "conv", 4, 4)
    none = "the Conv2{d} has no weight.* neither a BSConvS1{d}, BSC"
    check_refused(
        (lambda: loss(conv(1)), ValueError, say(adapter, none)),
        (lambda: loss(built(adapter, usual("u"))[0]), ValueError, "has no weight"),
        (lambda: loss([]), TypeError, say(adapter, "must be a {module}; received .*list")),
        (lambda: loss(layer, "1"), TypeError, "alpha must be a number; received"),
        (lambda: loss(layer, float("inf")), ValueError, "alpha must be finite"),
        (lambda: mark(linear(adapter)), TypeError, "takes a convolution; rec.* (Linear|Dense)"),
        (lambda: mark(conv(3)), ValueError, r"kernel_size=\(3, 3\)"),
        (lambda: mark(conv(1, rank=1, groups=2)), ValueError, "received .*groups=2"),
        (lambda: loss(layer, -0.1), ValueError, r"alpha must not be negative.*alpha=-0\.1"),
        (
            lambda: mark(adapter.walk(adapter.chain(("conv", 3, 8, 1)))["0"]),
            ValueError,
            "more rows cannot be orthonormal; received 3 input channels and 8 output channels",
        ),
    )


def linear(adapter):
    network = Network("one", sequence(("flatten", Flatten()), ("linear", Linear(2))), (1, 2, 2))
    return adapter.walk(adapter.described(network))["linear"]


def test_the_loss_is_computed_in_float32_at_least(adapter):
    problem = make_problem(usual())
    for dtype in (*adapter.HALF_TYPES, adapter.DOUBLE):
        arrays = {name: rounded(array, dtype) for name, array in problem.arrays.items()}
        wide = "float32" if dtype in adapter.HALF_TYPES else dtype
        layers = [
            built(adapter, usual(), problem._replace(arrays=arrays), each)[0]
            for each in (dtype, wide)
        ]
        losses = [adapter.package.orthonormality_loss(layer) for layer in layers]
        assert_same(*losses, dtype)
        assert wide in str(losses[0].dtype)


@pytest.mark.parametrize("alpha", [0.1, 0])
def test_training_with_the_loss_makes_the_rows_orthonormal(adapter, alpha):
    model = adapter.chain(("s", 8, 6, 3), ("s", 6, 4, 3), rank=1, with_bn=True)
    rng = np.random.default_rng(0)
    x, target = (rng.standard_normal(shape).astype("f4") for shape in ((16, 8, 12), (16, 4, 8)))
    steps = 240 if alpha else 20
    rates = 0.1 * (1 + np.cos(np.pi * np.arange(steps) / steps))
    adapter.descend(model, x, target, alpha, rates)
    arrays = adapter.package.export_state(model).arrays
    weights = [w[..., 0] for name, w in arrays.items() if name.endswith("pointwise1.weight")]
    assert len(weights) == 2
    for w in weights:
        off = np.abs(w @ w.T - np.eye(len(w))).max()
        assert off <= 1e-5 if alpha else off > 0.5


@pytest.mark.parametrize("variant", "us")
def test_copies_are_whole_and_folding_keeps_what_is_trained_and_the_dtype(adapter, variant):
    for with_bn in (False, True):
        case = usual(variant, with_bn=with_bn, padding=0)
        layer, x = built(adapter, case, dtype=adapter.DOUBLE)
        x = x.astype(adapter.DOUBLE)
        output, other = adapter.forward(layer, x), adapter.copied(layer)
        assert (type(other), other.spec) == (type(layer), layer.spec)
        assert_same(adapter.forward(other, x), output)
        for parameter in adapter.entries(layer).values():
            adapter.freeze(parameter)
        for form in FORMS:
            folded = layer.fold(**in_form(form))
            assert adapter.trainable(folded) == 0, form
            assert adapter.dtypes(folded) == {adapter.DOUBLE}, form
            assert_close(adapter.forward(folded, x), output, adapter.EXACT, form)


def test_the_package_has_every_name(adapter):
    names = {f"BSConv{v}{rank}" for v in "US" for rank in (1, 2, 3)}
    names = {say(adapter, name + "{d}") for name in names} | {"BSConvU", "BSConvS"}
    names |= {"to_bsconv", "mark_orthonormal", "orthonormality_loss"}
    assert names <= set(adapter.package.__all__)
    for name in ("BSConvU", "BSConvS"):
        assert getattr(adapter.package, name) is class_of(adapter, f"{name}2")
