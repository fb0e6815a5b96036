"""PyTorch's files: state dicts in lists, copies without names, and tensors that are no arrays."""

from __future__ import annotations

import argparse
import codecs
import collections
import datetime
import fractions
import json
import pathlib
import types

import numpy as np
import pytest
from checkpoint_files import SPECS, numbers, only_line, pair, refused, state_dict
from command_line import BAD_FILE, DIFFERENT, IMPOSSIBLE, USAGE, doconv
from frameworks import fresh, need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint  # noqa: E402
from doconv_core.files.entries import CheckpointError  # noqa: E402

LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
# PyTorch tells that quantized tensors will go; there are files with them all the same.
QUANTIZED = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
KINDS = pytest.mark.parametrize("kind", ["quantized qint8", "sparse_coo float32"])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.pt"


def save(content, path, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def tensors(factor=1):
    arrays, _ = state_dict()
    return {name: factor * torch.from_numpy(array.copy()) for name, array in arrays.items()}


def load(path):
    return torch.load(path, weights_only=True)


def names_folded(state):
    assert set(state) == set(state_dict()[1])


@LEGACY
@pytest.mark.parametrize("kind", [list, tuple])
def test_state_dicts_in_lists_are_folded_as_those_in_dicts(file, tmp_path, kind, legacy):
    first, second = tensors(), tensors(2)
    content = {"models": kind([first, second, "note"]), "epochs": kind([1, 2])}
    save(content, file, legacy)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.parts == ("models/0", "models/1")
        assert checkpoint.others == ("models/2", "epochs")
        assert checkpoint.unfolded == ()
    report = fold_checkpoint(file, tmp_path / "out")
    paths = [f"models/{n}/{path}" for n in (0, 1) for path in SPECS]
    assert [change.path for change in report.changed] == paths
    assert report.left == ()
    found = load(tmp_path / "out")
    assert type(found["models"]) is kind
    assert found["epochs"] == kind([1, 2])
    assert found["models"][2] == "note"
    for state, given in zip(found["models"], (first, second), strict=False):
        names_folded(state)
        assert torch.equal(state["head.weight"], given["head.weight"])
    assert not torch.equal(found["models"][0]["plain.weight"], found["models"][1]["plain.weight"])


def test_a_list_may_be_all_that_a_file_holds(file, tmp_path):
    save([{"state_dict": tensors()}, 3], file)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.parts == ("",)
        assert "0/state_dict/head.weight" in checkpoint.entries
    fold_checkpoint(file, tmp_path / "out")
    found = load(tmp_path / "out")
    names_folded(found[0]["state_dict"])
    assert found[1] == 3


def test_what_is_reached_twice_stays_one(file, tmp_path):
    state = tensors()
    inner = [state]
    save({"models": [state, state], "again": inner, "pairs": (inner, inner)}, file)
    fold_checkpoint(file, tmp_path / "out")
    found = load(tmp_path / "out")
    first = found["models"][0]
    names_folded(first)
    assert found["models"][1] is first
    assert found["again"][0] is first
    assert found["pairs"][0] is found["pairs"][1] is found["again"]


@LEGACY
def test_lists_that_hold_themselves_are_visited_once(file, tmp_path, legacy):
    state, loop = tensors(), []
    loop += [loop, state, (loop, state)]
    save({"loop": loop}, file, legacy)
    report = fold_checkpoint(file, tmp_path / "out")
    assert len(report.changed) == len(SPECS)
    found = load(tmp_path / "out")["loop"]
    names_folded(found[1])
    assert found[0] is found[2][0] is found
    assert found[2][1] is found[1]


def average(state):
    """Return what an average keeps: the parameters, in order, without names."""
    return [value for name, value in state.items() if "running" not in name]


AVERAGES = {
    "a list": ({"shadow_params": average(tensors())}, "shadow_params"),
    "a list in a dict": ({"ema": {"decay": 0.9, "shadow": average(tensors())}}, "ema/shadow"),
    "a tuple": ({"mean": tuple(average(tensors()))}, "mean"),
    "numbers as keys": ({"mean": dict(enumerate(average(tensors())))}, "mean"),
    "state dicts by numbers": ({"runs": {7: tensors()}}, "runs/7"),
    "lists in lists": ({"mean": [[1], [average(tensors())]]}, "mean/1/0"),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_a_copy_of_the_model_without_names_is_told_of(file, tmp_path, case):
    more, path = AVERAGES[case]
    save({"state_dict": tensors(), **more}, file)
    report = fold_checkpoint(file, tmp_path / "out")
    assert [change.path for change in report.changed] == list(SPECS)
    (left,) = report.left
    assert (left.path, left.kind) == (path, "tensors")
    assert "in no state dict, as in an average that is kept as a list; a copy of the" in left.reason
    assert "tensors: " in str(report)


def test_the_command_tells_of_it_too(file, tmp_path):
    save({"state_dict": tensors(), "shadow_params": average(tensors())}, file)
    out = tmp_path / "out.pt"
    done = doconv("fold", file, out)
    assert "left 1;" in done.stdout.splitlines()[0]
    assert "tensors: 22 in no state dict" in done.stdout
    assert "    shadow_params\n" in done.stdout
    (left,) = json.loads(doconv("fold", file, out, "--force", "--json").stdout)["left"]
    assert left["path"] == "shadow_params"
    assert "stays over-parameterized: load it into the model, and fold that" in left["reason"]


@pytest.mark.parametrize(
    "more",
    [
        {"mean": [torch.zeros(4, 4), torch.zeros(3)]},  # of no D's shape
        {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3, 9, 9)}}}},
        {"loss": [0.5, 0.25], "shape": torch.Size([3, 9, 9])},
    ],
)
def test_other_tensors_are_none_of_a_copy(file, tmp_path, more):
    save({"state_dict": tensors(), **more}, file)
    assert fold_checkpoint(file, tmp_path / "out").left == ()
    ordinary = {"fc.weight": torch.zeros(2, 2), "conv.weight": torch.zeros(2, 2, 1, 1)}
    save({"state_dict": ordinary, "shadow_params": average(tensors())}, file)
    assert fold_checkpoint(file, tmp_path / "other").left == ()  # nothing was folded


