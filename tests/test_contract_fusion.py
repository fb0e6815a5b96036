"""The contract of fusing batch norms: who follows whom, what becomes of it, and why not."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
from equal import assert_close, assert_same, same
from frameworks import BACKENDS
from model_contract import BRANCHES, CHANGED, PAIRS, Again, Layer, Net, conv, models_of, norm, runs

from doconv_core import Change, Left, State, fuse_batchnorm
from doconv_core.models.report import (
    NOT_DIRECT,
    NOT_FINITE,
    OUTPUT,
    REPLACED,
    SEVERAL,
    SHARED,
    SUBCLASS,
    behind,
    fused_into,
)

ALL = frozenset(BACKENDS)
EACH = pytest.mark.parametrize("backend", BACKENDS)
RUNS = pytest.mark.parametrize(("backend", "mode"), runs())
TAIL = pytest.mark.exhaustive


class Case(NamedTuple):
    """A model, and of its layer "norm" the reason why it is left; None where it is fused.

    backends: those for which it is so: what others can tell or tie is in their own files.
    """

    net: Net
    reason: str | None
    backends: frozenset[str] = ALL


relu, pair = Layer("relu"), {"conv": conv, "norm": norm}
three = {**pair, "other": conv}
CASES = {
    "a pair": Case(Net(pair), None),
    "over-parameterized": Case(Net(pair).over_parameterized(multiplier=12), None),
    "first": Case(Net({"norm": norm, "conv": conv}), NOT_DIRECT),
    "relu between": Case(Net({"conv": conv, "relu": relu, "norm": norm}), NOT_DIRECT),
    "subclass": Case(Net({"conv": conv, "norm": Layer("own_norm")}), SUBCLASS),
    "forward": Case(Net({"conv": conv, "norm": Layer("patched_norm")}), REPLACED),
    "conv's forward": Case(Net({"conv": Layer("patched"), "norm": norm}), behind(REPLACED)),
    "conv's subclass": Case(Net({"conv": Layer("own"), "norm": norm}), behind(SUBCLASS)),
    "into transposed": Case(
        Net({"conv": Layer("transposed", groups=2), "norm": norm}), None
    ),
    "output used twice": Case(
        Net(pair, (("y", "conv", "x"), ("z", "norm", "y"), ("sum", "+", "y", "z"))), OUTPUT
    ),
    "output used by another layer": Case(
        Net(three, (("y", "conv", "x"), ("z", "norm", "y"), ("w", "other", "y")), ("z", "w")),
        OUTPUT,
    ),
    "output returned": Case(
        Net(pair, (("y", "conv", "x"), ("z", "norm", "y")), ("z", "y")), OUTPUT
    ),
    "sum between": Case(
        Net(pair, (("y", "conv", "x"), ("sum", "+", "y", "x"), ("z", "norm", "sum"))), NOT_DIRECT
    ),
    "conv called again": Case(
        Net(pair, (("y", "conv", "x"), ("z", "norm", "y"), ("w", "conv", "z"))),
        OUTPUT,
    ),
    "norm called again": Case(
        Net(pair, (("y", "conv", "x"), ("z", "norm", "y"), ("w", "norm", "z"))), NOT_DIRECT
    ),
    "norm of two": Case(
        Net(
            three,
            (
                ("y", "conv", "x"), ("z", "norm", "y"), ("v", "other", "x"), ("w", "norm", "v"),
                ("sum", "+", "z", "w"),
            ),
        ),
        SEVERAL,
    ),
    "called at two scales": Case(
        Net(
            {**pair, "relu": relu},
            (
                ("y", "conv", "x"), ("z", "norm", "y"), ("r", "relu", "x"), ("v", "conv", "r"),
                ("w", "norm", "v"),
            ),
            ("z", "w"),
        ),
        None,
        frozenset({"torch", "mx"}),
    ),
    "tied": Case(
        Net({**pair, "tied": Layer("conv", tied="conv")}), SHARED, frozenset({"torch", "mx"})
    ),
    "another place": Case(Net({**pair, "again": Again("conv")}), OUTPUT),
}  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "mode", "name_of_case"),
    [(*run, name) for name, case in CASES.items() for run in runs() if run[0] in case.backends],
)
def test_a_batch_norm_is_fused_or_left_and_named(backend, mode, name_of_case):
    models, case = models_of(backend), CASES[name_of_case]
    types, model, x = models.types, models.build(case.net, mode), case.net.input()
    folded, report = models.package.fold(model, fuse_batchnorm=True)
    found, expected = models.outputs(folded, x), models.outputs(model, x)
    kind = case.net.layers["norm"].kind
    name = types[kind if kind == "own_norm" else "norm"]
    fused = [change for change in report.changed if change.path == "norm"]
    if case.reason is None:
        conv_type = types["transposed" if "transposed" in name_of_case else "conv"]
        assert fused == [Change("norm", name, fused_into(conv_type))]
        assert report.left == ()
        assert_close(found, expected)
        again, report = models.package.fold(folded, fuse_batchnorm=True)
        assert not report.changed
        assert same(models.outputs(again, x), found)
    else:
        assert fused == []
        assert report.left == (Left("norm", name, case.reason),)
        assert same(found, expected), "what is left computes the same bits"


@EACH
@pytest.mark.parametrize(
    ("rank", "groups"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (3, 1), (3, 2)]
)
def test_the_fused_kernel_is_the_cores(backend, rank, groups):
    """With and without a bias, scale and offset."""
    models, layers = models_of(backend), {}
    for n, (bias, affine) in enumerate(product([True, False], repeat=2)):
        options = (("epsilon", 0.01), ("affine", affine))
        layers[f"conv{n}"] = Layer("conv", 8, 8 if n else 4, groups=groups, bias=bias, rank=rank)
        layers[f"norm{n}"] = Layer("norm", 8, rank=rank, options=options)
    net = Net(layers, shape=(4, *(5,) * rank))
    model = models.build(net)
    state, x = models.package.export_state(model), net.input()
    arrays = state.arrays
    folded, report = models.package.fold(model, fuse_batchnorm=True)
    assert [change.path for change in report.changed] == [f"norm{n}" for n in range(4)]
    found = models.package.export_state(folded).arrays
    assert list(found) == [f"conv{n}.{name}" for n in range(4) for name in ("weight", "bias")]
    for n in range(4):
        kernel, offset = fuse_batchnorm(
            arrays[f"conv{n}.weight"].reshape(state.layers[f"conv{n}"].spec.kernel_shape),
            arrays.get(f"conv{n}.bias"),
            mean=arrays[f"norm{n}.running_mean"],
            variance=arrays[f"norm{n}.running_var"],
            epsilon=0.01,
            scale=arrays.get(f"norm{n}.gamma"),
            offset=arrays.get(f"norm{n}.beta"),
        )
        assert_close(found[f"conv{n}.weight"].reshape(kernel.shape), kernel, 1e-6, f"kernel {n}")
        assert_close(found[f"conv{n}.bias"], offset, case=f"offset {n}")
    assert_close(models.outputs(folded, x), models.outputs(model, x))


@RUNS
@pytest.mark.parametrize(
    ("inplace", "multiplier"), [*PAIRS, (False, 0), pytest.param(True, 0, marks=TAIL)]
)
def test_a_network_without_batch_norms(backend, mode, inplace, multiplier, tmp_path):
    models, x = models_of(backend), BRANCHES.input()
    package, (model, twin) = models.package, (models.build(BRANCHES, mode) for _ in range(2))
    if multiplier != 0:
        options = {"depth_multiplier": multiplier, "inplace": True}
        for each in (model, twin):
            models.train(package.over_parameterize(each, **options)[0])
    untouched = models.values(model)
    target, report = package.fold(model, fuse_batchnorm=True, inplace=inplace)
    assert (target is model) == inplace
    changes = {change.path: change for change in report.changed}
    fused = fused_into(models.types["conv"])
    for path in ("stem_norm", "body.norm"):
        assert changes.pop(path) == Change(path, models.types["norm"], fused)
    assert list(changes) == ([] if multiplier == 0 else CHANGED)
    assert report.left == ()
    assert report.parameters_after == models.count(target)
    assert_close(models.outputs(target, x), models.outputs(twin, x))
    names = list(models.values(target))
    assert not [n for n in names if "norm" in n or "running" in n or "moving" in n]
    assert len([n for n in names if "stem" in n and "bias" in n]) == 1, "a bias to take the offset"
    if not inplace:
        assert_same(models.values(model), untouched)
    content = models.save(target, tmp_path).lower()
    assert b"doconv" not in content
    assert b"depthwise" not in content
    again = package.fold(target, fuse_batchnorm=True)[0]
    assert_same(models.outputs(again, x), models.outputs(target, x))
    assert not package.fold(twin if multiplier == 0 else target).report.changed


@EACH
def test_what_would_not_be_finite_is_left(backend):
    models = models_of(backend)
    epsilon = 0.0 if backend == "mx" else 1e-12
    model = models.build(
        Net({"conv": conv, "norm": Layer("norm", options=(("epsilon", epsilon),))})
    )
    state = models.package.export_state(model)
    bad = {"norm.gamma": np.full(4, 1e38, "f4"), "norm.running_var": np.zeros(4, "f4")}
    models.package.load_state(model, State(state.layers, {**state.arrays, **bad}))
    target, report = models.package.fold(model, fuse_batchnorm=True)
    assert report.left == (Left("norm", models.types["norm"], NOT_FINITE),)
    assert not report.changed
    assert_same(list(models.values(target).values()), list(models.values(model).values()))


@pytest.mark.parametrize("backend", sorted(ALL - {"torch", "tf"}))
@pytest.mark.parametrize("inplace", [False, True])
def test_branches_are_not_merged_in_gluon(backend, inplace):
    models = models_of(backend)
    model = models.build(Net(pair).over_parameterized(multiplier=12))
    untouched = models.values(model)
    with pytest.raises(NotImplementedError, match=r"PyTorch and Keras.*deploy\(\).*export_state"):
        models.package.fold(model, merge_branches=True, inplace=inplace)
    assert_same(models.values(model), untouched)
