"""Flattened images in `doconv convert`: seen in Keras' configs, else asked for or assumed."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from command_line import DIFFERENT, IMPOSSIBLE, USAGE, doconv
from equal import as_array
from frameworks import imported

from doconv_core import ConvSpec, LayerForm, State, difference, write_state
from doconv_core.cli.command import Failure
from doconv_core.cli.flattening import Flattenings, Images
from doconv_core.files.checkpoint import open_checkpoint
from doconv_core.files.gluon import write_params
from doconv_core.state.layers import BatchNormSpec, LinearSpec

pytestmark = pytest.mark.usefixtures("unprobed")


def pair(keras):
    """Return a network with a norm behind a flattened image, in PyTorch and in Keras."""
    nn, layers = importlib.import_module("torch").nn, keras.layers
    model = nn.Sequential()
    for name, layer in {
        "conv": nn.Conv2d(3, 5, 3), "flatten": nn.Flatten(), "bn": nn.BatchNorm1d(80, eps=1e-3),
        "fc": nn.Linear(80, 2),
    }.items():  # fmt: skip
        model.add_module(name, layer)
    for parameter in model.bn.parameters():
        nn.init.normal_(parameter)
    nn.init.normal_(model.bn.running_mean)
    like = keras.Sequential(
        [
            keras.Input((6, 6, 3)), layers.Conv2D(5, 3, name="conv"), layers.Flatten(),
            layers.BatchNormalization(name="bn"), layers.Dense(2, name="fc"),
        ]
    )  # fmt: skip
    return model.eval(), like


def test_the_config_of_a_keras_file_is_enough(keras, tmp_path):
    torch = imported("torch")
    model, like = pair(keras)
    torch.save(model.state_dict(), tmp_path / "in.pt")
    like.save(tmp_path / "like.keras")
    out, back = tmp_path / "out.keras", tmp_path / "back.pt"
    done = doconv("convert", tmp_path / "in.pt", out, "--like", tmp_path / "like.keras")
    assert "fc.weight: an image of 5x4x4 reordered" in done.stdout
    assert done.stderr == ""
    image = torch.randn(3, 3, 6, 6)
    expected = model(image).detach().numpy()
    found = as_array(keras.saving.load_model(out)(image.permute(0, 2, 3, 1).numpy()))
    assert difference(found, expected).relative < 1e-5
    doconv("verify", tmp_path / "in.pt", out)
    doconv("verify", out, tmp_path / "in.pt")
    doconv("convert", out, back)
    for name, tensor in torch.load(back, weights_only=True).items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_an_option_that_contradicts_the_config_is_refused(keras, tmp_path):
    torch = imported("torch")
    model, like = pair(keras)
    torch.save(model.state_dict(), tmp_path / "in.pt")
    like.save(tmp_path / "like.keras")
    args = [
        "convert",
        tmp_path / "in.pt",
        tmp_path / "out.keras",
        "--like",
        tmp_path / "like.keras",
    ]
    text = "like.keras flattens an image of 5x4x4 before layer '{}'; received {}. Leave it out.*{}"
    for name, size in (("fc", "no"), ("fc", "10x8"), ("bn", "10x8"), ("bn", "no")):
        error = text.format(name, size, "--ignore flattening")
        doconv(*args, "--flatten", f"{name}={size}", code=USAGE, error=error)
    doconv(*args, "--flatten", "fc=5x2x8")  # whose numbers are in the same order
    doconv(*args, "--flatten", "*=no", "--ignore", "flattening", "--force")
    with open_checkpoint(tmp_path / "out.keras") as file:
        found = file.read("layers/dense/vars/0")
    np.testing.assert_array_equal(found, model.fc.weight.detach().numpy().T)
    doconv("verify", tmp_path / "in.pt", tmp_path / "out.keras", code=DIFFERENT)
    doconv("verify", tmp_path / "in.pt", tmp_path / "out.keras", "--flatten", "*=no")
    none = keras.Sequential(
        [
            keras.Input((80,)),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(2, name="fc"),
        ]
    )
    none.save(tmp_path / "none.keras")
    error = "none.keras flattens no image before layer 'fc'; received 5x4x4"
    args = ["convert", tmp_path / "none.keras", tmp_path / "none.pt", "--flatten", "fc=5x4x4"]
    doconv(*args, code=USAGE, error=error)


def test_what_becomes_an_image_is_refused(keras, tmp_path):
    layers = keras.layers
    inputs = keras.Input((3,))
    for size in ((4, 4, 2), (4, 4, 1)):
        x = layers.ReLU()(layers.Dense(16 * size[-1], name="fc")(inputs))
        image = layers.Conv2D(1, 1)(layers.Reshape(size)(x))
        keras.Model(inputs, image).save(tmp_path / f"{size[-1]}.keras")
    error = "2.keras: what layer 'fc' gives becomes an image, which .*--ignore flattening"
    args = ["convert", tmp_path / "2.keras", tmp_path / "out.safetensors"]
    doconv(*args, code=IMPOSSIBLE, error=error)
    doconv(*args, "--ignore", "flattening")
    doconv("convert", tmp_path / "1.keras", tmp_path / "out.safetensors", "--force")


def test_what_cannot_be_reordered_is_refused(keras, tmp_path):
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)), layers.Conv2D(2, 1), layers.Flatten(),
            layers.EinsumDense("ab,bc->ac", 3, name="act"),
        ]
    )  # fmt: skip
    model.save(tmp_path / "in.keras")
    error = "layer 'act' is behind a flattened image, and its numbers cannot be reordered here"
    args = ["convert", tmp_path / "in.keras", tmp_path / "out.safetensors", "--keep", "*"]
    doconv(*args, code=IMPOSSIBLE, error=error)


def test_a_subclassed_model_tells_neither_connections_nor_order(keras, tmp_path):
    torch = imported("torch")

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.z = keras.layers.Conv2D(4, 1, name="z")
            self.a = keras.layers.Conv2D(4, 1, name="a")

        def call(self, x):
            return self.a(self.z(x))

    like = Net()
    like(np.zeros((1, 2, 2, 4)))
    like.save(tmp_path / "like.keras")
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    torch.save(model.state_dict(), tmp_path / "in.pt")
    args = [
        "convert",
        tmp_path / "in.pt",
        tmp_path / "out.keras",
        "--like",
        tmp_path / "like.keras",
    ]
    error = "like.keras has its layers in the order of their names, not of the model"
    doconv(*args, "--match", "order", code=IMPOSSIBLE, error=error)


def weights(**shapes):
    rng = np.random.default_rng(0)
    return {
        f"{name}.weight": rng.standard_normal(shape).astype("float32")
        for name, shape in shapes.items()
    }


def norm(name, features):
    roles = ("gamma", "beta", "running_mean", "running_var")
    return {f"{name}.{role}": np.ones(features, "float32") for role in roles}


STEM = {"stem": (4, 3, 3, 3)}


def template(keras, folder, arrays):
    """Write weights of Keras with the arrays' layers, which tell neither order nor connections."""
    layers = keras.layers
    shapes = {name.partition(".")[0]: array.shape for name, array in arrays.items()}
    made = []
    for name, shape in shapes.items():
        if len(shape) == 1:
            made.append((layers.BatchNormalization(name=name), (None, *shape)))
        elif len(shape) == 2:
            made.append((layers.Dense(shape[0], use_bias=False, name=name), (None, shape[1])))
        else:
            options = {"use_bias": False, "name": name, "data_format": "channels_last"}
            layer = getattr(layers, f"Conv{len(shape) - 2}D")(shape[0], shape[2:], **options)
            made.append((layer, (None, *(8,) * (len(shape) - 2), shape[1])))

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.all = [layer for layer, _ in made]

        def call(self, x):
            return x

    for layer, shape in made:
        layer.build(shape)
    model = Net()
    model(np.zeros((1, 1)))
    model.save_weights(folder / "like.weights.h5")


