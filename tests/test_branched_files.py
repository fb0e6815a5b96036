"""Blocks of branches in the training checkpoints of others: folded, they are what is deployed.

The files are made by formula, with the entries that those implementations have; what they fold to
is compared with the block computed branch by branch, as it is trained, in evaluation mode.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import numpy as np
import pytest
from checkpoint_files import folded_arrays, pair, refused
from command_line import BAD_FILE, DIFFERENT, doconv
from equal import assert_close, assert_same
from frameworks import imported
from safetensors.numpy import load_file, save_file

from doconv_core import CheckpointError, ConvSpec, NotFoldable, convolve, fold_checkpoint

EPSILON = 1e-5
EXACT = 1e-12  # relative, for two ways to the same float64 result


class Case(NamedTuple):
    """A block. convs: by the names of a convolution and its norm, its taps. inputs: norms of the
    input. folded: what it becomes. Where it has them: a norm that is taken away, a scale, and
    whether the input itself is added."""

    name: str
    convs: dict[tuple[str, str], tuple[int, int]]
    inputs: tuple[str, ...]
    folded: str
    subtracted: str = ""
    scale: str = ""
    plain: bool = False


def branches(conv="conv", norm="bn", **taps):
    """Return the convolutions of branches of these names; two underscores stand for a dot."""
    names = {name.replace("__", "."): (size, size) for name, size in taps.items()}
    return {(f"{name}.{conv}", f"{name}.{norm}"): size for name, size in names.items()}


KXK = {f"conv_kxk__{n}": 3 for n in range(3)}
RBR = {f"rbr_conv__{n}": 5 for n in range(11)}  # of two digits, too
CASES = {
    "repvgg": Case("RepVGG", branches(rbr_dense=3, rbr_1x1=1), ("rbr_identity",), "rbr_reparam"),
    "mobileone": Case("MobileOne", branches(**RBR, rbr_scale=1), ("rbr_skip",), "reparam_conv"),
    "mobileone 1x1": Case("MobileOne", branches(rbr_conv__0=1), ("rbr_skip",), "reparam_conv"),
    "timm repvgg": Case("RepVGG", branches(conv_kxk=3, conv_1x1=1), ("identity",), "reparam_conv"),
    "timm mobileone": Case(
        "MobileOne", branches(**KXK, conv_scale=1), ("identity",), "reparam_conv"
    ),
    "timm large": Case("large kernel", branches(large_conv=7, small_conv=3), (), "reparam_conv"),
    "large": Case("large kernel", branches(lkb_origin=7, small_conv=5), (), "lkb_reparam"),
    "large alone": Case("large kernel", branches(lkb_origin=7), (), "lkb_reparam"),
    "lcnet": Case(
        "LCNetV2", branches(dw_conv_list__0=5, dw_conv_list__1=3, dw_conv_list__2=1), (), "dw_conv"
    ),
    "ghost primary": Case(
        "GhostNetV3", branches(primary_rpr_conv__0=1, primary_rpr_conv__1=1), (), "primary_conv.0"
    ),
    "timm ghost cheap": Case(
        "GhostNetV3", branches(norm="bn1", cheap_rpr_conv__0=3, cheap_rpr_scale=1),
        ("cheap_rpr_skip",), "cheap_operation.0",
    ),
    "timm ghost dw": Case(
        "GhostNetV3", branches(norm="bn1", dw_rpr_conv__0=3, dw_rpr_scale=1), (), "conv_dw"
    ),
    "repghost": Case(
        "RepGhost", branches("0", "1", cheap_operation=3), ("fusion_bn.0",), "cheap_operation"
    ),
    "timm repmixer": Case(
        "RepMixer", branches(mixer__conv_kxk__0=3, mixer__conv_scale=1), ("mixer.identity",),
        "reparam_conv", "norm.identity", "layer_scale.gamma", True,
    ),
    "repmixer": Case(
        "RepMixer", branches(mixer__rbr_conv__0=3, mixer__rbr_scale=1), ("mixer.rbr_skip",),
        "reparam_conv", "norm.rbr_skip", "layer_scale", True,
    ),
    "repmixer unscaled": Case(
        "RepMixer", branches(mixer__conv_kxk__0=3), ("mixer.identity",), "reparam_conv",
        "norm.identity", "", True,
    ),
}  # fmt: skip
DEPTHWISE = ("repmixer", "timm repmixer", "repmixer unscaled", "repghost", "lcnet")


def norm_of(rng, path, channels):
    """Return a norm's entries, with numbers of a training."""
    return {
        f"{path}.weight": rng.uniform(0.5, 1.5, channels),
        f"{path}.bias": rng.standard_normal(channels),
        f"{path}.running_mean": rng.standard_normal(channels),
        f"{path}.running_var": rng.uniform(0.1, 2, channels),
        f"{path}.num_batches_tracked": np.array(7),
    }


