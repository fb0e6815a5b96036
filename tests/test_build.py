"""One description, three frameworks: the same paths, the same state, the same function."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from contract_bsconv import adapter_of, check_refused, snapshot
from contract_networks import check_network, images, problem_of, trained
from equal import assert_close
from frameworks import BACKENDS
from networks.described import NETWORKS, SHAPE

import doconv_core
from doconv_core import StateError, read_state, write_state
from doconv_core.kinds.base import recipe
from doconv_core.networks import build
from doconv_core.networks.evaluate import evaluate
from doconv_core.networks.initialize import initialize
from doconv_core.networks.lowering import layers
from doconv_core.networks.names import describe
from doconv_core.networks.nodes import (
    ACTIVATIONS,
    Activation,
    Conv,
    Network,
    Pool,
    Residual,
    sequence,
)
from doconv_core.networks.shapes import for_input, infer

OUTPUTS = 1e-5  # relative to the largest entry of the float64 result


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


@pytest.fixture(scope="module", params=NETWORKS)
def problem(request):
    return problem_of(NETWORKS[request.param])


def loaded(adapter, network):
    model = adapter.described(network)
    adapter.package.load_state(model, trained(network))
    return model


def test_a_network_has_the_cores_paths_state_and_function(problem, adapter):
    network, state = problem.network, problem.state
    exported = adapter.package.export_state(loaded(adapter, network))
    assert list(exported.layers) == list(layers(network))
    for entry, array in state.arrays.items():
        np.testing.assert_array_equal(exported.arrays[entry], array, err_msg=entry)
    # Gluon's batch norm has a beta in any case.
    more = exported.arrays.keys() - state.arrays.keys()
    assert all(entry.endswith(".beta") and not exported.arrays[entry].any() for entry in more)
    check_network(adapter, problem, OUTPUTS)


@pytest.mark.parametrize("name", ["scales", "strided_kinds"])
def test_over_parameterized_and_folded_it_computes_the_same(adapter, name):
    network = NETWORKS[name]
    x, model, package = images(network), loaded(adapter, network), adapter.package
    expected = adapter.forward(model, x)
    more = package.over_parameterize(model).model
    assert_close(adapter.forward(more, x), expected, OUTPUTS, "over-parameterized")
    state = package.export_state(more)
    assert list(state.layers) == list(layers(network))
    assert any(form.over_parameterized for form in state.layers.values())
    for fuse in (False, True):
        folded = package.fold(more, fuse_batchnorm=fuse).model
        assert_close(adapter.forward(folded, x), expected, OUTPUTS, f"fuse={fuse}")
        forms = package.export_state(folded).layers
        assert not any(form.over_parameterized for form in forms.values())
        assert (list(forms) == list(layers(network))) != fuse


def test_the_state_of_another_network_is_refused_by_name_before_anything_changes(adapter):
    network, load = NETWORKS["residuals"], adapter.package.load_state
    model = loaded(adapter, network)
    before = snapshot(adapter.package, model).arrays
    # The same layers but for one, the last.
    other = sequence(*network.body.children[:-1], ("last", Conv(3)))
    last = trained(Network("other", other, SHAPE))
    first, second = r"'stem' is not in the state, .* 'stem\.bn'", "'last' is not in the model, tho"
    check_refused(
        (lambda: load(model, trained(NETWORKS["pooled"])), StateError, f"layer {first}"),
        (lambda: load(model, last), StateError, f"layer {second}ugh the state"),
    )
    after = adapter.package.export_state(model).arrays
    for entry, array in before.items():
        np.testing.assert_array_equal(after[entry], array)


def test_a_state_says_whose_it_is(adapter, tmp_path):
    get_model, load = adapter.package.get_model, adapter.package.load_state
    model = get_model("tutorial_tf")
    state = adapter.package.export_state(model)
    assert state.origin["network"] == "tutorial_tf"
    write_state(state, tmp_path / "stored.safetensors")
    stored = read_state(tmp_path / "stored.safetensors")
    other = get_model("tutorial_gluon")
    before = snapshot(adapter.package, other).arrays
    refused = r"^the state is not one of 'tutorial_gluon', but of 'tutorial_tf': entry 'conv1\.w"
    # And two of one name, for other numbers of classes.
    three, sizes = get_model("tutorial_tf", num_classes=3), r"^entry '\w+\.weight' is of LinearSpec"
    check_refused(
        (lambda: load(other, stored), StateError, refused),
        (lambda: load(other, stored, match="order"), StateError, refused),
        (lambda: load(other, stored, ignore="geometry"), StateError, refused),
        (lambda: load(three, stored), StateError, sizes),
    )
    for entry, array in adapter.package.export_state(other).arrays.items():
        np.testing.assert_array_equal(before[entry], array)
    load(model, stored)


def test_every_activation_is_that_of_its_formula(adapter):
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
        assert_close(adapter.forward(adapter.described(network), x), y, OUTPUTS, name)


@pytest.mark.parametrize("name", ["max", "average"])
def test_what_is_padded_takes_no_part_in_pooling(adapter, name):
    for sizes in ((3, 2, 1), (2, 1, 1), (5, 3, 2), (4, 2, 1), (3, 1, 0)):
        network = Network("one", sequence(("pool", Pool(name, *sizes))), (2, 9, 8))
        x = images(network) - 5  # below 0, which zeros around would hide
        expected = evaluate(network, initialize(network), x)
        assert_close(adapter.forward(adapter.described(network), x), expected, OUTPUTS, str(sizes))


def test_an_input_of_another_size(adapter):
    model = adapter.described(NETWORKS["scales"], input_shape=(3, 14, 12))
    adapter.package.load_state(model, trained(NETWORKS["scales"]))
    network = for_input(NETWORKS["scales"], (3, 14, 12))
    expected = infer(network)[""].after
    assert expected != infer(NETWORKS["scales"])[""].after
    assert adapter.forward(model, images(network)).shape[1:] == expected
    with pytest.raises(ValueError, match=r"'grouped' needs at least 3 rows and columns; received"):
        adapter.described(NETWORKS["scales"], input_shape=(3, 4, 4))


@pytest.fixture
def named(monkeypatch):
    """Make `described` the network of every name, and return what was asked for."""
    asked = []

    def describe(name, **options):
        asked.append((name, options))
        return NETWORKS["vectors1.0"]

    monkeypatch.setattr(build, "describe", describe)
    return asked


def test_a_model_by_name_starts_from_its_seed(adapter, named):
    network = NETWORKS["vectors1.0"]
    get_model, export_state = adapter.package.get_model, adapter.package.export_state
    arrays = export_state(get_model("a", num_classes=7, in_channels=3)).arrays
    assert named == [("a", {"num_classes": 7, "in_channels": 3})]
    for seed, same in ((0, True), (1, False)):
        expected = initialize(network, seed).arrays
        assert np.array_equal(arrays["output.weight"], expected["output.weight"]) == same
    larger = get_model("a", input_shape=(3, 20, 9), seed=5)
    expected = initialize(for_input(network, (3, 20, 9)), 5).arrays
    np.testing.assert_array_equal(export_state(larger).arrays["bn.gamma"], expected["bn.gamma"])
    assert expected["hidden.weight"].shape != arrays["hidden.weight"].shape
    assert adapter.package.list_models is doconv_core.list_models
    make, channels = partial(get_model, "a"), "must have the 3 channels of the network; rec"
    check_refused(
        (partial(make, input_shape=(1, 28, 28)), ValueError, channels),
        (partial(make, input_shape=28), TypeError, r"input_shape must be \(C, H, W\); rec.*=28"),
        (partial(make, input_shape=(3, 28)), ValueError, "must be one integer or 3 of them"),
        (partial(make, input_shape=(3, 0, 28)), ValueError, r"input_shape\[1\] must be at least 1"),
        (partial(make, seed=-1), ValueError, "seed must be at least 0"),
    )


def test_a_model_of_a_description_starts_from_its_seed(adapter):
    network, get_model = NETWORKS["vectors1.0"], adapter.package.get_model
    arrays = adapter.package.export_state(get_model(network, seed=3)).arrays
    for name, array in initialize(network, 3).arrays.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    with pytest.raises(TypeError, match="has its own num_classes; received num_classes=7"):
        get_model(network, num_classes=7)


def test_a_model_by_name_has_the_sizes_of_its_options(adapter):
    sizes = {"num_classes": 3, "stages": (2, 1), "growth": (4, 8), "heads": 2}
    model = adapter.package.get_model("cifar_dydensenet86", input_shape=(3, 8, 8), **sizes)
    expected = layers(describe("cifar_dydensenet86", **sizes), (3, 8, 8))
    assert snapshot(adapter.package, model).layers.keys() == expected.keys()
    assert adapter.trainable(model) == doconv_core.count("cifar_dydensenet86", **sizes).parameters
    with pytest.raises(TypeError, match="'plain18' takes no options; received heads=2"):
        adapter.package.get_model("plain18", heads=2)


def test_nodes_that_give_no_network_are_refused():
    activations, kinds = "name must be one of relu, .*; received 'swish'", "conv, doconv, bsconvu, "
    padding, text = "padding must be at most half of .* padding=2, size=2", "a text without dots an"
    shortcut = "a residual's body cannot have a child named 'shortcut'"
    check_refused(
        (lambda: Activation("swish"), ValueError, activations),
        (
            lambda: recipe("conv2d"),
            ValueError,
            f"must be one of {kinds}bsconvs, branches, .*; received",
        ),
        (lambda: Pool("mean", 2, 2), ValueError, "one of max, average; received 'mean'"),
        (lambda: Pool("max", 2, 2, 2), ValueError, padding),
        (lambda: sequence(("a.b", Conv(1))), ValueError, f"{text}d slashes; received 'a.b'"),
        (lambda: Residual(sequence(("shortcut", Conv(3)))), ValueError, shortcut),
    )


def check_by_name(adapter, name, in_channels):
    model = adapter.package.get_model(name, num_classes=5, in_channels=in_channels, seed=2)
    network = describe(name, num_classes=5, in_channels=in_channels)
    assert network.input_shape[0] == (in_channels or 1)
    x = images(network, batch=2)
    expected = evaluate(network, initialize(network, 2), x.astype(np.float64))
    assert_close(adapter.forward(model, x), expected, OUTPUTS, name)
    assert name in adapter.package.list_models(f"{name[:9]}*")


def test_a_model_by_name_computes_what_the_core_does(adapter):
    check_by_name(adapter, "tutorial_tf_doconv", 1)
    check_by_name(adapter, "tutorial_pt", None)
    with pytest.raises(ValueError, match=r"'cifar_resnet21' is no network: .*cifar_resnet20"):
        adapter.package.get_model("cifar_resnet21")


@pytest.mark.exhaustive
def test_larger_models_by_name_compute_what_the_core_does(adapter):
    check_by_name(adapter, "cifar_resnet20_bsconvs_p1d4", 3)
    check_by_name(adapter, "cifar_mobilenetv3_small_w1d2", 3)


@pytest.mark.parametrize("name", ["bsconvu", "bsconvs"])
def test_a_bsconv_with_groups_is_refused_by_its_path(adapter, name):
    network = Network(
        "one", sequence(("sole", Conv(6, (3, 3), groups=3, kind=recipe(name)))), SHAPE
    )
    with pytest.raises(ValueError, match=r"'sole' cannot be a BSConv, .* received groups=3"):
        adapter.package.build(network)
