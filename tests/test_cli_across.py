"""`doconv convert` between real networks of two frameworks: they compute the same."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from command_line import DIFFERENT, IMPOSSIBLE, MISSING, TARGET, USAGE, doconv
from equal import as_array
from frameworks import imported, need

from doconv_core import difference, open_checkpoint

pytestmark = pytest.mark.usefixtures("unprobed")

SIZE = ("--kernel-size", "depthwise=3x3")  # its S is above M
FLAT = ("--flatten", "fc=6x4x4")


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype("float32")


def torch_network(over_parameterized):
    """Return a network with a batch norm, a grouped and a depthwise layer, and a flattening."""
    torch, own = importlib.import_module("torch"), importlib.import_module("doconv_torch")
    nn = torch.nn
    conv = own.DOConv2d if over_parameterized else nn.Conv2d
    more = {"depth_multiplier": 11} if over_parameterized else {}
    model = nn.Sequential()
    for name, layer in {
        "conv": conv(3, 8, 3, padding=1, bias=False),
        "bn": nn.BatchNorm2d(8, eps=1e-3),
        "relu": nn.ReLU(),
        "depthwise": conv(8, 8, 3, padding=1, groups=8, **more),
        "grouped": conv(8, 6, (3, 1), padding=(1, 0), groups=2),
        "pool": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(96, 5),
    }.items():
        model.add_module(name, layer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*model.parameters(), model.bn.running_mean]:
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def keras_network(over_parameterized, names=True):
    keras, own = importlib.import_module("keras"), importlib.import_module("doconv_tf")
    layers = keras.layers
    conv = own.DOConv2D if over_parameterized else layers.Conv2D
    depthwise = own.DODepthwiseConv2D if over_parameterized else layers.DepthwiseConv2D
    more = {"d_multiplier": 11} if over_parameterized else {}

    def named(name):
        return {"name": name} if names else {}

    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            conv(8, 3, padding="same", use_bias=False, **named("conv")),
            layers.BatchNormalization(**named("bn")),
            layers.ReLU(),
            depthwise(3, padding="same", **more, **named("depthwise")),
            conv(6, (3, 1), padding="same", groups=2, **named("grouped")),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(5, **named("fc")),
        ]
    )


def gluon_network(over_parameterized):
    own = importlib.import_module("doconv_mx")
    nn = importlib.import_module("mxnet").gluon.nn
    more = {"depth_multiplier": 11} if over_parameterized else {}

    def conv(inputs, outputs, size, **options):
        if over_parameterized:
            return own.DOConv2D(inputs, outputs, size, **options)
        return nn.Conv2D(outputs, size, in_channels=inputs, **options)

    model = nn.HybridSequential()
    layers = {
        "conv": conv(3, 8, (3, 3), padding=(1, 1), use_bias=False),
        "bn": nn.BatchNorm(epsilon=1e-3, in_channels=8),
        "relu": nn.Activation("relu"),
        "depthwise": conv(8, 8, (3, 3), padding=(1, 1), groups=8, **more),
        "grouped": conv(8, 6, (3, 1), padding=(1, 0), groups=2),
        "pool": nn.MaxPool2D(2),
        "flatten": nn.Flatten(),
        "fc": nn.Dense(5, in_units=96),
    }
    for name, layer in layers.items():
        model.register_child(layer, name)
    return model


def torch_output(model, image):
    torch = importlib.import_module("torch")
    with torch.no_grad():
        return model(torch.from_numpy(image)).numpy()


def keras_output(path, image):
    model = importlib.import_module("keras").saving.load_model(path)
    return as_array(model(image.transpose(0, 2, 3, 1)))


def gluon_output(model, path, image):
    model.load_parameters(str(path))
    return model(importlib.import_module("mxnet").nd.array(image)).asnumpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A PyTorch network and its file."""
    need("torch")
    model, path = torch_network(True), tmp_path_factory.mktemp("torch") / "net.pt"
    importlib.import_module("torch").save(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("fold", [False, True], ids=["over-parameterized", "folded"])
def test_pytorch_to_gluon_and_back(trained, image, tmp_path, fold):
    need("mx")
    model, path = trained
    options = ["--fold", *SIZE] if fold else []
    doconv("convert", path, tmp_path / "net.params", *options)
    found = gluon_output(gluon_network(not fold), tmp_path / "net.params", image)
    assert difference(found, torch_output(model, image)).relative < 1e-5
    doconv("convert", tmp_path / "net.params", tmp_path / "back.pt")
    torch = importlib.import_module("torch")
    back = torch_network(not fold)
    back.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))
    if not fold:
        for name, tensor in model.state_dict().items():
            assert name.endswith("tracked") or torch.equal(back.state_dict()[name], tensor)
    assert difference(torch_output(back, image), torch_output(model, image)).relative < 1e-5


