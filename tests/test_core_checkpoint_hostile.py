"""Damaged and hostile safetensors files: one line, and nothing is written."""

from __future__ import annotations

import json

import pytest
from checkpoint_files import numbers, only_line, refused
from safetensors.numpy import save_file

from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint
from doconv_core.files.entries import CheckpointError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def header_of(names_to_entries, data=b"", length=None, pad=0):
    text = names_to_entries if isinstance(names_to_entries, bytes) else json.dumps(
        names_to_entries).encode()  # fmt: skip
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": (b"", "is empty"),
    "unknown": (b"something else entirely", "is no checkpoint that is known here; .*safetensors"),
    "short": (b"\x10", "is no checkpoint that is known here"),
    "header beyond the file": (header_of({}, length=1 << 20), "is not a whole safetensors file"),
    "huge header": (header_of({}, length=1 << 62), "is not a whole safetensors file"),
    "truncated data": (header_of({"a": tensor([4], 0, 16)}, bytes(12)), "is not a whole safetens"),
    "data beyond the file": (
        header_of({"a": tensor([1 << 40], 0, 1 << 42)}),
        "is not a whole safe",
    ),
    "overlapping": (
        header_of({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
        "is not a whole safetensors file",
    ),
    "a shape that overflows": (
        header_of({"a": tensor([1 << 33, 1 << 33], 0, 16)}, bytes(16)),
        "is not a whole safetensors file",
    ),
    "a negative size": (header_of({"a": tensor([-4], 0, 16)}, bytes(16)), "is not a whole safete"),
    "an unknown type": (header_of({"a": tensor([4], 0, 16, "OBJ")}, bytes(16)), "is not a whole s"),
    "no JSON": (header_of(b"{]"), "is not a whole safetensors file"),
    "deeply nested": (header_of(b'{"a":' * 5000 + b"}" * 5000), "is not a whole safetensors file"),
    "a name twice": (
        header_of(b'{"a":%b,"a":%b}' % (2 * (json.dumps(tensor([1], 0, 1, "U8")).encode(),)), b"x"),
        "in the header, the name 'a' occurs twice",
    ),
    "a path upwards": (
        header_of({"../../etc/passwd": tensor([1], 0, 4)}, bytes(4)),
        r"has an entry named '\.\./\.\./etc/passwd', a path out of the file",
    ),
    "an absolute path": (
        header_of({"/etc/x": tensor([1], 0, 4)}, bytes(4)),
        "named '/etc/x', a pat",
    ),
    "a path upwards behind a line's end": (
        header_of({"a\n/../../x": tensor([1], 0, 4)}, bytes(4)),
        r"named 'a\\n/\.\./\.\./x', a path out of the file",
    ),
    "a drive": (header_of({"C:\\x": tensor([1], 0, 4)}, bytes(4)), "a path out of the file"),
    "a NUL": (header_of({"a\0b": tensor([1], 0, 4)}, bytes(4)), "a path out of the file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_and_hostile_files_are_refused_in_one_line(file, case):
    content, message = HOSTILE[case]
    file.write_bytes(content)
    refused(file, message, CheckpointError)


def test_every_truncation_is_refused(file):
    save_file({"a.weight": numbers(2, 2)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(file)


def test_ordinary_names_with_slashes_and_dots_are_no_paths_out(file):
    names = ["a/b.weight", "..a.weight", "a...weight", "c:weight", "a../b.weight"]
    save_file({name: numbers(2) for name in names}, file)
    with open_checkpoint(file) as checkpoint:
        assert set(checkpoint.entries) == set(names)


def state_header(**changes):
    layer = {"kind": "linear", "spec": {"in_features": 2, "out_features": 2},
             "over_parameterized": False, "bias": False}  # fmt: skip
    header = {"format": "doconv", "version": "1", "layers": json.dumps({"a": layer})}
    return header | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": "99"}, "has format version 99"),
        ({"layers": "[" * 100_000}, "the header's layers .* no JSON"),
        ({"layers": '{"b": null}'}, "the header's layer 'b'"),
        ({}, r"entry 'a\.weight' is missing; its header describes \(2, 2\)"),
    ],
)
def test_a_state_whose_header_is_wrong_is_refused(file, header, message):
    save_file({"other": numbers(2)}, file, metadata=state_header(**header))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(file)
    only_line(error)


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a checkpoint file"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "absent")


def test_types_that_numpy_lacks_are_carried_over_and_not_read(file, tmp_path):
    content = header_of({"a": tensor([4], 0, 4, "F8_E4M3")}, b"abcd")
    file.write_bytes(content + b"")
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.entries["a"].dtype == "f8_e4m3"
        with pytest.raises(CheckpointError, match="entry 'a' is f8_e4m3, not read here"):
            checkpoint.read("a")
    fold_checkpoint(file, tmp_path / "out")
    assert (tmp_path / "out").read_bytes().endswith(b"abcd")


def test_metadata_that_are_null_are_none(file, tmp_path):
    file.write_bytes(header_of({"__metadata__": None, "a": tensor([1], 0, 4)}, bytes(4)))
    fold_checkpoint(file, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.metadata == {}


def linear_state(file, kind):
    layer = {"kind": "linear", "spec": {"in_features": 2, "out_features": 2},
             "over_parameterized": kind, "bias": False}  # fmt: skip
    header = state_header(layers=json.dumps({"a": layer}))
    save_file({"a.weight": numbers(2, 2)}, file, metadata=header)


@pytest.mark.parametrize("kind", [True, "doconv"])
def test_a_linear_layer_has_nothing_to_compose_whatever_it_says(file, tmp_path, kind):
    linear_state(file, kind)
    assert fold_checkpoint(file, tmp_path / "out").changed == ()


@pytest.mark.parametrize("kind", ["bsconv", "nothing", 3, None])
def test_a_linear_layer_of_no_such_kind_is_refused(file, kind):
    linear_state(file, kind)
    refused(file, "the header's layer 'a'", CheckpointError)


@pytest.mark.parametrize("name", ["a\n/../../x", "a\n/..", "../a\nb"])
def test_a_newline_hides_no_path_out(file, name):
    file.write_bytes(header_of({name: tensor([1], 0, 4)}, bytes(4)))
    refused(file, "a path out of the file", CheckpointError)
