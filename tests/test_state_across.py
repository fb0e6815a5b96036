"""States that go from framework to framework: whole networks, every kind of layer, and refusals."""

from __future__ import annotations

import re

import numpy as np
import pytest
from equal import assert_same
from frameworks import need

for backend in ("torch", "tf", "mx"):
    need(backend)

# Before MXNet, which it makes importable.
import doconv_mx  # noqa: E402

# isort: split
import keras  # noqa: E402
import mxnet as mx  # noqa: E402
import torch  # noqa: E402
from keras import layers  # noqa: E402
from mxnet.gluon import nn as gluon  # noqa: E402
from networks import SIZE, gluon_networks, keras_networks, torch_networks  # noqa: E402
from networks.layers import CASES, model_of  # noqa: E402
from torch import nn  # noqa: E402

import doconv_tf  # noqa: E402
import doconv_torch  # noqa: E402
from doconv_core import State, StateError, difference, read_state, write_state  # noqa: E402


def keras_network(name, do_conv):
    if not do_conv:
        return getattr(keras_networks, name)()
    classes = {"conv": doconv_tf.DOConv2D}
    if name == "mobilenet_v2":
        classes["depthwise"] = doconv_tf.DODepthwiseConv2D
    return getattr(keras_networks, name)(**classes)


def gluon_network(name, do_conv):
    build = getattr(gluon_networks, name)
    net = build(doconv_mx.DOConv2D) if do_conv else build()
    net.initialize()
    return net


def torch_network(name, do_conv):
    build = getattr(torch_networks, name)
    return (build(doconv_torch.DOConv2d) if do_conv else build()).eval()


BUILDERS = {"torch": torch_network, "tf": keras_network, "mx": gluon_network}
PACKAGES = {"torch": doconv_torch, "tf": doconv_tf, "mx": doconv_mx}


def random_state(state, seed=0):
    """Return a state of this form with values as after training: no statistic is trivial."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for path, form in state.layers.items():
        for name, shape in form.shapes.items():
            values = rng.standard_normal(shape)
            if name == "weight":
                values *= (2 / np.prod(shape[1:])) ** 0.5
            elif name == "depthwise_weight":
                values *= 0.1
            elif name in ("gamma", "running_var"):
                values = rng.uniform(0.5, 1.5, shape)
            else:
                values *= 0.2
            arrays[f"{path}.{name}"] = values.astype(np.float32)
    return State(state.layers, arrays, state.origin)


def outputs(backend, model, values):
    """Return the model's output in evaluation mode, channels first as the values are."""
    if backend == "torch":
        with torch.no_grad():
            return model.eval()(torch.from_numpy(values)).numpy()
    if backend == "mx":
        return model(mx.nd.from_numpy(values.copy())).asnumpy()
    image = np.issubdtype(values.dtype, np.floating)
    output = model(np.moveaxis(values, 1, -1).copy() if image else values, training=False)
    output = keras.ops.convert_to_numpy(output)
    return np.moveaxis(output, -1, 1) if image else output


def images(batch=2, size=SIZE, channels=3):
    rng = np.random.default_rng(1)
    return rng.standard_normal((batch, channels, size, size)).astype(np.float32)


def assert_same_arrays(found, expected):
    """Check that two states have the same arrays in the same order, whatever their names."""
    assert_same(list(found.values()), list(expected.values()))


