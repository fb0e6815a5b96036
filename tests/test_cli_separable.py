"""The command on separable layers of Keras: two convolutions, as other frameworks have them."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from command_line import IMPOSSIBLE, doconv, save
from equal import as_array
from frameworks import imported, need

from doconv_core import difference, write_state

pytestmark = pytest.mark.usefixtures("unprobed")

FLAT = ["--flatten", "fc=no"]


def keras_network(over_parameterized, **more):
    keras, own = importlib.import_module("keras"), importlib.import_module("doconv_tf")
    layers = keras.layers
    source, prefix = (own, "DO") if over_parameterized else (layers, "")
    more = more if over_parameterized else {}

    def made(kind, *args, **options):
        return getattr(source, f"{prefix}{kind}")(*args, **options, **more)

    return keras.Sequential(
        [
            keras.Input((10, 3)),
            made("SeparableConv1D", 6, 3, depth_multiplier=2, name="a"),
            layers.ReLU(),
            made("DepthwiseConv1D", 2, depth_multiplier=2, use_bias=False, name="b"),
            layers.SeparableConv1D(4, 2, strides=2, use_bias=False, name="c"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(5, name="fc"),
        ]
    )


def torch_network(over_parameterized):
    torch, own = importlib.import_module("torch"), importlib.import_module("doconv_torch")
    nn = torch.nn
    conv = own.DOConv1d if over_parameterized else nn.Conv1d
    more = {"depth_multiplier": 4} if over_parameterized else {}

    def separable(inputs, outputs, each, size, make, stride=1, bias=True, **more):
        depthwise = make(
            inputs, inputs * each, size, stride=stride, groups=inputs, bias=False, **more
        )
        parts = {"depthwise": depthwise, "pointwise": nn.Conv1d(inputs * each, outputs, 1)}
        if not bias:
            parts["pointwise"].register_parameter("bias", None)
        block = nn.Sequential()
        for name, part in parts.items():
            block.add_module(name, part)
        return block

    model = nn.Sequential()
    for name, layer in {
        "a": separable(3, 6, 2, 3, conv, **more),
        "relu": nn.ReLU(),
        "b": conv(6, 12, 2, groups=6, bias=False, **more),
        "c": separable(12, 4, 1, 2, nn.Conv1d, stride=2, bias=False),
        "pool": nn.AdaptiveAvgPool1d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(4, 5),
    }.items():
        model.add_module(name, layer)
    return model.eval()


@pytest.fixture
def network(tmp_path):
    need("tf")
    model = keras_network(True, d_multiplier=4)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(weight + 0.3 * rng.standard_normal(weight.shape))
    model.save(tmp_path / "net.keras")
    return model


@pytest.fixture
def image():
    return np.random.default_rng(1).standard_normal((2, 10, 3)).astype(np.float32)


@pytest.mark.parametrize("fold", [False, True], ids=["over-parameterized", "folded"])
def test_to_pytorch_and_back(network, image, tmp_path, fold):
    torch = imported("torch")
    file, options = tmp_path / "net.keras", ["--fold"] if fold else []
    doconv("convert", file, tmp_path / "net.pt", *FLAT, *options)
    model = torch_network(not fold)
    model.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    with torch.no_grad():
        found = model(torch.from_numpy(image).swapaxes(1, 2)).numpy()
    expected = as_array(network(image))
    assert difference(found, expected).relative < 1e-5
    keras_network(not fold, d_multiplier=4).save(tmp_path / "like.keras")
    like = ["--like", tmp_path / "like.keras", *FLAT]
    if fold:
        doconv("convert", tmp_path / "net.pt", tmp_path / "back.keras", *like)
    else:  # of one dimension and S > M, PyTorch's files do not tell the kernel size
        doconv("convert", tmp_path / "net.pt", tmp_path / "back.keras", *like,
               "--kernel-size", "b=2", "--kernel-size", "a.depthwise=3")  # fmt: skip
    back = importlib.import_module("keras").saving.load_model(tmp_path / "back.keras")
    assert difference(as_array(back(image)), expected).relative < 1e-5
    doconv("verify", file, tmp_path / "back.keras")


def test_inspect_lists_both_parts_and_verify_compares_them(network, tmp_path):
    file, state, folded = (tmp_path / name for name in ("net.keras", "state", "folded.keras"))
    listed = json.loads(doconv("inspect", file, "--json").stdout)["layers"]
    found = {layer["path"]: layer for layer in listed}
    assert {path: layer["over_parameterized"] for path, layer in found.items()} == {
        "a.depthwise": True, "a.pointwise": False, "b": True, "c.depthwise": False,
        "c.pointwise": False, "fc": False,
    }  # fmt: skip
    assert found["a.depthwise"]["parameters_folded"] == 18
    assert found["a.depthwise"]["depthwise"]["taps"] == 3
    assert sum(layer["parameters"] for layer in listed) == network.count_params()
    export_state = importlib.import_module("doconv_tf").export_state
    write_state(export_state(network), state)
    doconv("verify", file, state, *FLAT)
    doconv("fold", file, folded)
    done = json.loads(doconv("verify", folded, file, "--json").stdout)
    roles = [f"{array['path']} {array['role']}" for array in done["arrays"]]
    assert roles[:3] == ["a.depthwise kernel", "a.pointwise weight", "a.pointwise bias"]
    assert not done["missing"]
    costs = json.loads(doconv("cost", file, "--json", "--at", "*=4").stdout)["layers"]
    macs = {layer["path"]: layer["cost"]["folded"]["macs"] for layer in costs if layer["cost"]}
    assert (macs["a.depthwise"], macs["a.pointwise"]) == (4 * 18, 4 * 36)


def test_what_seems_a_layer_of_this_package_is_folded_or_refused(tmp_path):
    arrays = {"a.weight_v": np.ones((4, 2, 3)), "a.depthwise_weight": np.ones((2, 3, 3))}
    file, out = save(tmp_path / "net.safetensors", arrays), tmp_path / "out.safetensors"
    error = r"layer 'a': named like an over-parameterized layer, but its entries make none: 'depth"
    doconv("fold", file, out, code=IMPOSSIBLE, error=error)
    doconv("convert", file, out, "--fold", code=IMPOSSIBLE, error=error)
    assert not out.exists()
    assert "but its entries make none" in doconv("inspect", file).stdout
    doconv("convert", file, out)  # which leaves it what it is
    doconv("verify", file, out)
    doconv("convert", file, out, "--fold", "--keep", "a.*", "--force")
    doconv("verify", file, out)
