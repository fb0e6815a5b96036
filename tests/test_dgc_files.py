"""Dynamic group convolutions in files: this package's, and checkpoints of their source.

Those are made here by formula, as that implementation saves them; those of the block are its own
arrays, see `test_core_dgc.py`.
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

from doconv_core import CheckpointError, describe, open_checkpoint, read_upstream, write_state
from doconv_core.kinds.dgc import inactive_channels
from doconv_core.networks.evaluate import evaluate
from doconv_core.networks.initialize import initialize
from doconv_core.state.file import State

pytestmark = pytest.mark.usefixtures("unprobed")

NETWORK = describe("cifar_dydensenet86", num_classes=5, stages=(2, 1), growth=(8, 8))
SOURCE = {
    "weight": "conv.weight", "squeeze_weight": "fc1.weight", "saliency_weight": "fc2.weight",
    "saliency_bias": "fc2.bias",
}  # fmt: skip
SAVE = {
    "torch": (".pt", lambda model, path: imported("torch").save(model.state_dict(), path)),
    "tf": (".keras", lambda model, path: model.save(path)),
    "mx": (".params", lambda model, path: model.save_parameters(str(path))),
}


def trained():
    """Return the network's state at the end of a training, in float32."""
    state, rng = initialize(NETWORK), np.random.default_rng(0)
    arrays = {name: array.astype("f4") for name, array in state.arrays.items()}
    for name, array in arrays.items():
        if name.endswith("saliency_bias"):
            array += 0.5 * rng.standard_normal(array.shape)
            dropped = inactive_channels(array.shape[1], 0.25, 1)
            arrays[name.replace("saliency_bias", "inactive")][...] = dropped
    return State(state.layers, arrays)


def as_source(state):
    """Return a state's arrays by the names of the source's implementation, in its order."""
    found = {}
    for path, form in state.layers.items():
        place = "module." + ("" if path[:2] in ("bn", "cl") else "features.")
        place += path.replace(".new", "").removesuffix(".heads")
        own = {name: state.arrays[f"{path}.{name}"] for name in form.shapes}
        if form.kind == "dynamic_heads":
            own["weight"] = own["weight"].reshape(form.spec.kernel_shape)
            before = {key: found.pop(key) for key in [*found] if key.startswith(f"{place}.norm")}
            found |= {f"{place}._inactive_channels": own["inactive"].reshape(1), **before}
            for head in range(form.spec.heads):
                for name, theirs in SOURCE.items():
                    parts = own[name].reshape(form.spec.heads, -1, *own[name].shape[1:])
                    part = parts[head] if name == "weight" else own[name][head]
                    found[f"{place}.headconv_{head}.{theirs}"] = part
            continue
        if form.kind == "convolution":
            own["weight"] = own["weight"].reshape(form.spec.kernel_shape)
        for name, array in own.items():
            name = {"gamma": "weight", "beta": "bias"}.get(name, name)
            found[f"{place}.{name}"] = array
        if form.kind == "batch_norm":
            found[f"{place}.num_batches_tracked"] = np.array(0)
    return found


