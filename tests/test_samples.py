"""The samples: their data, options, table, fold check and files, and a short run of each."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
from pathlib import Path

import digits
import harness
import numpy as np
import pytest
from cases import one_test
from equal import assert_same
from frameworks import fresh, need
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

from doconv_core import LayerForm, LinearSpec, NotFoldable, State, compose, difference, read_state

FOLDER = Path(harness.__file__).parent
SAMPLES = {"sample_pt": "torch", "sample_tf": "tf", "sample_gluoncv": "mx"}
PARAMETERS = {
    # from the layers' sizes: D adds I·M·S numbers to each convolution
    "sample_pt": (3930 + (1 + 16 + 16) * 81, 3930),
    "sample_tf": (593874 + (1 + 32) * 81, 593874),
    "sample_gluoncv": (431080 + (1 + 20) * 625, 431080),
}


@pytest.fixture(scope="module")
def small():
    """The default data, made once."""
    return digits.load("digits", "nowhere")


def fake(**changes):
    """A sample without a framework: one linear layer, trained by one step for each epoch."""
    trainings = []

    def build(layer, seed, device):
        rng = np.random.default_rng(seed)
        weight = rng.normal(0, 0.01, (10, 784)).astype(np.float32)
        return {"layer": layer, "weight": weight, "bias": np.zeros(10, np.float32)}

    def train(model, data, options, seed, device, epochs):
        trainings.append((model["layer"], seed))
        x, onehot = data.train_images.reshape(-1, 784), np.eye(10)[data.train_labels]
        for _ in epochs:
            model["weight"] += (options.lr * (onehot - 0.1).T @ x / len(x)).astype(np.float32)

    def outputs(model, images, device):
        assert len(images) <= harness.EVALUATED_AT_ONCE
        return images.reshape(len(images), -1) @ model["weight"].T + model["bias"]

    def export_state(model):
        form = LayerForm(LinearSpec(784, 10))
        return State({"fc": form}, {f"fc.{n}": model[n] for n in ("weight", "bias")})

    options = {
        "name": "fake", "description": "A sample without a framework.",
        "versions": {"nothing": "1.0"}, "epochs": {"digits": 3, "mnist": 1},
        "lr": {"digits": 0.5, "mnist": 0.1}, "why": "It is quick.", "batch_size": 10,
        "devices": {"cpu": "here"}, "build": build, "train": train, "outputs": outputs,
        "fold": lambda model, device: dict(model), "export_state": export_state,
        "parameters": lambda model: model["weight"].size + model["bias"].size,
    }  # fmt: skip
    return harness.Sample(**{**options, **changes}), trainings


def contents(folder):
    """Every file below a folder, by its path, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# The data


def test_digits_are_all_there_as_images_from_0_to_1(small):
    images = np.concatenate([small.train_images, small.test_images])
    assert small.train_images.shape == (1257, 28, 28)
    assert small.test_images.shape == (540, 28, 28)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 1797
    assert images.any(axis=(0, 2)).nonzero()[0].tolist() == list(range(4, 24))


def test_the_split_is_fixed_and_keeps_the_share_of_each_digit(small):
    again = digits.load("digits", "nowhere")
    assert all(np.array_equal(a, b) for a, b in zip(small, again, strict=True))
    assert small.train_labels.dtype == np.int64
    train, test = (np.bincount(labels) for labels in (small.train_labels, small.test_labels))
    assert np.abs(test / (train + test) - 0.3).max() < 0.004
    assert test.tolist() == [54, 55, 53, 55, 54, 55, 54, 54, 52, 54]
    assert small.test_labels[:10].tolist() == [1, 4, 5, 6, 9, 1, 2, 2, 2, 0]


def test_enlarging_keeps_a_digits_place_and_brightness(small):
    before = load_digits().images.sum(0) / 16
    after = np.concatenate([small.train_images, small.test_images]).sum(0)
    assert after.sum() == pytest.approx(before.sum() * 2.5**2, rel=0.03)
    for axis in (0, 1):
        centre = (before.sum(axis) @ (np.arange(8) + 0.5)) / before.sum()
        moved = (after.sum(axis) @ (np.arange(28) + 0.5)) / after.sum()
        assert moved == pytest.approx(4 + 2.5 * centre, abs=0.05)