@pytest.mark.parametrize("fold", [False, True], ids=["over-parameterized", "folded"])
def test_pytorch_to_keras_and_back(trained, image, tmp_path, fold):
    need("tf")
    model, path = trained
    keras_network(not fold).save(tmp_path / "like.keras")
    args = ["convert", path, tmp_path / "net.keras", "--like", tmp_path / "like.keras"]
    if fold:
        error = "layer 'conv' is over-parameterized in .*--fold folds it"
        doconv(*args, *FLAT, code=IMPOSSIBLE, error=error)
    options = ["--fold", *SIZE] if fold else []
    doconv(*args, *options, "--flatten", "fc=5x4x4", code=USAGE, error="has 96 inputs; received")
    doconv(*args, *options)
    expected = torch_output(model, image)
    assert difference(keras_output(tmp_path / "net.keras", image), expected).relative < 1e-5
    doconv("verify", path, tmp_path / "net.keras")
    # The two orders of inputs.
    doconv("verify", path, tmp_path / "net.keras", "--flatten", "fc=no", code=DIFFERENT)
    doconv("convert", tmp_path / "net.keras", tmp_path / "back.pt")
    torch = importlib.import_module("torch")
    back = torch_network(not fold)
    back.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))
    for name, tensor in model.state_dict().items():
        if not fold and not name.endswith("tracked"):
            assert torch.equal(back.state_dict()[name], tensor)
    assert difference(torch_output(back, image), expected).relative < 1e-5


def test_by_order_into_a_network_of_other_names(trained, image, tmp_path):
    need("tf")
    model, path = trained
    like = keras_network(False, names=False)
    like.save(tmp_path / "like.keras")
    like.save_weights(tmp_path / "like.weights.h5")
    args = ["convert", path, tmp_path / "net.keras", "--fold", *SIZE, *FLAT, "--like"]
    error = "layer 'conv' is in .*net.pt, but not in .*like.keras; --match order"
    doconv(*args, tmp_path / "like.keras", code=IMPOSSIBLE, error=error)
    error = "like.weights.h5 has its layers in the order of their names"
    other = [
        tmp_path / "net.weights.h5" if each == tmp_path / "net.keras" else each for each in args
    ]
    doconv(*other, tmp_path / "like.weights.h5", "--match", "order", code=IMPOSSIBLE, error=error)
    doconv(*args, tmp_path / "like.keras", "--match", "order")
    expected = torch_output(model, image)
    assert difference(keras_output(tmp_path / "net.keras", image), expected).relative < 1e-5
    keras = importlib.import_module("keras")
    other = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(8, 3, use_bias=False)])
    other.save(tmp_path / "other.keras")
    done = doconv(
        *args, tmp_path / "other.keras", "--match", "order", "--force", code=IMPOSSIBLE,
        listing=True, error="layer 2 of 5 differs: bn, batch norm in .*, nothing in",
    )  # fmt: skip
    assert "conv, convolution 8x3x3x3" in done.stderr


def test_keras_to_gluon(image, tmp_path):
    for backend in ("tf", "mx"):
        need(backend)
    model = keras_network(True)
    rng = np.random.default_rng(3)
    model.set_weights([w + 0.1 * rng.random(w.shape).astype("float32") for w in model.weights])
    model.save(tmp_path / "net.keras")
    doconv("convert", tmp_path / "net.keras", tmp_path / "net.params", *FLAT)
    found = gluon_output(gluon_network(True), tmp_path / "net.params", image)
    expected = keras_output(tmp_path / "net.keras", image)
    assert difference(found, expected).relative < 1e-5
    # The weights alone name the layers, too, but not the order in which they stand.
    model.save_weights(tmp_path / "net.weights.h5")
    out = tmp_path / "other.params"
    doconv("convert", tmp_path / "net.weights.h5", out, *FLAT)
    doconv("verify", out, tmp_path / "net.params", *SIZE, "--tolerance", "0")