def block_of(case, path="stage.0", outputs=8, inputs=8, groups=1, seed=0):
    """Return the entries of a block; a norm of the input where it has as many channels."""
    rng, arrays = np.random.default_rng(seed), {}
    for name in case.inputs if outputs == inputs else ():
        arrays |= norm_of(rng, f"{path}.{name}", outputs)
    for (conv, norm), taps in case.convs.items():
        arrays[f"{path}.{conv}.weight"] = rng.standard_normal((outputs, inputs // groups, *taps))
        arrays |= norm_of(rng, f"{path}.{norm}", outputs)
    if case.subtracted:
        arrays |= norm_of(rng, f"{path}.{case.subtracted}", outputs)
    if case.scale:
        arrays[f"{path}.{case.scale}"] = rng.uniform(0.2, 0.8, (outputs, 1, 1))
    return arrays


def normed(arrays, path, x):
    """Return what a batch norm in evaluation mode gives."""
    weight, bias, mean, variance = (
        arrays[f"{path}.{name}"].reshape(-1, 1, 1)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(variance + EPSILON) * weight + bias


def trained(case, arrays, x, path="stage.0", groups=1):
    """Return what a block gives, branch by branch."""
    total = 0
    for (conv, norm), taps in case.convs.items():
        padding = tuple(n // 2 for n in taps)
        y = convolve(x, arrays[f"{path}.{conv}.weight"], padding=padding, groups=groups)
        total = total + normed(arrays, f"{path}.{norm}", y)
    for name in case.inputs:
        if f"{path}.{name}.weight" in arrays:
            total = total + normed(arrays, f"{path}.{name}", x)
    if case.subtracted:
        total = total - normed(arrays, f"{path}.{case.subtracted}", x)
    if case.scale:
        total = total * arrays[f"{path}.{case.scale}"]
    return total + x if case.plain else total


def deployed(case, arrays, x, path="stage.0", groups=1):
    """Return what the folded convolution gives."""
    weight, bias = (arrays[f"{path}.{case.folded}.{name}"] for name in ("weight", "bias"))
    padding = tuple(n // 2 for n in weight.shape[2:])
    return convolve(x, weight, bias, padding=padding, groups=groups)


def layouts():
    """Yield each case in the sizes that such blocks have: dense, grouped, depthwise, widening."""
    for name in CASES:
        yield name, 8, 8, 8
        if name not in DEPTHWISE:
            yield from ((name, 8, 8, 1), (name, 8, 8, 2), (name, 12, 8, 1), (name, 12, 8, 4))


@pytest.mark.parametrize(("name", "outputs", "inputs", "groups"), [*layouts()])
def test_a_block_becomes_the_convolution_of_the_deployed_network(
    name, outputs, inputs, groups, tmp_path
):
    case, others = CASES[name], {"stem.weight": np.ones((8, 3, 3, 3)), "zhead.bias": np.ones(5)}
    block = block_of(case, outputs=outputs, inputs=inputs, groups=groups)
    report, found = folded_arrays(others | block, tmp_path / "in.safetensors")
    folded = f"stage.0.{case.folded}"
    assert {*found} == {*others, f"{folded}.weight", f"{folded}.bias"}
    assert [change.path for change in report.changed] == ["stage.0"]
    assert report.changed[0].before.startswith(f"{case.name} block of ")
    x = np.random.default_rng(1).standard_normal((2, inputs, 7, 7))
    assert_close(
        deployed(case, found, x, groups=groups), trained(case, block, x, groups=groups), EXACT
    )


def test_a_position_encoding_is_one_beside_a_mixer_alone(tmp_path):
    rng, mixer = np.random.default_rng(0), block_of(CASES["timm repmixer"], groups=8)
    for name in ("pos_enc", "pe"):
        path = f"stages.2.pos_emb.{name}"
        arrays = {f"{path}.weight": rng.standard_normal((4, 1, 7, 7)), f"{path}.bias": np.ones(4)}
        found = folded_arrays(arrays, tmp_path / "alone.safetensors", overwrite=True)[1]
        assert_same(found, arrays)  # nothing tells that its input is added
        found = folded_arrays(arrays | mixer, tmp_path / "in.safetensors", overwrite=True)[1]
        unit = np.zeros((7, 7))
        unit[3, 3] = 1
        assert_same(found["stages.2.pos_emb.reparam_conv.weight"], arrays[f"{path}.weight"] + unit)
        assert_same(found["stages.2.pos_emb.reparam_conv.bias"], np.ones(4))


@pytest.mark.parametrize("multiplier", [9, 12])
def test_what_is_over_parameterized_in_a_branch_is_composed_on_the_way(multiplier, tmp_path):
    case, spec = CASES["repvgg"], ConvSpec(8, 8, (3, 3), 2, multiplier)
    arrays = block_of(case, groups=2)
    weight, depthwise, kernel = pair(spec, dtype=np.float64)
    ordinary = arrays | {"stage.0.rbr_dense.conv.weight": kernel}
    arrays["stage.0.rbr_dense.conv.weight"] = weight
    arrays["stage.0.rbr_dense.conv.depthwise_weight"] = depthwise
    size = {"kernel_sizes": {"*.conv": (3, 3)}} if multiplier > 9 else {}
    report, found = folded_arrays(arrays, tmp_path / "in.safetensors", **size)
    expected = folded_arrays(ordinary, tmp_path / "ordinary.safetensors", overwrite=True)[1]
    assert len(report.changed) == 1
    assert_close(found, expected, EXACT)
    if multiplier > 9:
        refused(tmp_path / "in.safetensors", "give it, with kernel_sizes=", overwrite=True)


def test_a_training_checkpoint_keeps_what_is_no_block_and_its_prefixes(tmp_path):
    torch = imported("torch")
    case, arrays = CASES["mobileone"], block_of(CASES["mobileone"])
    before = {"first.weight": np.ones(3), **arrays, "last.weight": np.ones((2, 8))}

    def state(prefix, factor=1.0):
        scaled = {f"{prefix}{k}": torch.tensor(factor * v) for k, v in before.items()}
        return {k: v.bfloat16() if v.ndim == 4 else v.float() for k, v in scaled.items()}

    content = {"epoch": 3, "state_dict": state("module."), "ema": {"module": state("", 0.5)}}
    content["optimizer"] = {"state": {0: {"m": torch.ones(2, 2)}}, "param_groups": []}
    kernel = "module.stage.0.rbr_conv.0.conv.weight"
    content["state_dict"][kernel] = content["state_dict"][kernel].to(
        memory_format=torch.channels_last
    )
    torch.save(content, tmp_path / "in.pth")
    steps = []
    report = fold_checkpoint(
        tmp_path / "in.pth", tmp_path / "out.pth", progress=lambda *step: steps.append(step)
    )
    assert [change.path for change in report.changed] == ["stage.0", "ema/module/stage.0"]
    assert steps == [(n, 4) for n in range(5)]
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert found["epoch"] == 3
    assert_same(found["optimizer"]["state"][0], content["optimizer"]["state"][0])
    folded = [f"stage.0.{case.folded}.{name}" for name in ("weight", "bias")]
    names = ["first.weight", *folded, "last.weight"]
    assert [*found["state_dict"]] == [f"module.{name}" for name in names]
    assert [*found["ema"]["module"]] == names
    weight, bias = (found["state_dict"][f"module.{name}"] for name in folded)
    assert (weight.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not bias.equal(found["ema"]["module"][folded[1]])
    save_file({k: v.float().double().numpy() for k, v in state("").items()}, tmp_path / "f8")
    fold_checkpoint(tmp_path / "f8", tmp_path / "exact")
    exact = load_file(tmp_path / "exact")
    assert_same(weight.float(), torch.tensor(exact[folded[0]]).bfloat16().float())  # rounded once
    assert_same(bias.numpy(), exact[folded[1]].astype("f4"))


def without(*endings):
    return lambda arrays: {k: v for k, v in arrays.items() if not k.endswith(endings)}


def with_(**more):
    return lambda arrays: arrays | {f"stage.0.{k.replace('__', '.')}": v for k, v in more.items()}


def fewer(name, shape):
    return lambda arrays: arrays | {f"stage.0.{name}": np.ones(shape)}


BAD = [
    ("repvgg", without("bn.running_var"), "it has no rbr_dense.bn.running_var"),
    ("repvgg", without("rbr_identity.weight"), "it has no rbr_identity.weight"),
    ("repvgg", without("rbr_1x1.conv.weight"), "it has no rbr_1x1.conv"),
    ("repvgg", lambda arrays: {k: v for k, v in arrays.items() if "rbr_1x1" not in k},
     "it has no rbr_1x1.conv"),
    ("repvgg", lambda arrays: {k: v for k, v in arrays.items() if "rbr_identity" in k},
     "it has no rbr_dense.conv"),
    ("repvgg", with_(rbr_dense__conv__mask=np.ones(8)), "it has rbr_dense.conv.mask besides"),
    ("repvgg", with_(rbr_dense__extra__weight=np.ones(8)), "it has rbr_dense.extra besides"),
    ("repvgg", fewer("rbr_dense.conv.weight", (8, 8)), "rbr_dense.conv is no convolution"),
    ("repvgg", fewer("rbr_1x1.conv.weight", (8, 4, 1, 1)),
     "the kernel (8, 4, 1, 1) of rbr_1x1.conv does not fit the others"),
    ("repvgg", fewer("rbr_1x1.conv.weight", (8, 8, 1)),
     "the kernel (8, 8, 3, 3) of rbr_dense.conv does not fit the others"),
    ("repvgg", fewer("rbr_1x1.conv.weight", (8, 8, 2, 2)),
     "of rbr_1x1.conv, a kernel of (2, 2) taps has no place in the middle of one of (3, 3)"),
    ("repvgg", fewer("rbr_1x1.bn.bias", 4),
     "it has rbr_1x1.bn.bias (4,) of float64, where 8 floats belong"),
    ("repvgg", fewer("rbr_dense.conv.bias", 4), "it has rbr_dense.conv.bias (4,) of float64, wh"),
    ("repvgg", with_(rbr_identity__bias=np.ones(8, int)), "it has rbr_identity.bias (8,) of int64"),
    ("mobileone", without("rbr_conv.3.conv.weight"), "it has no rbr_conv.3.conv"),
    ("mobileone", lambda arrays: {k: v for k, v in arrays.items() if "rbr_conv.3." not in k},
     "it has no rbr_conv.3.conv"),
    ("timm mobileone", without("identity.running_mean"), "it has no identity.running_mean"),
    ("timm repmixer", without("norm.identity.bias"), "it has no norm.identity.bias"),
    ("timm repmixer", fewer("layer_scale.gamma", (4, 1, 1)), "it has layer_scale.weight (4, 1,"),
    ("repghost", without("1.running_mean"), "it has no cheap_operation.1.running_mean"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_what_makes_no_block_is_refused_and_listed(name, change, message, tmp_path):
    case, path = CASES[name], tmp_path / "in.safetensors"
    save_file(change(block_of(case)), path)
    message = f"named like a {case.name} block, but {message}"
    refused(path, re.escape(f"layer 'stage.0': {message}"), CheckpointError)
    doconv("fold", path, tmp_path / "out.safetensors", code=BAD_FILE, error=re.escape(message))
    assert f"stage.0: {message}" in doconv("inspect", path).stdout


def test_an_input_of_other_channels_is_refused(tmp_path):
    case, path = CASES["repvgg"], tmp_path / "in.safetensors"
    norm = norm_of(np.random.default_rng(0), "stage.0.rbr_identity", 12)
    save_file(block_of(case, outputs=12, inputs=8) | norm, path)
    message = "its input is added, and no kernel of shape (12, 8, 3, 3) gives each channel of its"
    refused(path, re.escape(message), CheckpointError)


def test_names_and_numbers_that_cannot_be_are_refused(tmp_path):
    case, path = CASES["repvgg"], tmp_path / "in.safetensors"
    block = block_of(case)
    save_file(block | {"stage.0.rbr_reparam.weight": np.ones((8, 8, 3, 3))}, path)
    refused(path, "a folded kernel would be named 'stage.0.rbr_reparam.weight'", CheckpointError)
    save_file(block | {"stage.0.rbr_1x1.bn.running_var": np.full(8, -1.0)}, path)
    refused(path, "layer 'stage.0': the folded kernel is not finite", NotFoldable)


def test_what_only_has_some_of_a_blocks_names_is_left(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {  # MobileViT's, a norm alone, branches of which there are no others, a GhostNet's
        "a.conv_kxk.conv.weight": np.ones((8, 8, 3, 3)),
        **norm_of(rng, "a.conv_kxk.bn", 8),
        "a.conv_1x1.weight": np.ones((12, 8, 1, 1)),
        **norm_of(rng, "b.identity", 8),
        "c.large_conv.conv.weight": np.ones((8, 1, 7, 7)),
        "d.layer_scale": np.ones((8, 1, 1)),
        "e.cheap_operation.0.weight": np.ones((8, 1, 3, 3)),
        **norm_of(rng, "e.cheap_operation.1", 8),
    }
    report, found = folded_arrays(arrays, tmp_path / "in.safetensors")
    assert report.changed == ()
    assert_same(found, arrays)


def test_the_command_tells_what_blocks_become_and_verifies_them(tmp_path):
    case, path, out = CASES["repvgg"], tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    arrays = {k: v.astype("f4") for k, v in block_of(case).items()}
    arrays["stage.0.rbr_dense.conv.depthwise_weight"] = np.full((8, 9, 9), 0.1, "f4")
    save_file(arrays, path)
    lines = doconv("inspect", path).stdout.splitlines()
    assert lines[0].endswith("5 layers, 1 of them over-parameterized, 1 block of branches")
    assert lines[3].split() == [
        "stage.0", "RepVGG", "block,", "to", "be", "rbr_reparam", "8x8x3x3", "float32", "1,336",
        "584",
    ]  # fmt: skip
    assert any(line.startswith("stage.0.rbr_dense.conv  8x9x9") for line in lines)
    told = json.loads(doconv("inspect", path, "--json").stdout)
    assert (told["parameters"], told["parameters_folded"]) == (1336, 584)
    (layer,) = told["layers"]
    assert (layer["kind"], layer["kernel_shape"]) == ("branches", [8, 8, 3, 3])
    assert layer["block"]["family"] == "RepVGG"
    assert layer["block"]["folds_to"] == [f"stage.0.rbr_reparam.{x}" for x in ("weight", "bias")]
    inner = {each["path"]: each for each in layer["block"]["layers"]}
    assert inner["stage.0.rbr_dense.conv"]["depthwise"]["taps"] == 9
    assert inner["stage.0.rbr_dense.conv"]["block"] is None

    told = json.loads(doconv("fold", path, out, "--json").stdout)
    assert told["changed"] == [
        {"path": "stage.0", "before": "RepVGG block of 3 branches, epsilon 1e-05",
         "after": "convolution rbr_reparam, 3×3"}
    ]  # fmt: skip
    for files in ((path, out), (out, path), (path, path)):
        doconv("verify", *files)
    found = load_file(out)
    save_file(found | {"stage.0.rbr_reparam.bias": found["stage.0.rbr_reparam.bias"] + 1}, out)
    done = doconv("verify", path, out, code=DIFFERENT)
    assert "stage.0.rbr_reparam bias" in done.stdout


def test_a_copy_of_a_block_that_is_in_no_state_dict_is_told(tmp_path):
    torch = imported("torch")
    state = {k: torch.tensor(v) for k, v in block_of(CASES["repvgg"]).items()}
    torch.save({"state_dict": state, "optimizer": {"lookahead": dict(state)}}, tmp_path / "in.pt")
    report = fold_checkpoint(tmp_path / "in.pt", tmp_path / "out.pt")
    assert [left.path for left in report.left] == ["optimizer/lookahead"]
