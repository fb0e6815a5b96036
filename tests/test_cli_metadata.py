"""What `doconv convert` knows of layers beyond arrays: compared, kept, or listed."""

from __future__ import annotations

import dataclasses
import json
from itertools import product

import numpy as np
import pytest
from command_line import DIFFERENT, IMPOSSIBLE, doconv, save, state_dict
from frameworks import imported

from doconv_core import ConvSpec, LayerForm, State, difference, read_state, write_state
from doconv_core.cli.pairing import _moves
from doconv_core.files.checkpoint import open_checkpoint
from doconv_core.files.gluon import write_params
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.state.layers import (
    BatchNormSpec,
    GroupNormSpec,
    LayerNormSpec,
    LinearSpec,
    TransposedConvSpec,
)

pytestmark = pytest.mark.usefixtures("unprobed")


def write(path, origin=(), /, **layers):
    """Write a state of these layers, of random numbers."""
    rng = np.random.default_rng(0)
    forms = {name: LayerForm(spec, **options) for name, (spec, options) in layers.items()}
    arrays = {
        f"{name}.{role}": rng.random(shape).astype("float32")
        for name, form in forms.items()
        for role, shape in form.shapes.items()
    }
    write_state(State(forms, arrays, dict(origin)), path)
    return path


def convert(folder, source, like, *options, **checks):
    out = folder / f"out{like.suffix}"
    return doconv("convert", source, out, "--force", "--like", like, *options, **checks)


def required(folder, source, like):
    found = json.loads(convert(folder, source, like, "--json").stdout)["required"]
    return [(each["network"], each["what"], *each["layers"]) for each in found]


ORIGIN = {"framework": "torch", "version": "2.6"}


def state(path, *, stride=2, padding=1, epsilon=1e-5, momentum=0.1, geometry=True, origin=ORIGIN):
    """Write a state of a convolution and a batch norm, and return it."""
    moves = Geometry((stride,) * 2, (1, 1), symmetric((padding,) * 2)) if geometry else None
    conv, norm = ConvSpec(3, 4, (3, 3)), BatchNormSpec(4, epsilon, momentum)
    write(path, origin, conv=(conv, {"geometry": moves}), bn=(norm, {}))
    return read_state(path)


def like(folder, *options, **checks):
    files = folder / "in.safetensors", folder / "like.safetensors"
    return convert(folder, *files, *options, **checks)


@pytest.mark.parametrize("match", ["name", "order"])
def test_a_state_keeps_what_it_tells(tmp_path, match):
    found = state(tmp_path / "in.safetensors")
    state(tmp_path / "like.safetensors", momentum=0.5, geometry=False, origin={})
    like(tmp_path, "--match", match)
    made = read_state(tmp_path / "out.safetensors")
    assert made.layers == found.layers
    assert made.origin == ORIGIN
    for name, array in found.arrays.items():
        np.testing.assert_array_equal(made.arrays[name], array, err_msg=name, strict=True)


def test_states_that_compute_otherwise_are_refused(tmp_path):
    state(tmp_path / "in.safetensors")
    state(tmp_path / "like.safetensors", epsilon=1e-3)
    error = "layer 'bn' adds epsilon=1e-05 to the variance in .*in.safetensors, 0.001 in .*like"
    like(tmp_path, code=IMPOSSIBLE, error=error)
    like(tmp_path, "--ignore", "geometry", code=IMPOSSIBLE, error=error)
    state(tmp_path / "like.safetensors", stride=1)
    error = (
        r"layer 'conv' would compute something else .*stride is \(2, 2\) in .*\(1, 1\) in .*--ig"
    )
    like(tmp_path, code=IMPOSSIBLE, error=error)
    assert not (tmp_path / "out.safetensors").exists()
    like(tmp_path, "--ignore", "geometry")
    made = read_state(tmp_path / "out.safetensors")
    assert made.layers["conv"].geometry.stride == (1, 1)


def keras_network(folder, *, strides=2, padding="valid", pad=1, epsilon=1e-5):
    keras = imported("tf")
    layers = keras.layers
    pads = [layers.ZeroPadding2D(pad)] if pad else []
    norm = layers.BatchNormalization(name="bn", epsilon=epsilon)
    conv = layers.Conv2D(4, 3, strides=strides, padding=padding, name="conv")
    model = keras.Sequential([keras.Input((8, 8, 3)), *pads, conv, norm])
    model.save(folder / "like.keras")


def to_keras(folder, *options, **checks):
    return convert(folder, folder / "in.safetensors", folder / "like.keras", *options, **checks)


def test_a_state_and_a_keras_file_must_agree(tmp_path):
    state(tmp_path / "in.safetensors")
    keras_network(tmp_path, padding="same", pad=0)
    error = r"padding is \(\(1, 1\), \(1, 1\)\) in .*in.safetensors, \('same', 'same'\) in .*keras"
    to_keras(tmp_path, code=IMPOSSIBLE, error=error)
    to_keras(tmp_path, "--ignore", "geometry")
    keras_network(tmp_path, strides=1)
    to_keras(tmp_path, code=IMPOSSIBLE, error=r"stride is \(2, 2\) in .*, \(1, 1\) in")
    keras_network(tmp_path, epsilon=1e-3)
    to_keras(tmp_path, code=IMPOSSIBLE, error="layer 'bn' adds epsilon=1e-05 to the variance in")
    # A layer before it pads, which is seen, but not by how much.
    keras_network(tmp_path)
    text = to_keras(tmp_path).stdout
    assert "out.keras must have stride 2x2, padding 1x1: conv\n" in text
    assert "epsilon" not in text
    state(tmp_path / "in.safetensors", stride=1)
    keras_network(tmp_path, strides=1, padding="same", pad=0)
    assert "must have" not in to_keras(tmp_path).stdout


