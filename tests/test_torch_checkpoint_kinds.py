"""PyTorch's files: state dicts in lists, copies without names, and tensors that are no arrays."""

from __future__ import annotations

import json

import pytest
from checkpoint_files import SPECS, numbers, only_line, pair, refused, state_dict
from command_line import DIFFERENT, IMPOSSIBLE, doconv
from frameworks import fresh, need

need("torch")

import torch  # noqa: E402

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