def test_weights_alone_are_filled_too(trained, image, tmp_path):
    need("tf")
    model, path = trained
    like = keras_network(True)
    like.save_weights(tmp_path / "like.weights.h5")
    out = tmp_path / "net.weights.h5"
    error = "whether the 96 inputs of layer 'fc' are a flattened image.*--flatten 'fc=CxHxW'"
    args = ["convert", path, out, "--like", tmp_path / "like.weights.h5"]
    doconv(*args, code=IMPOSSIBLE, error=error)
    doconv(*args, *FLAT)
    like.load_weights(out)
    found = as_array(like(image.transpose(0, 2, 3, 1)))
    assert difference(found, torch_output(model, image)).relative < 1e-5


def test_keras_norms_embeddings_and_transposed_convolutions(tmp_path):
    for backend in ("tf", "torch"):
        need(backend)
    keras, torch = importlib.import_module("keras"), importlib.import_module("torch")
    layers = keras.layers
    words = keras.Input((6,), dtype="int32")
    x = layers.LayerNormalization(name="ln", epsilon=1e-5)(layers.Embedding(9, 4, name="e")(words))
    x = layers.Reshape((6, 1, 4))(x)
    x = layers.Conv2DTranspose(3, (2, 2), name="up")(x)
    model = keras.Model(words, x)
    rng = np.random.default_rng(3)
    for layer in model.layers:
        for weight in layer.trainable_weights:
            weight.assign(rng.standard_normal(weight.shape))
    model.save(tmp_path / "net.keras")
    out = tmp_path / "net.pt"
    doconv("convert", tmp_path / "net.keras", out)
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.ln = nn.Embedding(9, 4), nn.LayerNorm(4)
            self.up = nn.ConvTranspose2d(4, 3, 2)

        def forward(self, x):
            return self.up(self.ln(self.e(x)).transpose(1, 2)[..., None])

    net = Net()
    net.load_state_dict(torch.load(out, weights_only=True))
    indices = rng.integers(0, 9, (2, 6))
    found = torch_output(net, indices).transpose(0, 2, 3, 1)
    assert difference(found, as_array(model(indices))).relative < 1e-5


def test_copies_of_a_model_and_bfloat16(tmp_path):
    torch = imported("torch")
    weight = torch.randn(4, 2, 3, 3).bfloat16()
    content = {"model": {"c.weight": weight}, "ema": {"c.weight": 2 * weight}, "epoch": 3}
    torch.save(content, tmp_path / "m.pt")
    done = doconv("convert", tmp_path / "m.pt", tmp_path / "m.safetensors")
    assert "left out: ema/c.weight, epoch" in done.stdout
    doconv("convert", tmp_path / "m.pt", tmp_path / "ema.params", "--part", "ema")
    doconv("convert", tmp_path / "m.safetensors", tmp_path / "again.pt")
    assert torch.equal(torch.load(tmp_path / "again.pt", weights_only=True)["c.weight"], weight)
    with open_checkpoint(tmp_path / "ema.params") as checkpoint:
        assert checkpoint.entries["c.weight"].dtype == "float32"  # which holds every bfloat16
        np.testing.assert_array_equal(checkpoint.read("c.weight"), 2 * weight.float().numpy())


def test_a_full_disk_in_pytorchs_words(trained, tmp_path, monkeypatch):
    torch = importlib.import_module("torch")
    words = {"unexpected pos 64 vs 0 (inline_container.cc)": OSError, "a fault": RuntimeError}
    for text, kind in words.items():

        def save(*args, text=text, **options):
            raise RuntimeError(text)

        monkeypatch.setattr(torch, "save", save)
        for subcommand in ("fold", "convert"):
            args = [subcommand, trained[1], tmp_path / "out.pt", *SIZE]
            if kind is OSError:
                doconv(*args, code=TARGET, error="out.pt could not be written: the disk takes no")
            else:
                with pytest.raises(RuntimeError, match="a fault"):
                    doconv(*args)
    assert not list(tmp_path.iterdir())


def test_a_framework_that_is_missing_is_named(trained, tmp_path, monkeypatch):
    from importlib import metadata

    real = metadata.EntryPoint.load

    def load(self):
        if self.value.startswith("doconv_torch"):
            raise ImportError("doconv_torch needs torch, which is not installed.")
        return real(self)

    monkeypatch.setattr(metadata.EntryPoint, "load", load)
    doconv(
        "inspect", trained[1], code=MISSING, error="net.pt is a PyTorch file. doconv_torch needs"
    )
