"""The contract of whole models: every backend does the same to the same model, and says so."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from equal import assert_same, close, same
from frameworks import BACKENDS
from model_contract import (
    BATCH,
    BRANCHES,
    CHANGED,
    SHAPE,
    WAYS,
    Again,
    Layer,
    Net,
    conv,
    is_d,
    models_of,
    norm,
    runs,
)

from doconv_core import Change, Converted, Left, NotFoldable, Report, State
from doconv_core.models.report import (
    ALREADY,
    NOT_DIRECT,
    NOT_SELECTED,
    ONE_TAP,
    REPLACED,
    SUBCLASS,
    TIED,
    TRANSPOSED,
    behind,
    fused_into,
)

EACH = pytest.mark.parametrize("backend", BACKENDS)
RUNS = pytest.mark.parametrize(("backend", "mode"), runs())
INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
SHAREABLE = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "tf"])

# Layers in the order in which they are called, most with a batch norm behind them.
MIXED = Net(
    {
        "first_norm": norm,
        "conv": conv, "conv_norm": norm,
        "relu": Layer("relu"), "relu_norm": norm,
        "already": Layer("do_conv"), "already_norm": norm,
        "unselected": conv,
        "pointwise": Layer("conv", kernel=1), "pointwise_norm": norm,
        "transposed": Layer("transposed"), "transposed_norm": norm,
        "own": Layer("own"), "own_norm": norm,
        "patched": Layer("patched"), "patched_norm": norm,
    }
)  # fmt: skip


@EACH
def test_what_is_changed_and_left_is_told_alike(backend):
    models = models_of(backend)
    package, types = models.package, models.types
    model = models.build(MIXED)
    more, report = package.over_parameterize(model, where=lambda path, layer: path != "unselected")
    conv, fused = types["conv"], fused_into(types["conv"])
    counts = models.count(model), models.count(more)
    changed = (Change("conv", conv, types["do_conv"]),)
    left = (
        Left("already", types["do_conv"], ALREADY),
        Left("unselected", conv, NOT_SELECTED),
        Left("pointwise", conv, ONE_TAP),
        Left("transposed", types["transposed"], TRANSPOSED),
        Left("own", types["own"], SUBCLASS),
        Left("patched", conv, REPLACED),
    )
    assert report == Report("over-parameterized", changed, left, *counts)
    folded, report = package.fold(more, fuse_batchnorm=True)
    changed = (
        Change("conv", types["do_conv"], conv),
        Change("conv_norm", types["norm"], fused),
        Change("already", types["do_conv"], conv),
        Change("already_norm", types["norm"], fused),
        Change("pointwise_norm", types["norm"], fused),
        Change("transposed_norm", types["norm"], fused_into(types["transposed"])),
    )
    reasons = {
        "first_norm": NOT_DIRECT,
        "relu_norm": NOT_DIRECT,
        "own_norm": behind(SUBCLASS),
        "patched_norm": behind(REPLACED),
    }
    left = tuple(Left(path, types["norm"], reason) for path, reason in reasons.items())
    counts = models.count(more), models.count(folded)
    assert report == Report("folded", changed, left, *counts)


@EACH
def test_a_layer_whose_forward_was_replaced_has_no_state(backend):
    """It may compute something else, as a subclass may, which has none either."""
    models = models_of(backend)
    package, kind = models.package, models.types["conv"]
    model = models.build(Net({"patched": Layer("patched")}))
    state = package.export_state(models.build(Net({"patched": conv})))
    reason = f"'patched' is a {kind} with .*; {REPLACED}"
    for action in (package.export_state, lambda model: package.load_state(model, state)):
        with pytest.raises(TypeError, match=reason):
            action(model)
    if backend != "tf":  # where a model of one layer has its name
        with pytest.raises(TypeError, match=f"^the model itself is a {kind} with"):
            package.export_state(models.layers(model)["patched"])


@EACH
def test_a_model_that_is_its_only_layer_is_named_so(backend):
    models = models_of(backend)
    layer = models.layer(conv, (BATCH, *SHAPE))
    message = "where matches no convolution: 'conv'; .* such as the model itself"
    with pytest.warns(UserWarning, match=message):
        models.package.over_parameterize(layer, where="conv")


def ordinary_values(models, model):
    return {name: v for name, v in models.values(model).items() if not is_d(name)}


def assert_same_values(found, expected, but=()):
    assert list(found) == list(expected), "names, or their order"
    assert_same(*({n: v for n, v in each.items() if n not in but} for each in (found, expected)))


def kinds(models, model):
    return {path: type(layer) for path, layer in models.layers(model).items()}


@RUNS
@WAYS
def test_there_and_back(backend, mode, inplace, multiplier, tmp_path):
    """Nothing changes but the layers, and folding gives the ordinary model back."""
    models, x = models_of(backend), BRANCHES.input()
    package = models.package
    model, twin, plain = (models.build(BRANCHES, mode) for _ in range(3))
    for each in (model, plain):
        models.layers(each)["head"].note = ["a user's own"]
    before, places = models.identities(model), models.layers(model)
    result = package.over_parameterize(model, depth_multiplier=multiplier, inplace=inplace)
    check_over_parameterized(models, model, result, plain, inplace, multiplier)
    target, _ = result
    if inplace:
        found = models.layers(target)
        assert all(found[path] is layer for path, layer in places.items()), "layers stay themselves"
    if inplace and multiplier is None and backend != "tf":  # whose layers make variables anew
        after = models.identities(target)
        assert all(after[name] is value for name, value in before.items()), "an optimizer goes on"
    equal = same if multiplier is None or models.exact else close
    for training in (False, True, False):
        given = models.outputs(target, x, training), models.outputs(twin, x, training)
        assert equal(*given), f"outputs, training={training}"
    values = models.values(target)
    weights = [n for n in values if "norm" not in n and values[n].ndim > 1] if multiplier else ()
    assert_same_values(ordinary_values(models, target), models.values(twin), weights)

    twin = models.train(package.over_parameterize(twin, depth_multiplier=multiplier)[0])
    expected, untouched = models.outputs(models.train(target), x), models.values(target)
    count, result = models.count(target), package.fold(target, inplace=inplace)
    check_folded(models, target, result, plain, inplace, count)
    folded, _ = result
    if not inplace:
        assert kinds(models, target) == kinds(models, twin), "the original is untouched"
        assert_same_values(models.values(target), untouched)
        assert same(models.outputs(target, x), expected)
        shared = {id(v) for v in models.identities(model).values()}
        assert not shared & {id(v) for v in models.identities(target).values()}
        models.step(target, x)
        assert_same_values(models.values(model), models.values(plain))
        assert kinds(models, model) == kinds(models, plain), "nor is the first one"
        assert same(models.outputs(model, x), models.outputs(plain, x))
    assert same(models.outputs(folded, x), expected)
    for training in (False, True, False):
        given = models.outputs(folded, x, training), models.outputs(twin, x, training)
        assert same(*given), f"folded outputs, training={training}"
    back, _ = package.over_parameterize(folded)
    assert same(models.outputs(back, x), models.outputs(folded, x)), "there again"
    assert b"depthwise" in models.save(twin, tmp_path).lower()
    content = models.save(folded, tmp_path).lower()
    assert b"doconv" not in content
    assert b"depthwise" not in content
    models.load(plain, tmp_path)
    assert same(models.outputs(plain, x), models.outputs(folded, x)), "loaded into the ordinary"


def check_over_parameterized(models, model, result, plain, inplace, multiplier):
    """Assert which layers a model has in place of the plain one's, and that this is told."""
    assert type(result) is Converted
    target, report = result
    assert (target is model) == inplace
    assert type(target) is type(plain)
    old, new = models.types["conv"], models.types["do_conv"]
    changed = tuple(Change(path, old, new) for path in CHANGED)
    left, counts = (Left("body.point", old, ONE_TAP),), (models.count(plain), models.count(target))
    assert report == Report("over-parameterized", changed, left, *counts)
    do_conv, found = getattr(models.package, new), models.layers(target)
    types = kinds(models, plain) | dict.fromkeys(CHANGED, do_conv)
    assert kinds(models, target) == types, "types, by path"
    assert found["head"].note == ["a user's own"]
    assert found["stem"].spec.depth_multiplier == (multiplier or 9)
    assert found["body.wide"].spec.depth_multiplier == (multiplier or 3)
    ds = {name: value for name, value in models.values(target).items() if is_d(name)}
    assert len(ds) == len(CHANGED)
    assert not any(value.any() for value in ds.values())


