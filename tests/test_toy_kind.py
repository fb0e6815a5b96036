"""A kind that four files of `tests/toy` register is a kind like any other."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from equal import assert_close
from frameworks import BACKENDS, adapter_of, fresh, need

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", *BACKENDS)

# Run in a process of its own, as a registered kind stays: names by networks, choices and messages
# that other tests compare would have one more.
PROGRAM = """
import importlib, json, sys
sys.path[:0] = json.loads(sys.argv[1])
import test_toy_kind
for name, *arguments in json.loads(sys.argv[2]):
    print("TOLD", json.dumps(getattr(test_toy_kind, name)(*arguments)))
"""


def told_by(*calls):
    """Return what functions of this file, each with its arguments, return in one process."""
    paths = json.dumps([str(ROOT / "tests"), str(ROOT / "benchmarks")])
    given = json.dumps([[str(argument) for argument in call] for call in calls])
    done = fresh("-c", PROGRAM, paths, given, cwd=ROOT)
    return [json.loads(told) for told in re.findall("^TOLD (.*)$", done.stdout, re.MULTILINE)]


def test_the_core_counts_and_computes_networks_of_it():
    (told,) = told_by(["in_the_core"])
    assert told["names"] == ["cifar_resnet20", "cifar_resnet20_scaled"]
    # One scale for each output channel of the 19 convolutions of three taps squared.
    assert told["more"] == 16 * 7 + 32 * 6 + 64 * 6
    assert told["composition"] == told["kernels"]
    assert told["equal"]


def in_the_core():
    from toy.core import SCALED  # noqa: F401

    from doconv_core import count, describe, list_models
    from doconv_core.networks.evaluate import evaluate
    from doconv_core.networks.initialize import initialize

    names = [n for n in list_models("cifar_resnet20*") if n.endswith(("20", "scaled"))]
    ordinary, scaled = count("cifar_resnet20"), count("cifar_resnet20_scaled")
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    outputs = []
    for name in names:
        network = describe(name)
        outputs.append(evaluate(network, initialize(network, input_shape=x.shape[1:]), x))
    kernels = [c.parameters for c in scaled.layers if c.kind == "scaled"]
    return {
        "names": names,
        "more": scaled.training_parameters - ordinary.parameters,
        "composition": scaled.composition_macs,
        "kernels": sum(kernels),
        "equal": bool((outputs[0] == outputs[1]).all()),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_trains_folds_saves_and_builds_it(backend, tmp_path):
    need(backend)  # which fails, or skips, without the framework
    more = [["in_keras_files", tmp_path]] if backend == "tf" else []
    told, *files = told_by(["in_a_backend", backend, tmp_path / "state.safetensors"], *more)
    assert told["folded"] == told["changed"] == 3
    assert told["same"] == told["named"] == 0
    for name in ("fold", "state", "ordinary"):
        assert told[name] <= 1e-5, name
    assert told["kind"] == "scaled"
    for each in files:
        check_keras_files(each)


def in_a_backend(backend, file):
    importlib.import_module("toy.core")
    adapter = adapter_of(backend)
    models = importlib.import_module(f"adapters.{backend}_models")
    importlib.import_module(f"toy.{backend}")
    package = adapter.package
    from doconv_core import State, read_state, write_state

    network = package.get_model("tutorial_pt", input_shape=(1, 12, 12), num_classes=5)
    shape = (2, 12, 12, 1) if backend == "tf" else (2, 1, 12, 12)
    x = models.array(np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    getattr(network, "eval", lambda: network)()
    model, report = package.over_parameterize(network, kind="scaled")
    same = package.verify(model, network, x).absolute
    state = package.export_state(model)
    drawn = np.random.default_rng(0)
    arrays = {
        name: drawn.uniform(0.5, 2, array.shape).astype(np.float32) if name.endswith(".scale")
        else array for name, array in state.arrays.items()
    }  # fmt: skip
    package.load_state(model, State(state.layers, arrays, state.origin))
    folded, fold_report = package.fold(model)
    write_state(package.export_state(model), file)
    other = package.get_model("tutorial_pt_scaled", input_shape=(1, 12, 12), num_classes=5)
    getattr(other, "eval", lambda: other)()
    named = package.verify(other, network, x).absolute
    package.load_state(other, read_state(file))
    again = package.verify(other, model, x).relative
    package.load_state(other, package.export_state(network))
    kinds = {str(form.over_parameterized) for form in read_state(file).layers.values()} - {"False"}
    return {
        "changed": len(report.changed),
        "folded": len(fold_report.changed),
        "same": same,
        "named": named,
        "fold": package.verify(folded, model, x).relative,
        "state": again,
        "ordinary": package.verify(other, network, x).relative,
        "kind": ",".join(kinds),
    }


def test_files_of_it_are_folded_and_converted(tmp_path):
    (told,) = told_by(["in_files", tmp_path])
    assert told["folded"] == ["conv.weight", "conv.bias"]
    assert told["converted"] == ["conv.weight", "conv.scale", "conv.bias"]
    assert_close(np.array(told["kernel"]), np.array(told["expected"]))
    # A state of it is folded and read as an ordinary layer's, and so is the state as another file.
    assert told["state"] == told["ordinary"] == ["weight", "bias"]
    assert_close(np.array(told["arrays"]), np.array(told["expected"]))
    assert told["cost"] == {"ordinary": [112, 108], "kernel_composed": [116, 216]}
    assert told["taken"] == "over-parameterized, scaled"


def in_files(folder):
    from click.testing import CliRunner
    from safetensors.numpy import save_file
    from toy.core import SCALED

    from doconv_core import (
        ConvSpec,
        LayerForm,
        State,
        fold_checkpoint,
        open_checkpoint,
        read_state,
        write_state,
    )
    from doconv_core.cli.command import doconv

    folder, spec = Path(folder), ConvSpec(3, 4, (3, 3))
    drawn = np.random.default_rng(0)
    weights = {n: drawn.standard_normal(s) for n, s in SCALED.entries(spec).items()}
    arrays = {f"conv.{n}": a.astype(np.float32) for n, a in weights.items()}
    arrays["conv.weight"] = arrays["conv.weight"].reshape(spec.kernel_shape)
    arrays["conv.bias"] = np.zeros(4, np.float32)
    file, folded, converted = (
        folder / "m.safetensors",
        folder / "f.safetensors",
        folder / "c.params",
    )
    save_file(arrays, file)
    fold_checkpoint(file, folded)
    done = CliRunner().invoke(doconv, ["convert", str(file), str(converted)])
    assert done.exit_code == 0, done.output
    form = LayerForm(spec, "scaled")
    state = State({"conv": form}, {f"conv.{n}": arrays[f"conv.{n}"].reshape(s)
                                   for n, s in form.shapes.items()})  # fmt: skip
    whole, ordinary, like = (folder / f"{name}.safetensors" for name in ("s", "o", "l"))
    write_state(state, whole)

    def run(*command):
        done = CliRunner().invoke(doconv, [*map(str, command)])
        assert done.exit_code == 0, done.output
        return done.output

    run("fold", whole, ordinary)
    run("convert", whole, folder / "o.params", "--fold")
    run("convert", ordinary, like, "--like", whole)
    taken = json.loads(run("convert", ordinary, like, "--like", whole, "--force", "--json"))
    costs = json.loads(run("cost", whole, "--json"))["layers"][0]["cost"]
    read = read_state(ordinary)
    with open_checkpoint(folder / "o.params") as one:
        plain = [*one.entries]
    with open_checkpoint(folded) as one, open_checkpoint(converted) as two:
        return {
            "state": [*read.layers["conv"].shapes],
            "ordinary": [name.removeprefix("conv.") for name in plain],
            "arrays": read.arrays["conv.weight"].reshape(spec.kernel_shape).tolist(),
            "cost": {form: [*costs[form].values()] for form in ("ordinary", "kernel_composed")},
            "taken": {each["name"]: each["how"] for each in taken["entries"]}["conv.scale"],
            "folded": sorted(one.entries, reverse=True),
            "converted": sorted(two.entries, key=["conv.weight", "conv.scale", "conv.bias"].index),
            "kernel": two.kernel(two.layers[0]).tolist(),
            "expected": one.read("conv.weight").tolist(),
        }


def check_keras_files(told):
    """Keras' files of it are folded where its class takes no part in names."""
    assert told["same"] <= 1e-6
    refused = "'scaled_conv2d_1': it is a scaled_conv2d, which may compute something else"
    assert re.search(refused, told["refused"]), told["refused"]
    assert told["files"] == ["attribute.weights.h5", "folded.weights.h5", "list.weights.h5"]