def fill(keras, folder, arrays, *options, **checks):
    """Convert Gluon's arrays, which are in order, into weights of Keras."""
    write_params(folder / "in.params", arrays)
    template(keras, folder, arrays)
    return doconv(
        "convert", folder / "in.params", folder / "out.weights.h5", "--like",
        folder / "like.weights.h5", "--force", *options, **checks,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arrays", "image"),
    [
        # A convolution beside the path, with as many channels as the image has numbers.
        (weights(**STEM, aux=(64, 4, 1, 1), fc=(2, 64)), "4x4x4 of layer 'stem'"),
        (weights(**STEM, aux=(64, 4, 1, 1)) | norm("bn", 64) | weights(fc=(2, 64)), "4x4x4"),
        (weights(line=(4, 3, 3), aux=(20, 4, 1), fc=(2, 20)), "4x5 of layer 'line'"),
        (weights(cube=(4, 3, 2, 2, 2), aux=(32, 4, 1, 1, 1), fc=(2, 32)), "4x2x2x2"),
        # A norm, which may be behind the image, too.
        (weights(**STEM) | norm("bn", 64) | weights(fc=(2, 64)), "4x4x4 of layer 'stem'"),
        # Two paths, of which the first is the one that goes on.
        (weights(**STEM, mid=(16, 4, 3, 3), b=(8, 3, 3, 3), end=(64, 8, 3, 3), fc=(2, 64)),
         "16x2x2 of layer 'mid'"),
    ],
)  # fmt: skip
def test_an_image_as_likely_as_none_is_asked_about(keras, tmp_path, arrays, image):
    number, given = arrays["fc.weight"].shape[1], image.partition(" ")[0]
    error = (
        f"the {number} inputs of layer 'fc' may be the channels of layer '.*', or an image that is "
        f"flattened, such as {image}.*--flatten 'fc=no', or --flatten 'fc={given}'"
    )
    fill(keras, tmp_path, arrays, code=IMPOSSIBLE, error=error)
    done = fill(keras, tmp_path, arrays, "--flatten", "fc=no", "--json")
    assert json.loads(done.stdout)["no_image_assumed"] == {}


