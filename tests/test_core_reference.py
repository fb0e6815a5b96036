"""The core's training: its gradients are the slopes of its losses, with all that kinds add."""

from __future__ import annotations

import numpy as np
import pytest
from cases import one_test
from described import KINDS
from equal import assert_close

from doconv_core import State, compose, difference, recipe
from doconv_core.networks.evaluate import evaluate, training_pass
from doconv_core.networks.initialize import initialize, with_zero_gammas
from doconv_core.networks.lowering import layers
from doconv_core.networks.names import describe
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Conv,
    Flatten,
    GlobalPool,
    Linear,
    Network,
    Residual,
    dynamic,
    sequence,
)
from doconv_core.training.engine import Batch, Step
from doconv_core.training.loss import cross_entropy, targets
from doconv_core.training.optimizer import trained
from doconv_core.training.reference import train

EXACT = 1e-12  # many roundings of float64
CLASSES, ROWS, SHAPE = 3, 6, (2, 7, 6)


def network(middle, *, norm=False):
    """Return a small, smooth network around a node."""
    return Network(
        "small",
        sequence(
            ("stem", Conv(8, (3, 3), kind=KINDS["doconv"], bias=True)),
            ("norm", BatchNorm()) if norm else None,
            ("act", Activation("tanh")),
            ("middle", middle),
            ("pool", GlobalPool()),
            ("flatten", Flatten()),
            ("fc", Linear(CLASSES)),
        ),
        SHAPE,
    )


NETWORKS = {
    "doconv": network(Conv(4, (3, 3), groups=2, kind=KINDS["doconv"])),
    "norm": network(Conv(4, (3, 3)), norm=True),
    "bsconvs": network(Conv(6, (3, 3), kind=KINDS["bsconvs"])),
    "dgc": network(dynamic(8, heads=2, squeeze_rate=4, gate_factor=0.5), norm=True),
}
PLAIN = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0}


def state_of(net):
    """Return a state in float64 of which nothing is at its special first value."""
    first, rng = initialize(net), np.random.default_rng(1)
    arrays = {}
    for name, a in first.arrays.items():
        moved = a + (0.3 * rng.standard_normal(a.shape) if trained(name) else 1)
        arrays[name] = np.asarray(moved, np.float64)
    return State(first.layers, arrays)


def batch(rows=ROWS, seed=2):
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=rows)
    images = rng.standard_normal((rows, *SHAPE)).astype(np.float32)
    return Batch(images, targets(labels, CLASSES, 0.1), labels, rows)


def steps(*batches, rate=0.1, progress=0.5):
    return [(Step(n, 0, rate, progress), each) for n, each in enumerate(batches)]


@one_test
@pytest.mark.parametrize("name", NETWORKS)
def test_a_steps_gradients_are_the_slopes_of_its_loss(name):
    net, given = NETWORKS[name], batch()
    made = recipe("digits", **PLAIN, orthonormality=0.2, lasso=0.3)
    state = state_of(net)
    losses, after, _ = train(net, state, made, steps(given, rate=1.0))
    rng, h = np.random.default_rng(3), 1e-6
    for key in filter(trained, state.arrays):
        gradient = state.arrays[key] - after.arrays[key]
        towards = rng.standard_normal(gradient.shape)
        up, down = (
            train(
                net,
                State(state.layers, {**state.arrays, key: state.arrays[key] + s * h * towards}),
                made,
                steps(given),
            ).losses[0]
            for s in (1, -1)
        )
        slope = (gradient * towards).sum()
        assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-8 * losses[0]), key


@one_test
@pytest.mark.parametrize(("name", "field"), [("bsconvs", "orthonormality"), ("dgc", "lasso")])
def test_what_kinds_add_to_the_loss_has_its_weight(name, field):
    net = NETWORKS[name]
    without, once, twice = (
        train(net, state_of(net), recipe("digits", **{field: weight}), steps(batch())).losses[0]
        for weight in (0, 0.1, 0.2)
    )
    assert once > without
    assert twice - without == pytest.approx(2 * (once - without), rel=1e-10)
    plain = NETWORKS["norm"]
    made = recipe("digits", **{field: 0.1})
    assert train(plain, state_of(plain), made, steps(batch())).losses.shape == (1,)


def test_the_loss_is_the_mean_cross_entropy_with_the_targets():
    net, given = NETWORKS["norm"], batch()
    state = state_of(net)
    logits = evaluate(net, state, given.images.astype(np.float64), training=True)
    expected = cross_entropy(logits, given.targets).mean()
    assert train(net, state, recipe("digits"), steps(given)).losses[0] == pytest.approx(expected)


@one_test
@pytest.mark.parametrize("name", ["doconv", "bsconvs"])
def test_parts_of_a_batch_are_a_whole_one_without_norms(name):
    net = NETWORKS[name]
    fields = {"orthonormality": 0.1, "clip_norm": 0.5}
    whole, in_parts = (
        train(net, state_of(net), recipe("digits", accumulate=n, **fields), steps(*[batch()] * 3))
        for n in (1, 4)
    )
    assert_close(in_parts.losses, whole.losses, EXACT)
    for key, array in whole.state.arrays.items():
        assert_close(in_parts.state.arrays[key], array, 1e-10)


def test_running_statistics_move_by_the_norms_momentum():
    net, given = NETWORKS["norm"], batch()
    state = state_of(net)
    x = training_pass(_until_norm(net), _of(state, "stem"), given.images.astype(np.float64)).output
    after = train(net, state, recipe("digits"), steps(given)).state.arrays
    unbiased = x.var((0, 2, 3), ddof=1)
    for key, new in (("norm.running_mean", x.mean((0, 2, 3))), ("norm.running_var", unbiased)):
        assert_close(after[key], 0.9 * state.arrays[key] + 0.1 * new, EXACT)


