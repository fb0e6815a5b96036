"""This package's layers of branches with batch norms in files: folded as the layers themselves."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from checkpoint_files import refused
from command_line import BAD_FILE, DIFFERENT, USAGE, doconv
from contract import case
from contract_normed import CASES, NormedCase
from equal import assert_close, assert_same
from frameworks import need
from safetensors.numpy import load_file, save_file

from doconv_core import CheckpointError, fold_checkpoint, read_state, write_state
from doconv_core.files.normed import TOLD_BY, UNTOLD
from doconv_core.kinds.normed import RULES

need("torch")

import torch  # noqa: E402
from safetensors.torch import save_file as save_tensors  # noqa: E402
from torch import nn  # noqa: E402

import doconv_torch as package  # noqa: E402

EXACT = 1e-6  # two ways to the same float32 result
# Of as many channels, but no input among the branches, and in groups.
MORE = [
    NormedCase(rule, case(4, 4, (3, 3), (7, 8), padding=1, stride=2, groups=2))
    for rule in ("repvgg", "mobileone", "acnet", "dbb")
]
TOLD = [c for c in (*CASES, *MORE) if c.rule != "qarepvgg" or c.conv.spec.out_channels != 4]


def trained(case, **options):
    """Return a layer with numbers as after training, in evaluation mode."""
    torch.manual_seed(0)
    conv, cls = case.conv, getattr(package, f"NormedConv{case.conv.spec.rank}d")
    layer = cls(
        conv.spec.in_channels, conv.spec.out_channels, conv.spec.kernel_size, conv.stride,
        tuple(before for before, _ in conv.padding), conv.dilation, conv.spec.groups, conv.bias,
        rule=case.rule, **case.options, **options,
    )  # fmt: skip
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value.normal_()
    return layer.eval()


def repvgg(outputs=4, **options):
    return trained(NormedCase("repvgg", case(4, outputs, (3, 3), (7, 7), padding=1)), **options)


def arrays_of(layer):
    return {name: value.numpy() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("case", TOLD, ids=str)
def test_a_file_is_folded_as_the_layer_is(case, tmp_path):
    model = nn.Sequential(nn.Identity(), trained(case), nn.Linear(3, 2))
    expected = package.fold(model).model.state_dict()
    file, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_tensors(model.state_dict(), file)
    report = fold_checkpoint(file, out)
    (change,) = report.changed
    size = "×".join(map(str, case.conv.spec.kernel_size))
    assert change.path == "1"
    assert change.before.startswith(f"{case.rule} block of ")
    assert change.after == f"ordinary convolution, {size}"
    assert_close(load_file(out), arrays_of(package.fold(model).model), EXACT)

    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "in.pt")
    fold_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")
    assert found["epoch"] == 3
    assert [*found["model"]] == [*expected]
    assert_close(found["model"], expected, EXACT)
    doconv("verify", tmp_path / "in.pt", tmp_path / "out.pt")


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_a_state_is_folded_as_the_layer_is(case, tmp_path):
    """It tells which branches there are, and the epsilon, and stays a state."""
    layer = trained(case, bn_options={"eps": 1e-3})
    model = nn.Sequential(nn.Identity(), layer, nn.Linear(3, 2)).eval()
    file, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write_state(package.export_state(model), file)
    (change,) = fold_checkpoint(file, out).changed
    assert "epsilon" not in change.before
    found, expected = read_state(out), package.export_state(package.fold(model).model)
    assert found.layers == expected.layers
    assert_close(found.arrays, expected.arrays, EXACT)
    doconv("verify", file, out)


def test_the_epsilon_is_told_where_the_file_does_not_and_can_be_given(tmp_path):
    layer = repvgg(bn_options={"eps": 1e-2})
    file, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(layer.state_dict(), file)
    assert "repvgg block of 3 branches, epsilon 1e-05" in doconv("fold", file, out).stdout
    told = "the file does not tell the epsilon of the blocks' batch norms: "
    assert f"{told}1e-05\n" in doconv("inspect", file).stdout
    given = "--epsilon", "0.01"
    assert f"{told}0.01\n" in doconv("inspect", file, *given).stdout
    (row,) = json.loads(doconv("inspect", file, *given, "--json").stdout)["layers"]
    assert row["block"]["epsilon"] == 0.01
    doconv("verify", file, out)
    doconv("verify", file, out, *given, code=DIFFERENT)
    text = doconv("fold", file, out, *given, "--force").stdout
    assert "repvgg block of 3 branches, epsilon 0.01" in text
    assert_close(torch.load(out), layer.fold().state_dict(), EXACT)
    doconv("verify", file, out, *given)
    doconv("verify", out, file, *given)
    assert_same(torch.load(file), layer.state_dict())

    none = "has no block of branches whose epsilon it does not tell; received epsilon=0.01"
    state = tmp_path / "in.safetensors"
    write_state(package.export_state(layer), state)
    for each in (out, state):
        doconv("fold", each, tmp_path / "other.pt", *given, code=USAGE, error=none)
        doconv("verify", each, each, *given, code=USAGE, error=none)
    assert (
        json.loads(doconv("inspect", state, "--json").stdout)["layers"][0]["block"]["epsilon"]
        is None
    )
    for wrong in ("0", "-1", "inf", "nan"):
        error = f"epsilon must be a number above 0; received epsilon={float(wrong)}"
        doconv("inspect", file, "--epsilon", wrong, code=USAGE, error=error)
    with pytest.raises(ValueError, match="above 0; received epsilon=True"):
        fold_checkpoint(file, out, epsilon=True, overwrite=True)


def test_all_rules_are_among_these():
    assert {case.rule for case in TOLD} == {*TOLD_BY.values()} == {*RULES}


def test_a_layer_alone_a_wrapped_one_and_one_of_half_precision(tmp_path):
    layer, file = repvgg(), tmp_path / "in.pt"
    expected = arrays_of(layer.fold())
    for prefix in ("", "module.", "net.module."):
        state = {f"{prefix}{name}": value for name, value in layer.state_dict().items()}
        torch.save(state, file)
        fold_checkpoint(file, tmp_path / "out.pt", overwrite=True)
        found = torch.load(tmp_path / "out.pt")
        assert_close(found, {f"{prefix}{n}": a for n, a in expected.items()}, EXACT)
    half = layer.to(torch.bfloat16)
    torch.save(half.state_dict(), file)
    fold_checkpoint(file, tmp_path / "out.pt", overwrite=True)
    found = torch.load(tmp_path / "out.pt")
    assert_same(found, half.fold().state_dict())


def test_a_layer_of_which_a_part_is_over_parameterized(tmp_path):
    model = nn.Sequential(repvgg())
    model[0].dense_conv = package.DOConv2d.from_conv(model[0].dense_conv)
    nn.init.normal_(model[0].dense_conv.depthwise_weight)
    torch.save(model.state_dict(), tmp_path / "in.pt")
    fold_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")
    assert_close(found, package.fold(model).model.state_dict(), EXACT)


def test_the_command_shows_and_verifies_a_layer(tmp_path):
    file, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(nn.Sequential(repvgg()).state_dict(), file)
    lines = doconv("inspect", file).stdout.splitlines()
    assert lines[0].endswith("5 layers, 0 of them over-parameterized, 1 block of branches")
    row = ["0", "repvgg", "block,", "to", "be", "a", "convolution", "4x4x3x3"]
    assert lines[3].split()[:8] == row
    (told,) = json.loads(doconv("inspect", file, "--json").stdout)["layers"]
    assert told["parameters_folded"] == 4 * 4 * 9 + 4
    assert told["block"]["family"] == "repvgg"
    assert told["block"]["folds_to"] == ["0.weight", "0.bias"]
    assert len(told["block"]["layers"]) == 5
    doconv("fold", file, out)
    for pair in ((file, out), (out, file), (file, file)):
        doconv("verify", *pair)
    state = torch.load(out)
    torch.save(state | {"0.bias": state["0.bias"] + 1}, out)
    assert "0 bias" in doconv("verify", file, out, code=DIFFERENT).stdout


def test_what_the_file_does_not_tell_is_refused(tmp_path):
    file = tmp_path / "in.pt"
    for sizes in ((4, 4, (3, 3), (7, 7)), (4, 8, (3,), (7,))):
        layer = trained(NormedCase("qarepvgg", case(*sizes, padding=1)))
        torch.save({f"net.{n}": value for n, value in layer.state_dict().items()}, file)
        message = f"layer 'net': named like a qarepvgg layer, but {UNTOLD}"
        refused(file, re.escape(message), CheckpointError)
        doconv("fold", file, tmp_path / "out.pt", code=BAD_FILE, error=re.escape(message))
        assert f"net: named like a qarepvgg layer, but {UNTOLD}" in doconv("inspect", file).stdout


def without(*names):
    return lambda arrays: {n: a for n, a in arrays.items() if not n.startswith(names)}


def with_(**more):
    def changed(arrays):
        return arrays | {n.replace("__", "."): np.ones(s, "f4") for n, s in more.items()}

    return changed


BAD = [
    (without("dense_norm.running_var"), "it has no dense_norm.running_var"),
    (without("dense_norm.weight", "dense_norm.bias"), "it has no dense_norm.weight"),
    (without("pointwise_conv"), "it has no pointwise_conv"),
    (without("pointwise_norm", "identity_norm"), "nothing in the file tells"),
    (with_(sequence_conv__weight=(4, 4, 1, 1)), "it has no sequence_norm"),
    (with_(norm__weight=4), "it has norm besides"),
    (with_(dense_conv__mask=4), "it has dense_conv.mask besides"),
    (with_(dense_conv__weight=(4, 4, 2, 2)), "its kernel has an even size"),
    (with_(dense_conv__weight=(4, 4)), "its first branch has no convolution"),
    (with_(dense_conv__weight=(4, 0, 3, 3)), "its first branch has no convolution"),
    (with_(dense_conv__weight=(4, 4, 1, 1)), "one tap, nothing to over-parameterize"),
    (with_(dense_conv__weight=(6, 4, 3, 3)),
     "the kernel (6, 4, 3, 3) of dense_conv is not (6, 6, 3, 3)"),
    (with_(pointwise_conv__weight=(4, 2, 1, 1)),
     "the kernel (4, 2, 1, 1) of pointwise_conv is not (4, 4, 1, 1)"),
    (with_(pointwise_conv__weight=(4, 4)), "pointwise_conv is no convolution"),
    (with_(pointwise_norm__bias=3),
     "it has pointwise_norm.bias (3,) of float32, where 4 floats belong"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_parts_that_make_no_layer_are_refused_and_listed(change, message, tmp_path):
    file = tmp_path / "in.safetensors"
    arrays = change(arrays_of(repvgg()))
    save_file({f"a.{name}": array for name, array in arrays.items()}, file)
    told = rf"layer 'a': named like a \w+ layer, but .*{re.escape(message)}"
    refused(file, told, CheckpointError)
    assert message in doconv("inspect", file).stdout


def test_what_only_has_some_of_the_names_is_left(tmp_path):
    file, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    arrays = arrays_of(repvgg())
    for change in (
        without("dense_norm"),
        without("dense_conv"),
        without("pointwise", "identity"),
    ):
        save_file(change(arrays), file)
        assert fold_checkpoint(file, out, overwrite=True).changed == ()
        assert_same(load_file(out), change(arrays))
