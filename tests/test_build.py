"""One description, three frameworks: the same paths, the same state, the same function."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from frameworks import BACKENDS, need
from networks.described import NETWORKS

from doconv_core import State, difference
from doconv_core.architectures.initialize import initialize
from doconv_core.architectures.layers import layers
from doconv_core.architectures.shapes import infer

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
