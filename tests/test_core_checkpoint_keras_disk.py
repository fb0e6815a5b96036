"""A disk that is full while HDF5 is written: an OSError that says so, and a library left whole."""

from __future__ import annotations

import errno
import io
import os
import re
import zipfile

import numpy as np
import pytest
from checkpoint_files import numbers, refused
from command_line import TARGET, on_a_full_disk
from frameworks import need

need("tf")

import h5py  # noqa: E402

from doconv_core.files import hdf5  # noqa: E402
from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint  # noqa: E402
from doconv_core.files.entries import (  # noqa: E402
    CheckpointError,
    copy_member,
    open_archive,
)


def write_weights(path):
    with h5py.File(path, "w") as file:
        for n in range(12):
            group = file.create_group(f"layers/do_conv2d_{n}/vars".replace("_0/", "/"))
            group["0"], group["depthwise_kernel"] = numbers(3, 3, 16, 16), numbers(16, 9, 9)


def write_archive(path):
    write_weights(path)
    weights = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", '{"class_name": "Model", "config": {}}')
        archive.writestr("model.weights.h5", weights)


MOST = (0, 1000, 60_000, 100_000)


@pytest.mark.parametrize("write", [write_weights, write_archive], ids=["weights", "archive"])
def test_folding_onto_a_full_disk(tmp_path, write):
    source, target = tmp_path / "in", tmp_path / "out"
    write(source)
    assert max(MOST) < fold_size(source, target)
    done = on_a_full_disk(*((["fold", source, target], most) for most in MOST))
    for most, (code, told) in zip(MOST, done, strict=True):
        # An archive's weights are unpacked first, where the disk is as full.
        unpacked = write is write_archive
        name = r"\S+/model\.weights\.h5: " if unpacked else f"{target} could not be written: "
        nowhere = r"No usable temporary directory found in \[.*\]"
        problem = nowhere if unpacked and not most else f"{name}File too large"
        assert code == TARGET, (most, told)
        assert re.fullmatch(f"doconv: {problem}\\.\n", told), (most, told)
    assert [*tmp_path.iterdir()] == [source]


def fold_size(source, target):
    """Return the size of the folded file, which is removed again."""
    report = fold_checkpoint(source, target)
    assert len(report.changed) == 12
    with open_checkpoint(target) as checkpoint:
        expected = numbers(3, 3, 16, 16) + np.einsum(
            "ims,sio->mio", numbers(16, 9, 9), numbers(9, 16, 16)
        ).reshape(3, 3, 16, 16)
        found = checkpoint.read(next(iter(checkpoint.entries)))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    size = target.stat().st_size
    target.unlink()
    return size


def test_a_full_disk_is_no_damage_of_an_archive(tmp_path):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = tmp_path / "in"
    write_archive(source)
    with open_archive(source) as archive:
        with pytest.raises(OSError, match="No space left on device"):
            copy_member(source, archive, "model.weights.h5", Full())
        copy_member(source, archive, "model.weights.h5", io.BytesIO())


def test_a_disk_that_fills_while_the_library_writes_is_told_as_such(tmp_path, monkeypatch):
    """The room that arrays need is there at first, and gone when the library writes."""
    write_weights(tmp_path / "in")
    asked = []

    def reserve(target, size):
        asked.append(size)
        if len(asked) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hdf5, "_reserve", reserve)
    monkeypatch.setattr(
        h5py.Group, "create_dataset", lambda *a, **k: (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError, match="No space left on device"):
        fold_checkpoint(tmp_path / "in", tmp_path / "out")
    assert asked[0] == 12 * 3 * 3 * 16 * 16 * 4
    assert [*tmp_path.iterdir()] == [tmp_path / "in"]


def test_damage_of_the_source_is_told_as_such(tmp_path, monkeypatch):
    write_weights(tmp_path / "in")
    monkeypatch.setattr(h5py.Group, "copy", lambda *args: (_ for _ in ()).throw(OSError("bad")))
    with h5py.File(tmp_path / "in", "a") as file:
        file["layers/dense/vars/0"] = numbers(2, 2)
    refused(tmp_path / "in", "in could not be copied: bad", CheckpointError)
    assert [*tmp_path.iterdir()] == [tmp_path / "in"]
