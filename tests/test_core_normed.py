"""Convolutions of branches with batch norms in networks, in NumPy: what they are and compute."""

from __future__ import annotations

import numpy as np
import pytest
from contract import EPSILON
from contract_networks import images, trained
from contract_normed import forward
from equal import assert_close

from doconv_core import count, describe
from doconv_core.kinds.base import recipe
from doconv_core.kinds.normed import RULES, NormedRecipe
from doconv_core.networks.evaluate import evaluate, gradients, training_pass
from doconv_core.networks.initialize import initialize, with_zero_gammas
from doconv_core.networks.lowering import layers, lowered
from doconv_core.networks.names import list_models, of_kind
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Concat,
    Conv,
    Network,
    Residual,
    Scale,
    dynamic,
    sequence,
)
from doconv_core.networks.shapes import infer

EXACT = 1e-12  # of float64 in another order
LARGE = ("replknet", "unireplknet")
OTHERS = (
    {}, {"stride": 2}, {"padding": 0}, {"groups": 2, "bias": True}, {"channels": 8, "bias": True},
)  # fmt: skip


def alone(rule, channels=6, **options):
    size = 7 if rule in LARGE else 3
    conv = Conv(channels, (size, size), kind=NormedRecipe(rule, epsilon=EPSILON), **options)
    return Network("net", sequence(("conv", conv)), (6, 10, 9))


