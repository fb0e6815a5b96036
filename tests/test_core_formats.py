"""Formats are open: one registered from outside, and safetensors in several files."""

from __future__ import annotations

import io
import json
import os
import zipfile

import numpy as np
import pytest
from checkpoint_files import only_line
from command_line import BAD_FILE, TARGET, USAGE, doconv
from equal import assert_close
from safetensors.numpy import load_file, save_file

from doconv_core import (
    CheckpointError,
    ConvSpec,
    compose,
    fold_checkpoint,
    open_checkpoint,
)
from doconv_core.files.entries import Entry
from doconv_core.files.sharded import write as write_sharded

SPEC = ConvSpec(4, 6, (3, 3), 2)


def arrays(seed=0):
    """Return a model of two layers, the first over-parameterized, and its kernel."""
    drawn = np.random.default_rng(seed)
    weight = drawn.standard_normal(SPEC.weight_shape)
    depthwise = drawn.standard_normal(SPEC.depthwise_shape)
    model = {
        "conv.weight": weight.reshape(SPEC.kernel_shape),
        "conv.depthwise_weight": depthwise,
        "fc.weight": drawn.standard_normal((2, 6)),
    }
    return model, compose(weight, depthwise, SPEC)


def check(*commands):
    """Run commands, each with what it has to print among the rest, and nothing else to say."""
    for command, told in commands:
        done = doconv(*command)
        assert done.stderr == "", command
        assert told in done.stdout, command


def test_a_format_of_another_package_is_one_module(tmp_path, monkeypatch):
    """It is inspected, folded, converted to and from, and compared, by an entry point alone."""
    distribution = tmp_path / "toy_format-1.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: toy-format\nVersion: 1.0\n"
    )
    (distribution / "entry_points.txt").write_text("[doconv.formats]\ntoy = toy.format\n")
    monkeypatch.syspath_prepend(tmp_path)
    model, kernel = arrays()
    source = tmp_path / "m.safetensors"
    save_file(model, source)
    toy, folded, back = tmp_path / "m.toy", tmp_path / "f.toy", tmp_path / "b.safetensors"
    check(
        (["convert", source, toy], "3 arrays written"),
        (["inspect", toy], "m.toy: toy, 2 layers, 1 of them over-parameterized"),
        (["fold", toy, folded], "folded 1 layer"),
        (["convert", folded, back], "2 arrays written"),
        (["verify", source, folded], "equal"),
    )
    found = load_file(back)
    assert_close(found["conv.weight"], kernel)
    np.testing.assert_array_equal(found["fc.weight"], model["fc.weight"])
    (tmp_path / "broken.toy").write_text('{"toy": {')
    doconv("inspect", tmp_path / "broken.toy", code=BAD_FILE, error="broken.toy")
    monkeypatch.undo()  # the package is not installed
    doconv("inspect", toy, code=BAD_FILE, error="is no checkpoint that is known here")


def sharded(folder, model, where=None):
    """Write a model in two files and an index; where: of entries, another file's number."""
    shards = {"conv.weight": 1, "conv.depthwise_weight": 2, "fc.weight": 2} | (where or {})
    names = {n: f"model-{n:05}-of-00002.safetensors" for n in (1, 2)}
    for number, name in names.items():
        save_file({n: a for n, a in model.items() if shards[n] == number}, folder / name)
    index = folder / "model.safetensors.index.json"
    content = {
        "metadata": {"total_size": sum(a.nbytes for a in model.values()), "by": "hand"},
        "weight_map": {name: names[shards[name]] for name in model},
    }
    index.write_text(json.dumps(content))
    return index


def test_a_new_entry_goes_into_the_last_of_as_many_shards(tmp_path):
    model = {name: arrays()[0][name] for name in ("conv.weight", "fc.weight")}
    new = {**model, "fc.bias": np.ones(2)}
    entries = [Entry(name, array.shape, "float64") for name, array in new.items()]
    target = tmp_path / "new.safetensors.index.json"
    with open_checkpoint(sharded(tmp_path, model)) as like:
        write_sharded(target, entries, new, like)
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.shard_of == {"conv.weight": 0, "fc.weight": 1, "fc.bias": 1}
        for name, array in new.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)


