"""Dynamic group convolutions in files: this package's, and checkpoints of their source.

Those are made by formula, as that implementation saves them; the block's are its own arrays.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from checkpoint_files import only_line
from command_line import BAD_FILE, doconv
from contract import snapshot
from equal import assert_close, assert_same
from frameworks import BACKENDS, adapter_of, imported
from test_core_dgc import VECTORS, network_of

from doconv_core import (
    CheckpointError,
    count,
    describe,
    open_checkpoint,
    read_upstream,
    write_state,
)
from doconv_core.networks.evaluate import evaluate
from doconv_core.state.file import State

pytestmark = pytest.mark.usefixtures("unprobed")

SIZES = {"num_classes": 5, "stages": (2, 1), "growth": (8, 8)}
NETWORK = describe("cifar_dydensenet86", **SIZES)
FIRST = "features.denseblock_1.denselayer_1.conv_1"
SAVE = {
    "torch": (".pt", lambda model, path: imported("torch").save(model.state_dict(), path)),
    "tf": (".keras", lambda model, path: model.save(path)),
    "mx": (".params", lambda model, path: model.save_parameters(str(path))),
}


def state_dict():
    """Return what the source's implementation has of NETWORK at the end of a training."""
    rng, found = np.random.default_rng(0), {}

    def put(name, *shape, base=0.0):
        array = base + rng.standard_normal(shape) * (0.5 if base else np.prod(shape[1:]) ** -0.5)
        found[f"module.{name}"] = array.astype("f4")

    def norm(name, channels):
        put(f"{name}.weight", channels, base=2)
        put(f"{name}.bias", channels, base=0.1)
        put(f"{name}.running_mean", channels, base=0.1)
        found[f"module.{name}.running_var"] = np.linspace(1, 2, channels, dtype="f4")
        found[f"module.{name}.num_batches_tracked"] = np.array(0)

    put("features.init_conv.weight", 16, 3, 3, 3)
    for n, (block, layer) in enumerate(((1, 1), (1, 2), (2, 1))):
        path, channels = f"features.denseblock_{block}.denselayer_{layer}", 16 + 8 * n
        found[f"module.{path}.conv_1._inactive_channels"] = np.array([0.75 * channels], "f4")
        norm(f"{path}.conv_1.norm", channels)
        for head in (f"{path}.conv_1.headconv_{i}" for i in range(4)):
            put(f"{head}.conv.weight", 8, channels, 1, 1)
            put(f"{head}.fc1.weight", channels // 8, channels)
            put(f"{head}.fc2.weight", channels, channels // 8)
            put(f"{head}.fc2.bias", channels, base=1)
        norm(f"{path}.conv_2.norm", 32)
        put(f"{path}.conv_2.conv.weight", 8, 8, 3, 3)
    norm("bn_last", 40)
    put("classifier.weight", 5, 40)
    put("classifier.bias", 5, base=0.1)
    return found


def checkpoint(path, arrays):
    """Write a checkpoint as the source's training does."""
    torch = imported("torch")
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3, 3)}}, "param_groups": [{"lr": 0.1}]}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    content = {"epoch": 119, "state_dict": tensors, "best_prec1": 76.9, "optimizer": optimizer}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("source") / "checkpoint_119.pth.tar", state_dict())


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


def test_a_network_of_the_same_options_loads_them(adapter, source, tmp_path):
    package, found = adapter.package, read_upstream(source)
    assert found.carried[0] == f"{FIRST}.heads"
    model = adapter.described(NETWORK)
    package.load_state(model, found.state, match="order")
    state = snapshot(package, model)
    renamed = dict(zip(found.state.layers, state.layers, strict=True))
    for name, array in found.state.arrays.items():
        path, _, own = name.rpartition(".")
        assert_same(state.arrays[f"{renamed[path]}.{own}"], array)
    x = np.random.default_rng(1).standard_normal((2, 3, 32, 32)).astype("f4")
    assert_close(adapter.forward(model, x), evaluate(NETWORK, State(state.layers, state.arrays), x))

    # The command fills a file of a fresh network, and a state's.
    suffix, save = SAVE[package.__name__.removeprefix("doconv_")]
    fresh = adapter.described(NETWORK)
    save(fresh, tmp_path / f"fresh{suffix}")
    save(model, tmp_path / f"loaded{suffix}")
    write_state(snapshot(package, fresh), tmp_path / "fresh.safetensors")
    for ending in (suffix, ".safetensors"):
        out, like = tmp_path / f"out{ending}", tmp_path / f"fresh{ending}"
        doconv("convert", source, out, "--like", like, "--match", "order")
        doconv("verify", source, out, "--match", "order")
    doconv("verify", tmp_path / f"out{suffix}", tmp_path / f"loaded{suffix}")
    done = doconv("fold", tmp_path / f"out{suffix}", tmp_path / f"folded{suffix}")
    why = "of a DGConv2D, which chooses its channels for each image; fold the model in Python"
    assert (why in done.stdout) == (suffix == ".keras")
    doconv("verify", tmp_path / f"folded{suffix}", tmp_path / f"loaded{suffix}")