@pytest.mark.parametrize(
    "do_conv", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["ordinary", "do"]
)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_network_goes_round_and_comes_back_without_a_changed_bit(name, do_conv):
    models = {backend: build(name, do_conv) for backend, build in BUILDERS.items()}
    first = random_state(doconv_torch.export_state(models["torch"]))
    doconv_torch.load_state(models["torch"], first)
    expected = outputs("torch", models["torch"], images())
    assert expected.std() > 0.1
    state = doconv_torch.export_state(models["torch"])
    assert_same(list(state.arrays.values()), list(first.arrays.values()))
    for backend in ("tf", "mx"):
        PACKAGES[backend].load_state(models[backend], state, match="order")
        state = PACKAGES[backend].export_state(models[backend])
        assert_same(list(state.arrays.values()), list(first.arrays.values()))
        assert difference(outputs(backend, models[backend], images()), expected).relative < 1e-4
    back = torch_network(name, do_conv)
    doconv_torch.load_state(back, state, match="order")
    again = doconv_torch.export_state(back)
    assert again.layers == first.layers
    assert_same(list(again.arrays.values()), list(first.arrays.values()))
    np.testing.assert_array_equal(outputs("torch", back, images()), expected)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_goes_from_each_framework_to_each(name):
    case = CASES[name]
    models = {b: model_of(b, case) for b in PACKAGES if getattr(case, b)}
    assert len(models) > 1
    rng = np.random.default_rng(1)
    shape = (2, *case.shape)
    values = rng.integers(0, 10, shape) if case.tokens else rng.standard_normal(shape, np.float32)
    for seed, (source, first) in enumerate(models.items()):
        state = random_state(PACKAGES[source].export_state(first), seed)
        PACKAGES[source].load_state(first, state)
        assert_same_arrays(PACKAGES[source].export_state(first).arrays, state.arrays)
        expected = outputs(source, first, values)
        for target in models.keys() - {source}:
            PACKAGES[target].load_state(models[target], state, match="order")
            found = PACKAGES[target].export_state(models[target]).arrays
            assert_same(list(found.values()), list(state.arrays.values()))
            off = difference(outputs(target, models[target], values), expected)
            assert off.relative < 1e-5, f"{source} to {target}: {off}"


def flattening_network(backend):
    """Return a network in which a linear layer stands behind a flattened image of 4×3×2."""
    if backend == "torch":
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(24), nn.Linear(24, 6),
            nn.ReLU(), nn.Linear(6, 5),
        )  # fmt: skip
    if backend == "tf":
        return keras.Sequential(
            [
                keras.Input((5, 4, 3)), layers.Conv2D(4, 3), layers.ReLU(), layers.Flatten(),
                layers.BatchNormalization(epsilon=1e-5, momentum=0.9), layers.Dense(6),
                layers.ReLU(), layers.Dense(5),
            ]
        )  # fmt: skip
    net = gluon.HybridSequential()
    net.add(
        gluon.Conv2D(4, 3, in_channels=3), gluon.Activation("relu"), gluon.Flatten(),
        gluon.BatchNorm(in_channels=24), gluon.Dense(6, in_units=24, activation="relu"),
        gluon.Dense(5, in_units=6),
    )  # fmt: skip
    net.initialize()
    return net


@pytest.mark.parametrize("source", PACKAGES)
def test_a_flattened_image_keeps_its_meaning(source, tmp_path):
    models = {backend: flattening_network(backend) for backend in PACKAGES}
    state = random_state(PACKAGES[source].export_state(models[source]))
    PACKAGES[source].load_state(models[source], state)
    write_state(state, tmp_path / "state.safetensors")
    state = read_state(tmp_path / "state.safetensors")
    values = np.random.default_rng(1).standard_normal((2, 3, 5, 4), np.float32)
    expected = outputs(source, models[source], values)
    for backend, package in PACKAGES.items():
        package.load_state(models[backend], state, match="order")
        assert_same_arrays(package.export_state(models[backend]).arrays, state.arrays)
        assert difference(outputs(backend, models[backend], values), expected).relative < 1e-5


class Flattening(keras.Model):
    """A model of its own class, of which Keras does not tell what its call does."""

    def __init__(self):
        super().__init__()
        self.conv, self.flatten, self.head = layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(5)

    def call(self, x):
        return self.head(self.flatten(self.conv(x)))


def test_an_order_that_cannot_be_seen_is_refused():
    model = Flattening()
    model(np.zeros((1, 5, 4, 3), np.float32))
    state = doconv_torch.export_state(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(24, 5))
    )
    message = "'2', the model's 'dense.*', may have the features of a flattened image"
    with pytest.raises(StateError, match=message):
        doconv_tf.load_state(model, state, match="order")
    doconv_tf.load_state(model, state, match="order", ignore="flattening")
    kernel = keras.ops.convert_to_numpy(model.head.kernel)
    np.testing.assert_array_equal(kernel.T, state.arrays["2.weight"])  # as it was


