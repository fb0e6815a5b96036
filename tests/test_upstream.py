"""The reference implementation's checkpoints: its three layouts, by its own arithmetic.

The expected kernels are its formulas written out here; what they are compared with is made of
`compose`. Source: the reference implementation's layouts, described in `docs/checkpoints.md`.
"""

from __future__ import annotations

import numpy as np
import pytest
from checkpoint_files import numbers, refused
from equal import assert_close, assert_same
from frameworks import imported, need
from safetensors.numpy import load_file, save_file

from doconv_core import ConvSpec, NotFoldable, compose, convolve, feature_compose, identity
from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint
from doconv_core.files.entries import CheckpointError
from doconv_core.files.gluon import write_params
from doconv_core.files.upstream import FRAMEWORKS, read_upstream

#        I  O  kernel  g   S
SIZES = {
    "plain": (3, 8, (3, 3), 1, 9),
    "oblong": (4, 6, (1, 3), 1, 3),
    "multiplied": (4, 6, (3, 3), 1, 12),
    "depthwise": (4, 4, (3, 3), 4, 9),
    "one each": (8, 4, (3, 3), 4, 9),
    "grouped": (4, 8, (3, 3), 2, 9),
    "two by two": (4, 4, (2, 2), 2, 4),
    "six by three": (6, 9, (3, 3), 3, 20),
    "too small": (3, 4, (3, 3), 1, 4),
}
# All layers that the reference has: its Gluon version knows S = M alone.
LAYERS = pytest.mark.parametrize(
    ("framework", "case"),
    [
        (framework, case)
        for framework in FRAMEWORKS
        for case, (_, _, (rows, columns), _, multiplier) in SIZES.items()
        if framework != "Gluon" or multiplier == rows * columns
    ],
)
FRAMEWORK = pytest.mark.parametrize("framework", FRAMEWORKS)


