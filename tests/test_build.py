"""One description, three frameworks: the same paths, the same state, the same function."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from frameworks import BACKENDS, need
from networks.described import NETWORKS, SHAPE

from doconv_core import State, StateError, difference, read_state, write_state
from doconv_core.networks.evaluate import evaluate
from doconv_core.networks.initialize import initialize
from doconv_core.networks.layers import layers
from doconv_core.networks.names import describe
from doconv_core.networks.nodes import (
    ACTIVATIONS,
    Activation,
    Conv,
    Kind,
    Network,
    Pool,
    Residual,
    sequence,
)
from doconv_core.networks.shapes import for_input, infer

# Relative to the largest entry of the float64 result.
OUTPUTS, GRADIENTS = 1e-5, 1e-4


def backend_of(name):
    need(name)
    return importlib.import_module(f"built.{name}")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return backend_of(request.param)


def trained(network, seed=3):
    """Return a state of the network with values as after training: no statistic is trivial."""
    state, rng = initialize(network), np.random.default_rng(seed)
    arrays = {}
    for name, array in state.arrays.items():
        values = 0.1 * rng.standard_normal(array.shape) + array
        arrays[name] = (np.abs(values) + 0.3 if "running_var" in name else values).astype("float32")
    return State(state.layers, arrays)


def images(network, batch=6):
    rng = np.random.default_rng(1)
    return rng.standard_normal((batch, *network.input_shape)).astype(np.float32)


def loaded(backend, network):
    model = backend.made(network)
    backend.package.load_state(model, trained(network))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_goes_in_by_its_paths_and_comes_out_as_it_was(backend, name):
    network = NETWORKS[name]
    state = trained(network)
    exported = backend.package.export_state(loaded(backend, network))
    assert list(exported.layers) == list(layers(network))
    for entry, array in state.arrays.items():
        np.testing.assert_array_equal(exported.arrays[entry], array, err_msg=entry)
    # Gluon's batch norm has a beta in any case.
    more = exported.arrays.keys() - state.arrays.keys()
    assert all(entry.endswith(".beta") and not exported.arrays[entry].any() for entry in more)


@pytest.fixture(scope="module", params=NETWORKS)
def answers(request):
    """Return what PyTorch answers in float64, and each backend in float32, to one problem."""
    network = NETWORKS[request.param]
    x = images(network)
    dy = np.random.default_rng(2).standard_normal((len(x), *infer(network)[""].after))
    exact = backend_of("torch"), "float64"
    every = {"exact": exact, **{name: (backend_of(name), "float32") for name in BACKENDS}}
    inference, training = {}, {}
    for name, (module, dtype) in every.items():
        models = [loaded(module, network) for _ in range(2)]
        models = [model.double() for model in models] if dtype == "float64" else models
        inference[name] = module.inference(models[0], x.astype(dtype))
        training[name] = module.training(models[1], x.astype(dtype), dy.astype(dtype))
    return inference, training


@pytest.mark.parametrize("name", BACKENDS)
def test_outputs_agree_in_inference(answers, name):
    inference, _ = answers
    assert inference["exact"].std() > 0.01
    assert difference(inference[name], inference["exact"]).relative < OUTPUTS


@pytest.mark.parametrize("name", BACKENDS)
def test_outputs_and_gradients_agree_in_training(answers, name):
    _, training = answers
    (output, gradients), (expected, exact) = training[name], training["exact"]
    assert difference(output, expected).relative < OUTPUTS
    exact = {entry: gradient for entry, gradient in exact.items() if "running" not in entry}
    largest = max(np.abs(gradient).max() for gradient in exact.values())
    for entry, gradient in exact.items():
        # What a batch norm takes out again has no gradient but roundoff.
        none = np.abs(gradient).max() < 1e-12 * largest
        expected = largest if none else np.abs(gradient).max()
        found = np.abs(gradients[entry] - gradient).max() / expected
        assert found < GRADIENTS, entry


@pytest.mark.parametrize("name", ["scales", "strided_kinds"])
def test_over_parameterized_and_folded_it_computes_the_same(backend, name):
    network = NETWORKS[name]
    x, model = images(network), loaded(backend, network)
    expected = backend.inference(model, x)
    more = backend.package.over_parameterize(model).model
    assert difference(backend.inference(more, x), expected).relative < OUTPUTS
    state = backend.package.export_state(more)
    assert list(state.layers) == list(layers(network))
    assert any(form.over_parameterized for form in state.layers.values())
    for fuse in (False, True):
        folded = backend.package.fold(more, fuse_batchnorm=fuse).model
        assert difference(backend.inference(folded, x), expected).relative < OUTPUTS
        forms = backend.package.export_state(folded).layers
        assert not any(form.over_parameterized for form in forms.values())
        assert (list(forms) == list(layers(network))) != fuse


def test_the_state_of_another_network_is_refused_by_name_before_anything_changes(backend):
    network = NETWORKS["residuals"]
    model = loaded(backend, network)
    before = backend.package.export_state(model).arrays
    with pytest.raises(StateError, match=r"layer 'stem' is not in the state, .* 'stem\.bn'"):
        backend.package.load_state(model, trained(NETWORKS["pooled"]))
    # The same layers but for one, the last.
    other = sequence(*network.body.children[:-1], ("last", Conv(3)))
    with pytest.raises(StateError, match="layer 'last' is not in the model, though the state"):
        backend.package.load_state(model, trained(Network("other", other, SHAPE)))
    after = backend.package.export_state(model).arrays
    for entry, array in before.items():
        np.testing.assert_array_equal(after[entry], array)


def test_a_state_says_whose_it_is(backend, tmp_path):
    model = backend.package.get_model("tutorial_tf")
    state = backend.package.export_state(model)
    assert state.origin["network"] == "tutorial_tf"
    write_state(state, tmp_path / "stored.safetensors")
    stored = read_state(tmp_path / "stored.safetensors")
    other = backend.package.get_model("tutorial_gluon")
    before = backend.package.export_state(other).arrays
    refused = r"^the state is not one of 'tutorial_gluon', but of 'tutorial_tf': entry 'conv1\.w"
    for options in ({}, {"match": "order"}, {"ignore": "geometry"}):
        with pytest.raises(StateError, match=refused):
            backend.package.load_state(other, stored, **options)
    for entry, array in backend.package.export_state(other).arrays.items():
        np.testing.assert_array_equal(before[entry], array)
    # Two of one name, for other numbers of classes.
    with pytest.raises(StateError, match=r"^entry '\w+\.weight' is of LinearSpec"):
        backend.package.load_state(backend.package.get_model("tutorial_tf", num_classes=3), stored)
    backend.package.load_state(model, stored)


def test_every_activation_is_that_of_its_formula(backend):
    x = np.linspace(-8, 8, 32, dtype=np.float32).reshape(1, 2, 4, 4)
    expected = {
        "relu": np.maximum(x, 0),
        "relu6": np.clip(x, 0, 6),
        "hard_swish": x * np.clip(x + 3, 0, 6) / 6,
        "hard_sigmoid": np.clip(x + 3, 0, 6) / 6,
        "tanh": np.tanh(x),
    }
    assert expected.keys() == set(ACTIVATIONS)
    for name, y in expected.items():
        network = Network("one", sequence(("activation", Activation(name))), (2, 4, 4))
        assert difference(backend.inference(backend.made(network), x), y).relative < OUTPUTS


@pytest.mark.parametrize("name", ["max", "average"])
@pytest.mark.parametrize("sizes", [(3, 2, 1), (2, 1, 1), (5, 3, 2), (4, 2, 1), (3, 1, 0)])
def test_what_is_padded_takes_no_part_in_pooling(backend, name, sizes):
    network = Network("one", sequence(("pool", Pool(name, *sizes))), (2, 9, 8))
    x = images(network) - 5  # below 0, which zeros around would hide
    expected = evaluate(network, initialize(network), x)
    assert difference(backend.inference(backend.made(network), x), expected).relative < OUTPUTS


def test_an_input_of_another_size(backend):
    model = backend.made(NETWORKS["scales"], input_shape=(3, 14, 12))
    backend.package.load_state(model, trained(NETWORKS["scales"]))
    network = for_input(NETWORKS["scales"], (3, 14, 12))
    expected = infer(network)[""].after
    assert expected != infer(NETWORKS["scales"])[""].after
    assert backend.inference(model, images(network)).shape[1:] == expected
    with pytest.raises(ValueError, match=r"'grouped' needs at least 3 rows and columns; received"):
        backend.made(NETWORKS["scales"], input_shape=(3, 4, 4))


@pytest.fixture
def named(monkeypatch):
    """Make `described` the network of every name, and return what was asked for."""
    asked = []

    def describe(name, **options):
        asked.append((name, options))
        return NETWORKS["vectors1.0"]

    module = SimpleNamespace(describe=describe, list_models=lambda pattern: [pattern, "b"])
    monkeypatch.setitem(sys.modules, "doconv_core.networks.names", module)
    return asked


def test_a_model_by_name_starts_from_its_seed(backend, named):
    network = NETWORKS["vectors1.0"]
    get_model, export_state = backend.package.get_model, backend.package.export_state
    arrays = export_state(get_model("a", num_classes=7, in_channels=3)).arrays
    assert named == [("a", {"num_classes": 7, "in_channels": 3})]
    for seed, same in ((0, True), (1, False)):
        expected = initialize(network, seed).arrays
        assert np.array_equal(arrays["output.weight"], expected["output.weight"]) == same
    larger = get_model("a", input_shape=(3, 20, 9), seed=5)
    expected = initialize(for_input(network, (3, 20, 9)), 5).arrays
    np.testing.assert_array_equal(export_state(larger).arrays["bn.gamma"], expected["bn.gamma"])
    assert expected["hidden.weight"].shape != arrays["hidden.weight"].shape
    assert backend.package.list_models() == ["*", "b"]
    assert backend.package.list_models("res*") == ["res*", "b"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_shape": (1, 28, 28)}, ValueError, r"must have the 3 channels of the network; rec"),
        ({"input_shape": 28}, TypeError, r"input_shape must be \(C, H, W\); received .*=28"),
        ({"input_shape": (3, 28)}, ValueError, "must be one integer or 3 of them"),
        ({"input_shape": (3, 0, 28)}, ValueError, r"input_shape\[1\] must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_wrong_arguments_are_refused(backend, named, options, error, message):
    with pytest.raises(error, match=message):
        backend.package.get_model("a", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Activation("swish"), "name must be one of relu, .*; received 'swish'"),
        (lambda: Kind("conv2d"), "name must be one of conv, doconv, bsconvu, bsconvs; received"),
        (lambda: Pool("mean", 2, 2), "name must be one of max, average; received 'mean'"),
        (lambda: Pool("max", 2, 2, 2), "padding must be at most half of .* padding=2, size=2"),
        (lambda: sequence(("a.b", Conv(1))), "a text without dots and slashes; received 'a.b'"),
        (
            lambda: Residual(sequence(("shortcut", Conv(3)))),
            "a residual's body cannot have a child named 'shortcut'",
        ),
    ],
)
def test_nodes_that_give_no_network_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "in_channels"),
    [
        ("cifar_resnet20_bsconvs_p1d4", 3),
        ("cifar_mobilenetv3_small_w1d2", 3),
        ("tutorial_tf_doconv", 1),
        ("tutorial_pt", None),
    ],
)
def test_a_model_by_name_computes_what_the_core_does(backend, name, in_channels):
    model = backend.package.get_model(name, num_classes=5, in_channels=in_channels, seed=2)
    network = describe(name, num_classes=5, in_channels=in_channels)
    assert network.input_shape[0] == (in_channels or 1)
    x = images(network, batch=2)
    expected = evaluate(network, initialize(network, 2), x.astype(np.float64))
    assert difference(backend.inference(model, x), expected).relative < OUTPUTS
    assert name in backend.package.list_models(f"{name[:9]}*")


def test_a_wrong_name_gets_the_nearest_ones(backend):
    with pytest.raises(ValueError, match=r"'cifar_resnet21' is no network: .*cifar_resnet20"):
        backend.package.get_model("cifar_resnet21")