@pytest.mark.parametrize("options", OTHERS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_a_layer_and_its_gradients_are_the_branches_sum(rule, options):
    network = alone(rule, **options)
    state, x = trained(network), images(network, 3).astype(np.float64)
    spec = infer(lowered(network))["conv"].node.spec
    arrays = {n.removeprefix("conv."): a.astype(np.float64) for n, a in state.arrays.items()}
    for training in (False, True):
        expected = forward(spec, arrays, x, training)
        assert_close(evaluate(network, state, x, training=training), expected, EXACT)
        rng, step = np.random.default_rng(1), 1e-6
        dy = rng.standard_normal(expected.shape)
        found = gradients(network, state, x, dy, training=training)
        named = {name.removeprefix("conv."): g for name, g in found.parameters.items()}
        assert named.keys() == {name for name in arrays if "running" not in name}
        for name, gradient in {"x": found.x, **named}.items():
            direction = rng.standard_normal(gradient.shape)

            def loss(sign, name=name, direction=direction, training=training, dy=dy, step=step):
                values = dict(arrays, x=x)
                values[name] = values[name] + sign * step * direction
                return (forward(spec, values, values["x"], training) * dy).sum()

            slope = (loss(1) - loss(-1)) / (2 * step)
            error = abs((gradient * direction).sum() - slope)
            assert error < 1e-6 * max(1, abs(slope), np.abs(gradient).max()), name


def test_running_statistics_are_those_of_every_norm():
    network = alone("dbb")
    running = training_pass(network, trained(network), images(network)).running
    norms = [path for path in layers(network) if path.rpartition("_")[2] in ("norm", "norm2")]
    assert {name.rpartition(".")[0] for name in running} == {*norms}
    assert len(norms) == 6


@pytest.mark.parametrize("rule", RULES)
def test_a_network_starts_as_the_ordinary_one_by_the_same_seed(rule):
    size = 7 if rule in LARGE else 3
    pair = sequence(("conv", Conv(6, (size, size))), ("bn", BatchNorm()))
    plain = Network("net", sequence(("a", pair), ("b", pair)), (6, 10, 9))
    made, x = of_kind(plain, rule), images(plain).astype(np.float64)
    state = initialize(made, seed=3)
    expected = evaluate(plain, initialize(plain, seed=3), x)
    assert_close(evaluate(made, state, x), expected, 1e-6)  # where an identity is taken away
    other = initialize(made, seed=4).arrays
    weights = [name for name in state.arrays if name.endswith("weight")]
    drawn = [name for name in weights if state.arrays[name].any()]
    assert drawn
    assert not any(np.array_equal(state.arrays[name], other[name]) for name in drawn)
    a, b = (state.arrays[n] for n in drawn if n.endswith(("dense_conv.weight", "e0_conv.weight")))
    assert not np.array_equal(a, b)


def kinds_of(body, rule="repvgg"):
    placed = infer(of_kind(Network("net", body, (4, 8, 8)), rule))
    return {path for path, at in placed.items() if getattr(at.node, "kind", recipe()) != recipe()}


def test_a_batch_norm_that_alone_follows_is_taken():
    conv, norm, relu = Conv(4, (3, 3)), BatchNorm(1e-3, 0.2), Activation("relu")
    unit = sequence(("conv", conv), ("bn", norm))
    body = sequence(
        ("whole", unit),
        ("apart", sequence(("conv", conv))), ("its", sequence(("bn", norm), ("conv", conv))),
        ("sum", Residual(sequence(("1", norm), *unit.children), sequence(("conv", conv)))),
        ("after", norm), ("bare", conv), ("between", relu), ("last", norm), ("factor", conv),
        ("scale", Scale(sequence(("bn", norm), ("conv", Conv(4)), ("no", Activation("relu"))))),
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs one factor for each of 4"):
        kinds_of(body)
    body = sequence(*body.children[:-1])
    assert kinds_of(body) == {"whole.conv", "apart.conv", "sum.conv"}
    branches = sequence(("a", conv), ("b", norm), ("c", unit))
    body = sequence(("before", conv), ("every", Concat(branches)), ("after", norm))
    assert kinds_of(body) == {"every.c.conv"}
    body = sequence(("first", unit), ("conv", conv), ("dynamic", dynamic(4)))
    assert kinds_of(body) == {"first.conv"}
    (one,) = [
        at.node.kind
        for at in infer(of_kind(Network("net", unit, (4, 8, 8)), "dbb")).values()
        if isinstance(at.node, Conv)
    ]
    assert one == NormedRecipe("dbb", epsilon=1e-3, momentum=0.2)
    left = sequence(
        ("one", sequence(("conv", Conv(4)), ("bn", norm))),
        ("even", sequence(("conv", Conv(4, (2, 2))), ("bn", norm))),
        ("bare", sequence(("conv", conv), ("bn", BatchNorm(affine=False)))),
        ("rows", sequence(("conv", Conv(4, orthonormal=True)), ("bn", norm))), ("two", unit),
    )  # fmt: skip
    assert kinds_of(left) == {"two.conv"}
    assert kinds_of(left, "mobileone") == {"one.conv", "two.conv"}


def test_names_say_the_same_as_a_kind():
    for rule in ("repvgg", "mobileone", "acnet", "dbb", "qarepvgg"):
        named = describe(f"cifar_resnet20_{rule}")
        assert named.body == of_kind(describe("cifar_resnet20"), rule).body
        assert count(named).branch_macs == count("cifar_resnet20", kind=rule).branch_macs > 0
    assert describe("cifar_resnet20_branches_dbb").body != describe("cifar_resnet20_dbb").body
    assert not [name for name in list_models() if name.endswith(tuple(RULES))]
    with pytest.raises(ValueError, match="'cifar_resnet20_repvg' is no network: no family"):
        describe("cifar_resnet20_repvg")
    with pytest.raises(ValueError, match="within a BSConv are not over-parameterized"):
        describe("cifar_resnet20_bsconvu_repvgg")
    with pytest.raises(ValueError, match="no layer becomes one of kind 'replknet': none is a conv"):
        describe("cifar_resnet20_replknet")
    with pytest.raises(ValueError, match="'conv': there is no layer of rule 'dbb' of this size"):
        infer(lowered(Network("net", sequence(("conv", Conv(4, kind=recipe("dbb")))), (4, 8, 8))))
    with pytest.raises(TypeError, match="takes branches; received small=3"):
        recipe("mobileone", small=3)


def test_options_are_a_rules():
    conv = Conv(6, (3, 3), kind=recipe("mobileone", branches=2))
    found = layers(Network("net", sequence(("conv", conv)), (6, 8, 8)))
    assert [path for path in found if "dense" in path] == [
        f"conv.dense{n}_{part}" for n in (0, 1) for part in ("conv", "norm")
    ]


def test_residual_units_that_start_as_their_shortcuts():
    for name in ("cifar_resnet20_repvgg", "cifar_resnet20_qarepvgg", "cifar_resnet20_mobileone"):
        network = describe(name)
        state = with_zero_gammas(initialize(network), network)
        x = np.random.default_rng(0).standard_normal((2, 3, 32, 32))
        unit = dict(dict(network.body.children)["stage1"].children)["unit1"]
        body = Network("unit", sequence(("stage1", sequence(("unit1", unit)))), (16, 8, 8))
        own = {n: a for n, a in state.arrays.items() if n.startswith("stage1.unit1.")}
        x = np.random.default_rng(0).standard_normal((2, 16, 8, 8))
        forms = {path: form for path, form in state.layers.items() if "stage1.unit1." in path}
        found = evaluate(body, type(state)(forms, own), x)
        assert np.array_equal(found, x)
