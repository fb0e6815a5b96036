"""The contract of training: runs that end in every way, and go on; what they leave and refuse."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from contract import check_refused
from contract_train import (
    EPOCHS,
    NETWORK,
    NETWORKS,
    STEPS,
    TRAINED,
    bits,
    composed,
    model_of,
    recipe,
    smooth,
    trained,
)
from equal import assert_close
from frameworks import adapter_of, fresh
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from doconv_core import open_checkpoint, read_state
from doconv_core.networks.initialize import initialize
from doconv_core.training import reference, session
from doconv_core.training.data import batches, open_data
from doconv_core.training.data.sources import Arrays
from doconv_core.training.engine import Step
from doconv_core.training.optimizer import trained as is_trained
from doconv_core.training.run import RunError, open_run
from doconv_core.training.schedule import learning_rate, progress, steps_per_epoch

PROGRAM = "tests/contract_train.py"


@pytest.fixture(params=TRAINED)
def backend(request):
    adapter_of(request.param)
    return request.param


@pytest.fixture
def package(backend):
    return adapter_of(backend).package


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A backend's run that nothing has ended, and one that was killed; and how these ended."""
    made = {}

    def run(backend):
        if backend not in made:
            steps = sorted(random.sample(range(1, STEPS * EPOCHS), 2))
            folder = tmp_path_factory.mktemp(f"{backend}-{'-'.join(map(str, steps))}-")
            environment = {"OMP_NUM_THREADS": "1"}
            done = fresh(PROGRAM, backend, folder, *steps, environment=environment)
            made[backend] = folder, steps, json.loads(done.stdout.splitlines()[-1])
        return made[backend]

    return run


@pytest.fixture
def whole(backend, runs):
    """The run that nothing has ended."""
    return runs(backend)[0] / "whole"


