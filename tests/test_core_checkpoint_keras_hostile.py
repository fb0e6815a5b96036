"""Keras' files, damaged and hostile: one line, and nothing is written."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from checkpoint_files import numbers, refused
from command_line import doconv
from frameworks import need

need("tf")

import h5py  # noqa: E402
import keras  # noqa: E402
from keras_checkpoints import functional  # noqa: E402

from doconv_core.files.checkpoint import open_checkpoint  # noqa: E402
from doconv_core.files.entries import CheckpointError  # noqa: E402


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.keras"


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "model.weights.h5"


def archive(path, **members):
    """Write an archive as Keras does, with other content of some members."""
    weights = path.with_suffix(".h5")
    with h5py.File(weights, "w") as file:
        file.create_dataset("layers/dense/vars/0", data=np.ones((2, 2)))
    usual = {
        "metadata.json": b"{}",
        "config.json": json.dumps({"class_name": "Sequential", "config": {"layers": []}}).encode(),
        "model.weights.h5": weights.read_bytes(),
    }
    weights.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in (usual | members).items():
            if content is not None:
                new.writestr(name, content)


def truncated(path):
    archive(path)
    path.write_bytes(path.read_bytes()[:-40])


def overlapping(path):
    """Two members that share their data: the directory has one entry twice, by another name."""
    archive(path, **{"assets/a": bytes(4000), "assets/b": np.random.bytes(3000)})
    content = path.read_bytes()
    with zipfile.ZipFile(path) as old:
        big = old.getinfo("assets/b")
        entry = content[old.start_dir :]
    start = entry.index(b"assets/b") - 46
    record = entry[start : start + 46 + 8]
    again = b"".join(record.replace(b"assets/b", b"assets/%c" % (99 + n)) for n in range(9))
    body, end = entry[: entry.index(b"PK\x05\x06")] + again, bytearray(entry[-22:])
    count = end[8] + 9
    end[8] = end[10] = count
    end[12:16] = len(body).to_bytes(4, "little")
    assert big.compress_size > 2000
    path.write_bytes(content[: -len(entry)] + body + bytes(end))


def with_size(path, name, size):
    """Make an archive say that a member has another size."""
    archive(path)
    content = bytearray(path.read_bytes())
    at = content.rindex(name.encode()) - 46
    content[at + 24 : at + 28] = size.to_bytes(4, "little")
    path.write_bytes(content)


HOSTILE_ARCHIVES = {
    "truncated": (truncated, "is not a whole zip archive"),
    "a zip bomb": (
        lambda path: archive(path, **{"config.json": bytes(1 << 27)}),
        r"is a zip bomb: member 'config\.json' is to become 134217728 bytes, of",
    ),
    "a zip bomb beside": (
        lambda path: archive(path, **{"assets/big": bytes(1 << 27)}),
        r"is a zip bomb: member 'assets/big' is to become 134217728 bytes, of",
    ),
    "many small members": (
        lambda path: archive(path, **{f"assets/{n}": bytes(1 << 20) for n in range(20)}),
        r"is a zip bomb: its members are to become 2\d+ bytes, of \d+; at most 100 times",
    ),
    "overlapping members": (overlapping, "is a zip bomb: its members overlap, or exceed the file"),
    "a size too small": (
        lambda path: with_size(path, "config.json", 3), r"'config\.json' is damaged"
    ),
    "a size too large": (
        lambda path: with_size(path, "config.json", 9999), r"'config\.json' is damaged"
    ),
    "a path upwards": (
        lambda path: archive(path, **{"../x": b""}), r"entry named '\.\./x', a path out of the file"
    ),
    "an absolute path": (
        lambda path: archive(path, **{"/x": b""}), "entry named '/x', a path out of the file"
    ),
    "no weights": (
        lambda path: archive(path, **{"model.weights.h5": None}),
        r"has no model\.weights\.h5; weights in other formats are not read here",
    ),
    "weights that are none": (
        lambda path: archive(path, **{"model.weights.h5": b"text"}), "is not a whole HDF5 file"
    ),
    "a config that is no JSON": (
        lambda path: archive(path, **{"config.json": b"{"}), r"config\.json is no JSON"
    ),
    "a config in no known code": (
        lambda path: archive(path, **{"config.json": b"\xff\xfe{"}), r"config\.json is no JSON"
    ),
    "a config that is no model": (
        lambda path: archive(path, **{"config.json": b"[1]"}), "is not the config of a Keras model"
    ),
    "a deeply nested config": (
        lambda path: archive(path, **{"config.json": b'{"a":' * 99999 + b"1" + b"}" * 99999}),
        r"config\.json is nested too deeply",
    ),
    "a name twice in the config": (
        lambda path: archive(path, **{"config.json": b'{"a": 1, "a": 2}'}),
        r"in config\.json, the name 'a' occurs twice",
    ),
    "another archive": (
        lambda path: archive(path, **{"config.json": None}),
        r"is a zip archive, but neither a PyTorch nor a Keras file",
    ),
}  # fmt: skip


def nested(path):
    begin, end = b'{"class_name":"Sequential","config":{"layers":[', b"]}}"
    archive(path, **{"config.json": 290 * begin + 290 * end})


HOSTILE_ARCHIVES["a model in a model in a model"] = (nested, "config.json is nested too deeply")


@pytest.mark.parametrize("case", HOSTILE_ARCHIVES)
def test_hostile_archives_are_refused_in_one_line(file, case):
    make, message = HOSTILE_ARCHIVES[case]
    make(file)
    refused(file, message, CheckpointError)


def external_link(file):
    file["layers/dense/vars/0"] = h5py.ExternalLink("other.h5", "/secret")


def soft_link(file):
    file.create_dataset("layers/dense/vars/1", data=np.ones(2))
    file["layers/dense/vars/0"] = h5py.SoftLink("/layers/dense/vars/1")


def external_data(file):
    external = [("/etc/passwd", 0, 64)]
    file.create_dataset("layers/dense/vars/0", (8,), "f8", external=external)


def virtual(file):
    layout = h5py.VirtualLayout((8,), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (8,))
    file.create_virtual_dataset("layers/dense/vars/0", layout)


def cycle(file):
    group = file.create_group("layers/dense")
    group["again"] = file["layers"]


def deep(file):
    group = file
    for _ in range(70):
        group = group.create_group("a")


def bomb(file):
    file.create_dataset("layers/dense/vars/0", (1 << 20, 1 << 20), "f4", chunks=(1024, 1024))


def packed_bomb(file):
    zeros = np.zeros((3000, 1000), np.float32)
    file.create_dataset("layers/dense/vars/0", data=zeros, compression="gzip", chunks=(3000, 1000))


def texts(file):
    file.create_dataset("layers/dense/vars/0", data=["a", "b"], dtype=h5py.string_dtype())


def references(file):
    data = file.create_dataset("layers/dense/vars/0", (1,), h5py.ref_dtype)
    data[0] = file.ref


HOSTILE_HDF5 = {
    "an external link": (external_link, r"'layers/dense/vars/0' is a link to elsewhere \(External"),
    "a soft link": (soft_link, r"'layers/dense/vars/0' is a link to elsewhere \(SoftLink\)"),
    "data in another file": (external_data, "'layers/dense/vars/0' is kept in another file"),
    "a virtual array": (virtual, "'layers/dense/vars/0' is kept in another file"),
    "a cycle": (cycle, "'layers/dense/again' is in the file under two names"),
    "too deep": (deep, "is more than 64 groups deep"),
    "an array far beyond the file": (bomb, "is to become 4398046511104 bytes of 0 that are stored"),
    "an array of zeros, packed": (packed_bomb, "is to become 12000000 bytes of"),
    "texts": (texts, "'layers/dense/vars/0' is of object, not of numbers"),
    "references": (references, "'layers/dense/vars/0' is of object, not of numbers"),
    "a type": (
        lambda file: file.__setitem__("layers/dense", np.dtype("f4")),
        "'layers/dense' is neither a group nor an array",
    ),
    "a path upwards": (
        lambda file: file.create_group("layers").create_group("..").create_dataset("x", data=[1.0]),
        r"entry named 'layers/\.\./x', a path out of the file",
    ),
    "complex numbers": (
        lambda file: file.create_dataset("layers/dense/vars/0", data=[1j]), "of complex128, not of"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_HDF5)
def test_hostile_hdf5_files_are_refused_in_one_line(weights, case):
    make, message = HOSTILE_HDF5[case]
    with h5py.File(weights, "w") as file:
        make(file)
    refused(weights, message, CheckpointError)


def test_truncated_hdf5_files_are_refused(weights):
    functional().save_weights(weights)
    whole = weights.read_bytes()
    for length in (8, 9, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        refused(weights, "is not a whole HDF5 file", CheckpointError)
    weights.write_bytes(whole[:7])
    with pytest.raises(CheckpointError, match="is no checkpoint that is known here"):
        open_checkpoint(weights)


def test_a_heap_in_which_the_library_would_search_forever_is_refused(weights):
    functional().save_weights(weights)
    content = bytearray(weights.read_bytes())
    heap = content.index(b"GCOL")
    free = heap + 16
    while content[free : free + 2] != b"\0\0":
        size = int.from_bytes(content[free + 8 : free + 16], "little")
        free += 16 + (size + 7) // 8 * 8
    content[free + 8 : free + 16] = bytes(8)
    weights.write_bytes(content)
    refused(weights, "is not a whole HDF5 file: HDF5's library takes", CheckpointError)
    content[heap + 8 : heap + 16] = b"\xff" * 8  # which the library itself refuses
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="/vars' is damaged: "):
        open_checkpoint(weights)


def test_damaged_compressed_data_is_refused(weights):
    with h5py.File(weights, "w") as file:
        data = file.create_dataset("layers/do_conv2d/vars/0", data=numbers(3, 3, 4, 4),
                                   compression="gzip", fletcher32=True)  # fmt: skip
        file.create_dataset("layers/do_conv2d/vars/depthwise_kernel", data=numbers(4, 9, 9))
        offset = data.id.get_chunk_info(0).byte_offset
    content = bytearray(weights.read_bytes())
    content[offset + 20 : offset + 60] = bytes(40)
    weights.write_bytes(content)
    refused(weights, r"'layers/do_conv2d/vars/0' is damaged", CheckpointError)


def test_weights_and_assets_are_compared_with_their_check_sums(file):
    model = functional()
    model.save(file)
    with zipfile.ZipFile(file, "a") as old:
        old.writestr("assets/words", "a few words")
    whole = file.read_bytes()
    kernel = keras.ops.convert_to_numpy(model.layers[-1].kernel).tobytes()
    parts = {"model.weights.h5": kernel, "assets/words": b"few", "metadata.json": b"keras_vers"}
    for name, part in parts.items():
        content = bytearray(whole)
        content[whole.index(part)] ^= 1
        file.write_bytes(content)
        refused(file, f"'{name}' is damaged: Bad CRC-32", CheckpointError)


def test_a_missing_h5py_is_told(weights, monkeypatch):
    with h5py.File(weights, "w") as file:
        file["a"] = [1.0]
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(CheckpointError, match=r"needs h5py to be read; install it with: python -m"):
        open_checkpoint(weights)


def test_names_with_more_digits_than_a_number_may_have(weights):
    with h5py.File(weights, "w") as file:
        for name in ("dense_" + "9" * 5000, "dense"):
            file.create_dataset(f"layers/{name}/vars/0", data=np.ones((2, 2), "float32"))
    with open_checkpoint(weights) as checkpoint:
        assert len(checkpoint.layers) == 2


@pytest.mark.parametrize("key", ["epsilon", "axis", "momentum"])
def test_a_number_in_a_config_that_no_float_holds(file, tmp_path, key):
    net = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.BatchNormalization()])
    net.save(file)
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    config = json.loads(members["config.json"])
    config["config"]["layers"][1]["config"][key] = 10**400
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(file, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)
    doconv("convert", file, tmp_path / "out.safetensors")
    doconv("inspect", file)
    doconv("verify", file, file)
