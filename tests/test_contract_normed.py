"""The contract of branches with batch norms: every backend that has them, against NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cases import tail_but
from contract import FLOAT32_TOLERANCE, check_refused, put, say, snapshot
from contract_networks import images
from contract_networks import trained as trained_state
from contract_normed import CASES, forward, given, layer_of, make_arrays, make_data
from equal import assert_close, assert_same
from frameworks import BACKENDS, adapter_of

from doconv_core import Geometry, NotFoldable, count, describe
from doconv_core.kinds.base import ONE_TAP
from doconv_core.kinds.normed import KINDS, RULES, BranchedSpec, check_options
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.normed import NO_NORM, PART
from doconv_core.networks.evaluate import evaluate
from doconv_core.networks.initialize import initialize
from doconv_core.networks.lowering import layers
from doconv_core.networks.names import of_kind
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Conv,
    GlobalPool,
    Network,
    Residual,
    sequence,
)


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


def next_of(adapter):
    """Return another framework's adapter: each is that of one."""
    names = [*BACKENDS]
    return adapter_of(names[names.index(adapter.__name__.rpartition(".")[2]) - 1])


def wide(arrays):
    return {name: array.astype(np.float64) for name, array in arrays.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_is_numpys_and_folds_to_one_convolution(adapter, case, tmp_path):
    """What it computes in inference, what it is saved as, in another framework, and its fold."""
    layer, (x, _) = layer_of(adapter, case), make_data(case)
    arrays, x = make_arrays(case, layer.spec), given(adapter, case, x)
    put(adapter, layer, arrays)
    expected = forward(layer.spec, wide(arrays), x.astype(np.float64), training=False)
    output = adapter.forward(layer, x)
    assert_close(output, expected, FLOAT32_TOLERANCE)
    state = snapshot(adapter.package, layer)
    assert_same(state.arrays, arrays)

    folded = layer.fold()
    assert type(folded) is adapter.ordinary_type(case.conv)
    assert_close(adapter.forward(folded, x), expected, FLOAT32_TOLERANCE, "folded")
    made = snapshot(adapter.package, folded)
    assert made.layers[""].bias
    assert made.layers[""].spec == layer.spec.conv

    kept = adapter.round_trip(layer, layer_of(adapter, case), x, tmp_path)
    assert_same(adapter.forward(kept, x), output, "saved and loaded")
    other = next_of(adapter)
    there = layer_of(other, case)
    if there.spec == layer.spec:  # the padding may be before the one and in the other
        other.package.load_state(there, state)
        assert_close(other.forward(there, x), output, FLOAT32_TOLERANCE, other.__name__)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_training_a_layer_and_its_gradients_are_numpys(adapter, case):
    """Each gradient along a random direction, of which NumPy tells the slope."""
    layer, (x, dy) = layer_of(adapter, case, adapter.DOUBLE), make_data(case)
    arrays, x = wide(make_arrays(case, layer.spec)), given(adapter, case, x).astype(adapter.DOUBLE)
    put(adapter, layer, arrays)
    found = adapter.gradients(layer, x, dy.astype(adapter.DOUBLE), training=True)
    output = forward(layer.spec, arrays, x.astype(np.float64), training=True)
    assert_close(found.output, output, max(adapter.EXACT, 1e-9), "output")

    rng, step = np.random.default_rng(1), 1e-6
    allowed = 1e-5 if adapter.DOUBLE == "float64" else 1e-3

    def slope(name, direction):
        def loss(sign):
            values = dict(arrays, x=x.astype(np.float64))
            values[name] = values[name] + sign * step * direction
            return (forward(layer.spec, values, values["x"], training=True) * dy).sum()

        return (loss(1) - loss(-1)) / (2 * step)

    trained = {n: g for n, g in found.arrays.items() if "running" not in n}
    assert len(trained) == sum("running" not in name for name in arrays)
    for name, gradient in {"x": found.x, **trained}.items():
        direction = rng.standard_normal(gradient.shape)
        expected = slope(name, direction)
        error = abs((gradient * direction).sum() - expected)
        assert error < allowed * max(1, abs(expected), np.abs(gradient).max()), name


def unit(channels, size=3, groups=1, stride=1, **options):
    conv = Conv(channels, (size, size), stride=stride, groups=groups, **options)
    return sequence(("conv", conv), ("norm", BatchNorm()), ("relu", Activation("relu")))


# A unit that keeps its sizes, one that does not, one in groups, with a bias, and a pointwise one;
# a convolution of which two take the output, and a last one without a batch norm.
def units(groups):
    return Network(
        "units",
        sequence(
            ("stem", unit(6, 7, bias=True)),
            ("same", unit(6)),
            ("body", Residual(sequence(("a", unit(6, groups=groups)), ("b", unit(6, 1))))),
            ("down", unit(8, stride=2)),
            ("last", Conv(4, (3, 3))),
            ("pool", GlobalPool()),
        ),
        (5, 15, 14),
    )


NETWORK = units(groups=6)
# A kernel of one number has no gradient but roundoff, as the batch norm behind it takes it out.
OF_SEVERAL = units(groups=2)
POINTWISE, BARE = "body.b.conv", "last"


def trained(adapter):
    """Return the network, with values as after training, and an input."""
    model = adapter.described(NETWORK)
    rng = np.random.default_rng(3)

    def drawn(name, array):
        if name.endswith("running_var"):
            return rng.uniform(0.5, 2, array.shape)
        return array if name.endswith("weight") else rng.standard_normal(array.shape)

    arrays = snapshot(adapter.package, model).arrays
    put(adapter, model, {n: drawn(n, a).astype("f4") for n, a in arrays.items()})
    return model, rng.standard_normal((2, 5, 15, 14)).astype("f4")


def wait(model, adapter, x):
    """Let a model have run in training, as after a step, with other statistics and values."""
    arrays = snapshot(adapter.package, model).arrays
    rng = np.random.default_rng(4)
    return put(adapter, model, {
        n: (a * rng.uniform(0.8, 1.2, a.shape) + 0.1 * ("gamma" in n)).astype("f4")
        for n, a in arrays.items()
    })  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_convolution_and_its_batch_norm_become_a_layer_and_one_convolution(adapter, rule):
    package = adapter.package
    model, x = trained(adapter)
    output, before = adapter.forward(model, x), snapshot(package, model)
    made, report = package.over_parameterize(model, kind=rule)
    assert_close(adapter.forward(made, x), output, FLOAT32_TOLERANCE)
    assert_same(adapter.forward(model, x), output, "the model itself")
    assert report.changed
    assert {change.after.rpartition(", ")[2] for change in report.changed} == {rule}
    left = {path: reason for path, _, reason in report.left}
    assert left[BARE] == NO_NORM or "small" in left[BARE]
    assert left.get(POINTWISE, ONE_TAP) == ONE_TAP
    assert (POINTWISE in left) == (rule != "mobileone")

    # What was trained is the first branch's, and no gradient of the others is in the way.
    arrays = snapshot(package, made).arrays
    norm = "norm" if rule == "qarepvgg" else "dense0_norm" if rule == "mobileone" else "dense_norm"
    assert_same(arrays[f"stem.conv.{norm}.gamma"], before.arrays["stem.norm.gamma"])
    found = adapter.gradients(made, x, np.ones_like(output), training=True)
    assert all(np.isfinite(gradient).all() for gradient in found.arrays.values())
    assert max(np.abs(gradient).max() for gradient in found.arrays.values()) < 1e4

    wait(made, adapter, x)
    trained_on = adapter.forward(made, x)
    assert np.abs(trained_on - output).max() > 1e-2
    folded, report = package.fold(made)
    assert_close(adapter.forward(folded, x), trained_on, FLOAT32_TOLERANCE)
    assert_same(adapter.forward(made, x), trained_on, "the model itself")
    assert len(report.changed) == len({path for path, *_ in report.changed})
    types = {type(layer).__module__ for layer in adapter.walk(folded).values()}
    assert not any(name == f"{package.__name__}.normed" for name in types)
    names = set(snapshot(package, folded).arrays)
    assert "stem.conv.bias" in names
    assert "stem.norm.gamma" not in names

    fused = package.fold(made, fuse_batchnorm=True).model
    assert_close(adapter.forward(fused, x), trained_on, FLOAT32_TOLERANCE)
    assert not [name for name in snapshot(package, fused).arrays if "gamma" in name]


def test_in_place_layers_and_what_was_trained_stay_the_same_objects(adapter):
    model, x = trained(adapter)
    output, layers = adapter.forward(model, x), adapter.walk(model)
    layer, norm = layers["stem.conv"], layers["stem.norm"]
    made, report = adapter.package.over_parameterize(model, kind="repvgg", inplace=True)
    assert made is model
    after = adapter.walk(model)
    assert after["stem.conv"] is layer
    assert after["stem.norm"] is norm
    assert report.changed[0].before == adapter.types["conv"]
    assert_close(adapter.forward(model, x), output, FLOAT32_TOLERANCE)
    assert adapter.package.fold(model, inplace=True).model is model
    assert adapter.walk(model)["stem.conv"] is layer
    assert type(layer).__name__ == adapter.types["conv"]
    assert_close(adapter.forward(model, x), output, FLOAT32_TOLERANCE)
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        again = adapter.package.over_parameterize(model, kind="acnet")
    assert {path: reason for path, _, reason in again.report.left}["stem.conv"] == NO_NORM


def test_its_parts_are_left_by_other_rules_and_may_be_do_layers(adapter):
    package = adapter.package
    model, x = trained(adapter)
    made = package.to_bsconv(model, "s", where="last").model
    made = package.over_parameterize(made, kind="dbb", where="same.conv").model
    again, report = package.over_parameterize(made, kind="repvgg")
    left = {path: reason for path, _, reason in report.left}
    assert left["same.conv.dense_conv"] == left["same.conv.pointwise_conv"] == PART
    assert "stem.conv" in [change.path for change in report.changed]
    every, report = package.over_parameterize(again)
    changed = [change.path for change in report.changed]
    assert {"same.conv.sequence_conv2", "stem.conv.dense_conv", "last.depthwise"} <= {*changed}
    wait(every, adapter, x)
    output = adapter.forward(every, x)
    for form in ("keep", "dense"):
        folded, _ = package.fold(every, form={"bsconv": form}, fuse_batchnorm=True)
        assert_close(adapter.forward(folded, x), output, FLOAT32_TOLERANCE, form)
        names = [n for n in snapshot(package, folded).arrays if "gamma" in n or "depthwise_w" in n]
        assert not names


def test_its_state_crosses_frameworks(adapter):
    package = adapter.package
    for rule in ("repvgg", "dbb"):
        model, x = trained(adapter)
        made = wait(package.over_parameterize(model, kind=rule).model, adapter, x)
        state, output = snapshot(package, made), adapter.forward(made, x)
        other = next_of(adapter)
        there = other.package.over_parameterize(trained(other)[0], kind=rule).model
        other.package.load_state(there, state)
        assert_close(other.forward(there, x), output, FLOAT32_TOLERANCE, other.__name__)


@pytest.mark.parametrize("rule", tail_but(RULES, "repvgg", "dbb", "unireplknet"))
def test_a_described_network_of_a_rule_is_the_one_that_becomes_so(adapter, rule):
    """What its layers are, what it starts as, and what it and its gradients are in NumPy."""
    package, network = adapter.package, of_kind(OF_SEVERAL, rule)
    model = adapter.described(network)
    made = package.over_parameterize(adapter.described(OF_SEVERAL), kind=rule).model
    assert snapshot(package, model).layers == snapshot(package, made).layers
    assert [*snapshot(package, model).layers] == [*layers(network)]

    plain, own = initialize(OF_SEVERAL, seed=2), initialize(network, seed=2)
    x = images(network)
    expected = evaluate(OF_SEVERAL, plain, x.astype(np.float64))
    assert_close(evaluate(network, own, x.astype(np.float64)), expected, FLOAT32_TOLERANCE)
    assert count(network).training_parameters == count(OF_SEVERAL, kind=rule).training_parameters

    # Without strides, with which Keras' "dbb" has zeros of its own layer among what is normalized.
    children = [child for child in network.body.children if child[0] != "down"]
    network = replace(network, body=sequence(*children))
    model, state = adapter.described(network), trained_state(network)
    for training in (False, True):
        package.load_state(model, state)
        expected = evaluate(network, state, x.astype(np.float64), training=training)
        found = adapter.gradients(model, x, np.ones(expected.shape, "f4"), training=training)
        assert_close(found.output, expected, FLOAT32_TOLERANCE, f"training={training}")


def test_a_network_by_name_learns_and_is_folded(adapter):
    """As any other kind's: built with the weights of the core, of whatever framework."""
    package, name = adapter.package, "cifar_resnet20_repvgg"
    model = package.get_model(name, num_classes=3, seed=1)
    state = snapshot(package, model)
    assert state.origin["network"] == name
    assert_same(state.arrays, initialize(describe(name, num_classes=3), seed=1).arrays)
    adapter.forward(model, images(describe(name), 1))  # in evaluation mode
    _, report = package.fold(model)
    assert len(report.changed) == 19
    with pytest.raises(ValueError, match="no layer becomes one of kind 'repvgg': none is a conv"):
        package.get_model("tutorial_pt_repvgg")


def test_what_may_compute_something_else_is_not_folded(adapter):
    layer = layer_of(adapter, CASES[0])
    adapter.own_call(layer)
    with pytest.raises(NotFoldable, match=say(adapter, "has a {call} of its own")):
        layer.fold()


def test_arguments_that_give_no_layer_are_refused(adapter):
    model, _ = trained(adapter)
    over = partial(adapter.package.over_parameterize, model)
    cls = getattr(adapter.package, say(adapter, "NormedConv2{d}"))

    def made(**options):
        return lambda: adapter.make(cls, 4, 4, options.pop("kernel", 3), **options)

    before = snapshot(adapter.package, model).arrays
    check_refused(
        (partial(over, kind="mobileone", branches=0), ValueError, "branches must be at least 1"),
        (partial(over, kind="mobileone", branches=2.5), TypeError, "branches must be an integer"),
        (partial(over, kind="replknet", small=4), ValueError, "small must be odd.*small=4"),
        (partial(over, kind="repvgg", small=3), TypeError, "takes no options; received small=3"),
        (partial(over, kind="repvggs"), ValueError, "kind must be one of 'doconv', .*'repvggs'"),
        (made(rule="vgg"), ValueError, "rule must be one of repvgg, mobileone, .*received 'vgg'"),
        (made(rule="acnet", kernel=1), ValueError, f"no layer of rule 'acnet'.*: {ONE_TAP}"),
        (made(rule="dbb", kernel=4), ValueError, "no layer of rule 'dbb' .* even size"),
        (
            made(bn_options={say(adapter, "{wrong}"): 1}), TypeError,
            say(adapter, "bn_options may have .*; received '{wrong}'"),
        ),
    )  # fmt: skip
    assert_same(snapshot(adapter.package, model).arrays, before)


def geometry(padding=1, stride=1, dilation=1, mode="zeros", rank=2):
    pads = padding if isinstance(padding, tuple) else ((padding, padding),) * rank
    return Geometry((stride,) * rank, (dilation,) * rank, pads, mode)


@pytest.mark.parametrize(
    ("rule", "size", "where", "reason"),
    [
        ("repvgg", (1, 1), geometry(0), "one tap"),
        ("repvgg", (2, 2), geometry(0), "even size"),
        ("acnet", (3, 4), geometry(0), "even size"),
        ("repvgg", (3, 3), geometry(("same", "same"), 2), "depends on the input's size"),
        ("repvgg", (3, 3), geometry(0, mode="zeros"), None),
        ("repvgg", (3, 3), geometry(1, mode="reflect"), None),
        ("repvgg", (5, 5), geometry(1, mode="reflect"), "other values than zeros"),
        ("dbb", (3, 3), geometry(1, mode="circular"), "other values than zeros"),
        ("dbb", (3, 3), geometry(2, dilation=2), "it is dilated"),
        ("dbb", (1, 3), Geometry((1, 1), (2, 1), ((0, 0), (1, 1))), None),
        ("acnet", (3,), geometry(rank=1), "it has one dimension"),
        ("replknet", (5, 5), geometry(2), "is not larger than the small one, small=5"),
        ("replknet", (7, 3), geometry(2), "is not larger than the small one, small=5"),
        ("unireplknet", (7, 5), geometry(2), r"\(7, 5\) is none of those with small kernels: 5, 7"),
        ("unireplknet", (3, 3), geometry(1), r"\(3, 3\) is none of those with small kernels: 5, 7"),
        ("mobileone", (1, 1), geometry(0), None),
    ],
)
def test_why_a_rule_leaves_a_convolution(rule, size, where, reason):
    conv = ConvSpec(4, 4, size)
    if reason is None:
        assert BranchedSpec(conv, where, rule).parts
        return
    with pytest.raises(ValueError, match=reason):
        BranchedSpec(conv, where, rule)


def test_the_rules_are_kinds_that_change_nothing():
    assert [kind.name for kind in KINDS] == list(RULES)
    assert all(kind.exact for kind in KINDS)
    check_options({"branches": 1, "small": 3})
    spec = BranchedSpec(ConvSpec(4, 4, (3, 3)), geometry(), "mobileone", branches=2)
    assert list(spec.parts) == [
        "dense0_conv", "dense0_norm", "dense1_conv", "dense1_norm", "pointwise_conv",
        "pointwise_norm", "identity_norm",
    ]  # fmt: skip