@pytest.fixture
def offline(monkeypatch):
    """No name can be resolved, whatever the machine's network."""

    def refuse(*_, **__):
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
def test_mnist_without_a_network_says_what_to_download_and_where_to_put_it(tmp_path, capsys):
    sample, trainings = fake()
    with pytest.raises(SystemExit) as stopped:
        harness.main(
            sample, ["--data", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]
        )
    message = str(stopped.value)
    assert "no network in this test" in message
    assert f"download {digits.MNIST_URL}" in message
    assert f"put it here as {tmp_path / 'mnist.npz'}" in message
    assert not trainings
    assert not (tmp_path / "o").exists()


def made_up_mnist(file, **changes):
    """Write a file of MNIST's form with few images; returns its arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 28, 28), np.uint8),
        "y_train": rng.integers(0, 10, 30, np.uint8),
        "x_test": rng.integers(0, 256, (20, 28, 28), np.uint8),
        "y_test": rng.integers(0, 10, 20, np.uint8),
    }
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(file, **arrays)
    return arrays


@pytest.mark.usefixtures("offline")
def test_a_local_mnist_file_is_used(tmp_path):
    arrays = made_up_mnist(tmp_path / "mnist.npz")
    data = digits.load("mnist", tmp_path)
    assert np.array_equal(data.train_images * 255, arrays["x_train"])
    assert np.array_equal(data.test_labels, arrays["y_test"])
    assert [array.dtype for array in data] == [np.float32, np.int64] * 2

    sample, trainings = fake()
    harness.main(
        sample, ["--data", "mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]
    )
    report = json.loads((tmp_path / "o" / "fake.json").read_text())
    assert report["data"] == {"train": 30, "test": 20}
    assert (report["options"]["epochs"], report["options"]["lr"]) == (1, 0.1)
    assert len(trainings) == 10


@one_test
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "is not a whole mnist.npz, which has the arrays x_train, y_train"),
        ({"x_test": np.zeros((20, 784), np.uint8)}, r"x_test must be uint8 of shape \('N', 28, 28"),
        ({"x_train": np.zeros((30, 28, 28))}, "x_train must be uint8 .* found float64"),
        ({"y_train": np.zeros(29, np.uint8)}, "found 29 labels up to 0 for 30 images"),
        ({"y_train": np.full(30, 10, np.uint8)}, "one label from 0 to 9 .* up to 10"),
        ({"x_test": np.array([None])}, "is not a whole mnist.npz"),
    ],
)
def test_a_wrong_mnist_file_is_refused(tmp_path, changes, message):
    made_up_mnist(tmp_path / "mnist.npz", **changes)
    with pytest.raises(digits.DataError, match=message):
        digits.load("mnist", tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 20000])
def test_a_truncated_mnist_file_is_refused(tmp_path, keep):
    file = tmp_path / "mnist.npz"
    made_up_mnist(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(digits.DataError, match="is not a whole"):
        digits.load("mnist", tmp_path)


def test_mnist_as_openml_gives_it(tmp_path, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return np.arange(7 * 784).reshape(7, 784) % 256, np.array(list("0123456"), object)

    monkeypatch.setattr(digits, "fetch_openml", fetch)
    monkeypatch.setattr(digits, "MNIST_TRAINING", 5)
    data = digits.load("mnist", tmp_path)
    assert (asked["name"], asked["data_home"]) == ("mnist_784", tmp_path)
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4]
    assert data.test_labels.tolist() == [5, 6]
    assert data.train_images[0, 0, 3] == np.float32(3) / np.float32(255)


# Options


@one_test
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--runs 0", "argument --runs: must be a whole number of at least 1; received '0'."),
        ("--runs -2", "argument --runs: must be a whole number of at least 1; received '-2'."),
        ("--runs two", "argument --runs: must be a whole number of at least 1; received 'two'."),
        ("--epochs 1.5", "argument --epochs: must be a whole number of at least 1; received '1.5'"),
        ("--batch-size 0", "argument --batch-size: must be a whole number of at least 1"),
        ("--lr 0", "argument --lr: must be a number above 0; received '0'."),
        ("--lr nan", "argument --lr: must be a number above 0; received 'nan'."),
        ("--lr inf", "argument --lr: must be a number above 0; received 'inf'."),
        ("--seed -1", "argument --seed: must be a whole number from 0 to"),
        ("--seed 4294967296", "argument --seed: must be a whole number from 0 to"),
        ("--layer dense", "argument --layer: invalid choice: 'dense'"),
        ("--data cifar", "argument --data: invalid choice: 'cifar'"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        ("--device gpu", "argument --device: nothing 1.0 found no GPU here; use cpu or auto."),
        (f"--out {__file__}", "is a file; name a folder for the results."),
        (f"--out {__file__}/deeper", "is a file; name a folder for the results."),
    ],
)
def test_bad_options_stop_before_anything_is_done(arguments, message, capsys):
    sample, trainings = fake()
    with pytest.raises(SystemExit) as stopped:
        harness.main(sample, arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not trainings


def test_help_explains_each_option_with_its_default(capsys):
    sample, _ = fake()
    with pytest.raises(SystemExit):
        harness.main(sample, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in (
        "--runs", "--epochs", "--batch-size", "--lr", "--seed", "--layer", "--data", "--data-dir",
        "--out", "--device",
    ):  # fmt: skip
        assert "(default: " in text.split(f" {option} ")[-1]
    assert "(default: 3 for digits, 1 for mnist; see below)" in text
    assert text.endswith("It is quick.")


def test_a_gpu_is_taken_where_there_is_one_and_left_where_it_is_not_wanted():
    sample, _ = fake(devices={"cpu": "here", "gpu": "there"})
    assert harness.parse_options(sample, []).device == "gpu"
    assert harness.parse_options(sample, ["--device", "cpu"]).device == "cpu"
    assert harness.parse_options(fake()[0], []).device == "cpu"


# The table and the files


def test_the_table():
    accuracies = {"conv": [98.5, 98.51, 98.54], "doconv": [98.71, 98.62, 98.67]}
    assert harness.table(accuracies) == (
        "|          | run1  | run2  | run3  | avg    | std   | +     |\n"
        "| -------- | ----- | ----- | ----- | ------ | ----- | ----- |\n"
        "| Baseline | 98.50 | 98.51 | 98.54 | 98.517 | 0.021 | -     |\n"
        "| DO-Conv  | 98.71 | 98.62 | 98.67 | 98.667 | 0.045 | 0.150 |"
    )
    assert harness.table({"doconv": [98.7]}).splitlines()[2].split("|")[3:] == [
        " 98.700 ", " -   ", " - ", "",
    ]  # fmt: skip
    assert "-0.000" not in harness.table({"conv": [98.1], "doconv": [98.1 - 1e-9]})


def test_a_run_trains_both_layers_with_the_same_seeds_and_writes_its_results(
    tmp_path, capsys, small
):
    sample, trainings = fake()
    harness.main(sample, ["--runs", "2", "--seed", "7", "--out", str(tmp_path)])
    assert trainings == [("conv", 7), ("doconv", 7), ("conv", 8), ("doconv", 8)]

    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "fake.json").read_text())
    assert harness.table(report["accuracy"]) in printed
    assert "outputs differ by at most 0 (0 of the largest); predictions: all agree" in printed
    assert "parameters: 7850 in training, 7850 folded, 7850 in the ordinary network" in printed
    assert report["options"]["seed"] == 7
    assert report["options"]["out"] == str(tmp_path)
    assert report["versions"]["nothing"] == "1.0"
    assert set(report["files"].values()) == {p.name for p in tmp_path.iterdir()} - {"fake.json"}

    outputs = load_file(tmp_path / "fake.outputs.safetensors")
    assert outputs.keys() == {"labels", "conv", "doconv", "folded"}
    assert np.array_equal(outputs["labels"], small.test_labels)
    for layer in ("conv", "doconv"):
        found = 100 * np.mean(outputs[layer].argmax(1) == outputs["labels"])
        assert found == report["accuracy"][layer][-1] > 50
    assert read_state(tmp_path / "fake.folded.safetensors").layers.keys() == {"fc"}

    again = tmp_path / "again"
    harness.main(fake()[0], ["--runs", "2", "--seed", "7", "--out", str(again)])
    for name in report["files"].values():
        assert_same(load_file(again / name), load_file(tmp_path / name))
    assert json.loads((again / "fake.json").read_text())["accuracy"] == report["accuracy"]


def test_a_training_that_diverged_agrees_with_nothing(tmp_path, capsys):
    def diverged(model, images, device):
        return np.full((len(images), 10), np.nan, np.float32)

    harness.main(fake(outputs=diverged)[0], ["--runs", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "outputs are NOT FINITE, so that nothing can be compared" in printed
    assert "agree" not in printed
    report = json.loads((tmp_path / "fake.json").read_text())
    assert report["accuracy"]["doconv"] == [0]
    assert report["fold"]["largest_difference"] is None
    assert not report["fold"]["all_predictions_agree"]

    def fold(model, device):
        raise NotFoldable("layer '0': the folded kernel is not finite.")

    with pytest.raises(SystemExit, match=r"is not finite\. Try a smaller --lr\. Nothing was writ"):
        harness.main(fake(fold=fold)[0], ["--runs", "1", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_one_layer_alone(tmp_path, capsys):
    for layer, files in (("conv", {"outputs"}), ("doconv", {"outputs", "doconv", "folded"})):
        sample, trainings = fake()
        out = tmp_path / layer
        harness.main(sample, ["--runs", "1", "--layer", layer, "--out", str(out)])
        assert trainings == [(layer, 0)]
        report = json.loads((out / "fake.json").read_text())
        assert report["accuracy"].keys() == {layer}
        assert report["files"].keys() == files
        assert ("fold" in report) == (layer == "doconv")


def test_a_fold_that_changes_the_outputs_is_reported(tmp_path, capsys):
    def fold(model, device):
        return {**model, "weight": -model["weight"]}

    harness.main(fake(fold=fold)[0], ["--runs", "1", "--out", str(tmp_path)])
    assert "predictions: DIFFER" in capsys.readouterr().out
    report = json.loads((tmp_path / "fake.json").read_text())
    assert report["fold"]["all_predictions_agree"] is False
    assert report["fold"]["relative_to_largest_output"] == pytest.approx(2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["train", "fold", "write"])
def test_an_error_or_an_interruption_leaves_the_previous_results_whole(
    tmp_path, monkeypatch, capsys, where, error
):
    harness.main(fake()[0], ["--runs", "1", "--out", str(tmp_path)])
    before = contents(tmp_path)
    assert len(before) == 4

    def fail(*_):
        raise error

    sample, _ = fake() if where == "write" else fake(**{where: fail})
    if where == "write":
        original, written = harness.write_state, []

        def second_fails(state, path):
            original(state, path)
            written.append(path)
            if len(written) == 2:
                raise error

        monkeypatch.setattr(harness, "write_state", second_fails)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error) as stopped:
        harness.main(sample, ["--runs", "2", "--seed", "1", "--out", str(tmp_path)])
    if error is KeyboardInterrupt:
        assert stopped.value.code == 130
        assert "fake: interrupted; nothing was written." in capsys.readouterr().err
    assert contents(tmp_path) == before


# The samples themselves


RUN_EACH = """
import os, runpy, sys
images, sample, *folders = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sample))
if images != "all":
    import digits
    data = digits.load_small()
    train = {name: getattr(data, name)[: int(images)] for name in ("train_images", "train_labels")}
    digits.load_small = lambda: data._replace(**train)