def in_keras_files(folder):
    import keras
    from toy.tf import ScaledConv2D

    from doconv_core import NotFoldable, difference, fold_checkpoint

    class Model(keras.Model):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def call(self, x):
            return self.conv(x)

    folder, x = Path(folder), np.random.default_rng(0).random((1, 6, 6, 2), np.float32)
    model, plain = Model(ScaledConv2D(3, 3)), Model(keras.layers.Conv2D(3, 3))
    listed = keras.Sequential([keras.Input(x.shape[1:]), ScaledConv2D(3, 3)])
    model(x), plain(x)
    model.conv.scale.assign([0.5, 2.0, 3.0])
    attribute, in_list = folder / "attribute.weights.h5", folder / "list.weights.h5"
    model.save_weights(attribute)
    listed.save_weights(in_list)
    fold_checkpoint(attribute, folder / "folded.weights.h5")
    plain.load_weights(folder / "folded.weights.h5")
    try:
        fold_checkpoint(in_list, folder / "no.weights.h5")
        refused = ""
    except NotFoldable as error:
        refused = str(error)
    return {
        "same": difference(np.asarray(plain(x)), np.asarray(model(x))).relative,
        "refused": refused,
        "files": sorted(path.name for path in folder.glob("*.h5")),
    }


def test_it_costs_little():
    """A kind is to be one short file in the core and one in each backend."""
    files = [ROOT / "tests" / "toy" / f"{package}.py" for package in PACKAGES]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 400
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        assert f"`doconv_{package}/{'kinds/' if package == 'core' else ''}KIND.py`" in contributing


