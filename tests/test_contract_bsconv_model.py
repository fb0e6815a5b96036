"""The contract of whole models and BSConv: converted, folded, over-parameterized, penalized."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
from contract_bsconv import (
    ARGUMENT,
    FORMS,
    adapter_of,
    check_refused,
    in_form,
    put,
    say,
    snapshot,
)
from equal import assert_close
from frameworks import BACKENDS

from doconv_core import (
    BSConvReport,
    Converted,
    FoldReport,
    Left,
    NotFoldable,
    Report,
    orthonormality,
)
from doconv_core.kinds.bsconv import GROUPED, OVER_PARAMETERIZED, PART
from doconv_core.models.report import NOT_SELECTED, SUBCLASS
from doconv_core.networks.nodes import Activation, Conv, Network, Residual, sequence

other_size = "its kernel_size {} is not among kernel_sizes".format
NOTHING = "the model has no convolution that could be replaced"
SHAPE = (4, 12, 10)
TAIL = pytest.mark.exhaustive
BODY = sequence(
    ("conv", Conv(8, (3, 3))),
    ("relu", Activation("relu")),
    ("grouped", Conv(8, (3, 3), groups=2)),
    ("wide", Conv(8, (1, 5))),
)
NETWORK = Network(
    "net",
    sequence(
        ("stem", Conv(8, (3, 3), stride=2, padding=0, bias=True)),
        ("body", Residual(BODY)),
        ("one_tap", Conv(8)),
        ("head", Conv(5, (5, 5), bias=True)),
    ),
    SHAPE,
)
# What becomes a BSConv, and what does not.
REPLACED = ["stem", "body.conv", "head"]
LEFT = {
    "body.grouped": GROUPED,
    "body.wide": other_size((1, 5)),
    "one_tap": other_size((1, 1)),
}


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


def network(adapter):
    return adapter.described(NETWORK, adapter.DOUBLE)


def converted(adapter, variant="u", **options):
    """Return the network with BSConvs, with values as after training."""
    model = adapter.package.to_bsconv(network(adapter), variant, start="random", **options).model
    return moved(adapter, model, ("weight", "beta", "running_mean"))


def moved(adapter, model, endings):
    """Give the entries with these endings values that are not trivial; return the model."""
    rng, arrays = np.random.default_rng(5), snapshot(adapter.package, model).arrays
    chosen = {name: array for name, array in arrays.items() if name.endswith(endings)}
    assert chosen
    for name, array in chosen.items():
        chosen[name] = (0.3 * rng.standard_normal(array.shape)).astype(array.dtype)
    put(adapter, model, chosen)
    return model


def output(adapter, model, shape=(2, *SHAPE)):
    x = np.random.default_rng(1).standard_normal(shape)
    return adapter.forward(model, x.astype(adapter.DOUBLE))


def kinds(adapter, model):
    return {path: type(layer).__name__ for path, layer in adapter.walk(model).items()}


def paths(report):
    return [change.path for change in report.changed]


def is_bare(adapter, model):
    """Whether no layer of this package is left, but for what holds others in networks by name."""
    return not any(kind.startswith(("BSConv", "DO")) for kind in kinds(adapter, model).values())


def test_the_report_tells_what_was_done(adapter):
    original = network(adapter)
    before = output(adapter, original)
    result = adapter.package.to_bsconv(original, "s", p=0.5)
    assert type(result) is Converted
    model, report = result
    assert type(report) is BSConvReport
    assert paths(report) == REPLACED
    before_after = say(adapter, "Conv2{d}"), say(adapter, "BSConvS2{d}")
    assert {change[1:] for change in report.changed} == {before_after}
    assert [kinds(adapter, model)[path] for path in REPLACED] == [before_after[1]] * 3
    assert report.parameters_before == adapter.trainable(original)
    assert report.parameters_after == adapter.trainable(model) < report.parameters_before
    assert [path for path, _ in report.explained] == REPLACED
    assert all(0 < share < 1 for _, share in report.explained)
    assert "explained variance of the kernels before" in str(report)
    assert report.left == tuple(Left(path, before_after[0], why) for path, why in LEFT.items())
    assert [kinds(adapter, original)[path] for path in REPLACED] == [before_after[0]] * 3
    np.testing.assert_array_equal(output(adapter, original), before)


@pytest.mark.parametrize("variant", ["u", "s"])
def test_models_fold_in_every_form_and_dense_ones_are_found_again(adapter, variant):
    """Into copies and in place, and no further when folded again."""
    original = converted(adapter, variant)
    expected, dense = output(adapter, original), None
    for form in FORMS:
        given = adapter.copied(original)
        for inplace in (False, True):
            dense = check_form(adapter, variant, given, expected, form, inplace)
    # A network of dense convolutions that are BSConvs in fact has its outputs unchanged.
    conv = adapter.walk(dense)[REPLACED[0]]
    for inplace in (False, True):
        model, report = adapter.package.to_bsconv(dense, variant, inplace=inplace)
        assert (model is dense) == inplace
        assert (adapter.walk(model)[REPLACED[0]] is conv) == inplace
        assert_close(output(adapter, model), expected, 10 * adapter.EXACT, f"inplace={inplace}")
        assert [share for _, share in report.explained] == pytest.approx([1, 1, 1])


def check_form(adapter, variant, given, expected, form, inplace):
    """Assert that a model folds to this form, and that this is told; return it folded."""
    case, first = f"{form}, inplace={inplace}", adapter.walk(given)[REPLACED[0]]
    model, report = adapter.package.fold(given, **in_form(form), inplace=inplace)
    assert (adapter.walk(model)[REPLACED[0]] is first) == inplace, case
    assert_close(output(adapter, model), expected, adapter.EXACT, case)
    assert type(report) is FoldReport
    assert paths(report) == REPLACED, case
    after = say(adapter, "Conv2{d}" if form == "dense" else "{sequential}")
    before = say(adapter, f"BSConv{variant.upper()}2{{d}}")
    assert {change[1:] for change in report.changed} == {(before, after)}, case
    assert is_bare(adapter, model), case
    assert [choice.path for choice in report.choices] == REPLACED, case
    for path, choice in zip(REPLACED, report.choices, strict=True):
        cost = dict(zip(FORMS, choice.cost, strict=True))[form]
        assert adapter.trainable(adapter.walk(model)[path]) == cost.parameters, path
    assert f"{ARGUMENT}={form!r}; each form's parameters" in str(report)
    again, report = adapter.package.fold(model, **in_form(form))
    assert (type(report), report.changed) == (Report, ())
    np.testing.assert_array_equal(output(adapter, again), output(adapter, model), case)
    return model


def test_merging_folds_batch_norms_that_a_dense_kernel_cannot(adapter):
    fold, first = adapter.package.fold, REPLACED[0]
    model = converted(adapter, "s", with_bn=True)
    before, expected = kinds(adapter, model), output(adapter, model)
    with pytest.raises(NotFoldable, match=r"layer 'body.conv': .* meets zero padding"):
        fold(model, **in_form("dense"), inplace=True)
    assert kinds(adapter, model) == before
    merged = fold(model, **in_form("merge")).model
    assert adapter.is_ordinary(adapter.walk(merged)[first], "merge")
    fused, report = fold(model, fuse_batchnorm=True)
    assert kinds(adapter, fused)[f"{first}.batch_norm1"] == adapter.WORDS["none"]
    assert f"{first}.batch_norm1" in paths(report)
    both = fold(model, fuse_batchnorm=True, **in_form("merge")).model
    for what, found in (("merged", merged), ("fused", fused), ("both", both)):
        assert_close(output(adapter, found), expected, adapter.EXACT, what)


def test_what_is_left_has_its_reason(adapter):
    rows = [
        (("do_conv", 4, 4, 3), "0", OVER_PARAMETERIZED),
        (("own", 4, 4, 3), "0", SUBCLASS),
        (("u", 1, 1, 3), "0.depthwise", PART),
    ]
    for layer, path, reason in rows:
        with pytest.warns(UserWarning, match=NOTHING):
            report = adapter.package.to_bsconv(adapter.chain(layer)).report
        assert {each.path: each.reason for each in report.left}[path] == reason, layer
    convs = adapter.chain(("conv", 4, 4, 3), ("conv", 4, 4, 3))
    report = adapter.package.to_bsconv(convs, where="0").report
    assert report.left == (Left("1", say(adapter, "Conv2{d}"), NOT_SELECTED),)
    # A shared layer stays shared.
    model, report = adapter.package.to_bsconv(adapter.chain(("conv", 4, 4, 3), 0))
    assert len(report.changed) == 1
    assert list(kinds(adapter, model).values()).count(say(adapter, "BSConvU2{d}")) in (1, 2)
    # Of which rank a layer is, its kernel size tells.
    convs = adapter.chain(("conv", 4, 4, 3), ("conv", 4, 4, 5), rank=1)
    made, report = adapter.package.to_bsconv(convs, kernel_sizes=(3,))
    assert kinds(adapter, made)["0"] == say(adapter, "BSConvU1{d}")
    assert report.left == (Left("1", say(adapter, "Conv1{d}"), other_size((5,))),)
    folded = adapter.package.fold(made, **in_form("dense")).model
    assert kinds(adapter, folded)["0"] == say(adapter, "Conv1{d}")
    x = np.random.default_rng(1).standard_normal((2, 4, 12)).astype("float32")
    assert_close(adapter.forward(folded, x), adapter.forward(made, x), 1e-5)


def test_bad_arguments_change_nothing(adapter):
    model = network(adapter)
    before, expected = kinds(adapter, model), output(adapter, model)
    rows = [
        ({"variant": "x"}, ValueError, "variant must be one of 'u', 's'; received variant='x'"),
        ({"start": "zeros"}, ValueError, "start must be one of 'weights', 'random'"),
        ({"kernel_sizes": 3}, TypeError, "kernel_sizes must be a sequence of kernel sizes"),
        ({"variant": "s", "p": 0}, ValueError, "p must be above 0 and at most 1"),
        ({"min_mid_channels": 0}, ValueError, "min_mid_channels must be at least 1"),
        ({"p": 0.5}, ValueError, r"p is of BSConv-S alone.*variant='u' and p=0\.5"),
        ({"variant": "u", "min_mid_channels": 2}, ValueError, "min_mid_channels is of BSConv-S al"),
        ({"bn_options": say(adapter, {"eps": 1})}, ValueError, "give with_bn=True as well"),
        ({"where": 3}, TypeError, "where must be None, a glob pattern or several"),
    ]
    to_bsconv = adapter.package.to_bsconv
    check_refused(
        *((partial(to_bsconv, model, **o, inplace=True), error, text) for o, error, text in rows)
    )
    put(adapter, model, {"head.weight": np.full((5, 8, 25), np.nan, adapter.DOUBLE)})
    with pytest.raises(ValueError, match=r"layer 'head': kernel must be finite"):
        to_bsconv(model, inplace=True)
    assert kinds(adapter, model) == before
    assert np.isfinite(expected).all()
    assert len(to_bsconv(model, start="random").report.changed) == 3


def test_a_layer_of_ones_own_is_kept_and_not_folded(adapter):
    model, own = adapter.chain(("doubled", 4, 4, 3)), "Doubled has a {call} of its own"
    kept, report = adapter.package.fold(model)
    assert type(adapter.walk(kept)["0"]) is adapter.Doubled
    assert report.left == (Left("0", "Doubled", SUBCLASS),)
    with pytest.raises(NotFoldable, match=rf"layer '0': .*{say(adapter, own)}"):
        adapter.package.fold(model, **in_form("merge"))
    with pytest.raises(ValueError, match=f"{ARGUMENT} must be one of 'keep', 'merge', 'dense'"):
        adapter.package.fold(model, **in_form("deploy"))


@pytest.mark.parametrize("multiplier", [pytest.param(None, marks=TAIL), 25])
def test_over_parameterized_depthwise_parts_fold(adapter, multiplier):
    parts = [f"{path}.depthwise" for path in REPLACED]
    options = {"where": "*.depthwise", "depth_multiplier": multiplier}
    model, report = adapter.package.over_parameterize(converted(adapter, "s"), **options)
    assert paths(report) == parts
    made = {kinds(adapter, model)[path] for path in parts}
    assert all(kind.startswith("DO") for kind in made)
    moved(adapter, model, "depthwise_weight")
    expected = output(adapter, model)
    for form in FORMS:
        folded, report = adapter.package.fold(model, **in_form(form))
        assert_close(output(adapter, folded), expected, adapter.EXACT, form)
        assert is_bare(adapter, folded), form
        found = [change.path for change in report.changed if change.before in made]
        assert found == ([] if form == "dense" else parts), form


def test_states_go_between_models(adapter):
    model, other = (converted(adapter, "s", p=0.5, with_bn=True) for _ in range(2))
    moved(adapter, other, "gamma")
    state = adapter.package.export_state(model)
    assert state.arrays["stem.pointwise1.weight"].shape == (4, 4, 1)
    assert np.abs(output(adapter, other) - output(adapter, model)).max() > 0
    adapter.package.load_state(other, state)
    np.testing.assert_array_equal(output(adapter, other), output(adapter, model))


def test_the_loss_of_a_converted_model_is_zero_at_first_and_gone_when_it_is_folded(adapter):
    model = adapter.package.to_bsconv(network(adapter), "s").model
    assert adapter.penalty(model)[0] <= adapter.EXACT
    none = say(adapter, "the {root} has no weight to make orthonormal")
    with pytest.raises(ValueError, match=none):
        adapter.package.orthonormality_loss(adapter.package.fold(model).model)


@pytest.mark.parametrize(
    ("name", "ending", "number"),
    [
        ("cifar_resnet20_bsconvs_p1d4", ".pointwise1.weight", 19),
        ("cifar_mobilenetv2_w1d4_bsconvs_p1d6", "project.conv.weight", 17),
        pytest.param(
            "cifar_mobilenetv3_small_w1d2_bsconvs_p1d6", "project.conv.weight", 11,
            marks=TAIL,
        ),
    ],
)  # fmt: skip
def test_networks_by_name_have_the_loss(adapter, name, ending, number):
    """Of MobileNets, the linear convolutions count."""
    model = adapter.package.get_model(name, num_classes=5)
    arrays = adapter.package.export_state(model).arrays
    weights = [array[..., 0] for path, array in arrays.items() if path.endswith(ending)]
    assert len(weights) == number
    expected = 0.1 * sum(map(orthonormality, weights))
    assert adapter.penalty(model)[0] == pytest.approx(expected, rel=1e-5)
    assert expected > 0
    if "mobilenet" not in name:
        layers = [adapter.walk(model)[path] for path, _ in list_bsconvs(adapter, model)]
        assert {layer.spec.p for layer in layers} == {0.25}
        return
    with pytest.raises(ValueError, match="has no weight to make orthonormal"):
        adapter.penalty(adapter.package.get_model(name.partition("_bsconvs")[0]))


def list_bsconvs(adapter, model):
    return [item for item in kinds(adapter, model).items() if item[1].startswith("BSConv")]


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param([("keep", True), ("merge", False), ("dense", True)], id="each form"),
        pytest.param([*product(FORMS, (False, True))], id="each way", marks=TAIL),
    ],
)
def test_a_network_by_name_folds_to_each_form(adapter, ways):
    shape, fold = (3, 16, 16), adapter.package.fold
    model = adapter.package.get_model("cifar_wrn16_1_bsconvu", num_classes=5, input_shape=shape)
    x = np.random.default_rng(0).random((2, *shape)).astype("float32")
    expected = adapter.forward(model, x)
    assert len(list_bsconvs(adapter, model)) == 13  # the stem, and twelve in units
    for form, fuse in ways:
        folded, report = fold(model, **in_form(form), fuse_batchnorm=fuse)
        assert (report.forms, len(report.choices)) == ({"bsconv": form}, 13)
        assert_close(adapter.forward(folded, x), expected, 1e-5, f"{form}, fuse_batchnorm={fuse}")
        assert not list_bsconvs(adapter, folded)