for folder, arguments in zip(folders, ([], ["--layer", "doconv"])):
    sys.argv = [sample, "--runs", "1", "--epochs", "1", "--out", folder, *arguments]
    runpy.run_path(sample, run_name="__main__")
"""


def run(sample, images, *folders):
    """Run a sample in a fresh interpreter, then with one layer alone, its warnings errors.

    images: how many to train with, or "all". Returns what was printed.
    """
    warnings = ["error", "ignore:Please import `csr_matrix`:DeprecationWarning"]  # see pyproject
    command = [*(f"-W{w}" for w in warnings), "-c", RUN_EACH, images]
    command += [FOLDER / f"{sample}.py", *folders]
    return fresh(*command, cwd=folders[0]).stdout


@pytest.mark.parametrize(
    "images",
    [pytest.param(300, marks=pytest.mark.brief), pytest.param("all", marks=pytest.mark.exhaustive)],
)
@pytest.mark.parametrize("sample", SAMPLES)
def test_a_short_run(sample, images, tmp_path):
    need(SAMPLES[sample])
    first, again = tmp_path / "first", tmp_path / "again"
    for folder in (first, again):
        folder.mkdir()
    printed = run(sample, images, first, again)
    report = json.loads((first / f"{sample}.json").read_text())
    assert harness.table(report["accuracy"]) in printed
    assert "predictions: all agree" in printed
    assert report["fold"]["all_predictions_agree"] is True
    assert report["fold"]["relative_to_largest_output"] <= 1e-5

    training, ordinary = PARAMETERS[sample]
    assert report["parameters"] == {
        "training": training, "folded": ordinary, "ordinary": ordinary,
    }  # fmt: skip
    check_states(first, sample, training, ordinary)

    outputs = load_file(first / f"{sample}.outputs.safetensors")
    shapes = {name: array.shape for name, array in outputs.items()}
    logits = dict.fromkeys(("conv", "doconv", "folded"), (540, 10))
    assert shapes == {"labels": (540,), **logits}
    assert not np.array_equal(outputs["conv"], outputs["doconv"])

    # The same seed gives the same result, whether or not the baseline was trained before it.
    repeated = load_file(again / f"{sample}.outputs.safetensors")
    assert np.array_equal(repeated["doconv"], outputs["doconv"])
    for kind in ("doconv", "folded"):
        name = f"{sample}.{kind}.safetensors"
        assert_same(load_file(again / name), load_file(first / name))


def check_states(folder, sample, training, ordinary):
    """The states have the network's parameters, and the folded one the composed kernels."""
    trained, folded = (
        read_state(folder / f"{sample}.{kind}.safetensors") for kind in ("doconv", "folded")
    )
    assert trained.layers.keys() == folded.layers.keys()
    assert sum(array.size for array in trained.arrays.values()) == training
    assert sum(array.size for array in folded.arrays.values()) == ordinary
    over_parameterized = {p for p, form in trained.layers.items() if form.over_parameterized}
    assert over_parameterized == {
        p for p, form in trained.layers.items() if not isinstance(form.spec, LinearSpec)
    }
    for path, form in trained.layers.items():
        expected = trained.arrays[f"{path}.weight"]
        if path in over_parameterized:
            depthwise = trained.arrays[f"{path}.depthwise_weight"]
            assert depthwise.any()  # it was trained
            expected = compose(expected, depthwise, form.spec).reshape(expected.shape)
        assert difference(folded.arrays[f"{path}.weight"], expected).relative <= 1e-6
        assert np.array_equal(folded.arrays[f"{path}.bias"], trained.arrays[f"{path}.bias"])