@pytest.mark.parametrize(
    "arrays",
    [
        weights(**STEM, mid=(16, 4, 3, 3), end=(64, 16, 3, 3), again=(64, 64, 3, 3), fc=(2, 64)),
        # A shortcut, listed behind the layers that it goes past.
        weights(**STEM, a=(16, 4, 3, 3), b=(16, 16, 3, 3), past=(16, 4, 1, 1), c=(64, 16, 3, 3),
                d=(64, 64, 3, 3), past2=(64, 16, 1, 1), fc=(2, 64)),
        # Depthwise, grouped, and channels that are no image's.
        weights(**STEM, deep=(4, 1, 3, 3), wide=(48, 4, 1, 1), fc=(2, 48)),
        weights(**STEM, deep=(4, 1, 3, 3), wide=(24, 4, 1, 1), half=(24, 12, 3, 3), fc=(2, 24)),
        # Channels that are joined.
        weights(**STEM, more=(12, 4, 3, 3)) | norm("bn", 16) | weights(c=(12, 16, 3, 3))
        | norm("last", 28) | weights(fc=(2, 28)),
    ],
)  # fmt: skip
def test_a_chain_is_assumed_and_said_so(keras, tmp_path, arrays):
    number = arrays["fc.weight"].shape[1]
    done = fill(keras, tmp_path, arrays)
    text = f"assumed: the {number} inputs of layer 'fc' are the channels of the layer before it"
    assert text in done.stderr
    assert "if they are one, give its channels and size, --flatten 'fc=CxHxW'" in done.stderr
    assert "assumed:" not in done.stdout
    done = fill(keras, tmp_path, arrays, "--json")
    assert json.loads(done.stdout)["no_image_assumed"] == {"fc": number}
    assert fill(keras, tmp_path, arrays, "--flatten", "fc=no").stderr == ""


def test_a_linear_layer_takes_the_image_before_it(keras, tmp_path):
    arrays = weights(**STEM, fc=(64, 4 * 25), fc2=(64, 64), head=(2, 64))
    done = fill(keras, tmp_path, arrays, "--flatten", "fc=4x5x5", "--json")
    assert json.loads(done.stdout)["no_image_assumed"] == {"fc2": 64, "head": 64}
    # Another does not take it, so that it may be the next that does.
    arrays = weights(**STEM, aux=(64, 10), fc=(2, 64))
    error = "may be the channels of layer 'aux', or .* such as 4x4x4 of layer 'stem'"
    fill(keras, tmp_path, arrays, "--flatten", "aux=no", code=IMPOSSIBLE, error=error)


def test_a_norm_behind_an_image_that_is_told(keras, tmp_path):
    arrays = weights(**STEM) | norm("bn", 64) | weights(fc=(2, 64))
    arrays["bn.beta"] = np.arange(64, dtype="float32")
    error = (
        "nothing tells whether layer 'bn' is behind the image of 4x4x4 that is flattened before "
        "layer 'fc'; give --flatten 'bn=4x4x4', or --flatten 'bn=no'"
    )
    fill(keras, tmp_path, arrays, "--flatten", "fc=4x4x4", code=IMPOSSIBLE, error=error)
    done = fill(keras, tmp_path, arrays, "--flatten", "4x4x4")
    assert "bn.beta: an image of 4x4x4 reordered" in done.stdout
    doconv("verify", tmp_path / "in.params", tmp_path / "out.weights.h5", "--flatten", "4x4x4")
    with open_checkpoint(tmp_path / "out.weights.h5") as file:
        names = [name for layer in file.in_order for name in layer.entries.values()]
        found = [file.read(name) for name in names if file.entries[name].shape == (64,)]
    expected = np.arange(64).reshape(4, 4, 4).transpose(1, 2, 0).ravel()
    assert any(np.array_equal(each, expected) for each in found)
    fill(keras, tmp_path, arrays, "--flatten", "fc=4x4x4", "--flatten", "bn=no")