def check_folded(models, model, result, plain, inplace, count):
    """Assert that a model has become one like the plain one, and that this is told."""
    assert type(result) is Converted
    folded, report = result
    assert (folded is model) == inplace
    old, new = models.types["do_conv"], models.types["conv"]
    changed = tuple(Change(path, old, new) for path in CHANGED)
    assert report == Report("folded", changed, (), count, models.count(plain))
    assert kinds(models, folded) == kinds(models, plain)
    values, ordinary = models.values(folded), models.values(plain)
    assert [(n, v.shape) for n, v in values.items()] == [(n, v.shape) for n, v in ordinary.items()]
    layers = models.layers(plain)
    for path, layer in models.layers(folded).items():
        if path:
            assert repr(layer) == repr(layers[path])
            assert vars(layer).keys() == vars(layers[path]).keys(), f"attributes of {path!r}"
    twice, again = models.package.fold(folded, inplace=inplace)
    assert not again.changed
    assert not again.left
    assert str(again).startswith("folded 0 layers, left 0; parameters: ")
    assert_same_values(models.values(twice), values)


@EACH
def test_untrained_it_comes_back_bit_for_bit_and_training_goes_on(backend):
    models, x = models_of(backend), BRANCHES.input()
    package, model = models.package, models.build(BRANCHES)
    before = models.values(model)
    assert_same_values(models.values(package.fold(package.over_parameterize(model)[0])[0]), before)
    for _ in range(2):
        package.over_parameterize(model, inplace=True)
        weights = models.values(model)
        models.step(model, x)
        moved = [n for n, v in models.values(model).items() if not np.array_equal(v, weights[n])]
        assert sum(map(is_d, moved)) == len(CHANGED), "every D is trained"
        assert {n for n, v in weights.items() if v.ndim > 2} <= set(moved), "and every W"
        expected = models.outputs(model, x)
        package.fold(model, inplace=True)
        assert same(models.outputs(model, x), expected)
    assert list(models.values(model)) == list(before)