def test_what_one_file_alone_tells_is_listed(tmp_path):
    state(tmp_path / "in.safetensors", epsilon=1e-3)
    text = doconv("convert", tmp_path / "in.safetensors", tmp_path / "o.params").stdout
    assert "o.params must have epsilon 0.001: bn\n" in text
    assert "o.params must have stride 2x2, padding 1x1: conv\n" in text
    state(tmp_path / "like.safetensors")
    args = [tmp_path / "o.params", tmp_path / "o.safetensors", "--like"]
    done = doconv("convert", *args, tmp_path / "like.safetensors", "--json")
    assert json.loads(done.stdout)["required"] == [
        {"network": "IN", "what": "stride 2x2, padding 1x1", "layers": ["conv"]},
        {"network": "IN", "what": "epsilon 1e-05", "layers": ["bn"]},
    ]
    keras_network(tmp_path, pad=0, strides=1, epsilon=1e-3)
    text = doconv("convert", tmp_path / "like.keras", tmp_path / "k.params").stdout
    assert "k.params must have epsilon 0.001: bn\n" in text
    assert text.count("must have") == 1


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("suffix", ["safetensors", "params"])
def test_types_that_a_format_lacks(tmp_path, dtype, suffix):
    torch = imported("torch")
    odd = torch.zeros(3).to(getattr(torch, dtype))
    torch.save({"fc.weight": torch.ones(2, 2), "odd": odd}, tmp_path / "in.pt")
    out = tmp_path / f"out.{suffix}"
    error = f"the entry 'odd' is {dtype}, which is not written to .* files; --drop 'odd' leaves"
    doconv("convert", tmp_path / "in.pt", out, "--keep", "*", code=IMPOSSIBLE, error=error)
    assert not out.exists()
    doconv("convert", tmp_path / "in.pt", out, "--drop", "odd")
    with open_checkpoint(out) as file:
        assert [*file.entries] == ["fc.weight"]


def test_a_gluon_file_has_the_types_of_its_template(tmp_path):
    half = np.full((2, 2), 1.5, "float16")
    write_params(tmp_path / "in.params", {"fc.weight": half})
    write_params(tmp_path / "like.params", {"fc.weight": half.astype("float32")})
    args = [tmp_path / "in.params", tmp_path / "out.params", "--like", tmp_path / "like.params"]
    done = doconv("convert", *args, "--json")
    assert json.loads(done.stdout)["entries"][0]["dtype"] == "float32"
    with open_checkpoint(tmp_path / "out.params") as file:
        np.testing.assert_array_equal(file.read("fc.weight"), half.astype("float32"), strict=True)


def test_verify_by_order_tells_where_the_layers_differ(tmp_path):
    layers = {"a.weight": np.eye(2), "b.weight": np.eye(3)}
    write_params(tmp_path / "a.params", layers)
    write_params(tmp_path / "b.params", {"a.weight": np.eye(2), "c.weight": np.eye(4)})
    args = ["verify", tmp_path / "a.params", tmp_path / "b.params", "--match", "order"]
    found = json.loads(doconv(*args, "--json", code=DIFFERENT).stdout)
    assert not found["equal"]
    assert [each["path"] for each in found["arrays"]] == ["a"]
    assert found["missing"][0].startswith("layer 2 of 2 differs: b, linear 3x3 in ")
    assert "no more layers were compared" in doconv(*args, code=DIFFERENT).stdout
    save(tmp_path / "s.safetensors", layers)
    error = "s.safetensors has its layers in the order of their names, not of the model"
    args[2] = tmp_path / "s.safetensors"
    doconv(*args, code=IMPOSSIBLE, error=error)


def test_totals_count_one_copy_of_a_model(tmp_path):
    torch = imported("torch")
    arrays = {n: torch.from_numpy(np.array(a)) for n, a in state_dict().items() if "block" not in n}
    torch.save(arrays, tmp_path / "one.pt")
    torch.save({"model": arrays, "model_ema": dict(arrays)}, tmp_path / "two.pt")
    one, two = (
        json.loads(doconv("inspect", tmp_path / name, "--json").stdout)
        for name in ("one.pt", "two.pt")
    )
    assert len(two["layers"]) == 2 * len(one["layers"])
    for name in ("parameters", "parameters_folded"):
        assert two[name] == one[name]


def test_a_kernel_that_is_the_same_in_both_layouts_is_not_refused(tmp_path):
    kernel = np.arange(512.0).reshape(8, 1, 1, 64)
    write_params(tmp_path / "m.params", {"c.weight": kernel})
    doconv("convert", tmp_path / "m.params", tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as file:
        np.testing.assert_array_equal(file.read("c.weight"), kernel)


def test_the_model_itself_is_named(tmp_path):
    form = LayerForm(LinearSpec(4, 2), flattening="own")
    arrays = {"weight": np.zeros((2, 4), "float32"), "bias": np.zeros(2, "float32")}
    write_state(State({"": form}, arrays), tmp_path / "in.safetensors")
    error = "in which order the inputs of the model itself are"
    args = ["convert", tmp_path / "in.safetensors", tmp_path / "m.params"]
    doconv(*args, code=IMPOSSIBLE, error=error)
    write_state(
        State({"": dataclasses.replace(form, flattening=None)}, arrays), tmp_path / "in.safetensors"
    )
    doconv(*args)


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
    torch = imported("torch")
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