def test_sharded_safetensors_are_folded_converted_and_compared(tmp_path):
    model, kernel = arrays()
    index = sharded(tmp_path, model)
    out = tmp_path / "out"
    out.mkdir()
    target, whole, again = (
        out / name
        for name in ("f.safetensors.index.json", "w.safetensors", "a.safetensors.index.json")
    )
    report = fold_checkpoint(index, target)
    assert [change.path for change in report.changed] == ["conv"]
    expected = [f"f-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert sorted(p.name for p in out.iterdir()) == [*expected, target.name]
    content = json.loads(target.read_text())
    assert content["metadata"] == {"total_size": kernel.nbytes + 2 * 6 * 8, "by": "hand"}
    assert content["weight_map"] == dict(zip(("conv.weight", "fc.weight"), expected, strict=True))
    with open_checkpoint(target) as checkpoint:
        assert (checkpoint.format, checkpoint.parts) == ("sharded safetensors", ("",))
        assert_close(checkpoint.read("conv.weight"), kernel)
        np.testing.assert_array_equal(checkpoint.read("fc.weight"), model["fc.weight"])
    check(
        (["verify", index, target], "equal"),
        (["convert", index, whole], "3 arrays written"),
        (["convert", whole, again], "3 arrays written"),
        (["verify", index, again], "equal"),
        (["inspect", again], "sharded safetensors, 2 layers, 1 of them over-parameterized"),
    )
    assert (out / "a-00001-of-00001.safetensors").exists()
    target.unlink()  # its parts are there, and not to be replaced
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(FileExistsError, match=r"f-00001-of-00002\.safetensors exists"):
        fold_checkpoint(index, target)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def changed(index, **content):
    index.write_text(json.dumps({**json.loads(index.read_text()), **content}))


HOSTILE = {
    "a path upwards": (
        lambda i: changed(i, weight_map={"a": "../x.safetensors"}), r"names the file '\.\./x\.safet"
    ),
    "an absolute path": (
        lambda i: changed(i, weight_map={"a": "/etc/passwd"}), "names the file '/etc/passwd'"
    ),
    "no text": (lambda i: changed(i, weight_map={"a": 3}), "names the file '3'"),
    "a missing file": (
        lambda i: changed(i, weight_map={"a": "no.safetensors"}), r"needs \S+no\.safetensors, which"
    ),
    "an entry too many": (
        lambda i: changed(i, weight_map=dict.fromkeys("ab", "model-00001-of-00002.safetensors")),
        "does not fit its shards: of 'a', model-00001-of-00002.safetensors has not",
    ),
    "an entry in no shard": (
        lambda i: changed(i, weight_map={"fc.weight": "model-00002-of-00002.safetensors"}),
        "has, where the index has it in no shard",
    ),
    "no map": (lambda i: i.write_text("{}"), "is no index of safetensors files: it has no"),
    "no JSON": (lambda i: i.write_text("{"), "is no JSON"),
    "nested deeply": (lambda i: i.write_text('{"a":' * 99999), "is no JSON"),
    "a name twice": (lambda i: i.write_text('{"a": 1, "a": 2}'), "the name 'a' occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_indexes_are_refused_in_one_line(case, tmp_path):
    change, message = HOSTILE[case]
    index = sharded(tmp_path, arrays()[0])
    change(index)
    files = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message) as error:
        fold_checkpoint(index, tmp_path / "out.safetensors.index.json")
    only_line(error)
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("command", ["fold", "inspect"])
def test_a_shard_alone_is_refused(command, tmp_path):
    index = sharded(tmp_path, arrays()[0])
    shard = tmp_path / "model-00001-of-00002.safetensors"
    out = [tmp_path / "out.safetensors"] * (command == "fold")
    told = r"one of several files of a model.*name their index, \S+model\.safetensors\.index\.json"
    doconv(command, shard, *out, code=BAD_FILE, error=f"{told}\\.$")
    index.rename(tmp_path / "model.safetensors.index.fp16.json")
    doconv(command, shard, *out, code=BAD_FILE, error="safetensors.index.fp16.json")
    (tmp_path / "model.safetensors.index.fp16.json").unlink()
    doconv(command, shard, *out, code=BAD_FILE, error=f"{told}, which is not beside it")
    one = shard.rename(tmp_path / "model-00001-of-00001.safetensors")
    doconv(command, one, *out)
    out += ["--force"] * len(out)
    for name in ("model-1-of-2.safetensors", "net_01_of_12.SAFETENSORS"):
        doconv(command, one.rename(tmp_path / name), *out, code=BAD_FILE, error="one of several")
        one = tmp_path / name


@pytest.mark.parametrize("name", ["OUT.SAFETENSORS.INDEX.JSON", "out"])
def test_an_index_is_read_under_the_name_by_which_it_was_written(name, tmp_path):
    index, out = sharded(tmp_path, arrays()[0]), tmp_path / "new" / name
    out.parent.mkdir()
    doconv("fold", index, out)
    stem = name.split(".")[0]
    assert {x.name for x in out.parent.iterdir()} == {
        name, *(f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2))
    }  # fmt: skip
    doconv("verify", index, out)
    out.unlink()
    message = rf"{stem}-00001-of-00002\.safetensors exists; use --force"
    doconv("fold", index, out, code=TARGET, error=message)


def test_a_folder_is_told_with_the_index_in_it(tmp_path):
    index = sharded(tmp_path, arrays()[0])
    index = index.rename(tmp_path / "model.safetensors.index.fp16.json")
    doconv("inspect", tmp_path, code=USAGE, error=rf"such as {index}")


def packed(*members):
    """Return a zip archive of members without content."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in members:
            archive.writestr(name, b"")
    return made.getvalue()


FOREIGN = {
    "lfs.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page.safetensors": (b"\n<!DOCTYPE html><html></html>", "is a web page, .*; download that"),
    "model.gguf": (b"GGUF\x03\0\0\0", "is a GGUF file, .* before it is exported"),
    "model.tflite": (b"\x1c\0\0\0TFL3", "is a TensorFlow Lite file"),
    "model.pt": (b"\x08\x07\x12\x07pytorch", "is an ONNX file"),
    "model.pt.gz": (b"\x1f\x8b\x08", "is a packed file; unpack it, and name the checkpoint in it"),
    "model.tar": (b"model.pt".ljust(257, b"\0") + b"ustar", "is a packed file"),
    "model.zip": (packed("folder/model.pt"), "is a packed file"),
    "model.pt2": (packed("m/archive_format", "m/models/model.json"), "a program of torch.export"),
    "model.npz": (packed("a.npy"), "an archive of NumPy's arrays; save a state dict"),
    "model.npy": (b"\x93NUMPY", "an array of NumPy's; save a state dict"),
    "ckpt-1.index": (b"\0\0\x13\x06", "a part of TensorFlow's checkpoint; load that into the mod"),
    "zero_pp_rank_0_mp_rank_00_model_states.pt": (b"", "folder .*, of DeepSpeed; its scr"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_write_is_named_as_what_it_is(name, tmp_path):
    content, message = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    doconv("inspect", tmp_path / name, code=BAD_FILE, error=message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mp_rank_00_model_states.pt", "is a folder of DeepSpeed; its script zero_to_fp32.py"),
        ("saved_model.pb", "is a SavedModel of TensorFlow's, .* before it is exported"),
    ],
)
def test_a_folder_that_others_write_is_named_as_what_it_is(name, message, tmp_path):
    (tmp_path / name).touch()
    doconv("inspect", tmp_path, code=USAGE, error=message)


SUFFIXES = [
    "out.keras", "out.weights.h5", "out.params", "out.pt", "out.safetensors.index.json", "out.onnx",
    "out.safetensors.GZ",
]  # fmt: skip


@pytest.mark.parametrize("name", SUFFIXES)
def test_a_suffix_that_says_another_format_is_refused(name, tmp_path):
    source, target = tmp_path / "m.safetensors", tmp_path / name
    save_file(arrays()[0], source)
    error = r"would be a safetensors file \(\.safetensors\), and its suffix says a"
    doconv("fold", source, target, code=USAGE, error=error)
    doconv("convert", source, target, "--to", "safetensors", code=USAGE, error=error)
    doconv("convert", source, target, "--like", source, code=USAGE, error=error)
    with pytest.raises(ValueError, match=error):
        fold_checkpoint(source, target)
    assert list(tmp_path.iterdir()) == [source]


def test_metadata_stay_in_what_is_written_like_a_file(tmp_path):
    source, like = tmp_path / "m.safetensors", tmp_path / "like.safetensors"
    out = tmp_path / "out.safetensors"
    save_file(arrays()[0], source)
    save_file(arrays(1)[0], like, metadata={"format": "pt"})
    doconv("convert", source, out, "--like", like)
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.metadata == {"format": "pt"}


def test_a_pipe_is_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for command in (["inspect", pipe], ["fold", pipe, tmp_path / "out"], ["cost", pipe]):
        doconv(*command, code=BAD_FILE, error="is a pipe or a device, which cannot be read twice")