@EACH
@INPLACE
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_model_may_be_a_layer_itself(backend, inplace, rank):
    models, shape = models_of(backend), (BATCH, 4, *(5,) * rank)
    package, x = models.package, np.random.default_rng(1).standard_normal(shape)
    x = x.astype(np.float32)
    plain = models.layer(replace(conv, rank=rank, to=6, groups=2), shape)
    cls, expected = type(plain), models.outputs(plain, x)
    layer, report = package.over_parameterize(plain, inplace=inplace)
    name = type(layer).__name__
    assert type(layer) is getattr(package, f"DO{cls.__name__}")
    assert type(plain) is (type(layer) if inplace else cls)
    assert report.changed == (Change("", cls.__name__, name),)
    assert str(report).splitlines()[1:] == [
        f"  {cls.__name__} -> {name} (1)",
        "    (the model itself)",
    ]
    assert same(models.outputs(layer, x), expected)
    expected = models.outputs(models.train(layer), x)
    folded, report = package.fold(layer, inplace=inplace)
    assert (folded is layer) == inplace
    assert type(folded) is cls
    assert report.changed == (Change("", name, cls.__name__),)
    assert "folded 1 layer, left 0" in str(report)
    assert same(models.outputs(folded, x), expected)


@EACH
@INPLACE
def test_one_tap_layers_and_harmless_subclasses_are_folded_too(backend, inplace):
    models = models_of(backend)
    net = Net({"tap": Layer("do_conv", kernel=1), "named": Layer("named"), "end": conv})
    model = models.train(models.build(net))
    models.layers(model)["named"].note = "kept"
    expected = models.outputs(model, net.input())
    folded, report = models.package.fold(model, inplace=inplace)
    assert models.layers(folded)["named"].note == "kept"
    old, new = models.types["do_conv"], models.types["conv"]
    assert report.changed == (Change("tap", old, new), Change("named", "Named", new))
    assert not any(map(is_d, models.values(folded)))
    assert same(models.outputs(folded, net.input()), expected)