def checkpoint(path, arrays):
    """Write a checkpoint as the source's training does."""
    torch = imported("torch")
    state_dict = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    moments = {"momentum_buffer": torch.ones(3, 3)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    content = {"epoch": 119, "state_dict": state_dict, "best_prec1": 76.9, "optimizer": optimizer}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "checkpoint_119.pth.tar"
    return checkpoint(path, as_source(trained()))


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


def test_a_network_of_the_same_options_loads_them(adapter, source, tmp_path):
    package, state = adapter.package, trained()
    found = read_upstream(source)
    assert found.carried == tuple(
        f"features.denseblock_{block}.denselayer_{layer}.conv_1.heads"
        for block, layer in ((1, 1), (1, 2), (2, 1))
    )
    model = adapter.described(NETWORK)
    package.load_state(model, found.state, match="order")
    assert_same(snapshot(package, model).arrays, state.arrays)
    x = np.random.default_rng(1).standard_normal((2, 3, 32, 32)).astype("f4")
    assert_close(adapter.forward(model, x), evaluate(NETWORK, state, x))

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


def test_a_block_of_the_source_computes_the_same(adapter):
    arrays = {}
    for stage in ("init", "after"):
        place = f"block/{stage}/"
        arrays |= {k.removeprefix(place): VECTORS[k] for k in VECTORS if k.startswith(place)}
    state = read_upstream(arrays, gate_factor=0.45).state
    model = adapter.described(network_of("block")[0])
    adapter.package.load_state(model, state, match="order")
    found = adapter.forward(model, VECTORS["block/x"].astype("f4"))
    assert_close(found, VECTORS["block/eval/out"])


def test_the_command_tells_and_converts_them_by_names(source, tmp_path):
    told = json.loads(doconv("inspect", source, "--json").stdout)
    kinds = [layer["kind"] for layer in told["layers"]]
    assert kinds.count("dynamic heads") == 3
    heads = told["layers"][2]
    assert (heads["path"], heads["origin"]) == (
        "features.denseblock_1.denselayer_1.conv_1.heads", "reference PyTorch",
    )  # fmt: skip
    assert heads["kernel_shape"] == [32, 16, 1, 1]
    assert told["parameters"] == sum(
        np.prod(shape, dtype=int)
        for form in trained().layers.values()
        for name, shape in form.shapes.items()
        if not name.startswith(("running", "inactive"))
    )
    out = tmp_path / "ours.params"
    doconv("convert", source, out)
    doconv("convert", out, tmp_path / "back.safetensors")
    doconv("verify", source, tmp_path / "back.safetensors")
    doconv("fold", source, tmp_path / "folded.pt")  # in which nothing is to be folded
    doconv("verify", source, tmp_path / "folded.pt")
    with open_checkpoint(out) as ours:  # in which no array has no axis
        assert ours.entries[f"{heads['path']}.inactive"].shape == (1,)


FIRST = "module.features.denseblock_1.denselayer_1.conv_1."


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"headconv_2.fc1.weight": None}, "make none: 4 of conv.weight (8, 16, 1, 1), 3 of fc1.we"),
        ({"headconv_3.conv.weight": (4, 16, 1, 1)}, "(8, 16, 1, 1) and (4, 16, 1, 1), 4 of fc1.we"),
        ({"headconv_0.fc2.bias": ()}, "4 of fc2.bias () and (16,)"),
        ({"_inactive_channels": None}, "4 of fc2.bias (16,)."),
        ({"_inactive_channels": (2,)}, "1 of _inactive_channels (2,)."),
    ],
)
def test_what_makes_no_heads_is_told(changed, message, tmp_path):
    arrays = as_source(trained())
    for name, shape in changed.items():
        arrays.pop(FIRST + name) if shape is None else arrays.update({FIRST + name: np.ones(shape)})
    path, error = checkpoint(tmp_path / "bad.pth.tar", arrays), re.escape(message)
    with pytest.raises(CheckpointError, match=error) as caught:
        read_upstream(path)
    assert "denselayer_1.conv_1.heads': named like the heads of a dyn" in only_line(caught)
    doconv("convert", path, tmp_path / "o.params", code=BAD_FILE, error=error)
    assert message.rstrip(".") in doconv("inspect", path).stdout
    doconv("convert", path, tmp_path / "o.params", "--drop", f"*{FIRST}headc*", "--drop", "*_ina*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"squeeze_rate": 8}, "squeezes 16 channels into 2 features, but squeeze_rate=8 into 4; g"),
        ({"gate_factor": 0.5}, r"drops 12 of 16 channels, but gate_factor=0.5 at most 8; give the"),
        ({"gate_factor": 0}, "heads': gate_factor, the share of channels to keep, must be above 0"),
    ],
)
def test_options_that_are_not_the_files_are_refused(source, options, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_upstream(source, **options)
    assert str(source) in only_line(caught)