def test_a_killed_run_goes_on_to_the_same_bits(backend, runs):
    """Killed between two steps, by chance, and, when it goes on, while it writes a checkpoint."""
    folder, (first, second), ended = runs(backend)
    assert ended == [
        0,
        [-signal.SIGKILL, first % STEPS],  # no step is lost
        [-signal.SIGKILL, (second - 1) % STEPS],  # but of the checkpoint that was torn
        [0, 0],
    ]
    assert bits(folder / "killed") == bits(folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_end_goes_on_to_the_same_bits(
    package, number, whole, tmp_path, monkeypatch
):
    former, step = session.Session._after, random.randrange(STEPS * EPOCHS)

    def patched(self, at):
        if at.number == step:
            os.kill(os.getpid(), number)
        former(self, at)

    folder = tmp_path / f"asked-{step}"
    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_after", patched)
        with pytest.raises(
            session.Interrupted, match=r"was interrupted .*; the last checkpoint is"
        ):
            trained(package, folder, checkpoint_every=None)
    assert open_run(folder).last.name == f"step-{step + 1:08d}"
    assert signal.getsignal(number) is not patched
    trained(package, folder, resume=True)
    assert bits(folder) == bits(whole)


def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint_has_it(package, tmp_path):
    folder = tmp_path / "run"
    wild = recipe(learning_rate=1e30, average=None)
    with pytest.raises(session.NotFinite, match=r"the run diverged in epoch 1 of 2; .*lower learn"):
        trained(package, folder, recipe=wild)
    state = read_state(open_run(folder).last / "state.safetensors")
    assert all(np.isfinite(array).all() for array in state.arrays.values())
    model = model_of(package)
    package.load_state(model, state)


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(package, whole, tmp_path):
    """Of which nothing is lost but what was to be written."""
    folder, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(epoch, metrics, model):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(session.DiskFull, match=r"File too large.*; make room and resume\.$"):
            trained(package, folder, callback=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run = open_run(folder)
    assert run.last.name == "epoch-0001"
    assert {path.name for path in run.last.parent.iterdir()} == {"epoch-0001", "last", "best"}
    trained(package, folder, resume=True)
    assert bits(folder) == bits(whole)


def events(folder):
    """Return what TensorBoard reads in a run's folder: numbers by tag and step."""
    (file,) = folder.glob("*tfevents*")
    reader, found = PyRecordReader_New(str(file)), {}
    with suppress(errors.OutOfRangeError):
        while True:
            reader.GetNext()
            event = Event.FromString(reader.record())
            for value in event.summary.value:
                found[value.tag, event.step] = np.float32(value.simple_value)
    return found


def test_what_a_run_leaves(package, backend, tmp_path):
    """The folder, the folded weights in both forms, and what the callback and the caller get."""
    called, folder = [], tmp_path / "run"
    made = trained(
        package, folder, notes={"why": "a test"}, seed=3,
        callback=lambda epoch, metrics, model: called.append((epoch, metrics, model)),
    )  # fmt: skip
    run = open_run(folder)
    assert [epoch for epoch, _, _ in called] == [1, 2]
    assert [metrics for _, metrics, _ in called] == made.metrics == run.metrics()
    assert all(model is made.model for _, _, model in called)
    assert made.run == folder
    for metrics in made.metrics:
        assert 0 < metrics["train_loss"] < 3
        assert 0 <= metrics["eval_top1"] <= metrics["eval_top5"] <= 1
        assert events(folder)["eval/top1", metrics["step"]] == np.float32(metrics["eval_top1"])

    told = run.described
    assert (told["seed"], told["framework"], told["notes"]) == (3, backend, {"why": "a test"})
    assert told["recipe"]["learning_rate"] == 0.05
    assert (told["data"]["name"], told["data"]["train"]) == ("digits", 1437)
    assert {"python", "numpy", "grain"} <= told["versions"].keys()
    assert run.is_complete
    verified, result = made.verified, run.result
    assert verified.before.images == verified.after.images == 360
    assert verified.relative == result["difference"]["relative"] < 1e-5
    assert result["trained"]["top1"] == verified.before.correct / 360
    assert result["moved"].keys() == {"conv1", "conv2"}
    assert result["moved"]["conv1"]["relative"] > 0

    folded = read_state(folder / "folded.safetensors")
    assert not any(form.over_parameterized for form in folded.layers.values())
    own = package.export_state(made.folded)
    assert {n: a.tobytes() for n, a in own.arrays.items()} == {
        n: a.tobytes() for n, a in folded.arrays.items()
    }
    files = {path.name for path in folder.iterdir()}
    assert {"report.html", "folded.safetensors", *result["files"]} <= files
    (native,) = set(result["files"]) - {"folded.safetensors"}
    with open_checkpoint(folder / native) as checkpoint:
        assert [layer.kind for layer in checkpoint.layers].count("convolution") == 2
        assert not any(layer.over_parameterized for layer in checkpoint.layers)
    page = (folder / "report.html").read_text()
    assert "http" not in page
    assert page.count("<svg") == page.count("</svg>") == 3


def test_a_run_that_writes_nothing_comes_to_the_same(package, whole):
    made = trained(package, None)
    assert made.run is None
    expected = open_run(whole).metrics()
    assert [{**m, "seconds": 0} for m in made.metrics] == [{**m, "seconds": 0} for m in expected]


def test_force_replaces_a_run_and_nothing_else(package, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    options = {"recipe": recipe(epochs=1), "checkpoint_every": None}
    with pytest.raises(RunError, match=r"is not empty; name another folder .*, or use force\.$"):
        trained(package, tmp_path, **options)
    trained(package, tmp_path, force=True, **options)
    with pytest.raises(RunError, match="holds a run already; resume it, replace it by force"):
        trained(package, tmp_path, **options)
    most = 2**70  # beyond what frameworks take
    trained(package, tmp_path, force=True, seed=most, **options)
    assert open_run(tmp_path).described["seed"] == most
    assert len(open_run(tmp_path).metrics()) == 1
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(RunError, match=r"another recipe: learning_rate is 0\.05 there, 0\.1 given"):
        trained(
            package, tmp_path, resume=True, recipe=recipe(epochs=1, learning_rate=0.1), seed=most
        )
    with pytest.raises(RunError, match=f"another seed: {most} there, 0 given"):
        trained(package, tmp_path, resume=True, **options)


def test_what_cannot_be_is_refused_before_anything_is_written(package, tmp_path):
    run = tmp_path / "run"

    def call(**options):
        return lambda: trained(package, run, **options)

    def wide():
        model = package.get_model("tutorial_pt", num_classes=7)
        package.train(model, "tutorial_pt", run=run, quiet=True)

    check_refused(
        (call(precision="float8"), ValueError, "must be float32, .*; received precision='float8'"),
        (call(devices="cuda:99"), ValueError, "there is no device 'cuda:99' here; there is .*cpu"),
        (call(devices=2), ValueError, "received devices=2"),
        (call(seed=-1), ValueError, "seed must be at least 0; received seed=-1"),
        (call(checkpoint_every=0), ValueError, "at least 1 step; received 0"),
        (call(resume=True), RunError, "is no run folder: it has no run.json"),
        (call(resume=True, force=True), ValueError, "and force replaces it; give one of them"),
        (lambda: trained(package, None, resume=True), ValueError, "give its folder as run"),
        (lambda: package.train(None, "digits", run=run), TypeError, "received None"),
        (
            lambda: package.train(model_of(package), "digit", run=run),
            ValueError, "'digit' is no recipe, .*; the nearest are digits",
        ),
        (wide, ValueError, r"must give logits of shape \(B, classes\), .*; it gave \(.*7\)"),
        (
            call(recipe=recipe(zero_last_gamma=True)),
            ValueError, "zero_last_gamma is for networks by name",
        ),
    )  # fmt: skip
    assert not run.exists()


class Torn(Arrays):
    """Images of which one cannot be read."""

    def image(self, index):
        if index == 3:
            raise OSError("torn")
        return super().image(index)


def test_an_image_that_cannot_be_read_does_not_count_in_an_evaluation(package):
    data, model = open_data("digits"), model_of(package)
    pixels, labels = data.val.images[:9], data.val.labels[:9]
    kept = np.arange(9) != 3
    torn, whole = Torn(pixels, labels), Arrays(pixels[kept], labels[kept])
    torn.max_broken = 1
    expected = package.evaluate(model, recipe(), replace(data, val=whole))
    with pytest.warns(UserWarning, match=r"could not be read \(torn\); it does not count$"):
        found = package.evaluate(model, recipe(), replace(data, val=torn))
    assert found["images"] == 8
    assert_close(found["loss"], expected["loss"])
    assert (found["top1"], found["top5"]) == (expected["top1"], expected["top5"])


RECIPES = {
    "sgd": {"optimizer": "sgd", "decay_exempt": ("norms", "biases"), "schedule": "steps",
            "milestones": (1,)},
    "nesterov": {"optimizer": "nesterov", "decay_exempt": ("depthwise",), "clip_norm": 0.05,
                 "accumulate": 3, "warmup_epochs": 1.5},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.01, "label_smoothing": 0.1, "per": "epoch",
              "decay_exempt": ("biases",), "average": 0.5, "drop_last": True},
    "kernels": {"average": 0.5, "average_of": "kernels", "weight_decay": 0},
    "orthonormal": {"orthonormality": 0.1},
    # Of few steps, before a rounding lets a head keep another channel.
    "lasso": {"lasso": 0.01, "accumulate": 2, "epochs": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_training_is_the_cores(package, name, tmp_path):
    """The losses and the weights of eight steps, and what is folded, which may be averaged.

    And the state of the last checkpoint: of averaged kernels, as layers start from them.
    """
    made = recipe(**{"average": None, **RECIPES[name]})
    network = smooth(NETWORKS.get(name, NETWORK))
    state, data = initialize(network), open_data("digits")
    per = steps_per_epoch(made, len(data.train))
    drawn = [
        batch
        for epoch in range(made.epochs)
        for batch in batches(data.train, 10, made, training=True, epoch=epoch)
    ]
    numbers = [
        Step(n, n // per, learning_rate(made, n, per), progress(made, n, per))
        for n in range(made.epochs * per)
    ]
    steps = list(zip(numbers, drawn, strict=True))
    expected = reference.train(network, state, made, steps)
    found = package.train(model_of(package, network), made, data, run=tmp_path, quiet=True)
    for epoch, metrics in enumerate(found.metrics):
        own = slice(epoch * per, (epoch + 1) * per)
        sizes = [len(batch.images) for _, batch in steps[own]]
        loss = np.average(expected.losses[own], weights=sizes)
        assert metrics["train_loss"] == pytest.approx(loss, rel=1e-4)
    arrays = package.export_state(found.model).arrays
    for entry, array in expected.state.arrays.items():
        if is_trained(entry):
            assert_close(arrays[entry], array, tolerance=1e-4)
    evaluated = read_state(open_run(tmp_path).last / "state.safetensors")
    for entry, array in expected.averaged.arrays.items():
        if is_trained(entry):
            assert_close(evaluated.arrays[entry], array, tolerance=1e-4)
    kernels = composed(expected.averaged)
    for entry, array in package.export_state(found.folded).arrays.items():
        if is_trained(entry):
            assert_close(array, kernels[entry].reshape(array.shape), tolerance=1e-4)
