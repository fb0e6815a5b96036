"""Gluon's `.params` as checkpoints; against MXNet's own reader and writer where that is there."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from checkpoint_files import SPECS, numbers, pair, refused, state_dict
from equal import assert_close
from frameworks import need

from doconv_core import ConvSpec
from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint
from doconv_core.files.entries import CheckpointError
from doconv_core.files.gluon import V1, V2, V3, write_params
from doconv_core.files.layers import CONVOLUTION

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import BSConvS2D, BSConvU1D, DOConv2D  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from mxnet.gluon import nn  # noqa: E402


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.params"


def check_carried_over(file):
    """Assert that nothing is folded in a file, and that it is written as it is."""
    out = file.with_name("out")
    assert fold_checkpoint(file, out).changed == ()
    assert out.read_bytes() == file.read_bytes()


def network():
    net = nn.HybridSequential()
    net.add(DOConv2D(3, 8, 3, groups=1), nn.BatchNorm(in_channels=8), DOConv2D(8, 8, 3, groups=4))
    net.add(DOConv2D(8, 4, 1), nn.Dense(3, in_units=4))
    net.initialize()
    for seed, layer in enumerate((net[0], net[2])):
        shape = layer.depthwise_weight.shape
        layer.depthwise_weight.set_data(mx.nd.array(numbers(*shape, seed=seed)))
    net[1].running_mean.set_data(mx.nd.array(numbers(8)))
    return net


def ordinary():
    net = nn.HybridSequential()
    net.add(nn.Conv2D(8, 3, in_channels=3), nn.BatchNorm(in_channels=8))
    net.add(nn.Conv2D(8, 3, groups=4, in_channels=8), nn.Conv2D(4, 1, in_channels=8))
    net.add(nn.Dense(3, in_units=4))
    return net


def image():
    return mx.nd.array(numbers(2, 3, 5, 5))


def test_saved_parameters_load_into_the_ordinary_network(file, tmp_path):
    net, plain = network(), ordinary()
    net.save_parameters(str(file))
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.format == "Gluon parameters"
        kinds = {layer.path: layer.kind for layer in checkpoint.layers}
        assert kinds == {
            "0": "convolution", "1": "batch norm", "2": "convolution", "3": "convolution",
            "4": "linear",
        }  # fmt: skip
        assert [layer.spec for layer in checkpoint.layers if layer.over_parameterized] == [
            ConvSpec(3, 8, (3, 3)), ConvSpec(8, 8, (3, 3), 4)
        ]  # fmt: skip
        norm = next(layer for layer in checkpoint.layers if layer.kind == "batch norm")
        roles = {"weight": "1.gamma", "bias": "1.beta", "running_mean": "1.running_mean",
                 "running_var": "1.running_var"}  # fmt: skip
        assert norm.entries == roles
    report = fold_checkpoint(file, tmp_path / "out")
    assert [change.path for change in report.changed] == ["0", "2"]
    plain.load_parameters(str(tmp_path / "out"))
    assert_close(plain(image()), net(image()))


@pytest.mark.parametrize("how", ["export", "collect_params"])
def test_the_names_of_parameters_themselves_are_understood(file, tmp_path, how):
    net = network()
    net.hybridize()
    expected = net(image())
    if how == "export":
        net.export(str(tmp_path / "net"))
        (tmp_path / "net-0000.params").rename(file)
    else:
        net.collect_params().save(str(file))
    before = list(mx.nd.load(str(file)))
    report = fold_checkpoint(file, tmp_path / "out")
    after = mx.nd.load(str(tmp_path / "out"))
    assert list(after) == [name for name in before if not name.endswith("depthwise_weight")]
    paths = [net[i].name for i in (0, 2)]
    assert [change.path for change in report.changed] == paths
    plain = ordinary()
    plain.initialize()
    names = {p.name: q.name for p, q in zip_parameters(net, plain)}
    stripped = {name.removeprefix("arg:").removeprefix("aux:"): a for name, a in after.items()}
    plain.collect_params().load_dict({names[name]: a for name, a in stripped.items()})
    assert_close(plain(image()), expected)


def zip_parameters(net, plain):
    """Return the parameters of the two networks that have the same path."""
    found = plain._collect_params_with_prefix()
    return [
        (p, found[path]) for path, p in net._collect_params_with_prefix().items() if path in found
    ]


def test_a_layer_alone(file, tmp_path):
    layer = DOConv2D(4, 6, 3, groups=2)
    layer.initialize()
    layer.depthwise_weight.set_data(mx.nd.array(numbers(4, 9, 9)))
    layer.save_parameters(str(file))
    fold_checkpoint(file, tmp_path / "out")
    found = mx.nd.load(str(tmp_path / "out"))
    assert found.keys() == {"weight", "bias"}
    assert_close(found["weight"], layer.fold().weight.data())


@pytest.mark.parametrize("multiplier", [9, 12])
def test_channels_last(file, tmp_path, multiplier):
    layer = DOConv2D(8, 6, 3, groups=2, layout="NHWC", depth_multiplier=multiplier)
    layer.initialize()
    layer.depthwise_weight.set_data(mx.nd.array(numbers(8, 9, multiplier)))
    net = nn.HybridSequential()
    net.add(layer)
    net.save_parameters(str(file))
    sizes = {} if multiplier == 9 else {"0": (3, 3)}
    with open_checkpoint(file, kernel_sizes=sizes) as checkpoint:
        assert checkpoint.layers[0].layout == "O*I"
        assert checkpoint.layers[0].kernel_shape == (6, 4, 3, 3)
    fold_checkpoint(file, tmp_path / "out", kernel_sizes=sizes)
    found = mx.nd.load(str(tmp_path / "out"))["0.weight"]
    assert found.shape == (6, 3, 3, 4)
    assert_close(found, layer.fold().weight.data())


def test_a_layout_that_shapes_leave_open_is_that_of_the_file(file):
    weight, depthwise, _ = pair(ConvSpec(3, 4, (3, 3)))
    ambiguous = {"a.weight": weight, "a.depthwise_weight": depthwise}
    write_params(file, ambiguous)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.layers[0].layout == "OI*"
        assert "taken to be channels first" in checkpoint.layers[0].note
    last = {"b.weight": numbers(4, 3, 3, 5), "b.depthwise_weight": numbers(5, 9, 9)}
    write_params(file, ambiguous | last)
    with open_checkpoint(file) as checkpoint:
        assert [layer.layout for layer in checkpoint.layers] == ["O*I", "O*I"]
        assert not checkpoint.layers[0].note


def test_a_kernel_size_that_is_not_in_the_file_must_be_given(file, tmp_path):
    weight, depthwise, kernel = pair(ConvSpec(4, 6, (3, 3), 2, 12))
    write_params(file, {"conv_weight": weight, "conv_depthwise_weight": depthwise})
    refused(file, r"layer 'conv': its kernel size is not in the file")
    fold_checkpoint(file, tmp_path / "out", kernel_sizes={"*": (3, 3)})
    np.testing.assert_allclose(mx.nd.load(str(tmp_path / "out"))["conv_weight"].asnumpy(), kernel,
                               atol=1e-6)  # fmt: skip


def test_an_ordinary_depthwise_layer_by_that_name_is_none_of_ours(file):
    arrays = {"block_depthwise_weight": numbers(8, 1, 3, 3), "block_weight": numbers(8, 8, 1, 1)}
    write_params(file, arrays)
    with open_checkpoint(file) as checkpoint:
        assert [layer.path for layer in checkpoint.layers] == ["block_depthwise", "block"]
    check_carried_over(file)


@pytest.mark.parametrize("cls", [BSConvU1D, BSConvS2D])
@pytest.mark.parametrize("bias", [True, False])
def test_the_depthwise_part_of_a_bsconv_by_its_flat_name(file, cls, bias):
    layer = cls(4, 8, 3, use_bias=bias, prefix="bs_")
    layer.initialize()
    layer.collect_params().save(str(file))
    with open_checkpoint(file) as checkpoint:
        *pointwise, depthwise = checkpoint.layers
        assert {found.kind for found in checkpoint.layers} == {CONVOLUTION}
        assert (depthwise.path, depthwise.note) == ("bs_depthwise", "")
        assert depthwise.kernel_shape == (8, 1, *layer.depthwise.weight.shape[2:])
        assert [found.path for found in pointwise] == [f"bs_{n}" for n in layer.spec.names[:-1]]
    check_carried_over(file)


def test_a_d_without_its_w_is_no_convolution(file):
    write_params(file, {"conv_depthwise_weight": numbers(4, 9, 9), "conv_bias": numbers(6)})
    refused(file, "named like an over-parameterized layer, but its entri")


TYPES = ["float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1,), (2, 3), (0, 2), (2, 1, 3, 1, 2)])
def test_what_mxnet_writes_is_read(file, dtype, shape):
    if 0 in shape:
        with mx.util.np_shape(True):
            array = mx.nd.zeros(shape, dtype=dtype)
            mx.nd.save(str(file), {"a": array})
    else:
        array = mx.nd.array((5 * numbers(*shape)).astype(dtype), dtype=dtype)
        mx.nd.save(str(file), {"a": array, "b": array})
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.entries["a"].shape == shape
        assert checkpoint.entries["a"].dtype == dtype
        np.testing.assert_array_equal(checkpoint.read("a"), array.asnumpy())


def test_scalars_of_numpy_mode(file):
    mx.npx.set_np()
    try:
        mx.npx.save(str(file), {"scalar": mx.np.array(2.5), "b": mx.np.ones((2, 2))})
    finally:
        mx.npx.reset_np()
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.entries["scalar"].shape == ()
        assert checkpoint.read("scalar") == 2.5
    check_carried_over(file)


def test_bfloat16(file):
    upper_halves = np.array([1.5, -2.25], np.float32).view("<u2")[1::2]
    file.write_bytes(listed(record(dtype=12, data=upper_halves.tobytes())))
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.entries["a"].dtype == "bfloat16"
        np.testing.assert_array_equal(checkpoint.read("a"), np.array([1.5, -2.25], np.float32))


def test_lists_without_names(file):
    mx.nd.save(str(file), [mx.nd.ones((2, 2)), mx.nd.zeros((3,))])
    with open_checkpoint(file) as checkpoint:
        assert list(checkpoint.entries) == ["0", "1"]
    check_carried_over(file)


@pytest.mark.parametrize("kind", ["row_sparse", "csr"])
def test_sparse_arrays_are_carried_over_and_not_read(file, kind):
    sparse = mx.nd.array([[0, 1], [0, 0], [2, 3]]).tostype(kind)
    sparse.wait_to_read()  # MXNet writes its shape before it waits for it
    arrays = {"s": sparse, "a": mx.nd.ones((2, 2))}
    mx.nd.save(str(file), arrays)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.entries["s"].shape == (3, 2)
        np.testing.assert_array_equal(checkpoint.read("a"), np.ones((2, 2)))
        with pytest.raises(CheckpointError, match="entry 's' is sparse, which is not read here"):
            checkpoint.read("s")
    check_carried_over(file)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_written_mxnet_reads(file, dtype):
    arrays = {"a": (5 * numbers(2, 3)).astype(dtype), "é": np.ones((1, 1, 2), dtype)}
    write_params(file, arrays)
    found = mx.nd.load(str(file))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].asnumpy().dtype == array.dtype
        np.testing.assert_array_equal(found[name].asnumpy(), array)
    saved = file.read_bytes()
    mx.nd.save(str(file), {name: mx.nd.array(a, dtype=dtype) for name, a in arrays.items()})
    assert file.read_bytes() == saved


def test_what_gluon_has_no_room_for_is_not_written(file):
    with pytest.raises(TypeError, match="entry 'a' is complex64, which Gluon's files lack"):
        write_params(file, {"a": np.ones(2, np.complex64)})
    with pytest.raises(TypeError, match="entry 'a' has no dimension, which Gluon's files lack"):
        write_params(file, {"a": np.ones(())})


def older(arrays, version):
    """Return a file as MXNet wrote it before storage types, and before 64-bit shapes."""
    content = struct.pack("<QQQ", 0x112, 0, len(arrays))
    for array in arrays.values():
        if version == V1:
            content += struct.pack(f"<Ii{array.ndim}q", V1, array.ndim, *array.shape)
        else:
            content += struct.pack(f"<I{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<iii", 1, 0, 0) + array.tobytes()
    content += struct.pack("<Q", len(arrays))
    for name in arrays:
        content += struct.pack("<Q", len(name)) + name.encode()
    return content


@pytest.mark.parametrize("version", [0, V1])
def test_older_files_are_folded_in_their_own_version(file, tmp_path, version):
    arrays, folded = (
        {k: v for k, v in part.items() if v.dtype == np.float32} for part in state_dict()
    )
    file.write_bytes(older(arrays, version))
    loaded = mx.nd.load(str(file))
    with open_checkpoint(file) as checkpoint:
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.read(name), array)
            np.testing.assert_array_equal(loaded[name].asnumpy(), array)
    report = fold_checkpoint(file, tmp_path / "out")
    assert {change.path for change in report.changed} == set(SPECS)
    content = (tmp_path / "out").read_bytes()
    found = mx.nd.load(str(tmp_path / "out"))
    assert content == older({name: array.asnumpy() for name, array in found.items()}, version)
    for name, array in folded.items():
        np.testing.assert_allclose(found[name].asnumpy(), array, atol=1e-5)


def record(shape=(2,), dtype=0, version=V2, storage=0, data=b"", ndim=None):
    head = struct.pack("<I", version)
    if version in (V2, V3):
        head += struct.pack("<i", storage)
    ndim = len(shape) if ndim is None else ndim
    head += struct.pack(f"<i{len(shape)}q", ndim, *shape)
    return head + struct.pack("<iii", 1, 0, dtype) + data


def listed(*records, count=None, names=("a",), named=None, lengths=None):
    content = struct.pack("<QQQ", 0x112, 0, len(records) if count is None else count)
    content += b"".join(records) + struct.pack("<Q", len(names) if named is None else named)
    for index, name in enumerate(names):
        size = len(name) if lengths is None else lengths[index]
        content += struct.pack("<Q", size) + name.encode()
    return content


GOOD = record(data=bytes(8))
HOSTILE = {
    "truncated": (listed(GOOD)[:-3], "bytes are said to follow, beyond the file's end"),
    "truncated data": (listed(GOOD)[:50], "bytes are said to follow, beyond the file's end"),
    "a length beyond the file": (listed(record((1 << 40,))), "4398046511104 bytes are said to"),
    "a shape that overflows": (listed(record((1 << 62, 1 << 62))), "bytes are said to follow, bey"),
    "a negative size": (listed(record((-2,), data=bytes(8))), r"an array has the shape \(-2,\)"),
    "too many dimensions": (listed(record(ndim=1 << 30)), "is said to have 1073741824 dimensions"),
    "negative dimensions": (listed(record(ndim=-7)), "is said to have -7 dimensions"),
    "an unknown type": (listed(record(dtype=99, data=bytes(8))), "the unknown element type 99"),
    "a negative type": (listed(record(dtype=-1, data=bytes(8))), "the unknown element type -1"),
    "an unknown storage": (listed(record(storage=9, data=bytes(8))), "unknown storage type 9"),
    "too many arrays": (listed(GOOD, count=1 << 60), "is said to hold 1152921504606846976 arrays"),
    "more arrays than there are": (listed(GOOD, count=2), "no whole Gluon file"),
    "fewer names": (listed(GOOD, GOOD), "there are 1 names for 2 arrays"),
    "a huge number of names": (listed(GOOD, named=1 << 60), "there are 1152921504606846976 names"),
    "a name beyond the file": (listed(GOOD, lengths=[99]), "99 bytes are said to follow, beyond"),
    "a huge name": (listed(GOOD, lengths=[1 << 62]), "a name is said to have 461168601842738790"),
    "more behind the names": (listed(GOOD) + b"more", "4 bytes follow the names"),
    "a name twice": (listed(GOOD, GOOD, names=("a", "a")), "has the name 'a' twice"),
    "a path upwards": (listed(GOOD, names=("../a",)), r"entry named '\.\./a', a path out of"),
    "one behind a line's end": (listed(GOOD, names=("a\n/..",)), r"'a\\n/\.\.', a path out of"),
    "an absolute path": (listed(GOOD, names=("/a",)), "entry named '/a', a path out of"),
    "no UTF-8": (listed(GOOD).replace(b"a", b"\xff"), "a name is not in UTF-8"),
    "another number": (b"\x12\x01" + bytes(6) + b"\1" * 8, "is no whole Gluon file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_and_hostile_files_are_refused_in_one_line(file, case):
    content, message = HOSTILE[case]
    file.write_bytes(content)
    refused(file, message, CheckpointError)


def test_every_truncation_is_refused(file):
    whole = listed(GOOD, record((1, 2), data=bytes(8)), names=("a", "bc"))
    file.write_bytes(whole)
    with open_checkpoint(file) as checkpoint:
        assert list(checkpoint.entries) == ["a", "bc"]
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(file)