def of_kind(kind, tensor):
    if kind.startswith("sparse"):
        return tensor.to_sparse()
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@LEGACY
@QUANTIZED
@KINDS
def test_other_kinds_of_tensors_are_carried_over(file, tmp_path, kind, legacy):
    special = of_kind(kind, torch.eye(3))
    save({**tensors(), "graph": special, "note": "text", "empty": torch.zeros(0)}, file, legacy)
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.others == ("note",)
        assert checkpoint.entries["graph"].dtype == kind
        assert [e.name for e in checkpoint.entries.values() if not e.is_plain] == ["graph"]
        with pytest.raises(CheckpointError, match=f"entry 'graph' is {kind}, not read here") as e:
            checkpoint.read("graph")
    only_line(e)
    fold_checkpoint(file, tmp_path / "out")
    found = load(tmp_path / "out")
    dense = found["graph"].to_dense() if found["graph"].is_sparse else found["graph"].dequantize()
    torch.testing.assert_close(dense, torch.eye(3))
    assert found["graph"].layout == special.layout
    assert found["graph"].dtype == special.dtype
    assert found["note"] == "text"
    names_folded({n: t for n, t in found.items() if n not in ("graph", "note", "empty")})


@QUANTIZED
@KINDS
@pytest.mark.parametrize("role", ["weight", "depthwise_weight"])
def test_no_layer_is_left_because_half_of_it_is_no_plain_array(file, role, kind):
    weight, depthwise, _ = map(torch.from_numpy, pair(SPECS["features.0"]))
    arrays = {"a.weight": weight, "a.depthwise_weight": depthwise}
    arrays[f"a.{role}"] = of_kind(kind, arrays[f"a.{role}"])
    save(arrays, file)
    refused(file, rf"layer 'a': named like an over-par.*of {kind}")


