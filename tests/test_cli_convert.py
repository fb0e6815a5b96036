"""`doconv convert` between files, by names and shapes alone: no framework is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import IMPOSSIBLE, KERNEL_SIZE, TARGET, USAGE, doconv, save, state_dict
from safetensors.numpy import load_file

from doconv_core import ConvSpec, LayerForm, State, compose, read_state, write_state
from doconv_core.files.checkpoint import open_checkpoint
from doconv_core.files.gluon import write_params
from doconv_core.state.layers import (
    BatchNormSpec,
    EmbeddingSpec,
    LayerNormSpec,
    LinearSpec,
    PReLUSpec,
    TransposedConvSpec,
)

GLUON = {"bn1.weight": "bn1.gamma", "bn1.bias": "bn1.beta"}


def read(path):
    """Return a file's arrays by the names that it has."""
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.entries}


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model.safetensors", state_dict())


def test_to_gluon_and_back_no_bit_changes(model, tmp_path):
    doconv("convert", model, tmp_path / "model.params")
    arrays = state_dict()
    found = read(tmp_path / "model.params")
    del arrays["bn1.num_batches_tracked"]  # which Gluon does not keep
    assert found.keys() == {GLUON.get(name, name) for name in arrays}
    doconv("convert", tmp_path / "model.params", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        for other in (found[GLUON.get(name, name)], back[name]):
            np.testing.assert_array_equal(other, array, err_msg=name, strict=True)
    doconv("verify", model, tmp_path / "model.params", *KERNEL_SIZE)


# Runs commands, and prints how often each has opened a file, in openings by `open_checkpoint`, and
# which arrays it has read.
COUNTING = """
import json, sys
from collections import Counter
from doconv_core.cli import doconv
from doconv_core.files.checkpoint import open_checkpoint

opened, read, found = Counter(), [], []
sys.addaudithook(lambda name, args: name == "open" and opened.update([str(args[0])]))
for files, command in json.loads(sys.argv[1]):
    once = {}
    for file in files:
        opened.clear()
        with open_checkpoint(file) as checkpoint:
            once[file], kind = opened[file], type(checkpoint)
        if "counted" not in kind.__dict__:
            def read_stored(self, name, own=kind.read_stored):
                read.append([str(self.path), name])
                return own(self, name)
            kind.counted, kind.read_stored = True, read_stored
    opened.clear(), read.clear()
    doconv.main([*command, "--json"], standalone_mode=False)
    found.append([[opened[file] / once[file] for file in files], list(read)])
print("found:", json.dumps(found))
"""


def test_each_file_is_opened_once_and_each_array_read_once(tmp_path):
    arrays = {name: array for name, array in state_dict().items() if "block.1" not in name}
    commands = []
    for kind in ("safetensors", "params", "state"):
        pair = [str(tmp_path / f"{name}.{kind}") for name in ("in", "like")]
        for file in pair:
            if kind == "state":
                write_state(state(), file)
            elif kind == "params":
                write_params(Path(file), {n: a for n, a in arrays.items() if a.ndim})
            else:
                save(file, arrays)
        target = str(tmp_path / f"out.{kind}")
        commands += [
            (pair, ["convert", pair[0], target, "--like", pair[1]]),
            (pair, ["convert", pair[0], str(tmp_path / f"{kind}.params")]),
            (pair, ["convert", pair[0], str(tmp_path / f"{kind}.folded.params"), "--fold"]),
            (pair, ["verify", *pair]),
        ]
    process = [sys.executable, "-c", COUNTING, json.dumps(commands)]
    done = subprocess.run(process, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.rpartition("found:")[2])
    for (pair, command), (opened, read) in zip(commands, found, strict=True):
        assert opened == [1, 1 if pair[1] in command else 0], command
        assert len(read) == len({*map(tuple, read)}), command
        with open_checkpoint(pair[0]) as file:
            expected = {(pair[0], name) for name in file.entries if "num_batches" not in name}
        if command[0] == "verify":
            expected |= {(pair[1], name) for _, name in expected}
        assert {(file, name) for file, name in read if "num_batches" not in name} == expected


def test_fold_on_the_way(model, tmp_path):
    doconv("convert", model, tmp_path / "a.params", "--fold", *KERNEL_SIZE)
    doconv("fold", model, tmp_path / "folded.safetensors", *KERNEL_SIZE)
    doconv("verify", tmp_path / "a.params", tmp_path / "folded.safetensors", "--tolerance", "0")
    asked = "layer 'block.1': its kernel size is not in the file"
    doconv("convert", model, tmp_path / "b.params", "--fold", code=IMPOSSIBLE, error=asked)
    arrays = state_dict()
    arrays["conv1.weight"][0, 0, 0, 0] = np.nan
    broken = save(tmp_path / "broken.safetensors", arrays)
    options = ["--fold", *KERNEL_SIZE]
    doconv(
        "convert", broken, tmp_path / "b.params", *options, code=IMPOSSIBLE, error="is not finite"
    )
    assert not (tmp_path / "b.params").exists()


def test_what_was_done_is_told(model, tmp_path):
    done = doconv("convert", model, tmp_path / "a.params", "--json")
    found = json.loads(done.stdout)
    entries = {entry["name"]: entry for entry in found["entries"]}
    assert entries["bn1.gamma"]["sources"] == ["bn1.weight"]
    assert entries["conv1.weight"]["shape"] == [8, 3, 3, 3]
    assert entries["block.1.weight"]["shape"] == [8, 4, 10]
    assert found["left_out"] == ["bn1.num_batches_tracked"]
    text = doconv("convert", model, tmp_path / "b.params", "--fold", *KERNEL_SIZE).stdout
    assert "left out: bn1.num_batches_tracked" in text
    assert "conv1.depthwise_weight, conv1.weight: folded" in text


def test_norms_slopes_and_what_nothing_tells(tmp_path):
    ones = np.ones(4, "float32")
    arrays = {
        "norm.weight": ones, "norm.bias": 2 * ones, "act.weight": ones[:1],
        "block.gamma": 3 * ones, "plain.running_mean": ones, "plain.running_var": ones,
    }  # fmt: skip
    model, out = save(tmp_path / "model.safetensors", arrays), tmp_path / "out.params"
    doconv(
        "convert", model, out, code=IMPOSSIBLE,
        error=r"the entry 'act.weight', float32 \(1,\), and 1 more .*--keep 'act.weight'.*--drop",
    )  # fmt: skip
    doconv("convert", model, out, "--drop", "act.*", "--keep", "block.gamma")
    found = read(out)
    assert found.keys() == {
        "norm.gamma", "norm.beta", "block.gamma", "plain.running_mean", "plain.running_var",
        "plain.gamma", "plain.beta",
    }  # fmt: skip
    # A batch norm without scale and offset; Gluon's always has both.
    assert (found["plain.gamma"] == 1).all()
    assert (found["plain.beta"] == 0).all()
    write_params(out, {"act.alpha": ones[:1], "norm.gamma": ones, "norm.beta": ones})
    doconv("convert", out, tmp_path / "back.safetensors")
    assert load_file(tmp_path / "back.safetensors").keys() == {
        "act.weight", "norm.weight", "norm.bias"
    }  # fmt: skip


def test_what_gluon_lacks(tmp_path):
    model = save(tmp_path / "m.safetensors", {"scale": np.array(1.0), "fc.weight": np.eye(2)})
    doconv(
        "convert", model, tmp_path / "m.params", "--keep", "scale", code=IMPOSSIBLE,
        error="'scale' has no dimension, which Gluon's files lack; --drop 'scale' leaves it out",
    )  # fmt: skip
    doconv("convert", model, tmp_path / "m.params", "--drop", "scale")
    assert read(tmp_path / "m.params").keys() == {"fc.weight"}


def test_a_channels_last_network_of_gluon_is_refused(tmp_path):
    for shape in ((8, 3, 3, 16), (8, 3, 3, 3, 32), (4, 5, 5, 64)):
        write_params(tmp_path / "m.params", {"c.weight": np.zeros(shape)})
        doconv(
            "convert", tmp_path / "m.params", tmp_path / "m.pt", code=IMPOSSIBLE,
            error="of layer 'c' looks like one of a channels-last network",
        )  # fmt: skip


def test_two_entries_of_one_name(tmp_path):
    write_params(tmp_path / "m.params", {"a.weight": np.eye(2), "a_weight": np.eye(2)})
    doconv(
        "convert", tmp_path / "m.params", tmp_path / "m.safetensors", code=IMPOSSIBLE,
        error="'a.weight' and 'a_weight' would both be named 'a.weight'",
    )  # fmt: skip


def test_the_target_is_told_by_its_suffix(model, tmp_path):
    doconv(
        "convert", model, tmp_path / "out", code=USAGE, error="tells no format; give it with --to"
    )
    doconv("convert", model, tmp_path / "out", "--to", "gluon")
    assert read(tmp_path / "out").keys() >= {"bn1.gamma"}
    for name in ("out.keras", "out.weights.h5"):
        doconv("convert", model, tmp_path / name, code=USAGE, error="give that file with --like")
    doconv("convert", model, tmp_path / "out", "--to", "gluon", code=TARGET, error="use --force")
    doconv("convert", model, model, "--part", "ema", code=TARGET, error="use --force")
    doconv("convert", model, tmp_path / "o.pt", "--part", "ema", code=USAGE, error="no part 'ema'")


def reference(framework, groups, seed=0):
    """Return a 3×3 layer, 4 -> 8, in a layout of the reference implementation, and its pair."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((8, 4 // groups, 9)).astype("float32")
    depthwise = rng.standard_normal((4, 9, 9)).astype("float32")
    unit = np.broadcast_to(np.eye(9, dtype="float32"), (4, 9, 9)).copy()
    if framework == "PyTorch":
        return {"c.W": weight, "c.D": depthwise, "c.D_diag": unit, "c.bias": weight[:, 0, 0]}
    return {"c.weight": weight.reshape(8, -1, 3, 3), "c.D": depthwise.transpose(1, 2, 0).copy()}


@pytest.mark.parametrize("framework", ["PyTorch", "Gluon"])
def test_the_reference_implementations_layers_become_ours(tmp_path, framework):
    arrays = reference(framework, 1)
    file = save(tmp_path / "ref.safetensors", arrays)
    if framework == "Gluon":
        file = tmp_path / "ref.params"
        write_params(file, arrays)
    doconv("convert", file, tmp_path / "ours.safetensors")
    found = load_file(tmp_path / "ours.safetensors")
    theirs = reference("PyTorch", 1)
    np.testing.assert_array_equal(found["c.weight"].reshape(8, 4, 9), theirs["c.W"])
    np.testing.assert_array_equal(found["c.depthwise_weight"], theirs["c.D"])
    assert ("c.bias" in found) == (framework == "PyTorch")
    assert len(found) == len(arrays) - (framework == "PyTorch")
    doconv("verify", file, tmp_path / "ours.safetensors")


def test_a_layer_that_no_pair_composes_becomes_its_kernel(tmp_path):
    file = save(tmp_path / "ref.safetensors", reference("PyTorch", 2))
    done = doconv("convert", file, tmp_path / "ours.safetensors")
    assert "its kernel as W, and D = 0" in done.stdout
    found = load_file(tmp_path / "ours.safetensors")
    assert not found["c.depthwise_weight"].any()
    with open_checkpoint(file) as checkpoint:
        kernel = checkpoint.kernel(checkpoint.layers[0])
    np.testing.assert_array_equal(found["c.weight"], kernel)
    doconv("convert", file, tmp_path / "folded.params", "--fold")
    np.testing.assert_array_equal(read(tmp_path / "folded.params")["c.weight"], kernel)


def test_a_depth_multiplier_below_the_taps_can_only_be_folded(tmp_path):
    arrays = reference("PyTorch", 1)
    small = {name: a if a.ndim < 3 else a[..., :5].copy() for name, a in arrays.items()}
    file = save(tmp_path / "ref.safetensors", small)
    out = tmp_path / "ours.safetensors"
    error = "layer 'c' has a depth multiplier below its 9 taps.*--fold carries its kernel over"
    doconv("convert", file, out, code=IMPOSSIBLE, error=error)
    doconv("convert", file, out, "--fold")
    assert load_file(out)["c.weight"].shape == (8, 4, 3, 3)
    assert json.loads(doconv("inspect", file, "--json").stdout)["layers"][0]["depthwise"] is None


def state(**flattening):
    """Return a canonical state of many kinds."""
    rng = np.random.default_rng(0)
    spec = ConvSpec(4, 6, (3, 3), 2, 11)
    layers = {
        "conv": LayerForm(spec, True),
        "up": LayerForm(TransposedConvSpec(6, 4, (2, 2), 2)),
        "bn": LayerForm(BatchNormSpec(4, 1e-5, 0.1)),
        "ln": LayerForm(LayerNormSpec(4, 1e-5)),
        "act": LayerForm(PReLUSpec(4)),
        "words": LayerForm(EmbeddingSpec(7, 4)),
        "fc": LayerForm(LinearSpec(16, 5), **flattening),
    }
    arrays = {
        f"{path}.{name}": rng.standard_normal(shape).astype("float32")
        for path, form in layers.items()
        for name, shape in form.shapes.items()
    }
    return State(layers, arrays)


def test_a_canonical_state_by_the_names_of_frameworks(tmp_path):
    file, found = tmp_path / "state.safetensors", state()
    write_state(found, file)
    doconv("convert", file, tmp_path / "m.params")
    arrays = read(tmp_path / "m.params")
    renamed = {"up.weight": found.arrays["up.weight"].reshape(6, 2, 2, 2)}
    for name, array in {**found.arrays, **renamed}.items():
        np.testing.assert_array_equal(arrays.pop(name), array, err_msg=name, strict=True)
    assert not arrays
    doconv("convert", file, tmp_path / "m.safetensors", "--to", "safetensors")
    names = load_file(tmp_path / "m.safetensors").keys()
    assert names >= {"bn.weight", "bn.bias", "ln.weight", "act.weight", "up.weight", "fc.bias"}
    doconv("convert", file, tmp_path / "folded.params", "--fold")
    spec = found.layers["conv"].spec
    pair = (found.arrays["conv.weight"], found.arrays["conv.depthwise_weight"])
    folded = read(tmp_path / "folded.params")["conv.weight"]
    np.testing.assert_array_equal(folded, compose(*pair, spec))


def test_a_canonical_state_is_filled_from_a_file_of_weights(tmp_path):
    template, like = tmp_path / "state.safetensors", state()
    write_state(like, template)
    doconv("convert", template, tmp_path / "m.params")
    zeros = State(like.layers, {name: np.zeros_like(a) for name, a in like.arrays.items()})
    write_state(zeros, tmp_path / "zeros.safetensors")
    doconv("convert", tmp_path / "m.params", tmp_path / "back.safetensors",
           "--like", tmp_path / "zeros.safetensors")  # fmt: skip
    found = read_state(tmp_path / "back.safetensors")
    assert found.layers == like.layers
    for name, array in like.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, err_msg=name, strict=True)


def test_a_state_whose_order_of_inputs_is_open_is_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    write_state(state(flattening="own"), file)
    error = "in which order the inputs of layer 'fc' are; load the state in Python, with load_state"
    doconv("convert", file, tmp_path / "m.params", code=IMPOSSIBLE, error=error)


def test_like_another_file_by_name_and_by_order(tmp_path):
    rng = np.random.default_rng(1)
    names = {"first.weight": (4, 3, 3, 3), "second.weight": (4, 4, 3, 3), "fc.weight": (2, 4)}
    source = {name: rng.standard_normal(shape) for name, shape in names.items()}
    write_params(tmp_path / "source.params", source)
    other = {f"net.{name}".replace("first", "a"): 0 * array for name, array in source.items()}
    write_params(tmp_path / "like.params", other)
    args = ["convert", tmp_path / "source.params", tmp_path / "out.params", "--like",
            tmp_path / "like.params"]  # fmt: skip
    error = "layer 'first' is in .*source.params, but not in .*like.params; --match order"
    doconv(*args, code=IMPOSSIBLE, error=error)
    doconv(*args, "--match", "order")
    found = read(tmp_path / "out.params")
    assert [*found] == [*other]
    for array, expected in zip(found.values(), source.values(), strict=True):
        np.testing.assert_array_equal(array, expected)
    other["net.fc.weight"] = np.zeros((2, 5))
    write_params(tmp_path / "like.params", other)
    done = doconv(
        *args, "--match", "order", "--force", code=IMPOSSIBLE, listing=True,
        error="layer 3 of 3 differs: fc, linear 2x4 in .*, net.fc, linear 2x5 in",
    )  # fmt: skip
    assert "net.a, convolution 4x3x3x3" in done.stderr
    same = {name: 0 * array for name, array in source.items()}
    write_params(tmp_path / "like.params", {**same, "fc.weight": np.zeros((2, 5))})
    error = r"layer 'fc' in .*, linear \(2, 4\) with weight, is another than 'fc' in .*\(2, 5\)"
    doconv(*args, "--force", code=IMPOSSIBLE, error=error)
    write_params(tmp_path / "like.params", {**same, "fc.bias": np.zeros(2)})
    doconv(*args, "--force", code=IMPOSSIBLE, error="layer 'fc' .* with weight, is another .*bias")
    small = {name: array.astype("float32") for name, array in same.items()}
    write_params(tmp_path / "like.params", small)
    error = "'first.weight' is float64, and would lose digits as float32, which"
    doconv(*args, "--force", code=IMPOSSIBLE, error=error)


def test_a_gamma_of_ones_and_a_beta_of_zeros_come_and_go(tmp_path):
    spec, roles = BatchNormSpec(4, 1e-5, 0.1), ("running_mean", "running_var")
    statistics = {f"a.{role}": np.full(4, 2, "float32") for role in roles}
    neutral = {"a.gamma": np.ones(4, "float32"), "a.beta": np.zeros(4, "float32")}
    files = {name: tmp_path / f"{name}.safetensors" for name in ("bare", "whole", "moved")}
    write_state(State({"a": LayerForm(spec, bias=False, scale=False)}, statistics), files["bare"])
    write_state(State({"a": LayerForm(spec)}, neutral | statistics), files["whole"])
    moved = {**neutral, **statistics, "a.beta": neutral["a.gamma"]}
    write_state(State({"a": LayerForm(spec)}, moved), files["moved"])
    for source, like in (("bare", "whole"), ("whole", "bare")):
        out = tmp_path / "out.safetensors"
        doconv("convert", files[source], out, "--like", files[like], "--force")
        made, wanted = read_state(out), read_state(files[like])
        assert made.layers == wanted.layers
        np.testing.assert_equal(dict(made.arrays), dict(wanted.arrays))
    error = "entry 'a.beta' is there, and not 0 throughout; the layer in .*bare.* has no beta"
    args = ["convert", files["moved"], out, "--force", "--like", files["bare"]]
    doconv(*args, code=IMPOSSIBLE, error=error)


def test_safetensors_tell_no_order(model, tmp_path):
    doconv("convert", model, tmp_path / "m.params")
    error = "model.safetensors has its layers in the order of their names, not of the model"
    doconv(
        "convert", model, tmp_path / "out.params", "--like", tmp_path / "m.params",
        "--match", "order", code=IMPOSSIBLE, error=error,
    )  # fmt: skip


def test_layers_are_over_parameterized_or_folded_as_the_template_is(model, tmp_path):
    doconv("convert", model, tmp_path / "over.params")
    doconv("convert", model, tmp_path / "plain.params", "--fold", *KERNEL_SIZE)

    def like(source, template, *options, **checks):
        args = ["convert", tmp_path / source, tmp_path / "out.params", "--like"]
        doconv(*args, tmp_path / template, "--force", *options, **checks)

    error = "'block.0' is over-parameterized in .*over.params, and ordinary in .*; --fold folds it"
    like("over.params", "plain.params", code=IMPOSSIBLE, error=error)
    like("over.params", "plain.params", "--fold", *KERNEL_SIZE)
    assert Path(tmp_path / "out.params").read_bytes() == (tmp_path / "plain.params").read_bytes()
    like("over.params", "over.params")
    assert Path(tmp_path / "out.params").read_bytes() == (tmp_path / "over.params").read_bytes()
    # An ordinary kernel is over-parameterized, but where the template does not tell its size.
    like("plain.params", "over.params", code=IMPOSSIBLE, error="'block.1' .* is another than")
    arrays = state_dict()
    for name in ("block.1.weight", "block.1.depthwise_weight"):
        del arrays[name]
    doconv("convert", save(tmp_path / "m.safetensors", arrays), tmp_path / "over.params", "--force")
    doconv("convert", tmp_path / "m.safetensors", tmp_path / "plain.params", "--force", "--fold")
    like("plain.params", "over.params")
    found = read(tmp_path / "out.params")
    assert not found["conv1.depthwise_weight"].any()
    doconv("verify", tmp_path / "out.params", tmp_path / "plain.params", "--tolerance", "0")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--keep", "nope.*"), r"--keep: 'nope\.\*' matches no entry; the file has such as 'bn1"),
        (("--drop", "nope"), "--drop: 'nope' matches no entry"),
        (
            ("--flatten", "nope=3x4x4"),
            "--flatten: 'nope' matches no linear layer and no norm; .*bn",
        ),
        (("--match", "order"), "--match order pairs layers with those of --like, which is missing"),
        (("--to", "gluon", "--like", "model.safetensors"), "--to has no effect with --like"),
        (
            ("--flatten", "fc=2x3x8"),
            "no convolution gives the 2 channels .*, and one gives 8",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path, monkeypatch, options, error):
    monkeypatch.chdir(tmp_path)
    save("model.safetensors", {n: a for n, a in state_dict().items() if "block.1" not in n})
    if "fc=2x3x8" not in options:
        doconv("convert", "model.safetensors", "out.params", *options, code=USAGE, error=error)
        assert not (tmp_path / "out.params").exists()
        return
    args = ("verify", "model.safetensors", "model.safetensors", *options)
    doconv(*args, code=USAGE, error=error)
