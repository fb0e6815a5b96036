"""What `doconv convert` compares and lists of activations, norms and transposed convolutions."""

from __future__ import annotations

import importlib
import json
from itertools import product

import numpy as np
import pytest
from command_line import IMPOSSIBLE, doconv, save
from frameworks import need

from doconv_core import ConvSpec, LayerForm, State, difference, read_state, write_state
from doconv_core.cli.metadata import _moves
from doconv_core.maths.geometry import Geometry
from doconv_core.state.layers import GroupNormSpec, LayerNormSpec, TransposedConvSpec


@pytest.fixture
def keras():
    need("tf")
    return importlib.import_module("keras")


def write(path, **layers):
    """Write a state of these layers, all of ones."""
    forms = {name: LayerForm(spec, **options) for name, (spec, options) in layers.items()}
    arrays = {
        f"{name}.{role}": np.ones(shape, "float32")
        for name, form in forms.items()
        for role, shape in form.shapes.items()
    }
    write_state(State(forms, arrays), path)
    return path


def convert(folder, source, like, *options, **checks):
    out = folder / f"out{like.suffix}"
    return doconv("convert", source, out, "--force", "--like", like, *options, **checks)


def required(folder, source, like):
    found = json.loads(convert(folder, source, like, "--json").stdout)["required"]
    return [(each["network"], each["what"], *each["layers"]) for each in found]


def mirrored(x):
    return -x


def sequential(keras, path, *layers, shape=(8, 8, 3)):
    keras.Sequential([keras.Input(shape), *layers]).save(path)
    return path


def test_activations_are_listed_where_they_differ(keras, tmp_path):
    layers = keras.layers

    def network(name, first, second, third):
        return sequential(
            keras,
            tmp_path / name,
            layers.Conv2D(4, 3, activation=first, name="a"),
            layers.SeparableConv2D(4, 3, activation=second, name="b"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activation=third, name="fc"),
        )

    like = network("like.keras", "relu", None, "softmax")
    file = network("in.keras", "relu", "relu", mirrored)
    assert required(tmp_path, file, like) == [
        ("OUT", "activation relu", "b.pointwise"),
        ("OUT", "activation mirrored", "fc"),
        ("IN", "activation softmax", "fc"),
    ]
    assert required(tmp_path, like, like) == []
    text = doconv("convert", file, tmp_path / "out.params").stdout
    assert "out.params must have activation relu: a, b.pointwise\n" in text
    assert "out.params must have activation mirrored: fc\n" in text
    own = network("own.keras", layers.LeakyReLU(0.3), None, None)
    assert ("OUT", "activation LeakyReLU", "a") in required(tmp_path, own, like)


def test_norms_of_other_groups_are_refused(keras, tmp_path):
    layers = keras.layers
    four = write(tmp_path / "4.safetensors", norm=(GroupNormSpec(8, 4, 1e-3), {}))
    two = write(tmp_path / "2.safetensors", norm=(GroupNormSpec(8, 2, 1e-3), {}))
    one = write(tmp_path / "1.safetensors", norm=(LayerNormSpec(8, 1e-3), {}))
    error = "'norm' is a group norm of 4 groups in .*4.safetensors, a group norm of 2 groups in"
    convert(tmp_path, four, two, code=IMPOSSIBLE, error=error)
    error = "'norm' is a group norm of 2 groups in .*2.safetensors, a layer norm in"
    convert(tmp_path, two, one, code=IMPOSSIBLE, error=error)
    shape = (4, 4, 8)
    norms = {
        4: layers.GroupNormalization(4, name="norm"),
        8: layers.GroupNormalization(-1, name="norm"),
        0: layers.LayerNormalization(name="norm"),
    }
    files = {
        n: sequential(keras, tmp_path / f"{n}.keras", layer, shape=shape)
        for n, layer in norms.items()
    }
    assert required(tmp_path, four, files[4]) == required(tmp_path, one, files[0]) == []
    error = "group norm of 4 groups in .*4.safetensors, a group norm of 8 groups in .*8.keras"
    convert(tmp_path, four, files[8], code=IMPOSSIBLE, error=error)
    convert(tmp_path, four, files[0], code=IMPOSSIBLE, error="4 groups in .*, a layer norm in")
    text = doconv("convert", files[4], tmp_path / "out.params").stdout
    assert "out.params must have 4 groups: norm\n" in text
    text = doconv("convert", files[0], tmp_path / "out.params", "--force").stdout
    assert text.count("must have") == 1  # the epsilon


def test_convolutions_of_other_groups_are_refused(tmp_path):
    two = write(tmp_path / "2.safetensors", conv=(ConvSpec(8, 4, (3, 3), 2), {}))
    one = write(tmp_path / "1.safetensors", conv=(ConvSpec(4, 4, (3, 3)), {}))
    error = r"'conv' in .*, convolution \(4, 4, 3, 3\) in 2 groups with weight, bias, is another"
    convert(tmp_path, two, one, code=IMPOSSIBLE, error=error)