@QUANTIZED
@KINDS
@pytest.mark.parametrize("name", ["table", "fc.weight"])
@pytest.mark.parametrize("target", ["out.params", "out.pt", "out.safetensors"])
def test_what_is_no_plain_array_is_not_converted_in_silence(file, tmp_path, kind, name, target):
    kernel = torch.from_numpy(numbers(3, 3, 1, 1))
    save({"conv.weight": kernel, name: of_kind(kind, torch.eye(3))}, file)
    out = tmp_path / target
    error = rf"the entry '{name}' is {kind}, no plain array, and is not converted; --drop '{name}'"
    doconv("convert", file, out, code=IMPOSSIBLE, error=error)
    doconv("convert", file, out, "--keep", name, code=IMPOSSIBLE, error=error)
    assert list(tmp_path.iterdir()) == [file]
    done = doconv("convert", file, out, "--drop", name)
    assert f"left out: {name}" in done.stdout
    assert f"{name} is in {file} only" in doconv("verify", file, out, code=DIFFERENT).stdout


@QUANTIZED
def test_nothing_is_said_of_quantized_tensors_that_are_only_carried_over(file, tmp_path):
    """Not even for the first time in a process, when PyTorch would."""
    save({"a": torch.eye(2), "b": of_kind("quantized", torch.eye(2))}, file)
    command = ["-c", "from doconv_core.cli import main; main()", "fold", file]
    assert fresh(*command, tmp_path / "out").stderr == ""


@pytest.mark.parametrize(
    "name", ["upscaler", "optimus", "unscheduled", "scheduled", "a_scaler_net"]
)
def test_parts_of_words_do_not_decide_what_is_a_model(file, tmp_path, name):
    save({"generator": tensors(), name: tensors(2)}, file)
    report = fold_checkpoint(file, tmp_path / "out")
    folded = {change.path for change in report.changed}
    left = {left.path for left in report.left}
    assert folded >= {f"generator/{path}" for path in SPECS} or folded == {*SPECS}
    if name == "a_scaler_net":  # a word that says otherwise: named, at least
        assert left == {name}
    else:
        assert folded == {f"{part}/{path}" for part in ("generator", name) for path in SPECS}
        names_folded(load(tmp_path / "out")[name])


def of_each(key):
    """Return an optimizer's state that keeps the parameters by this key."""
    state = {number: {key: tensor} for number, tensor in enumerate(average(tensors()))}
    return {"optim": {"param_groups": [], "state": state}}


ELSEWHERE = {
    "a scaler": ({"scaler": tensors()}, "scaler"),
    "in an optimizer": ({"optimizer": {"opt": {}, "ema": average(tensors())}}, "optimizer/ema"),
    **{key: (of_each(key), "optim/state") for key in ("ax", "slow_weights", "old_p", "polyak")},
    "a set": ({"kept": {*average(tensors())}}, "kept"),
    "too deep": ({"a": [[[[[[[[[tensors()]]]]]]]]]}, "a/" + "/".join("0" * 9)),
    "arguments": ({"args": argparse.Namespace(best=tensors())}, "args/best"),
    "arrays": ({"numpy": {k: v.numpy() for k, v in tensors().items()}}, "numpy"),
}  # fmt: skip


@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_is_over_parameterized_anywhere_is_named(file, tmp_path, case):
    more, path = ELSEWHERE[case]
    save({"state_dict": tensors(), **more}, file)
    report = fold_checkpoint(file, tmp_path / "out")
    assert [change.path for change in report.changed] == list(SPECS)
    assert [left.path for left in report.left] == [path]


def test_tensors_beside_a_model_are_no_model(file, tmp_path):
    save({"model": tensors(), "confusion": torch.ones(3, 3)}, file)
    with open_checkpoint(file) as checkpoint:
        assert (checkpoint.parts, checkpoint.others) == (("",), ("confusion",))
    save({"model": tensors(2), "confusion": torch.ones(3, 3)}, tmp_path / "like.pt")
    doconv("convert", file, tmp_path / "out.pt", "--like", tmp_path / "like.pt")
    doconv("verify", file, tmp_path / "out.pt")