def test_a_block_of_the_source_computes_the_same(adapter):
    arrays = {}
    for place in ("block/init/", "block/after/"):
        arrays |= {k.removeprefix(place): VECTORS[k] for k in VECTORS if k.startswith(place)}
    model = adapter.described(network_of("block")[0])
    state = read_upstream(arrays, gate_factor=0.45).state
    adapter.package.load_state(model, state, match="order")
    found = adapter.forward(model, VECTORS["block/x"].astype("f4"))
    assert_close(found, VECTORS["block/eval/out"])


def test_the_command_tells_and_converts_them_by_names(source, tmp_path):
    told = json.loads(doconv("inspect", source, "--json").stdout)
    heads = told["layers"][2]
    assert (heads["path"], heads["kind"]) == (f"{FIRST}.heads", "dynamic heads")
    assert (heads["origin"], heads["kernel_shape"]) == ("reference PyTorch", [32, 16, 1, 1])
    assert told["parameters"] == count("cifar_dydensenet86", **SIZES).parameters
    doconv("convert", source, tmp_path / "ours.params")
    with open_checkpoint(tmp_path / "ours.params") as ours:  # in which no array has no axis
        assert ours.entries[f"{FIRST}.heads.inactive"].shape == (1,)
    doconv("convert", tmp_path / "ours.params", tmp_path / "back.safetensors")
    doconv("fold", source, tmp_path / "folded.pt")  # in which nothing is to be folded
    for other in ("back.safetensors", "folded.pt"):
        doconv("verify", source, tmp_path / other)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("headconv_2.fc1.weight", None, "make none: 4 of conv.weight (8, 16, 1, 1), 3 of fc1.weig"),
        ("headconv_3.conv.weight", (4, 16, 1, 1), "weight (8, 16, 1, 1) and (4, 16, 1, 1), 4 of f"),
        ("headconv_0.fc2.bias", (), "4 of fc2.bias () and (16,)"),
        ("_inactive_channels", None, "4 of fc2.bias (16,)"),
        ("_inactive_channels", (2,), "1 of _inactive_channels (2,)"),
    ],
)
def test_what_makes_no_heads_is_told(name, shape, message, tmp_path):
    arrays, name = state_dict(), f"module.{FIRST}.{name}"
    arrays[name] = np.ones(shape or ())
    if shape is None:
        del arrays[name]
    path, error = checkpoint(tmp_path / "bad.pth.tar", arrays), re.escape(message)
    with pytest.raises(CheckpointError, match=error) as caught:
        read_upstream(path)
    assert f"'{FIRST}.heads': named like the heads of a dynamic group" in only_line(caught)
    assert message in doconv("inspect", path).stdout
    doconv("convert", path, tmp_path / "o.params", code=BAD_FILE, error=error)
    entries = [f"*{each}" for each in arrays if f"{FIRST}.headconv" in each or "_inact" in each]
    doconv("convert", path, tmp_path / "o.params", *(f"--drop={each}" for each in entries))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("_inactive_channels", -3.0, "heads' drops -3 of 16 channels"),
        ("_inactive_channels", 12.5, "heads' drops 12.5 of 16 channels"),
        ("_inactive_channels", np.nan, "heads' drops nan of 16 channels"),
        ("norm.weight", np.ones(15), r"norm' has 'weight' of shape \(15,\); expected \(16,\)"),
    ],
)
def test_values_and_sizes_that_cannot_be_are_told(name, array, message, tmp_path):
    arrays = {**state_dict(), f"module.{FIRST}.{name}": np.asarray(array)}
    path = checkpoint(tmp_path / "bad.pth.tar", arrays)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_upstream(path)
    assert str(path) in only_line(caught)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"squeeze_rate": 8}, "squeezes 16 channels into 2 features, but squeeze_rate=8 into 4; g"),
        ({"gate_factor": 0.5}, "drops 12 of 16 channels, but gate_factor=0.5 at most 8; give the"),
        ({"gate_factor": 0}, "heads': gate_factor, the share of channels to keep, must be above 0"),
    ],
)
def test_options_that_are_not_the_files_are_refused(source, options, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_upstream(source, **options)
    assert str(source) in only_line(caught)