def tiled(taps, multiplier):
    """Return the reference's identity: whole unit matrices side by side, then zeros."""
    whole = [np.eye(taps)] * (multiplier // taps)
    return np.concatenate([*whole, np.zeros((taps, multiplier % taps))], axis=1).astype("f4")


def layer(framework, case, trained=True, dtype=np.float32):
    """Return a layer's entries by the reference's names, and the kernel that it convolves with."""
    inputs, outputs, size, groups, multiplier = SIZES[case]
    taps, each = size[0] * size[1], inputs // groups
    scale = np.float32(trained)
    if framework == "PyTorch":
        w = numbers(outputs, each, multiplier, seed=1, dtype=dtype)
        d = scale * numbers(inputs, taps, multiplier, seed=2, dtype=dtype)
        diag = np.repeat(tiled(taps, multiplier)[None], inputs, axis=0).astype(dtype)
        reshaped = w.reshape(outputs // groups, inputs, multiplier)
        kernel = np.einsum("ims,ois->oim", d + diag, reshaped).reshape(outputs, each, *size)
        return {"W": w, "D": d, "D_diag": diag, "bias": numbers(outputs)}, kernel
    d = scale * numbers(taps, multiplier, inputs, seed=2, dtype=dtype)
    total = d + tiled(taps, multiplier)[..., None].astype(dtype)
    if framework == "TensorFlow":
        w = numbers(multiplier, each, outputs, seed=1, dtype=dtype)
        rows = w
    else:
        w = numbers(outputs, each, *size, seed=1, dtype=dtype)
        rows = w.transpose(2, 3, 1, 0)
    reshaped = rows.reshape(multiplier, inputs, outputs // groups)
    kernel = np.einsum("msi,sio->mio", total, reshaped).reshape(*size, each, outputs)
    named = {"W" if framework == "TensorFlow" else "weight": w, "D": d, "bias": numbers(outputs)}
    return named, kernel.transpose(3, 2, 0, 1)


def named(entries, path="conv"):
    return {f"{path}.{name}": array for name, array in entries.items()}


def composed(found):
    """Return the kernel that the layer `conv` of what was read composes to."""
    pair = (found.state.arrays[f"conv.{name}"] for name in ("weight", "depthwise_weight"))
    return compose(*pair, found.state.layers["conv"].spec)


def sizes_for(framework, case):
    size = SIZES[case][2]
    return {} if framework == "Gluon" or size[0] == size[1] else {"conv": size}


def is_exact(framework, case):
    """Return whether there are a W and a D that compose to the same kernel."""
    _, outputs, size, groups, multiplier = SIZES[case]
    if multiplier < size[0] * size[1]:
        return False
    return framework != "PyTorch" or groups in (1, outputs)


@LAYERS
def test_layers_are_carried_over_where_that_is_exact_and_folded_where_not(framework, case):
    entries, kernel = layer(framework, case)
    found = read_upstream(named(entries), framework, kernel_sizes=sizes_for(framework, case))
    inputs, outputs, size, groups, multiplier = SIZES[case]
    spec = ConvSpec(inputs, outputs, size, groups, max(multiplier, size[0] * size[1]))
    weight, depthwise = found.entries["conv.weight"], found.entries["conv.depthwise_weight"]
    assert weight.shape == spec.parameter_shape
    assert_close(compose(weight.reshape(spec.weight_shape), depthwise, spec), kernel)
    np.testing.assert_array_equal(found.entries["conv.bias"], entries["bias"])
    form = found.state.layers["conv"]
    if is_exact(framework, case):
        assert (found.carried, found.folded) == (("conv",), {})
        assert form.over_parameterized
        assert form.spec == spec
        assert depthwise.any()
        stored = entries.get("W", entries.get("weight"))
        for made, given in ((weight, stored), (depthwise, entries["D"])):  # no bit changes
            assert_same(np.sort(made, axis=None), np.sort(given, axis=None))
    else:
        assert (found.carried, [*found.folded]) == ((), ["conv"])
        assert not form.over_parameterized
        assert not depthwise.any()
        assert_close(found.state.arrays["conv.weight"].reshape(kernel.shape), kernel)


@pytest.mark.parametrize("framework", ["TensorFlow", "Gluon"])
def test_what_is_carried_over_composes_by_features_too(framework):
    """The canonical D meets the channel that the convolution reads, in grouped layers as well."""
    entries, kernel = layer(framework, "grouped")
    state = read_upstream(named(entries), framework).state
    spec, x = state.layers["conv"].spec, numbers(2, 4, 6, 6)
    weight, depthwise = (state.arrays[f"conv.{n}"] for n in ("weight", "depthwise_weight"))
    assert_close(feature_compose(x, weight, depthwise, spec), convolve(x, kernel, groups=2))


@LAYERS
def test_an_untrained_d_is_always_exact(framework, case):
    if case == "too small":
        return
    entries, kernel = layer(framework, case, trained=False)
    found = read_upstream(named(entries), framework, kernel_sizes=sizes_for(framework, case))
    assert found.carried == ("conv",)
    assert_close(composed(found), kernel)


def test_equal_blocks_are_exact_in_pytorch_too():
    entries, kernel = layer("PyTorch", "grouped")
    entries["D"][2:] = entries["D"][:2]
    found = read_upstream(named(entries))
    assert found.carried == ("conv",)
    reshaped = entries["W"].reshape(4, 4, 9)
    total = entries["D"] + entries["D_diag"]
    kernel = np.einsum("ims,ois->oim", total, reshaped).reshape(kernel.shape)
    assert found.state.layers["conv"].spec == ConvSpec(4, 8, (3, 3), 2)
    assert_close(composed(found), kernel)


@pytest.mark.parametrize("name", ["D_diag", "d_diag"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_stored_identity_counts(name, factor):
    entries, _ = layer("PyTorch", "multiplied")
    entries[name] = factor * entries.pop("D_diag")
    found = read_upstream(named(entries))
    total = entries["D"] + entries[name]
    kernel = np.einsum("ims,ois->oim", total, entries["W"]).reshape(6, 4, 3, 3)
    spec = ConvSpec(4, 6, (3, 3), 1, 12)
    weight, depthwise = found.entries["conv.weight"], found.entries["conv.depthwise_weight"]
    assert_close(compose(weight, depthwise, spec), kernel)
    assert bool(found.folded) == (factor != 1)
    if found.folded:
        assert "the identity stored beside D is another" in found.folded["conv"]


def test_why_a_layer_was_folded_is_told():
    reasons = [
        read_upstream(named(layer("PyTorch", case)[0])).folded["conv"]
        for case in ("grouped", "too small")
    ]
    assert reasons[0].startswith("in its PyTorch layout, 2 groups of 8 output channels compose wi")
    assert reasons[1].startswith("its depth multiplier, 4, is less than its 9 taps")


def test_everything_else_comes_along():
    entries, _ = layer("PyTorch", "plain")
    others = {"bn.weight": numbers(8), "bn.bias": numbers(8), "bn.running_mean": numbers(8),
              "bn.running_var": numbers(8), "bn.num_batches_tracked": np.array(3),
              "fc.weight": numbers(5, 8), "first.weight": numbers(4, 3, 3, 3)}  # fmt: skip
    one_tap = {"down.W": numbers(8, 8, 1), "down.bias": numbers(8)}
    found = read_upstream(named(entries) | others | one_tap)
    assert found.entries.keys() == {
        "conv.weight", "conv.depthwise_weight", "conv.bias", "down.weight", "down.bias", *others
    }  # fmt: skip
    np.testing.assert_array_equal(found.entries["down.weight"][..., 0], one_tap["down.W"])
    assert found.entries["down.weight"].shape == (8, 8, 1, 1)
    for name, array in others.items():
        np.testing.assert_array_equal(found.entries[name], array)
    assert list(found.state.layers) == ["conv"]


def in_file(framework, arrays, folder):
    """Write arrays in a file of the framework; return its path."""
    if framework == "PyTorch":
        torch = imported("torch")
        tensors = {f"module.{name}": torch.from_numpy(array) for name, array in arrays.items()}
        torch.save({"epoch": 3, "model": tensors}, folder / "model.pth")
        return folder / "model.pth"
    if framework == "Gluon":
        write_params(folder / "model.params", arrays)
        return folder / "model.params"
    need("tf")
    import h5py

    with h5py.File(folder / "model.h5", "w") as file:
        file.attrs["layer_names"] = [b"conv", b"down"]
        for name, array in arrays.items():
            path, own = name.split(".")
            own = "kernel" if own == "W" else own
            file[f"{path}/{path}/{own}:0"] = array
        for path in ("conv", "down"):
            names = [f"{path}/{own}" for own in file[f"{path}/{path}"]]
            file[path].attrs["weight_names"] = [name.encode() for name in names]
    return folder / "model.h5"


def one_tap(framework):
    if framework == "PyTorch":
        return {"down.W": numbers(8, 8, 1)}
    name = "down.W" if framework == "TensorFlow" else "down.weight"
    return {name: numbers(*((1, 8, 8) if framework == "TensorFlow" else (8, 8, 1, 1)))}


@FRAMEWORK
@pytest.mark.parametrize("case", ["plain", "grouped"])
def test_files_of_each_framework(framework, case, tmp_path):
    entries, kernel = layer(framework, case)
    arrays = named(entries) | one_tap(framework)
    file = in_file(framework, arrays, tmp_path)
    with open_checkpoint(file) as checkpoint:
        found = {one.path.rpartition("/")[2]: one for one in checkpoint.layers}
        assert found["conv"].origin == f"reference {framework}"
        assert found["conv"].over_parameterized
        assert_close(checkpoint.kernel(found["conv"]), kernel)
        assert checkpoint.kernel(found["down"]).shape == (8, 8, 1, 1)
        if not is_exact(framework, case):
            with pytest.raises(
                NotFoldable, match=r"layer '.*conv': in its PyTorch layout, 2 group"
            ):
                checkpoint.pair(found["conv"])
    upstream = read_upstream(file)
    assert [path.rpartition("/")[2] for path in (*upstream.carried, *upstream.folded)] == ["conv"]
    again = read_upstream(file, framework)
    assert again.entries.keys() == upstream.entries.keys()
    for name, array in upstream.entries.items():
        np.testing.assert_array_equal(again.entries[name], array)


@FRAMEWORK
@pytest.mark.parametrize("case", ["plain", "grouped"])
def test_folding_gives_ordinary_layers_of_the_framework(framework, case, tmp_path):
    entries, kernel = layer(framework, case)
    file = in_file(framework, named(entries) | one_tap(framework), tmp_path)
    report = fold_checkpoint(file, tmp_path / "out")
    told = "\n".join(f"{change.before} -> {change.after}" for change in report.changed)
    assert f"S = 9 of the reference {framework} layer -> ordinary convolution, 3×3" in told
    if framework == "PyTorch":
        import torch

        found = torch.load(tmp_path / "out", weights_only=True)
        assert found["epoch"] == 3
        model = found["model"]
        assert set(model) == {"module.conv.weight", "module.conv.bias", "module.down.weight"}
        assert_close(model["module.conv.weight"].numpy(), kernel)
        assert model["module.down.weight"].shape == (8, 8, 1, 1)
        assert "taken to be 3×3" in told
    elif framework == "Gluon":
        with open_checkpoint(tmp_path / "out") as checkpoint:
            assert set(checkpoint.entries) == {"conv.weight", "conv.bias", "down.weight"}
            assert_close(checkpoint.read("conv.weight"), kernel)
    else:
        import h5py

        with h5py.File(tmp_path / "out") as found:
            assert_close(found["conv/conv/kernel:0"][:].transpose(3, 2, 0, 1), kernel)
            assert found["down/down/kernel:0"].shape == (1, 1, 8, 8)
            kept = list(found["conv"].attrs["weight_names"])
            with h5py.File(file) as before:
                names = list(before["conv"].attrs["weight_names"])
            assert kept == [name for name in names if "D:0" not in str(name)]
            assert len(kept) == 2
            assert "D:0" not in found["conv/conv"]


def test_other_kernels_than_square_ones_must_be_given(tmp_path):
    entries, kernel = layer("PyTorch", "oblong")
    save_file(named(entries), tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", r"layer 'conv': its kernel size is not in the file, whic")
    with pytest.raises(CheckpointError, match=r"layer 'conv': its kernel size is not in the file"):
        read_upstream(tmp_path / "a.safetensors")
    fold_checkpoint(tmp_path / "a.safetensors", tmp_path / "out", kernel_sizes={"conv": (1, 3)})
    found = load_file(tmp_path / "out")
    assert found.keys() == {"conv.weight", "conv.bias"}
    assert_close(found["conv.weight"], kernel)


def test_a_layout_that_the_shapes_leave_open_is_told_or_given():
    w, d = numbers(9, 9, 9, seed=1), numbers(9, 9, 9, seed=2)
    both = {"conv.W": w, "conv.D": d}
    torch, tensorflow = (read_upstream(both, f).entries["conv.weight"] for f in FRAMEWORKS[:2])
    assert (torch != tensorflow).any()
    np.testing.assert_array_equal(read_upstream(both).entries["conv.weight"], torch)
    other = {"b.W": numbers(9, 4, 6), "b.D": numbers(9, 9, 4)}  # TensorFlow's alone
    found = read_upstream(both | other).entries["conv.weight"]
    np.testing.assert_array_equal(found, tensorflow)


def test_a_guess_of_the_layout_is_in_the_note(tmp_path):
    save_file({"a.W": numbers(9, 9, 9), "a.D": numbers(9, 9, 9)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert "taken to be PyTorch's, though TensorFlow's layout fits" in checkpoint.layers[0].note


def test_a_name_that_is_there_already_is_not_overwritten(tmp_path):
    entries, _ = layer("PyTorch", "plain")
    save_file(named(entries) | {"conv.weight": numbers(2)}, tmp_path / "a.safetensors")
    refused(
        tmp_path / "a.safetensors", r"be named 'conv\.weight', as another entry", CheckpointError
    )


def test_what_is_no_reference_checkpoint():
    with pytest.raises(CheckpointError, match="has no layer of the reference implementation: no W"):
        read_upstream({"a.weight": numbers(4, 3, 3, 3)})
    with pytest.raises(CheckpointError, match="has no layer of the reference implementation"):
        read_upstream({"a.W": numbers(4, 3, 9), "a.D": numbers(5, 9, 9)})
    with pytest.raises(ValueError, match="one of PyTorch, TensorFlow, Gluon, or None; received"):
        read_upstream({}, "torch")


def test_float64_is_carried_over_exactly():
    entries, kernel = layer("PyTorch", "plain", dtype=np.float64)
    found = read_upstream(named(entries))
    np.testing.assert_allclose(composed(found), kernel, rtol=1e-13)
    np.testing.assert_array_equal(tiled(9, 20), identity(ConvSpec(1, 1, (9,), 1, 20)))


def test_a_reference_checkpoint_goes_into_a_model_here(tmp_path):
    need("torch")
    import torch
    from torch import nn

    from doconv_torch import DOConv2d

    entries, kernel = layer("PyTorch", "grouped")
    plain, other = layer("PyTorch", "plain")
    arrays = named(plain, "0") | named({**entries, "W": entries["W"]}, "2")
    file = in_file("PyTorch", arrays | {"1.weight": numbers(8), "1.bias": numbers(8),
        "1.running_mean": numbers(8), "1.running_var": numbers(8) + 2,
        "1.num_batches_tracked": np.array(5)}, tmp_path)  # fmt: skip
    model = nn.Sequential(DOConv2d(3, 8, 3), nn.BatchNorm2d(8), DOConv2d(4, 8, 3, groups=2))
    found = read_upstream(file)
    assert (found.carried, list(found.folded)) == (("0",), ["2"])
    model.load_state_dict({name: torch.from_numpy(a) for name, a in found.entries.items()})
    assert_close(model[0].composed_kernel().detach().numpy(), other)
    assert_close(model[2].composed_kernel().detach().numpy(), kernel)
