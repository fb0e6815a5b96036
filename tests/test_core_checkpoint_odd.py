"""Files that are whole and odd: shapes beyond NumPy, names that are no text; full disks; links."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from checkpoint_files import only_line
from command_line import BAD_FILE, TARGET, doconv, on_a_full_disk
from frameworks import BACKENDS, imported, is_here, need
from safetensors.numpy import save_file

from doconv_core.files.checkpoint import open_checkpoint
from doconv_core.files.entries import CheckpointError
from doconv_core.files.gluon import write_params

ARRAYS = {
    "a.weight": np.ones((64, 64, 3, 3), np.float32),
    "a.depthwise_weight": np.zeros((64, 9, 9), np.float32),
}


def of_70_axes(path):
    text = json.dumps({"a.bias": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}})
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))


def of_none_times_too_many(path):
    write_params(path, {"a.bias": np.zeros((0, 1, 1), np.float32)})
    axis = struct.pack("<q", 1)
    content = path.read_bytes()
    assert content.count(2 * axis) == 1
    path.write_bytes(content.replace(2 * axis, 2 * struct.pack("<q", 1 << 62)))


@pytest.mark.parametrize("make", [of_70_axes, of_none_times_too_many])
def test_a_shape_that_numpy_cannot_have_is_told_when_it_is_read(tmp_path, make):
    file, out = tmp_path / "model", tmp_path / "out"
    make(file)
    with (
        open_checkpoint(file) as checkpoint,
        pytest.raises(CheckpointError, match=r"model: no array here can be \(.*: (max|array)") as e,
    ):
        checkpoint.read("a.bias")
    only_line(e)
    assert not str(e.value).endswith("..")
    doconv("verify", file, file, code=BAD_FILE, error="no array here can be")
    doconv("fold", file, out)  # what is not read is carried over
    assert out.read_bytes()[-4:] == file.read_bytes()[-4:]


def test_halves_of_characters_are_no_names(tmp_path):
    torch = imported("torch")
    file = tmp_path / "model.pt"
    torch.save({"a\ud800.weight": torch.zeros(2, 2)}, file)
    message = r"has an entry named 'a\\ud800\.weight', which is no text"
    for arguments in (["inspect", file], ["convert", file, tmp_path / "out.safetensors"]):
        doconv(*arguments, code=BAD_FILE, error=message)
    assert list(tmp_path.iterdir()) == [file]


def test_a_tensor_without_values(tmp_path):
    torch = imported("torch")
    file = tmp_path / "model.pt"
    shapes = {name: torch.empty(array.shape, device="meta") for name, array in ARRAYS.items()}
    torch.save(shapes, file)
    doconv("fold", file, tmp_path / "out", code=BAD_FILE, error="is a meta tensor: no values")
    many = torch.zeros((1,) * 40)
    torch.save({"a": many, "b": torch.zeros(2, 2)}, file)
    doconv("verify", file, file, code=BAD_FILE, error=r"entry 'a' has the shape \(1, 1,")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_carried_over(tmp_path):
    torch = imported("torch")
    file, out = tmp_path / "model.pt", tmp_path / "out.pt"
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"w": torch.eye(2), "n": nested}, file)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.others == ("n",)
    doconv("fold", file, out)
    assert torch.load(out, weights_only=True)["n"].is_nested


def test_an_entry_beside_a_layer_without_a_path_is_measured_as_none(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({n.removeprefix("a."): a for n, a in ARRAYS.items()} | {"c": np.ones(3)}, file)
    layers = json.loads(doconv("inspect", file, "--json").stdout)["layers"]
    measured = {layer["kind"]: layer["depthwise"] is not None for layer in layers}
    assert measured == {"convolution": True, "other": False}
    assert "9 of 9" in doconv("inspect", file).stdout


def hdf5(path):
    import h5py

    with h5py.File(path, "w") as file:
        group = file.create_group("layers/do_conv2d/vars")
        group["0"] = ARRAYS["a.weight"].transpose(2, 3, 1, 0)
        group["depthwise_kernel"] = ARRAYS["a.depthwise_weight"]


def pytorch(path, zipped):
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)


KINDS = {
    "safetensors": (None, lambda path: save_file(ARRAYS, path)),
    "gluon": (None, lambda path: write_params(path, ARRAYS)),
    "pytorch": ("torch", lambda path: pytorch(path, True)),
    "pickle": ("torch", lambda path: pytorch(path, False)),
    "hdf5": ("tf", hdf5),
}


@pytest.mark.exhaustive
def test_a_disk_that_is_full_leaves_the_file_that_is_folded_in_place(tmp_path):
    here = {name for name in BACKENDS if is_here(name)}
    kinds = {kind: write for kind, (needed, write) in KINDS.items() if needed in {None, *here}}
    files = {kind: tmp_path / kind / "model" for kind in kinds}
    for kind, write in kinds.items():
        files[kind].parent.mkdir()
        write(files[kind])
        files[kind].chmod(0o600)
    before = {kind: file.read_bytes() for kind, file in files.items()}
    imports = [name for name in ("doconv_torch", "h5py") if name.removeprefix("doconv_") in
               {"h5py", *here}]  # fmt: skip
    done = on_a_full_disk(
        *((["fold", file, file, "--force"], 5000) for file in files.values()), imports=imports
    )
    for (kind, file), (code, told) in zip(files.items(), done, strict=True):
        assert code == TARGET, (kind, told)
        assert len(told.splitlines()) == 1, (kind, told)
        assert "model could not be written: " in told, (kind, told)
        assert file.read_bytes() == before[kind], kind
        assert file.stat().st_mode & 0o777 == 0o600, kind
        assert list(file.parent.iterdir()) == [file], kind


@pytest.mark.parametrize("kind", KINDS)
def test_links_are_read_and_written_through(tmp_path, kind):
    framework, write = KINDS[kind]
    if framework is not None:
        need(framework)
    file, link, hard = tmp_path / "model", tmp_path / "link", tmp_path / "hard"
    write(file)
    before = file.read_bytes()
    link.symlink_to(file)
    hard.hardlink_to(file)
    doconv("fold", link, tmp_path / "out")
    doconv("fold", link, link, "--force")
    assert link.is_symlink()
    assert hard.read_bytes() == before  # the file was replaced, and this is the former one
    doconv("fold", hard, hard, "--force")
    for folded in (link, file, hard):
        with open_checkpoint(folded) as checkpoint:
            assert not any(layer.over_parameterized for layer in checkpoint.layers)