def test_a_kind_of_several_layers_costs_no_more_files():
    found = {f.relative_to(ROOT).as_posix() for f in ROOT.glob("doconv_*/**/*bsconv*.py")}
    backends = {f"doconv_{backend}/bsconv.py" for backend in BACKENDS}
    assert found == {"doconv_core/kinds/bsconv.py", *backends}


def test_nobody_outside_a_kinds_own_files_names_its_weights():
    """Only a kind's files have the names of its entries as words of code."""
    from doconv_core.kinds.base import ComposedKind, kinds

    marks = {n for k in kinds().values() if isinstance(k, ComposedKind) for n in k.names[1:]}
    own = re.compile(
        r"(do_conv|depthwise_conv|over_parameterized|compose|kernel_cache|convolve|branches|expand)"
        r"\.py"
    )
    found = []
    for package in PACKAGES:
        for file in sorted((ROOT / f"doconv_{package}").rglob("*.py")):
            text = re.sub(
                r'""".*?"""|#[^\n]*', "", file.read_text(encoding="utf-8"), flags=re.DOTALL
            )
            if own.fullmatch(file.name):
                continue
            found += [
                f"{file.relative_to(ROOT)}: {m}" for m in marks if re.search(rf"\b{m}\b", text)
            ]
    assert not found