def test_same_padding_of_a_strided_convolution_is_refused():
    state = doconv_torch.export_state(torch_network("resnet18", False))
    model = keras_networks.resnet18(padding="same")
    before = [keras.ops.convert_to_numpy(weight).copy() for weight in model.weights]
    with pytest.raises(StateError) as raised:
        doconv_tf.load_state(model, state, match="order")
    assert "layer 'conv1', the model's 'stem', would compute something else" in str(raised.value)
    assert "padding is ((3, 3), (3, 3)) in the state, ('same', 'same') in the" in str(raised.value)
    assert "  > conv1: convolution (8, 3, 49)" in str(raised.value)
    for weight, values in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), values)
    doconv_tf.load_state(model, state, match="order", ignore="geometry")
    assert_same_arrays(doconv_tf.export_state(model).arrays, state.arrays)
    assert "same" in doconv_tf.export_state(model).layers["stem"].geometry.padding
    with pytest.raises(StateError, match=r"padding is \('same', 'same'\) in the state"):
        doconv_torch.load_state(
            torch_network("resnet18", False), doconv_tf.export_state(model), match="order"
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
            r"padding is \(\(0, 0\), \(0, 0\)\) in the state, \(\(1, 1\), \(1, 1\)\) in the model",
        ),
        (lambda: nn.Conv2d(3, 4, 3), r"stride is \(2, 2\) in the state, \(1, 1\) in the model"),
        (lambda: nn.Conv2d(3, 4, 3, 2, bias=False), "'conv.bias' is there; expected a layer witho"),
        (lambda: nn.ConvTranspose2d(3, 4, 3, 2), "is of ConvSpec.*; expected TransposedConvSpec"),
    ],
)
def test_a_convolution_of_another_function_is_refused(make, message):
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3, strides=2, name="conv")])
    with pytest.raises(StateError, match=message):
        doconv_torch.load_state(make(), doconv_tf.export_state(model), match={"conv": ""})


def test_a_transposed_convolution_that_crops_otherwise_is_refused():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2DTranspose(4, 3, strides=2, padding="same")]
    )
    other = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1)
    with pytest.raises(StateError, match=r"padding is \(\(1, 0\).* in the state, \(\(0, 1\)"):
        doconv_tf.load_state(model, doconv_torch.export_state(other), match="order")


def test_order_shows_where_two_networks_part():
    state = doconv_torch.export_state(torch_network("resnet18", False))
    with pytest.raises(StateError) as raised:
        doconv_mx.load_state(gluon_network("mobilenet_v2", False), state, match="order")
    marked = next(line for line in str(raised.value).split("\n") if line.startswith("  > "))
    pattern = r"  > conv1: convolution \(8, 3, 49\) +0: convolution \(8, 3, 9\)"
    assert re.fullmatch(pattern, marked)


def test_keras_default_epsilon_and_momentum_are_told_apart():
    state = doconv_torch.export_state(nn.BatchNorm2d(4))
    default = keras.Sequential([keras.Input((5, 5, 4)), layers.BatchNormalization(name="norm")])
    with pytest.raises(StateError, match=r"adds epsilon=1e-05 .* 0.001 in the model. Build the m"):
        doconv_tf.load_state(default, state, match={"": "norm"})
    norm = layers.BatchNormalization(epsilon=1e-5, name="norm")
    model = keras.Sequential([keras.Input((5, 5, 4)), norm])
    with pytest.warns(
        UserWarning, match=r"statistics differs: 'norm' \(0.1, here 0.01\)"
    ) as caught:
        doconv_tf.load_state(model, state, match={"": "norm"})
    assert caught[0].filename == __file__


def test_an_ordinary_network_is_loaded_over_parameterized_in_another_framework():
    model, other = torch_network("resnet18", False), keras_network("resnet18", True)
    state = random_state(doconv_torch.export_state(model))
    doconv_torch.load_state(model, state)
    doconv_tf.load_state(other, state, match="order")
    found = outputs("tf", other, images())
    assert difference(found, outputs("torch", model, images())).relative < 1e-4
    message = "'stem.depthwise_weight' is for an over-parameterized layer.*Fold the model"
    with pytest.raises(StateError, match=message):
        doconv_torch.load_state(model, doconv_tf.export_state(other), match="order")


def test_a_network_of_one_zoo_is_loaded_into_that_of_another():
    doconv_mx.import_gluoncv()
    import gluoncv
    import pytorchcv.model_provider

    model = pytorchcv.model_provider.get_model("resnet18", pretrained=False)
    net = gluoncv.model_zoo.get_model("resnet18_v1b", pretrained=False)
    net.initialize()
    values = images(1, 224)
    outputs("mx", net, values)  # which infers the shapes
    state = random_state(doconv_torch.export_state(model))
    doconv_torch.load_state(model, state)
    doconv_mx.load_state(net, state, match="order")
    expected = outputs("torch", model, values)
    assert difference(outputs("mx", net, values), expected).relative < 1e-4