def _until_norm(net):
    return Network("part", sequence(*net.body.children[:1]), net.input_shape)


def _of(state, path):
    arrays = {name: a for name, a in state.arrays.items() if name.startswith(f"{path}.")}
    return State({path: state.layers[path]}, arrays)


def test_heads_drop_as_many_channels_as_the_progress_says():
    net = NETWORKS["dgc"]
    for progress, dropped in ((0.0, 0), (0.5, 2), (1.0, 4)):
        after = train(net, state_of(net), recipe("digits"), steps(batch(), progress=progress))
        assert after.state.arrays["middle.heads.inactive"] == dropped


def test_an_average_of_weights_begins_with_the_first_state():
    net = NETWORKS["norm"]
    state, given = state_of(net), [batch(seed=n) for n in range(3)]
    made = recipe("digits", average=0.5)
    states = [state, *(train(net, state, made, steps(*given[: n + 1])).state for n in range(3))]
    found = train(net, state, made, steps(*given))
    for key, last in found.state.arrays.items():
        shares = (0.125, 0.125, 0.25, 0.5) if trained(key) else (0, 0, 0, 1)
        expected = sum(s * each.arrays[key] for s, each in zip(shares, states, strict=True))
        assert_close(found.averaged.arrays[key], expected, EXACT)
        assert last is states[-1].arrays[key] or (last == states[-1].arrays[key]).all()


def test_an_average_of_kernels_is_not_that_of_weights():
    net = NETWORKS["doconv"]
    state, given = state_of(net), [batch(seed=n) for n in range(2)]
    fields = {"average": 0.5, "learning_rate": 1.0}
    found = train(net, state, recipe("digits", **fields, average_of="kernels"), steps(*given))
    halfway = train(net, state, recipe("digits", **fields), steps(given[0])).state
    last = found.state

    def kernel(of, path):
        weight, depthwise = (of.arrays[f"{path}.{n}"] for n in ("weight", "depthwise_weight"))
        return compose(weight, depthwise, of.layers[path].spec)

    for path in ("stem", "middle"):
        expected = 0.25 * kernel(state, path) + 0.25 * kernel(halfway, path)
        expected += 0.5 * kernel(last, path)
        assert_close(kernel(found.averaged, path), expected, EXACT)
        assert not found.averaged.arrays[f"{path}.depthwise_weight"].any()
        of_weights = train(net, state, recipe("digits", **fields), steps(*given)).averaged
        assert difference(kernel(of_weights, path), expected).relative > 1e-6


def test_without_an_average_the_last_state_is_evaluated():
    net = NETWORKS["norm"]
    found = train(net, state_of(net), recipe("digits"), steps(batch()))
    assert found.averaged is found.state


def test_ordinary_weights_start_over_parameterized_ones():
    ordinary = describe("tutorial_gluon")
    over, made = describe("tutorial_gluon_doconv"), recipe("tutorial_gluon")
    images = np.random.default_rng(0).standard_normal((2, 1, 28, 28)).astype(np.float32)
    given = steps(Batch(images, targets([1, 2], 10), np.array([1, 2]), 2))
    losses = [train(net, initialize(ordinary), made, given).losses for net in (ordinary, over)]
    assert losses[0] == pytest.approx(losses[1], rel=EXACT)


def test_training_lowers_the_loss():
    net = NETWORKS["dgc"]
    made = recipe("digits", batch_size=ROWS, average=0.9)
    given = [(Step(n, 0, 0.1, n / 30), batch()) for n in range(30)]
    losses = train(net, initialize(net), made, given).losses
    assert losses[-1] < 0.7 * losses[0]


@one_test
@pytest.mark.parametrize(
    ("body", "shortcut", "zero"),
    [
        ((("bn1", BatchNorm()), ("bn2", BatchNorm())), (), {"unit.bn2"}),
        ((("bn1", BatchNorm()), ("conv", Conv(2))), (("bn", BatchNorm()),), {"unit.bn1"}),
        ((("bn1", BatchNorm()), ("bn2", BatchNorm(affine=False))), (), {"unit.bn1"}),
    ],
)
def test_the_last_norm_of_a_residual_unit_may_start_from_gamma_zero(body, shortcut, zero):
    unit = Residual(sequence(*body), sequence(*shortcut))
    net = Network("net", sequence(("first", BatchNorm()), ("unit", unit)), (2, 3, 3))
    state = initialize(net)
    found = with_zero_gammas(state, net)
    assert found.layers == state.layers == layers(net)
    for name, array in state.arrays.items():
        path, _, key = name.rpartition(".")
        expected = 0 * array if key == "gamma" and path in zero else array
        assert (found.arrays[name] == expected).all(), name


def test_a_network_without_units_that_norm_has_no_gammas_to_zero():
    units = sequence(("conv", Conv(2))), sequence(("bn", BatchNorm()))
    net = Network("net", sequence(("unit", Residual(*units))), (2, 3, 3))
    with pytest.raises(ValueError, match="net has no residual unit with a batch norm that scales"):
        with_zero_gammas(initialize(net), net)


def test_units_of_a_family_begin_as_their_shortcuts():
    net = describe("cifar_resnet20", num_classes=CLASSES)
    arrays = with_zero_gammas(initialize(net), net).arrays
    zero = [name for name, a in arrays.items() if name.endswith("gamma") and not a.any()]
    assert len(zero) == 9
    assert all(name.endswith(".bn2.gamma") for name in zero)