@pytest.mark.parametrize(("content", "where"), [({"optim": tensors()}, " in 'optim'"), ([], "")])
def test_where_arrays_are_is_told_where_there_is_no_state_dict(file, content, where):
    save(content, file)
    told = rf"; there are arrays{where}\." if where else r"8 deep\."
    refused(file, f"holds no state dict.*{told}", CheckpointError)


def test_what_an_average_counts_is_no_part_of_the_model(file, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save(net.state_dict(), file)
    average = tmp_path / "average.pt"
    save(torch.optim.swa_utils.AveragedModel(net).state_dict(), average)
    doconv("verify", file, average)
    doconv("convert", average, tmp_path / "out.params")
    doconv("convert", file, tmp_path / "out.pt", "--like", average)
    assert load(tmp_path / "out.pt").keys() == load(average).keys()


@pytest.mark.parametrize("name", [".pt", ".hidden.pt"])
def test_out_may_be_a_suffix_alone(file, tmp_path, name):
    save(tensors(), file)
    doconv("fold", file, tmp_path / name)
    names_folded(load(tmp_path / name))


def test_an_optimizer_s_moments_are_no_copy(file, tmp_path):
    state = {n: {"exp_avg": t, "step": 3} for n, t in enumerate(average(tensors()))}
    save({"state_dict": tensors(), "any": [{"param_groups": [], "state": state}]}, file)
    assert fold_checkpoint(file, tmp_path / "out").left == ()


INERT = {
    "args": argparse.Namespace(lr=0.1, of=argparse.Namespace(array=np.arange(6.0).reshape(2, 3).T)),
    "simple": types.SimpleNamespace(a=1, shape=3, dtype="float32"),
    "numbers": (np.float64(3.5), [np.int64(7)], {"k": np.complex64(1 + 2j)}, np.bool_(True)),
    "array": np.arange(6, dtype="float32").reshape(2, 3),
    "by columns": np.asfortranarray(np.ones((2, 3))),
    "empty": np.zeros((0, 3)),
    "texts": np.array(["a", "bcd"]),
    "type": np.dtype("float32"),
    "paths": [pathlib.PosixPath("/a/b"), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("d")],
    "default": collections.defaultdict(list, {"x": [1, np.float32(2)]}),
    "counter": collections.Counter("aab"),
    "dates": [
        datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc),
        datetime.date(2020, 1, 1), datetime.time(1, 2), datetime.timedelta(3),
    ],
    "slice": slice(1, None, 2),
    "bytes": [b"x\xff", bytearray(b"y"), b""],
    "other bytes": b"x\xff",
}  # fmt: skip


def same(a, b):
    """Return whether two objects are equal, of the same types throughout."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        is_default = isinstance(a, collections.defaultdict)
        known = not is_default or a.default_factory is b.default_factory
        return known and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (argparse.Namespace, types.SimpleNamespace)):
        return same(vars(a), vars(b))
    return a == b


@LEGACY
def test_what_trainers_save_beside_a_model_is_read_and_written_back(file, tmp_path, legacy):
    before = torch.serialization.get_safe_globals()
    save({"model": tensors(), **INERT}, file, legacy)
    fold_checkpoint(file, tmp_path / "out")
    found = torch.load(tmp_path / "out", weights_only=False)
    names_folded(found["model"])
    for name, value in INERT.items():
        assert same(found[name], value), name
    assert {*map(str, torch.serialization.get_safe_globals())} == {*map(str, before)}


class Made:
    """What unpickles into a call."""

    def __init__(self, *made):
        self.made = made

    def __reduce__(self):
        return self.made


class Attributes(dict):
    """A dict of its own class, as trainers keep their arguments in."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class Kept(list):
    """A list of its own class."""