@pytest.mark.parametrize("sample", SAMPLES)
def test_both_layers_begin_as_the_same_function(sample, small):
    need(SAMPLES[sample])
    module = importlib.import_module(sample)
    device = module.SAMPLE.devices["cpu"]
    conv, doconv, other = (
        module.outputs(module.build(layer, seed, device), small.test_images[:20], device)
        for layer, seed in (("conv", 3), ("doconv", 3), ("doconv", 4))
    )
    assert np.array_equal(conv, doconv)
    assert not np.array_equal(doconv, other)


@pytest.mark.parametrize(
    ("sample", "module", "extra"),
    [
        ("sample_pt", "torch", "torch"),
        ("sample_tf", "keras", "tf"),
        ("sample_gluoncv", "mxnet", "mx"),
    ],
)
def test_a_missing_framework_is_named_with_the_extra_to_install(sample, module, extra):
    hide = f"import runpy, sys; sys.modules[{module!r}] = None; sys.path.insert(0, sys.argv[1]); "
    run = f"{hide}runpy.run_path(sys.argv[2])"
    done = fresh("-c", run, FOLDER, FOLDER / f"{sample}.py", status=1)
    assert f"ImportError: doconv_{extra} needs {module}" in done.stderr
    assert f'python -m pip install "overconv[{extra}]"' in done.stderr