@RUNS
@WAYS
def test_a_layer_in_several_places_stays_one(backend, mode, inplace, multiplier):
    models = models_of(backend)
    net = Net({"conv": conv, "again": Again("conv"), "body": conv, "more": Again("conv")})
    package, model, x = models.package, models.build(net, mode), net.input()
    expected, old = models.outputs(model, x), models.layers(model)["conv"]
    target, report = package.over_parameterize(model, depth_multiplier=multiplier, inplace=inplace)
    assert [change.path for change in report.changed] == ["conv", "body"]
    assert (models.layers(target)["conv"] is old) == inplace
    assert (same if models.exact else close)(models.outputs(target, x), expected)
    assert list(models.layers(target)) == ["", *(p for p in models.layers(model) if p)]
    expected = models.outputs(models.train(target), x)
    folded, report = package.fold(target, inplace=inplace)
    assert [change.path for change in report.changed] == ["conv", "body"]
    assert same(models.outputs(folded, x), expected)


@SHAREABLE
@pytest.mark.parametrize("where", ["conv", "again", ["again"], lambda path, layer: path == "again"])
def test_any_path_of_a_layer_selects_it(backend, where):
    models = models_of(backend)
    model = models.build(Net({"conv": conv, "again": Again("conv"), "other": conv}))
    _, report = models.package.over_parameterize(model, where=where)
    assert [change.path for change in report.changed] == ["conv"]


TIED_NET = Net(
    {"conv": conv, "relu": Layer("relu"), "other": conv, "tied": Layer("conv", tied="conv")}
)


@pytest.mark.parametrize(("backend", "mode"), [run for run in runs() if run[0] != "tf"])
@WAYS
def test_tied_weights_stay_tied_through_training_and_folding(backend, mode, inplace, multiplier):
    models = models_of(backend)
    package, model, x = models.package, models.build(TIED_NET, mode), TIED_NET.input()
    expected = models.outputs(model, x)
    target, report = package.over_parameterize(model, depth_multiplier=multiplier, inplace=inplace)
    assert len(report.changed) == 3
    assert close(models.outputs(target, x), expected)
    models.step(models.train(target), x)
    expected, found = models.outputs(target, x), models.layers(target)
    for name in ("weight", "depthwise_weight"):
        assert getattr(found["conv"], name) is getattr(found["tied"], name)
        assert getattr(found["conv"], name) is not getattr(found["other"], name)
    for folded in (package.fold(target)[0], package.fold(target, inplace=True)[0]):
        found = models.layers(folded)
        assert found["conv"].weight is found["tied"].weight
        assert same(models.outputs(folded, x), expected)


@SHAREABLE
@pytest.mark.parametrize(
    ("kind", "kernel", "options"),
    [
        ("conv", 3, {"where": ["conv", "other"]}),
        ("transposed", 3, {}),
        ("transposed", 5, {"depth_multiplier": 9}),  # too few for what is left anyway
        ("own", 3, {}),
        ("patched", 3, {}),
    ],
)
def test_what_is_tied_to_something_that_stays_is_left(backend, kind, kernel, options):
    models = models_of(backend)
    layers = {"conv": replace(conv, kernel=kernel), "other": conv}
    net = Net({**layers, "tied": Layer(kind, kernel=kernel, tied="conv")})
    model = models.build(net)
    target, report = models.package.over_parameterize(model, **options)
    assert [change.path for change in report.changed] == ["other"]
    assert report.left[0] == Left("conv", models.types["conv"], TIED)
    found = models.layers(target)
    assert found["conv"].weight is found["tied"].weight
    assert same(models.outputs(target, net.input()), models.outputs(model, net.input()))