def test_of_states_what_they_tell_of_images_is_used(keras, tmp_path):
    layers = keras.layers
    convolution = LayerForm(ConvSpec(3, 64, (1, 1)), bias=False)
    like = keras.Sequential(
        [keras.Input((1, 1, 3)), layers.Conv2D(64, 1, use_bias=False, name="conv"),
         layers.Lambda(lambda x: x[:, 0, 0]), layers.Dense(2, use_bias=False, name="fc")]
    )  # fmt: skip
    like.save(tmp_path / "like.keras")
    args = ["convert", tmp_path / "in.safetensors", tmp_path / "out.keras", "--force", "--like"]
    args.append(tmp_path / "like.keras")
    errors = {
        "channels first": "nothing tells whether the 64 inputs of layer 'fc' are a flattened image",
        "own": "nothing tells in which order the inputs of layer 'fc' are; load the state in Py",
        None: None,
    }
    for word, error in errors.items():
        head = LayerForm(LinearSpec(64, 2), bias=False, flattening=word)
        arrays = {"conv.weight": np.ones((64, 3, 1)), "fc.weight": np.ones((2, 64))}
        arrays = {name: array.astype("float32") for name, array in arrays.items()}
        write_state(State({"conv": convolution, "fc": head}, arrays), tmp_path / "in.safetensors")
        if error is None:
            assert "assumed: the 64 inputs of layer 'fc'" in doconv(*args).stderr
        else:
            doconv(*args, code=IMPOSSIBLE, error=error)


def test_a_norm_that_a_state_tells_to_be_behind_an_image(keras, tmp_path):
    layers = keras.layers
    norm = LayerForm(BatchNormSpec(8, 1e-3, 0.01), flattening="channels first")
    arrays = {name: np.arange(8, dtype="float32") for name in norm.shapes}
    arrays = {f"bn.{name}": array for name, array in arrays.items()}
    write_state(State({"bn": norm}, arrays), tmp_path / "in.safetensors")
    model = keras.Sequential([keras.Input((8,)), layers.BatchNormalization(name="bn")])
    model.save_weights(tmp_path / "like.weights.h5")
    args = ["convert", tmp_path / "in.safetensors", tmp_path / "out.weights.h5", "--like"]
    args.append(tmp_path / "like.weights.h5")
    error = "whether the 8 inputs of layer 'bn' are a flattened image.*--flatten 'bn=CxHxW'"
    doconv(*args, code=IMPOSSIBLE, error=error)
    doconv(*args, "--flatten", "bn=2x2x2")
    model.load_weights(tmp_path / "out.weights.h5")
    expected = np.arange(8).reshape(2, 2, 2).transpose(1, 2, 0).ravel()
    np.testing.assert_array_equal(model.layers[0].gamma.numpy(), expected)


NETWORKS = {"resnet18": 512, "resnet50": 2048, "densenet121": 1024, "mobilenet_w1": 1024,
            "mobilenetv2_w1": None, "efficientnet_b0": 1280}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_a_zoo(name, tmp_path):
    torch = imported("torch")
    provider = importlib.import_module("pytorchcv.model_provider")
    with torch.device("meta"):
        model = provider.get_model(name)
    arrays = {key: torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}
    torch.save(arrays, tmp_path / "in.pt")
    with open_checkpoint(tmp_path / "in.pt") as file:
        layers = file.in_order
        if name.startswith("efficientnet"):  # 320 channels, of which a last convolution makes 1280
            with pytest.raises(Failure, match=r"may be .* such as 320x2x2 of .*=no', or --flatten"):
                Flattenings(file, layers, Images(), ordered=True)
            return
        assumed = Flattenings(file, layers, Images(), ordered=True).assumed
    assert [*assumed.values()] == [NETWORKS[name]] * (NETWORKS[name] is not None)