@LEGACY
def test_dicts_and_lists_of_their_own_class_are_read_where_that_is_allowed(file, tmp_path, legacy):
    recent = collections.deque([1, np.float32(2)], maxlen=3)
    named = collections.OrderedDict(a=1)
    named.note = "x"
    kept = {
        "args": Attributes(lr=0.1, inner=Attributes(b=recent)), "list": Kept([1]), "od": named,
        "by name": collections.defaultdict(collections.deque, {"a": recent}), "class": Kept,
    }  # fmt: skip
    save({"model": tensors(), **kept}, file, legacy)
    refused(file, r"needs \S*Attributes to be read", CheckpointError)
    fold_checkpoint(file, tmp_path / "out", allow=[Attributes, Kept, collections.deque])
    found = torch.load(tmp_path / "out", weights_only=False)
    names_folded(found["model"])
    for name, value in kept.items():
        assert same(found[name], value), name
    assert found["args"].inner.b.maxlen == 3
    assert found["by name"]["a"] is found["args"].inner.b
    assert found["od"].note == "x"


class Unwritable:
    """What can be read, and not written."""

    def __reduce__(self):
        raise TypeError("not again")


def test_what_cannot_be_written_again_is_told(file):
    save({"model": tensors(), "more": Made(Unwritable, ())}, file)
    refused(file, "has what torch.save cannot .*: not again", CheckpointError, allow=[Unwritable])


REFUSED = {
    "a function": (Made(eval, ("1",)), "needs builtins.eval to be read"),
    "objects": (np.array([{}], dtype=object), "type 'O8' is neither one of numbers nor of texts"),
    "fields": (np.array([(1, 2)], dtype=[("a", "i4"), ("b", "f4")]), "type 'V8' is neither"),
    "much memory": (
        Made(np.core.multiarray._reconstruct, (np.ndarray, (1 << 40,), b"b")),
        "made otherwise than NumPy writes it",
    ),
    "another size": (
        Made(np.core.multiarray._reconstruct, (np.ndarray, (0,), b"b"),
             (1, (1 << 20,), np.dtype("f8"), False, b"few")),
        "has 3 bytes",
    ),
    "many bytes": (Made(bytearray, (1 << 31,)), "calls builtins.bytearray with other than bytes"),
    "bytes in turn": (
        Made(codecs.encode, (Made(codecs.encode, ("a" * 99, "hex")), "hex")),
        r"calls _codecs\.encode with other than text in Latin-1",
    ),
    "a tensor of nothing": (Made(torch.Tensor, (1 << 31,)), r"calls torch\.Tensor with arguments"),
    "a storage": (
        Made(torch.UntypedStorage, (1 << 31,)), r"calls torch\.storage\.UntypedStorage with argu"
    ),
    "a long list": (Made(list, ([1, 2],)), r"calls builtins\.list with arguments"),
    "a method of a dict": (
        Made(collections.OrderedDict, (), {"items": 1}), "OrderedDict the attribute 'items', which"
    ),
    "a method of a tensor": (
        Made(torch._utils._rebuild_parameter_with_state,
             (torch.ones(2, 2), True, collections.OrderedDict(), {"detach": 1})),
        "Parameter the attribute 'detach', which is one of the class's own",
    ),
    "a method of arguments": (
        argparse.Namespace(_get_kwargs=1), "Namespace the attribute '_get_kwargs'"
    ),
}  # fmt: skip


@LEGACY
@pytest.mark.parametrize("case", REFUSED)
def test_nothing_else_is_made_of_a_file(file, case, legacy):
    made, message = REFUSED[case]
    save({"model": tensors(), "more": made}, file, legacy)
    refused(file, message, CheckpointError)