@EACH
def test_where_selects(backend):
    models = models_of(backend)
    model = models.build(BRANCHES)
    conv_type = type(models.layers(model)["head"])
    head = models.layers(model)["head"]
    for where, expected in [
        (None, CHANGED),
        ("body.*", ["body.wide"]),
        (["ste?", "he*"], ["stem", "head"]),
        (conv_type, CHANGED),
        ((conv_type, str), CHANGED),
        (lambda path, layer: layer is head, ["head"]),
        (lambda path, layer: path.startswith("e"), ["each"]),
    ]:
        _, report = models.package.over_parameterize(model, where=where)
        assert [change.path for change in report.changed] == expected, where
        left = {each.path for each in report.left if each.reason == NOT_SELECTED}
        assert left - {"body.point"} == set(CHANGED) - set(expected), where


@EACH
def test_what_matches_nothing_is_warned_of(backend):
    models = models_of(backend)
    model, over_parameterize = models.build(BRANCHES), models.package.over_parameterize
    linear = models.build(Net({"linear": Layer("linear")}, shape=(4,)))
    for where, message in [
        ("bdy.*", r"where matches no convolution: 'bdy\.\*'; the model has .*'body"),
        (["head", "un"], "where matches no convolution: 'un'"),
        (lambda path, layer: False, "where selects none of the 4 convolutions, such as 'stem'"),
        (None, "the model has no convolution that could be replaced"),
    ]:
        given = model if where else linear
        with pytest.warns(UserWarning, match=message) as caught:
            target, report = over_parameterize(given, where=where)
        assert caught[0].filename == __file__
        if where != ["head", "un"]:
            assert not report.changed
            x = (BRANCHES if where else Net({}, shape=(4,))).input()
            assert same(models.outputs(target, x), models.outputs(given, x))


@EACH
def test_again_changes_nothing_and_the_rest_can_follow(backend):
    models, x = models_of(backend), BRANCHES.input()
    over_parameterize = models.package.over_parameterize
    first = models.train(over_parameterize(models.build(BRANCHES), where="stem")[0])
    with pytest.warns(UserWarning, match="where matches no convolution: 'stem'"):
        second, report = over_parameterize(first, where="stem")
    assert not report.changed
    assert report.left[0] == Left("stem", models.types["do_conv"], ALREADY)
    third, report = over_parameterize(first)
    assert [change.path for change in report.changed] == CHANGED[1:]
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        fourth, report = over_parameterize(third)
    assert [(left.path, left.reason) for left in report.left] == [
        *((path, ALREADY) for path in ("stem", "body.wide")), ("body.point", ONE_TAP),
        *((path, ALREADY) for path in ("each", "head")),
    ]  # fmt: skip
    for each in (second, third, fourth):
        assert same(models.outputs(each, x), models.outputs(first, x))


@EACH
@INPLACE
def test_errors_come_before_anything_is_changed(backend, inplace):
    models = models_of(backend)
    over_parameterize, model = models.package.over_parameterize, models.build(BRANCHES)
    types = kinds(models, model)
    message = "layer 'stem': depth_multiplier must be at least .*received depth_multiplier=8"
    integer = "depth_multiplier must be an integer; received depth_multiplier="
    for options, error, match in [
        ({"depth_multiplier": 8}, ValueError, message),
        ({"depth_multiplier": 9.5}, TypeError, integer),
        ({"depth_multiplier": "x"}, TypeError, integer),
        ({"depth_multiplier": True}, TypeError, integer),
        ({"where": 3}, TypeError, "where must be None, a glob pattern or several"),
    ]:
        with pytest.raises(error, match=match):
            over_parameterize(model, inplace=inplace, **options)
        assert kinds(models, model) == types, options
    changed = over_parameterize(model, where="body.*", depth_multiplier=8, inplace=inplace).report
    assert len(changed.changed) == 1
    layer = models.layer(conv, (BATCH, 4, 8, 7))
    with pytest.raises(ValueError, match=r"^the model itself: depth_multiplier must be at least"):
        over_parameterize(layer, depth_multiplier=8, inplace=inplace)


@EACH
@INPLACE
def test_what_is_not_foldable_is_refused_before_anything_is_changed(backend, inplace):
    models = models_of(backend)
    for kind, name in [("doubled", "Doubled"), ("do_patched", models.types["do_conv"])]:
        model = models.build(Net({"plain": Layer("do_conv"), "odd": Layer(kind)}))
        types = kinds(models, model)
        reason = rf"{name} has a (forward|call) of its own|its forward pass was replaced"
        with pytest.raises(NotFoldable, match=rf"^layer 'odd': .*({reason})"):
            models.package.fold(model, inplace=inplace)
        assert kinds(models, model) == types
        odd = models.layer(Layer(kind), (BATCH, 4, 8, 7))
        with pytest.raises(NotFoldable, match=rf"^(the model itself|layer 'layer'): .*({reason})"):
            models.package.fold(odd, inplace=inplace)