@pytest.mark.parametrize("program", ["harness", "compare"])
def test_what_the_samples_need_is_named_with_the_extra_to_install(program):
    hide = "import sys; sys.modules['tqdm'] = None; sys.path.insert(0, sys.argv[1]); "
    done = fresh("-c", f"{hide}import {program}", FOLDER, status=1)
    told = 'ImportError: the samples need tqdm, .*python -m pip install "overconv\\[samples\\]"'
    assert re.search(told, done.stderr)


def test_tensorflows_remarks_are_held_back_and_errors_are_not(capfd):
    need("tf")
    from quiet_tensorflow import without_remarks

    remarks = [
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
        "I0000 00:00:1795921402.5 4044 cpu_feature_guard.cc:227] This TensorFlow binary is",
        "To enable the following instructions: AVX2 FMA, in other operations, rebuild",
        "W0000 00:00:1795921402.5 4044 computation_placer.cc:177] already registered",
        "E0000 00:00:1795922221.8 8100 cuda_platform.cc:52] failed call to cuInit: INTERNAL",
    ]
    errors = ["E0000 00:00:1795922221.8 8100 a.cc:5] broken", "Traceback: a user's own"]
    capfd.readouterr()
    with without_remarks():
        os.write(2, "\n".join([*remarks, *errors, ""]).encode())
    assert capfd.readouterr().err.splitlines() == errors