def test_a_class_may_be_allowed_by_its_name(file, tmp_path):
    out = tmp_path / "out.pt"
    save({"model": tensors(), "third": fractions.Fraction(1, 3)}, file)
    refused(file, r"needs fractions\.Fraction to be read.*allow a class", CheckpointError)
    for allow in (["fractions.Fraction"], [fractions.Fraction]):
        fold_checkpoint(file, out, allow=allow, overwrite=True)
        assert torch.load(out, weights_only=False)["third"] == fractions.Fraction(1, 3)
    for name in ("no.Such", "builtins.eval", "fractions.Nope", "Fraction"):
        with pytest.raises(ValueError, match=f"allow must name classes .*'{name}' is none"):
            open_checkpoint(file, allow=[name])
    given = ["--allow", "fractions.Fraction"]
    doconv("fold", file, tmp_path / "folded.pt", code=BAD_FILE, error="--allow")
    doconv("fold", file, tmp_path / "folded.pt", "--allow", "no.Such", code=USAGE, error="--allow:")
    doconv("fold", file, tmp_path / "folded.pt", *given)
    doconv("verify", file, tmp_path / "folded.pt", *given)
    doconv("inspect", file, *given)
    doconv("cost", file, *given)
    doconv("convert", file, tmp_path / "m.safetensors", *given)


@pytest.mark.parametrize("around", [dict, lambda inner: {"run": [{"model": inner["model"]}, 3]}])
@LEGACY
def test_a_file_like_another_has_its_form(file, tmp_path, around, legacy):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    like, out = tmp_path / "like.pt", tmp_path / "out.pt"
    content = around({"model": other.state_dict(), "epoch": 3})
    beside = {"optimizer": optimizer.state_dict(), "ema": other.state_dict(), "args": {"lr": 0.1}}
    save(net.state_dict(), file)
    save({**content, **beside}, like, legacy)
    found = json.loads(doconv("convert", file, out, "--like", like, "--json").stdout)
    made = load(out)
    assert made.keys() == {*content, "args"}
    state = made["model"] if "model" in content else made["run"][0]["model"]
    other.load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert state._metadata == net.state_dict()._metadata
    assert made.get("epoch", 3) == 3
    assert made.get("run", [0, 3])[1] == 3
    assert "args" in found["kept"]
    assert found["not_kept"] == ["optimizer", "ema"]
    told = doconv("convert", file, out, "--like", like, "--force").stdout
    assert "left out of" in told
    assert "optimizer, ema" in told


@pytest.mark.parametrize(
    "wrapped", ["a.module.conv", "a._orig_mod.conv", "module.a._orig_mod.conv"]
)
def test_wrappers_within_names(file, tmp_path, wrapped):
    arrays = {"weight": torch.ones(2, 2, 3, 3), "bias": torch.ones(2)}
    other = tmp_path / "plain.pt"
    save({f"{wrapped}.{n}": t for n, t in arrays.items()} | {"b.weight": torch.ones(2, 2)}, file)
    save({f"a.conv.{n}": t for n, t in arrays.items()} | {"b.weight": torch.ones(2, 2)}, other)
    assert "3 arrays compared: equal" in doconv("verify", file, other).stdout
    out = tmp_path / "out.pt"
    doconv("convert", file, out, "--like", other)
    assert set(load(out)) == set(load(other))


def test_checkpoints_of_many_processes_are_named_as_what_they_are(tmp_path):
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").touch()
    part = folder / "__0_0.distcp"
    part.touch()
    with pytest.raises(IsADirectoryError, match=r"dcp_to_torch_save\('.*dcp', 'model.pt'\) makes"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"is a part of a checkpoint of torch\.distr"):
        open_checkpoint(part)
    doconv("inspect", folder, code=USAGE, error="folder of torch.distributed.checkpoint")


def test_complex_numbers_are_compared(file, tmp_path):
    other = tmp_path / "other.pt"
    values = torch.tensor([[1 + 2j, 3], [4, 5j]])
    save({"a.weight": values}, file)
    assert "1 array compared: equal" in doconv("verify", file, file).stdout
    save({"a.weight": values + torch.tensor([[0, 0], [1j, 0]])}, other)
    assert " 1,0\n" in doconv("verify", file, other, code=DIFFERENT).stdout