@EACH
@INPLACE
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_is_not_folded(backend, inplace, bad):
    models = models_of(backend)
    package = models.package
    model = models.build(Net({"plain": Layer("do_conv"), "odd": Layer("do_conv")}))
    state = package.export_state(model)
    arrays = {name: np.array(array) for name, array in state.arrays.items()}
    arrays["odd.depthwise_weight"][0, 0, 0] = bad
    package.load_state(model, State(state.layers, arrays))
    types, reason = kinds(models, model), "the folded kernel is not finite; its trained weights"
    with pytest.raises(NotFoldable, match=rf"^layer 'odd': {reason}"):
        package.fold(model, inplace=inplace)
    assert kinds(models, model) == types
    with pytest.raises(NotFoldable, match=rf"^{reason}"):
        models.layers(model)["odd"].fold()


@EACH
def test_what_is_no_model_is_refused(backend):
    models = models_of(backend)
    name = {"tf": r"keras\.Layer", "torch": r"torch\.nn\.Module", "mx": r"mxnet\.gluon\.Block"}
    for action in (models.package.over_parameterize, models.package.fold):
        for value, kind in (([], "list"), ("model", "str"), ({}, "dict")):
            message = rf"model must be a {name[backend]}; received (builtins\.)?{kind}"
            with pytest.raises(TypeError, match=message):
                action(value)


@EACH
def test_a_model_with_its_report_is_no_model(backend):
    models = models_of(backend)
    package = models.package
    done = package.over_parameterize(models.build(BRANCHES))
    message = r"; received Converted, a model with the report .* give its `\.model`"
    verify = partial(package.verify, done.model)
    calls = (package.fold, package.to_bsconv, package.export_state, package.orthonormality_loss)
    for call in (*calls, lambda model: verify(model, BRANCHES.input())):
        with pytest.raises(TypeError, match=message):
            call(done)
    with pytest.raises(TypeError, match=r"received type, the class .* itself; give one of"):
        package.fold(type(done.model))


@EACH
def test_where_takes_no_layer_and_no_other_predicate(backend):
    models = models_of(backend)
    model = models.build(Net({"first": conv, "second": conv}))
    second, tool = models.layers(model)["second"], models.package.over_parameterize
    for where in (second, [second], (second,)):
        with pytest.raises(TypeError, match=r"takes no layers; .* its path, where='second', or"):
            tool(model, where=where)
    with pytest.raises(TypeError, match=r"called with a path and a layer, .* takes \(layer\)\."):
        tool(model, where=lambda layer: True)


@EACH
def test_a_missing_argument_is_told_of_the_class_that_was_called(backend):
    package = models_of(backend).package
    for name in ("DOConv2d", "BSConvU2d", "BSConvS2d"):
        cls = getattr(package, name, None) or getattr(package, name.replace("2d", "2D"))
        with pytest.raises(
            TypeError, match=rf"^{cls.__name__}(: |\.__init__\(\)).*kernel_size|filters"
        ):
            cls(*[3] * (1 if backend == "mx" else 2 if backend == "torch" else 0))


@EACH
def test_a_name_is_not_built_but_described(backend):
    with pytest.raises(TypeError, match="must be a Network; received 'resnet18': describe it fir"):
        models_of(backend).package.build("resnet18")


@EACH
def test_what_cannot_be_copied_is_named_and_changed_inplace(backend):
    models = models_of(backend)
    package, model = models.package, models.build(Net({"conv": conv}))
    models.layers(model)["conv"].source = (number for number in range(3))
    types = kinds(models, model)
    with pytest.raises(TypeError, match=r"cannot be copied.*[wW]ith inplace=True"):
        package.over_parameterize(model)
    assert kinds(models, model) == types
    assert package.over_parameterize(model, inplace=True).report.changed