# Without what TensorFlow cannot compute, an even size with nothing added to "same".
SIZES = [
    case
    for case in product(("valid", "same"), (3, 4, 5), (1, 2, 3), (None, 0, 1))
    if case[:2] != ("same", 4) or case[3] != 0
]


def test_what_keras_takes_from_a_transposed_convolutions_output(keras, tmp_path):
    """What is listed of it makes PyTorch's layer compute the same."""
    need("torch")
    torch = importlib.import_module("torch")
    rng, compared = np.random.default_rng(0), 0
    for padding, size, stride, more in SIZES:
        if more is not None and more >= stride:
            continue
        options = {"strides": stride, "padding": padding, "output_padding": more}
        layer = keras.layers.Conv1DTranspose(2, size, use_bias=False, name="up", **options)
        file = sequential(keras, tmp_path / "in.keras", layer, shape=(5, 3))
        args = ["convert", file, tmp_path / "out.pt", "--force", "--json"]
        found = json.loads(doconv(*args).stdout)["required"]
        words = found[0]["what"].split(", ") if found else []
        told = dict(word.rsplit(" ", 1) for word in words)
        if "+" in told.get("padding", ""):
            continue  # of which PyTorch has no such layer
        numbers = {"stride": 1, "padding": 0, "output padding": 0}
        numbers |= {name: int(text) for name, text in told.items()}
        if numbers["output padding"] >= stride:
            continue  # which PyTorch refuses
        pads = numbers["padding"], numbers["output padding"]
        ours = torch.nn.ConvTranspose1d(3, 2, size, numbers["stride"], *pads, bias=False)
        ours.load_state_dict(
            {key.removeprefix("up."): value for key, value in
             torch.load(tmp_path / "out.pt", weights_only=True).items()}
        )  # fmt: skip
        x = rng.standard_normal((1, 5, 3)).astype("float32")
        result = ours(torch.from_numpy(x).transpose(1, 2)).detach().transpose(1, 2).numpy()
        assert difference(result, keras.ops.convert_to_numpy(layer(x))).relative < 1e-5
        compared += 1
    assert compared > 15


def test_transposed_convolutions_are_compared(keras, tmp_path):
    layer = keras.layers.Conv2DTranspose(2, 4, strides=2, padding="same", name="up")
    file = sequential(keras, tmp_path / "in.keras", layer)
    form = TransposedConvSpec(3, 2, (4, 4))

    def state(*pad):
        moves = Geometry((2, 2), (1, 1), (pad, pad))
        return write(tmp_path / "like.safetensors", up=(form, {"geometry": moves}))

    assert required(tmp_path, file, state(1, 1)) == []
    error = r"padding is \(\(1, 1\), \(1, 1\)\) in .*in.keras, \(\(1, 0\), \(1, 0\)\) in .*like"
    convert(tmp_path, file, state(1, 0), code=IMPOSSIBLE, error=error)


def test_the_words_for_transposed_convolutions():
    def words(*pads):
        return _moves(Geometry((1,) * len(pads), (1,) * len(pads), pads), True)

    assert words((1, 0), (0, -1)) == "padding 1x0, output padding 1x1"
    assert words((1, 1)) == "padding 1"
    assert words((0, 1)) == "padding 0+1"
    assert words((1, 1), "same") == "padding 1xsame"


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_a_state_has_the_types_of_its_template(tmp_path, dtype):
    spec = ConvSpec(3, 4, (3, 3))
    form = LayerForm(spec, bias=False)
    rng = np.random.default_rng(0)

    def state(name, kind):
        weight = rng.standard_normal(form.shapes["weight"]).astype(kind)
        write_state(State({"conv": form}, {"conv.weight": weight}), tmp_path / name)
        return weight

    def fill(source, like, **checks):
        args = [tmp_path / source, tmp_path / "out.safetensors", "--force", "--like"]
        doconv("convert", *args, tmp_path / like, **checks)
        return checks or read_state(tmp_path / "out.safetensors").arrays["conv.weight"]

    narrow, wide = ("float16", "float32") if dtype == "float16" else ("float32", "float64")
    small, large = state("small.safetensors", narrow), state("large.safetensors", wide)
    found = fill("small.safetensors", "large.safetensors")
    np.testing.assert_array_equal(found, small.astype(wide), strict=True)
    error = f"'conv.weight' is {wide}, and would lose digits as {narrow}, which .*small"
    fill("large.safetensors", "small.safetensors", code=IMPOSSIBLE, error=error)
    # The same of a file of PyTorch's names, whose kernels are those of ordinary layers.
    save(tmp_path / "small.torch", {"conv.weight": small.reshape(spec.kernel_shape)})
    np.testing.assert_array_equal(fill("small.torch", "large.safetensors"), found, strict=True)
    save(tmp_path / "large.torch", {"conv.weight": large.reshape(spec.kernel_shape)})
    fill("large.torch", "small.safetensors", code=IMPOSSIBLE, error=error)
