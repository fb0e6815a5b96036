"""PyTorch's files as checkpoints: state dicts at any depth, folded without the model's code."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from checkpoint_files import SPECS, numbers, pair, refused, state_dict
from command_line import DIFFERENT, doconv
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from doconv_core import ConvSpec  # noqa: E402
from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint  # noqa: E402
from doconv_core.files.entries import CheckpointError  # noqa: E402
from doconv_torch import DOConv2d  # noqa: E402

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.pt"


def save(content, path, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def tensors(arrays, prefix=""):
    return OrderedDict((prefix + name, torch.from_numpy(a.copy())) for name, a in arrays.items())


def load(path):
    return torch.load(path, weights_only=True)


def folded(content, file, legacy=False, **options):
    """Save, fold, and return the report and what is in the new file, which may be there already."""
    save(content, file, legacy)
    out = file.with_name("out")
    return fold_checkpoint(file, out, overwrite=True, **options), load(out)


def network():
    torch.manual_seed(0)
    layers = [DOConv2d(3, 8, 3, groups=1), nn.BatchNorm2d(8), DOConv2d(8, 8, 3, groups=4)]
    net = nn.Sequential(*layers, DOConv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 3))
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.depthwise_weight)
    return net.eval()


def ordinary():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4)]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 3)).eval()


@LEGACY
def test_a_folded_file_loads_into_the_ordinary_network(file, tmp_path, legacy):
    net, plain, x = network(), ordinary(), torch.rand(2, 3, 5, 5)
    save(net.state_dict(), file, legacy)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.format == ("PyTorch (legacy)" if legacy else "PyTorch")
        assert checkpoint.others == ()
    report = fold_checkpoint(file, tmp_path / "out")
    assert [change.path for change in report.changed] == ["0", "2"]
    folded = load(tmp_path / "out")
    plain.load_state_dict(folded)
    torch.testing.assert_close(plain(x), net(x), rtol=1e-5, atol=1e-6)
    assert list(folded) == [k for k in net.state_dict() if not k.endswith("depthwise_weight")]
    assert zipfile.is_zipfile(tmp_path / "out") is not legacy
    assert folded._metadata == net.state_dict()._metadata


@LEGACY
def test_everything_else_in_a_training_checkpoint_stays(file, legacy):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    state = OrderedDict((f"module.{name}", value) for name, value in net.state_dict().items())
    averaged = {name: 2 * value for name, value in net.state_dict().items()}
    content = {
        "epoch": 3,
        "state_dict": state,
        "ema": {"module": averaged, "decay": 0.9},
        "optimizer": optimizer.state_dict(),
        "args": {"lr": 0.1, "milestones": [1, 2], "name": "resnet"},
        1: "one",
    }
    report, found = folded(content, file, legacy)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.parts == ("", "ema/module")
        assert checkpoint.others == ("ema/decay", "epoch", "optimizer", "args", "1")
        assert checkpoint.layers[0].path == "0"
        assert checkpoint.layers[0].entries["weight"] == "state_dict/module.0.weight"
    assert [c.path for c in report.changed] == ["0", "2", "ema/module/0", "ema/module/2"]
    assert list(found) == list(content)
    assert {k: found[k] for k in ("epoch", "args")} == {k: content[k] for k in ("epoch", "args")}
    assert found["ema"]["decay"] == 0.9
    assert type(found["state_dict"]) is OrderedDict
    kernel = net[2].fold().weight
    torch.testing.assert_close(found["state_dict"]["module.2.weight"], kernel.detach())
    torch.testing.assert_close(found["ema"]["module"]["1.weight"], averaged["1.weight"])
    assert "2.depthwise_weight" not in found["ema"]["module"]
    before, after = content["optimizer"], found["optimizer"]
    assert after["param_groups"] == before["param_groups"]
    for key, value in before["state"].items():
        torch.testing.assert_close(after["state"][key], value)


@pytest.mark.parametrize("keys", [(), ("model",), ("a", "b", "net")])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_state_dicts_lie_at_any_depth(file, keys, wrapper):
    arrays, ordinary = state_dict()
    content = tensors(arrays, wrapper)
    for key in reversed(keys):
        content = {key: content}
    _, found = folded(content, file)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.parts == ("",)
        assert {layer.path for layer in checkpoint.layers} >= SPECS.keys()
    for key in keys:
        assert list(found) == [key]
        found = found[key]
    assert set(found) == {wrapper + name for name in ordinary}
    for name, expected in ordinary.items():
        np.testing.assert_allclose(found[wrapper + name], expected, atol=1e-5)


def test_several_models_keep_their_names(file):
    arrays = tensors(state_dict()[0])
    save({"generator": arrays, "critic": arrays.copy(), "critic_ema": arrays.copy()}, file)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.parts == ("generator", "critic", "critic_ema")


@pytest.mark.parametrize("name", ["ema", "model_ema", "state_dict_ema", "EMA", "swa", "averaged"])
def test_an_averaged_copy_comes_second(file, name):
    arrays = tensors(state_dict()[0])
    save({name: arrays, "weights": arrays.copy()}, file)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.parts == ("", name)
        assert checkpoint.layers[0].entries["weight"].startswith("weights/")


def test_shared_tensors_and_dicts_stay_shared(file):
    weight, depthwise, kernel = map(torch.from_numpy, pair(SPECS["features.2"]))
    other = torch.from_numpy(numbers(6, 6))
    one = {"a.weight": weight, "a.depthwise_weight": depthwise, "c.weight": other}
    one |= {"b.weight": weight, "b.depthwise_weight": depthwise, "d.weight": other}
    _, found = folded({"model": one, "same": one, "best": dict(one)}, file)
    assert found["same"] is found["model"]
    first = found["model"]
    torch.testing.assert_close(first["a.weight"], kernel)
    for left, right in (("a.weight", "b.weight"), ("c.weight", "d.weight")):
        assert first[left].data_ptr() == first[right].data_ptr()
        assert first[left].data_ptr() == found["best"][right].data_ptr()
    del one["b.depthwise_weight"]
    one["b.depthwise_weight"] = depthwise + 1
    _, found = folded(one, file)
    assert not torch.equal(found["a.weight"], found["b.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_are_kept(file, dtype):
    arrays, ordinary = state_dict()
    content = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors(arrays).items()}
    _, found = folded(content, file)
    for path in SPECS:
        assert found[f"{path}.weight"].dtype == dtype
        expected = torch.from_numpy(ordinary[f"{path}.weight"]).to(dtype)
        torch.testing.assert_close(found[f"{path}.weight"], expected, rtol=0.1, atol=0.1)
    assert found["norm.num_batches_tracked"].dtype == torch.int64


def test_parameters_and_memory_formats_are_kept(file):
    weight, depthwise, _ = map(torch.from_numpy, pair(SPECS["features.0"]))
    last = weight.contiguous(memory_format=torch.channels_last)
    frozen = nn.Parameter(last, requires_grad=False)
    found = folded({"weight": frozen, "depthwise_weight": nn.Parameter(depthwise)}, file)[1][
        "weight"
    ]
    assert isinstance(found, nn.Parameter)
    assert not found.requires_grad
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_large_depth_multiplier_needs_the_kernel_size(file, tmp_path):
    layer = DOConv2d(4, 6, 3, groups=2, depth_multiplier=12)
    nn.init.normal_(layer.depthwise_weight)
    save({"state_dict": {"conv.weight": layer.weight, **layer.state_dict(prefix="conv.")}}, file)
    refused(file, r"layer 'conv': its kernel size is not in the file")
    fold_checkpoint(file, tmp_path / "out", kernel_sizes={"conv": (3, 3)})
    found = load(tmp_path / "out")["state_dict"]["conv.weight"]
    torch.testing.assert_close(found, layer.fold().weight.detach())


def test_an_archive_that_was_packed_again_is_read_right(file, tmp_path):
    arrays, folded = state_dict()
    save(tensors(arrays), tmp_path / "plain")
    packed = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain") as old, packed as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    fold_checkpoint(file, tmp_path / "out")
    found = load(tmp_path / "out")
    for name, expected in folded.items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5)


class Evil:
    """What unpickles into a call that leaves a trace."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def with_member(path, name, data):
    """Rewrite the archive at `path` with another content of one member."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    found = next((key for key in members if key.endswith(name)), name)
    with zipfile.ZipFile(path, "w") as archive:
        for key, content in (members | {found: data}).items():
            archive.writestr(key, content)


def scripted(path):
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 3), torch.rand(1, 1, 3, 3)), path)


def truncated(path):
    save(tensors(state_dict()[0]), path)
    path.write_bytes(path.read_bytes()[:-2000])


def truncated_legacy(path):
    save(tensors(state_dict()[0]), path, legacy=True)
    path.write_bytes(path.read_bytes()[:-2000])


def huge_storage(path):
    """A legacy file whose one tensor claims an absurd number of elements."""
    save({"a": torch.zeros(77, 1)}, path, legacy=True)
    content = path.read_bytes()
    assert content.count(b"K\x4d") >= 2  # 77, as the pickle has it
    path.write_bytes(content.replace(b"K\x4d", b"\x8a\x07" + (1 << 54).to_bytes(7, "little")))


def expanded(path):
    save({"a": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)


HOSTILE = {
    "a whole model": (
        lambda path: torch.save(network(), path),
        "needs torch.nn.modules.container.Sequential to be read; only tensors and plain containers",
    ),
    "code": (lambda path: save({"a": Evil()}, path), r"needs \w+\.system to be read"),
    "code, legacy": (lambda path: save({"a": Evil()}, path, True), r"needs \w+\.system to be read"),
    "code in a plain pickle": (
        lambda path: path.write_bytes(pickle.dumps(Evil())),
        r"a pickle that torch.save did not write, and needs '\w+\.system'; unpickling could run",
    ),
    "code in an old pickle": (
        lambda path: path.write_bytes(pickle.dumps(Evil(), protocol=2)),
        r"a pickle that torch.save did not write, and needs '\w+\.system'",
    ),
    "a pickle that breaks off": (lambda path: path.write_bytes(b"\x80\x04\x95"), "a pickle that"),
    "truncated": (truncated, "is not a whole zip archive"),
    "truncated, legacy": (truncated_legacy, "is no whole PyTorch file"),
    "a pickle that is none": (
        lambda path: (save({"a": torch.zeros(2, 2)}, path), with_member(path, "data.pkl", b"\x80")),
        "is no whole PyTorch file",
    ),
    "a storage that is missing": (
        lambda path: (save({"a": torch.zeros(2, 2)}, path), with_member(path, "data/0", b"")),
        "is no whole PyTorch file",
    ),
    "a huge storage": (huge_storage, "is no whole PyTorch file"),
    "another pickle protocol": (
        lambda path: torch.save({"a": torch.zeros(2, 2)}, path, pickle_protocol=4),
        r"is pickled in another way than torch\.save does by default",
    ),
    "a script": (scripted, "is a TorchScript archive, whose layers are code"),
    "no state dict": (lambda path: save([1, 2], path), "holds no state dict"),
    "a bare tensor": (lambda path: save(torch.zeros(2, 2), path), "holds no state dict"),
    "a path upwards": (
        lambda path: save({"../a": torch.zeros(2, 2)}, path), r"entry named '\.\./a', a path out of"
    ),
    "two by one name": (
        lambda path: save({"a": {"b/c": torch.zeros(2, 2)}, "a/b": {"c": torch.zeros(2, 2)}}, path),
        "has the name 'a/b/c' twice",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_and_hostile_files_are_refused_in_one_line(file, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, message = HOSTILE[case]
    make(file)
    refused(file, message, CheckpointError)


def test_a_tensor_that_repeats_its_few_numbers_is_not_unrolled(file):
    expanded(file)
    with (
        open_checkpoint(file) as checkpoint,
        pytest.raises(CheckpointError, match=r"entry 'a' has the shape \(1048576, 1048576\), and"),
    ):
        checkpoint.read("a")


def test_dicts_that_hold_themselves_are_visited_once(file):
    content = {str(number): {} for number in range(20)}
    for inner in content.values():
        inner |= content
    content["model"] = {"weight": torch.zeros(2, 2)}
    save(content, file)
    with open_checkpoint(file) as checkpoint:
        assert list(checkpoint.entries) == ["model/weight"]


def test_a_missing_framework_is_told(file, monkeypatch):
    save({"a": torch.zeros(2, 2)}, file)

    def missing(self):
        raise ImportError("doconv_torch needs torch, which is not installed.")

    monkeypatch.setattr("doconv_core.files.pytorch._backend", lambda: missing(None))
    with pytest.raises(CheckpointError, match=r"is a PyTorch file\. doconv_torch needs torch"):
        open_checkpoint(file)


def test_ranks_other_than_two(file):
    spec = ConvSpec(2, 3, (4,))
    weight, depthwise, kernel = pair(spec)
    _, found = folded(tensors({"weight": weight, "depthwise_weight": depthwise}), file)
    np.testing.assert_allclose(found["weight"], kernel, atol=1e-6)


def test_verify_of_complex_numbers(tmp_path):
    first, second = torch.tensor([1 + 2j, 3]), torch.tensor([1 + 2j, 3 + 1j])
    for name, values in (("a.pt", first), ("b.pt", second)):
        save({"fc.weight": torch.ones(2, 2), "phase": values}, tmp_path / name)
    assert "equal" in doconv("verify", tmp_path / "a.pt", tmp_path / "a.pt").stdout
    text = doconv("verify", tmp_path / "a.pt", tmp_path / "b.pt", code=DIFFERENT).stdout
    assert re.search(r"phase +2 +1 +0\.316 +0 +1\n", text)
