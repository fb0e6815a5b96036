"""`doconv inspect`, `fold` and `verify`: what they say is what is in the files."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from command_line import DIFFERENT, IMPOSSIBLE, KERNEL_SIZE, TARGET, USAGE, doconv, save, state_dict
from safetensors.numpy import load_file

from doconv_core import ConvSpec, compose, identity

SPECS = {
    "conv1": ConvSpec(3, 8, (3, 3)),
    "block.0": ConvSpec(8, 8, (2, 3), 4),
    "block.1": ConvSpec(8, 8, (3, 3), 2, 10),
}


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model.safetensors", state_dict())


def folded(arrays):
    """Return the arrays with the three layers folded by the core."""
    result = {name: array for name, array in arrays.items() if "depthwise" not in name}
    for path, spec in SPECS.items():
        weight = arrays[f"{path}.weight"].reshape(spec.weight_shape)
        result[f"{path}.weight"] = compose(weight, arrays[f"{path}.depthwise_weight"], spec)
    return result


def test_inspect_counts_and_measures(model):
    arrays = state_dict()
    found = json.loads(doconv("inspect", model, *KERNEL_SIZE, "--json").stdout)
    layers = {layer["path"]: layer for layer in found["layers"]}
    assert [p for p, layer in layers.items() if layer["over_parameterized"]] == sorted(SPECS)
    for path, spec in SPECS.items():
        depthwise = arrays[f"{path}.depthwise_weight"]
        unit = identity(spec)
        measured = layers[path]["depthwise"]
        relative = np.linalg.norm(depthwise) / np.linalg.norm(np.array([unit] * spec.in_channels))
        assert measured["relative"] == pytest.approx(relative, rel=1e-6)
        assert measured["largest"] == np.abs(depthwise).max()
        assert measured["least_rank"] == measured["taps"] == spec.taps
        conditions = [np.linalg.cond(unit + d) for d in depthwise]
        assert measured["worst_condition"] == pytest.approx(max(conditions), rel=1e-6)
        assert measured["median_condition"] == pytest.approx(np.median(conditions), rel=1e-6)
        assert tuple(layers[path]["kernel_shape"]) == spec.kernel_shape
    trained = [name for name in arrays if not re.search("running|tracked", name)]
    assert found["parameters"] == sum(arrays[name].size for name in trained)
    ordinary = folded(arrays)
    trained = [name for name in ordinary if not re.search("running|tracked", name)]
    assert found["parameters_folded"] == sum(ordinary[name].size for name in trained)
    assert layers["bn1"]["parameters"] == 16
    assert layers["bn1"]["entries"]["running_mean"] == {
        "name": "bn1.running_mean", "shape": [8], "dtype": "float32"
    }  # fmt: skip


def test_inspect_prints_a_table(model):
    lines = doconv("inspect", model).stdout.splitlines()
    assert lines[0].endswith("safetensors, 6 layers, 3 of them over-parameterized")
    rows = {line.split()[0]: line for line in lines if line}
    assert re.fullmatch(r"conv1 +3x9x9( +[\d.e-]+){2} +9 of 9( +[\d.e-]+){2}", rows["conv1"])
    assert rows["total"].split()[-1] == "?"  # as one kernel size is not known
    # Neither boxes nor colours where the output is no terminal.
    assert all(ord(sign) < 128 for line in lines for sign in line)


def test_inspect_measures_a_lost_rank(tmp_path):
    arrays = state_dict()
    arrays["conv1.depthwise_weight"][1] = 0
    arrays["conv1.depthwise_weight"][1, 4, 4] = -1
    arrays["block.0.depthwise_weight"][0, 0, 0] = np.nan
    model = save(tmp_path / "model.safetensors", arrays)
    found = json.loads(doconv("inspect", model, "--json").stdout)
    layers = {layer["path"]: layer["depthwise"] for layer in found["layers"]}
    assert layers["conv1"]["least_rank"] == 8
    assert layers["conv1"]["median_rank"] == 9
    assert layers["conv1"]["worst_condition"] is None  # JSON has no infinity
    assert layers["block.0"]["relative"] is None
    lines = doconv("inspect", model).stdout.splitlines()
    row = next(line for line in lines if line.startswith("conv1 ") and " of " in line)
    assert row.split()[4:7] == ["8", "of", "9"]
    assert row.split()[-1] == "inf"


def test_fold_writes_what_the_core_composes(model, tmp_path):
    done = doconv("fold", model, tmp_path / "out.safetensors", *KERNEL_SIZE)
    for path in SPECS:
        assert path in done.stdout
    found, expected = load_file(tmp_path / "out.safetensors"), folded(state_dict())
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    done = doconv("fold", tmp_path / "out.safetensors", tmp_path / "again.safetensors", "--json")
    assert json.loads(done.stdout)["changed"] == []
    again = load_file(tmp_path / "again.safetensors")
    assert all((again[name] == array).all() for name, array in found.items())


def test_fold_tells_what_it_did_as_json(model, tmp_path):
    out = tmp_path / "out.safetensors"
    found = json.loads(doconv("fold", model, out, *KERNEL_SIZE, "--json").stdout)
    assert [change["path"] for change in found["changed"]] == sorted(SPECS)
    assert found["bytes_after"] == out.stat().st_size < found["bytes_before"]
    assert found["parameters_after"] < found["parameters_before"]
    assert found["target"] == str(out)


def test_fold_asks_for_a_kernel_size(model, tmp_path):
    out = tmp_path / "out.safetensors"
    asked = r"layer 'block.1': its kernel size is not.*9 taps.*--kernel-size 'block.1=3x3'"
    doconv("fold", model, out, code=IMPOSSIBLE, error=asked)
    doconv(
        "fold", model, out, "--kernel-size", "block.1=2x2", code=USAGE, error="has 9 kernel taps"
    )
    doconv("fold", model, out, "--kernel-size", "nope=3x3", code=USAGE, error="'nope' matches no")
    doconv("fold", model, out, "--kernel-size", "block.1", code=USAGE, error="gives no size; write")
    assert not out.exists()


def test_fold_refuses_what_is_not_finite(tmp_path):
    arrays = state_dict()
    arrays["conv1.depthwise_weight"][0, 0, 0] = np.inf
    model = save(tmp_path / "model.safetensors", arrays)
    out = tmp_path / "out.safetensors"
    doconv("fold", model, out, *KERNEL_SIZE, code=IMPOSSIBLE, error="'conv1'.*is not finite")
    assert sorted(tmp_path.iterdir()) == [model]


def test_fold_in_place(model):
    model.chmod(0o600)
    doconv("fold", model, model, *KERNEL_SIZE, code=TARGET, error="exists; use --force")
    doconv("fold", model, model, *KERNEL_SIZE, "--force")
    assert load_file(model).keys() == folded(state_dict()).keys()
    assert model.stat().st_mode & 0o777 == 0o600
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_verify_folds_on_the_way(tmp_path, dtype):
    arrays = state_dict(dtype=dtype)
    model = save(tmp_path / "model.safetensors", arrays)
    out = save(tmp_path / "out.safetensors", folded(arrays))
    for pair in ((model, out), (out, model), (model, model)):
        found = json.loads(doconv("verify", *pair, *KERNEL_SIZE, "--json").stdout)
        assert found["equal"]
        assert {a["path"] + " " + a["role"] for a in found["arrays"]} >= {
            "conv1 kernel", "block.0 kernel", "block.1 kernel", "fc weight", "bn1 running_var"
        }  # fmt: skip
    # The kernel size that one file does not tell, the other does.
    assert "equal" in doconv("verify", model, out).stdout


def test_verify_says_where_and_how_far_apart(model, tmp_path):
    arrays = folded(state_dict())
    arrays["block.0.weight"][5, 1, 0, 2] += 1
    arrays["fc.bias"][3] = np.nan
    arrays["bn1.weight"] = arrays["bn1.weight"][:4]
    arrays["extra.weight"] = np.ones((2, 2), "float32")
    del arrays["pointwise.weight"]
    other = save(tmp_path / "other.safetensors", arrays)
    done = doconv("verify", model, other, "--json", code=DIFFERENT)
    found = json.loads(done.stdout)
    differing = {f"{a['path']} {a['role']}": a for a in found["arrays"] if not a["equal"]}
    assert differing.keys() == {"block.0 kernel", "fc bias", "bn1 weight"}
    kernel = differing["block.0 kernel"]
    assert kernel["at"] == [5, 1, 0, 2]
    assert kernel["absolute"] == pytest.approx(1, rel=1e-6)
    largest = np.abs(arrays["block.0.weight"]).max()
    assert kernel["relative"] == pytest.approx(1 / largest, rel=1e-6)
    assert differing["fc bias"]["at"] == [3]
    assert differing["fc bias"]["absolute"] is None  # infinite
    assert differing["bn1 weight"]["shapes"] == [[8], [4]]
    assert sorted(line.split()[0] for line in found["missing"]) == [
        "extra.weight", "pointwise.weight"
    ]  # fmt: skip
    assert not found["equal"]
    assert found["largest_relative"] is None  # infinite
    text = doconv("verify", model, other, code=DIFFERENT).stdout
    assert re.search(r"block\.0 kernel +8x2x2x3 +1 .* 5,1,0,2\n", text)
    assert re.search(r"bn1 weight +8 and 4 ", text)
    assert "extra.weight is in" in text
    assert "3 differ, 2 in one file only" in text


def test_verify_of_what_is_not_finite(tmp_path):
    arrays = {"mask": np.array([0, -np.inf]), "fc.weight": np.array([[1, 2], [3, np.nan]])}
    mask, both = (save(tmp_path / str(n), dict([*arrays.items()][:n])) for n in (1, 2))
    told = "not finite, of which no difference can be told"
    assert f"1 array compared: equal; 1 array {told}" in doconv("verify", mask, mask).stdout
    text = doconv("verify", both, both, code=DIFFERENT).stdout
    assert re.search(r"fc weight +2x2 +nan +nan +0 +1,1\n", text)
    assert f"1 differ, 0 in one file only; 2 arrays {told}" in text
    found = json.loads(doconv("verify", both, both, "--json", code=DIFFERENT).stdout)
    assert [array["equal"] for array in found["arrays"]] == [False, True]
    assert found["largest_absolute"] is None


APART = {
    "a NaN alone": (np.array(np.nan), np.array(np.nan), "1 array not finite"),
    "numbers alone": (np.array(2.0), np.array(1.0), "difference is 1, in temperature"),
    "integers beyond float64": (np.array([2**62]), np.array([2**62 + 1]), "is 2.17e-19"),
    "zeros in B": (np.array([0.5]), np.array([0.0]), "compared: .*only; 1 array all zeros in B"),
}


@pytest.mark.parametrize("case", APART)
def test_verify_of_numbers_alone_large_integers_and_zeros(tmp_path, case):
    *values, told = APART[case]
    a, b = (save(tmp_path / name, {"temperature": x}) for name, x in zip("ab", values, strict=True))
    done = doconv("verify", a, b, code=DIFFERENT)
    assert re.search(told, done.stdout.splitlines()[-1])


def test_verify_of_a_layer_at_the_root_beside_loose_entries(tmp_path):
    layer = {"weight": (4, 2, 3, 3), "depthwise_weight": (2, 9, 9), "scale": (3,)}
    arrays = {name: np.ones(shape, "float32") for name, shape in layer.items()}
    file = save(tmp_path / "model.safetensors", arrays)
    assert "2 arrays compared: equal" in doconv("verify", file, file).stdout
    for name in ("weight", "scale"):
        other = save(tmp_path / "other.safetensors", {**arrays, name: 2 * arrays[name]})
        text = doconv("verify", file, other, code=DIFFERENT).stdout
        assert "1 differ, 0 in one file only" in text


def test_verify_keeps_to_the_tolerance(model, tmp_path):
    arrays = state_dict()
    arrays["fc.weight"] *= np.float32(1 + 1e-4)
    other = save(tmp_path / "other.safetensors", arrays)
    doconv("verify", model, other, *KERNEL_SIZE, code=DIFFERENT)
    doconv("verify", model, other, *KERNEL_SIZE, "--tolerance", "1e-5", code=DIFFERENT)
    doconv("verify", model, other, *KERNEL_SIZE, "--tolerance", "1e-3")
    doconv("verify", model, other, "--tolerance", "-1", code=USAGE, error="--tolerance")
    doconv(
        "verify", model, other, "--tolerance", "nan", code=USAGE, error="a finite number; .* nan"
    )
    doconv("verify", model, other, "--kernel-size", "no=3x3", code=USAGE, error="'no' matches no")


def test_verify_pairs_by_order(model, tmp_path):
    renamed = {f"net.{name}": array for name, array in folded(state_dict()).items()}
    other = save(tmp_path / "other.safetensors", renamed)
    doconv("verify", model, other, *KERNEL_SIZE, code=DIFFERENT)
    error = "has its layers in the order of their names, not of the model"
    args = [*KERNEL_SIZE, "--match", "order"]
    doconv("verify", model, other, *args, code=IMPOSSIBLE, error=error)
    for file in (model, other):  # Gluon's files are in the order in which they were written
        doconv("convert", file, file.with_suffix(".params"))
    model, other = model.with_suffix(".params"), other.with_suffix(".params")
    doconv("verify", model, other, *args)
    del renamed["net.pointwise.weight"]
    doconv("convert", save(tmp_path / "less.safetensors", renamed), other, "--force")
    done = doconv("verify", model, other, *args, code=DIFFERENT)
    assert "layer 6 of 6 differs: pointwise, convolution 6x8x1x1 in " in done.stdout
    assert ", nothing in " in done.stdout


def test_cost_of_a_file(model, tmp_path):
    out = tmp_path / "out.safetensors"
    doconv("fold", model, out, *KERNEL_SIZE)
    doconv("cost", model, code=IMPOSSIBLE, error="layer 'block.1': its kernel size")
    at = ["--at", "*=/2", "--at", "block.*=/4", "--at", "fc=1"]
    options = [*KERNEL_SIZE, "--input", "31x30", *at, "--batch", "2", "--json"]
    found = json.loads(doconv("cost", model, *options).stdout)
    layers = {layer["path"]: layer for layer in found["layers"]}
    assert layers["conv1"]["output"] == [16, 15]
    assert layers["block.1"]["output"] == [8, 8]
    composed = layers["block.1"]["cost"]["kernel_composed"]["macs"]
    assert composed == 36 * 8 * 64 * 2 + 8 * 9 * 10 * 4
    assert layers["fc"]["cost"]["ordinary"]["macs"] == 30 * 2
    ordinary = sum(layer["cost"]["ordinary"]["macs"] for layer in layers.values() if layer["cost"])
    assert found["total"]["ordinary"]["macs"] == ordinary
    arrays, small = state_dict(), folded(state_dict())
    for form, held in (("kernel_composed", arrays), ("folded", small), ("ordinary", small)):
        trained = [a.size for name, a in held.items() if not re.search("running|tracked", name)]
        assert found["total"][form]["parameters"] == sum(trained)
    assert found["uncounted"] == []
    again = json.loads(doconv("cost", out, *options[2:]).stdout)
    assert again["total"]["ordinary"] == found["total"]["ordinary"]


def test_cost_of_a_file_without_places(model):
    found = json.loads(doconv("cost", model, *KERNEL_SIZE, "--json").stdout)
    assert found["uncounted"] == ["block.0", "block.1", "conv1", "fc", "pointwise"]
    assert found["total"]["ordinary"]["macs"] == 0
    text = doconv("cost", model, *KERNEL_SIZE, "--at", "conv1=8x8").stdout
    assert (
        "not in the total, as --at does not tell their output: block.0, block.1, pointwise" in text
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "9x9"], "does not tell at which positions its layers work; with --input"),
        (["--at", "/2"], "/2 is relative to the input; give --input, too"),
        (["--at", "nope=9x9"], "'nope' matches no convolution or linear layer; the file has"),
        (["--at", "conv1=9"], "'conv1' has a kernel of 2 dimensions; received an output of 1"),
        (["--at", "conv1=a"], "'conv1=a' gives no output size; write it as"),
        (["--at", "conv1=/2x2"], "gives no output size"),
    ],
)
def test_wrong_places(model, options, message):
    doconv("cost", model, *KERNEL_SIZE, *options, code=USAGE, error=message)


def test_verify_of_a_fold_where_what_is_added_nearly_cancels(tmp_path):
    rng = np.random.default_rng(0)
    depthwise = np.tile(-np.eye(9), (3, 1, 1)) + 1e-3 * rng.normal(size=(3, 9, 9))
    arrays = {
        "c.weight": rng.normal(size=(8, 3, 3, 3)).astype("float32"),
        "c.depthwise_weight": depthwise.astype("float32"),
    }
    model, out = save(tmp_path / "m.safetensors", arrays), tmp_path / "out.safetensors"
    spec = ConvSpec(3, 8, (3, 3))
    exact = compose(arrays["c.weight"].reshape(8, 3, 9).astype(np.float64), depthwise, spec)
    save(out, {"c.weight": exact.astype("float32")})
    doconv("verify", model, out)
    doconv("verify", out, model)
    save(out, {"c.weight": (exact * 1.5).astype("float32")})
    doconv("verify", model, out, code=DIFFERENT)
    doconv("verify", model, out, "--tolerance", "1e-6", code=DIFFERENT)
