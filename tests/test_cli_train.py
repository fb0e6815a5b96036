"""`doconv train` and `doconv evaluate`: what they print, leave, take up and refuse."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from command_line import BAD_FILE, IMPOSSIBLE, TARGET, USAGE, doconv
from contract_train import TRAINED
from equal import assert_close, assert_same
from frameworks import need
from PIL import Image

from doconv_core import describe, read_state, write_state
from doconv_core.cli.command import DIVERGED, INTERRUPTED
from doconv_core.networks.initialize import initialize
from doconv_core.networks.shapes import for_input
from doconv_core.training import session
from doconv_core.training.run import begin, open_run

NETWORK = "tutorial_pt_doconv"
SMALL = ("--set", "epochs=2", "--set", "batch_size=400")


@pytest.fixture(params=TRAINED)
def backend(request):
    need(request.param)
    return request.param


def train(out, *arguments, network=NETWORK, backend="torch", **expected):
    return doconv("train", network, "--backend", backend, "--out", out, *SMALL, *arguments,
                  **expected)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of PyTorch on the digits."""
    need("torch")
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder)
    return folder


def arrays(file):
    return dict(read_state(file).arrays)


def test_a_network_is_trained_resumed_and_evaluated(backend, tmp_path):
    run = tmp_path / "run"
    lines = train(run, "--seed", 1, backend=backend).stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert "trained" in lines[2]
    assert lines[3].startswith(f"{run}: folded.")
    assert all((run / name).exists() for name in lines[3].split(": ")[1].split(", "))

    before = arrays(run / "folded.safetensors")
    (run / "folded.safetensors").unlink()
    assert doconv("train", "--resume", "--out", run).stdout.splitlines() == lines[2:]
    assert_same(arrays(run / "folded.safetensors"), before)

    told = json.loads(doconv("evaluate", run, "--json").stdout)
    assert told["top1"] == open_run(run).metrics()[-1]["eval_top1"]
    assert (told["images"], told["network"], told["data"]) == (360, NETWORK, "digits")
    for other in TRAINED:
        found = doconv("evaluate", run / "folded.safetensors", "--backend", other, "--json")
        assert json.loads(found.stdout)["top1"] == pytest.approx(told["top1"], abs=1 / 360)
    line = doconv("evaluate", run, "--best").stdout
    assert f"{NETWORK} on digits, 360 images: top-1 " in line
    assert line.endswith(" images per second\n")


KIND = ("--set", "epochs=1", "--set", "batch_size=720", "--set", "train_images=resize 8 8",
        "--set", "eval_images=resize 8 8")  # fmt: skip


# Keras compiles each of the four networks anew, which takes a minute.
LONG = [pytest.param(n, marks=[pytest.mark.exhaustive] * (n == "tf")) for n in TRAINED]


@pytest.mark.parametrize("backend", LONG, indirect=True)
def test_a_network_is_trained_with_layers_of_a_kind(backend, tmp_path):
    """Begun from a file of the ordinary network, gone on with, folded to one, and evaluated.

    And begun from a run of such layers, by the network's name, with no step to be seen.
    """
    start, run, network = tmp_path / "plain.safetensors", tmp_path / "run", "cifar_resnet20"
    images = for_input(describe(network, num_classes=10, in_channels=1), (1, 8, 8))
    write_state(initialize(images, seed=5), start)
    given = *KIND, "--kind", "repvgg", "--from", start
    lines = train(run, *given, network=network, backend=backend).stdout.splitlines()
    told = json.loads(doconv("evaluate", run, "--json").stdout)
    assert told["top1"] == open_run(run).metrics()[-1]["eval_top1"]
    folded = arrays(run / "folded.safetensors")
    assert lines[0] == "19 layers of kind repvgg, 3 left"
    assert doconv("train", "--resume", "--out", run).stdout.splitlines() == lines[2:]
    assert_same(arrays(run / "folded.safetensors"), folded)
    given = run / "folded.safetensors", "--backend", backend, "--json"  # which tells its kind
    found = json.loads(doconv("evaluate", *given, "--set", "eval_images=resize 8 8").stdout)
    assert found["top1"] == pytest.approx(told["top1"], abs=1 / 360)
    named, other = tmp_path / "named", f"{network}_repvgg"
    still = "--from", run, "--set", "learning_rate=1e-20", *KIND
    train(named, *still, network=other, backend=backend)
    last = (open_run(folder).last / "state.safetensors" for folder in (run, named))
    before, after = map(arrays, last)
    still = ({n: a for n, a in x.items() if "running" not in n} for x in (after, before))
    assert_close(*still, 1e-6)
    found = doconv("evaluate", run / "folded.safetensors", "--network", other, *given[1:],
                   "--set", "eval_images=resize 8 8")  # fmt: skip
    assert json.loads(found.stdout)["top1"] == pytest.approx(told["top1"], abs=1 / 360)
    plain = next(run.glob("folded.[!s]*"))
    doconv(
        "evaluate",
        plain,
        *given[1:],
        "--network",
        other,
        code=USAGE,
        error="a FILE is a state, such as a run's folded.safetensors; received",
    )
    branch = "stem.conv.pointwise_conv.weight"
    assert branch in arrays(open_run(run).last / "state.safetensors").keys() - folded.keys()


def test_a_state_of_a_run_tells_its_networks_options(tmp_path):
    need("torch")
    run, network = tmp_path / "run", "cifar_dydensenet86"
    options = "--stages", "1-1-1", "--growth", "4-8-16", "--heads", "2"
    train(run, *KIND, *options, network=network)
    told = json.loads(doconv("evaluate", run, "--json").stdout)
    given = "--backend", "torch", "--set", "eval_images=resize 8 8", "--json"
    for file in (run / "folded.safetensors", open_run(run).last / "state.safetensors"):
        assert json.loads(doconv("evaluate", file, *given).stdout)["top1"] == told["top1"]
    state = read_state(file)
    for text in ("[1]", "{"):
        write_state(replace(state, origin={**state.origin, "options": text}), tmp_path / "odd")
        error = "has options that are no JSON object: "
        doconv("evaluate", tmp_path / "odd", *given, code=USAGE, error=error)


def test_a_batch_may_be_taken_in_parts(tmp_path):
    need("torch")
    run, parts = tmp_path / "run", ("--set", "accumulate=2")
    train(run, *parts, "--set", "epochs=1")
    assert open_run(run).described["recipe"]["accumulate"] == 2
    told = json.loads(doconv("evaluate", run, *parts, "--json").stdout)
    assert told["top1"] == open_run(run).metrics()[-1]["eval_top1"]


@pytest.mark.filterwarnings("ignore:.* could not be read .*; it does not count:UserWarning")
def test_images_that_may_be_broken_may_be_so_in_evaluation(tmp_path):
    need("torch")
    for part, number in itertools.product(("train", "val"), range(4)):
        file = tmp_path / "images" / part / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), number).save(file)
    file.write_bytes(file.read_bytes()[:40])
    given = ("--data", "folder", "--data-dir", tmp_path / "images", "--max-broken", "1")
    plain = ("--set", "train_images=resize 28 28", "--set", "eval_images=resize 28 28",
             "--set", "batch_size=4")  # fmt: skip
    run = tmp_path / "run"
    train(run, *given, *plain)
    told = json.loads(doconv("evaluate", run, "--json").stdout)
    assert told["top1"] == open_run(run).metrics()[-1]["eval_top1"]
    state = run / "folded.safetensors", "--backend", "torch", *plain, "--json"
    found = json.loads(doconv("evaluate", *state, *given).stdout)
    assert found["images"] == told["images"] == 3
    doconv("evaluate", *state, *given[:4], code=USAGE, error="could not be read")


def test_a_run_without_a_best_checkpoint_says_so(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "checkpoints" / "best").unlink()
    doconv("evaluate", run, "--best", code=TARGET, error="run has no best checkpoint yet")


def test_a_run_starts_from_any_file_of_the_network(trained, tmp_path):
    """From a run, a folded file of another format, and of an ordinary network by order."""
    last = arrays(open_run(trained).last / "state.safetensors")
    params, pt = tmp_path / "folded.params", tmp_path / "folded.pt"
    doconv("convert", trained / "folded.safetensors", params)
    doconv("convert", trained / "folded.safetensors", pt)
    kernels = arrays(trained / "folded.safetensors")
    for number, (file, network) in enumerate(
        [(trained, NETWORK), (params, NETWORK), (pt, NETWORK), (params, "tutorial_pt"),
         (trained / "folded.pt", "tutorial_pt")]
    ):  # fmt: skip
        run = tmp_path / f"run{number}"
        train(run, "--from", file, "--set", "learning_rate=1e-20", network=network)
        found = arrays(open_run(run).last / "state.safetensors")
        assert_same(arrays(run / "folded.safetensors"), kernels)
        if file == trained:
            assert_same(found, last)


def test_other_classes_begin_with_a_last_layer_of_their_own(trained, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(30, 28, 28, 1), dtype=np.uint8), np.arange(30) % 3
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = ("--data", "npz", "--data-dir", tmp_path / "data.npz")
    run = tmp_path / "run"
    done = train(run, *data, "--from", trained, "--set", "learning_rate=1e-20")
    assert done.stdout.startswith(f"{trained} is of other classes: the layer 'conv3' starts anew\n")
    found = arrays(open_run(run).last / "state.safetensors")
    assert found["conv3.weight"].shape[0] == 3
    assert_same(found["conv2.weight"], arrays(open_run(trained).last / "state.safetensors")
                ["conv2.weight"])  # fmt: skip
    refused = "is of another number of classes than the 3 of the data"
    doconv("evaluate", trained, *data, code=USAGE, error=refused)


def test_a_name_with_a_kind_is_the_same_run_as_the_option(tmp_path):
    """From the same first weights, those of new branches too; with gammas of 0."""
    need("torch")
    zero = "--set", "zero_last_gamma=true"
    train(tmp_path / "named", *KIND, *zero, network="cifar_resnet20_repvgg")
    train(tmp_path / "option", *KIND, *zero, "--kind", "repvgg", network="cifar_resnet20")
    named, option = (arrays(tmp_path / n / "folded.safetensors") for n in ("named", "option"))
    assert_same(named, option)
    line = doconv("train", "cifar_resnet20", "--kind", "dbb", "--backend", "torch", *KIND, "--from",
                  tmp_path / "named", "--out", tmp_path / "other", code=IMPOSSIBLE, listing=True,
                  error="differs: stage1.* in cifar_resnet20_dbb")  # fmt: skip
    assert not line.stdout
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_is_refused_in_one_line(trained, tmp_path):
    out, file = tmp_path / "run", tmp_path / "file.pt"
    file.write_bytes(b"no file")
    mine = tmp_path / "mine"
    begin(mine, {"notes": {}})

    def refused(error, *arguments, code=USAGE, **options):
        train(out, *arguments, code=code, error=error, **options)
        assert not out.exists()

    refused("'cifar_resnet21' is no network", network="cifar_resnet21")
    refused("'bsconv' is no recipe", "--recipe", "bsconv")
    refused("a recipe has no field 'epoch'; the nearest are epochs", "--set", "epoch=3")
    refused("'epochs'", "--set", "epochs")
    refused("epochs must be an integer; received epochs='x'", "--set", "epochs=x")
    refused("data must be one of digits", "--data", "cifar")
    refused("there is no device 'cuda:9' here", "--devices", "cuda:9")
    refused("nothing is trained in float16", "--precision", "float16")
    refused("takes no options; received heads=4", "--heads", 4)
    refused("tutorial_pt has no layer that becomes one of kind 'repvgg': no batch norm follows it",
            "--kind", "repvgg", network="tutorial_pt")  # fmt: skip
    refused("no checkpoint that is known here", "--from", file, code=BAD_FILE)
    refused("differs: conv1, convolution .* in cifar_resnet20", "--from", trained, code=IMPOSSIBLE,
            network="cifar_resnet20", listing=True)  # fmt: skip
    doconv("train", NETWORK, "--out", out, code=USAGE, error="--backend is missing")
    doconv("train", "--backend", "torch", "--out", out, code=USAGE, error="NETWORK is missing")
    doconv("train", "--resume", "--out", out, code=TARGET, error="is no run folder")
    doconv("train", "--resume", "--out", trained, "--seed", 1, code=USAGE,
           error="--resume takes all from the run but")  # fmt: skip
    doconv("train", "--resume", "--out", mine, code=TARGET, error="was not begun by doconv train")
    train(trained, code=TARGET, error="holds a run already; resume it")
    state = open_run(trained).folder / "folded.pt"
    doconv("evaluate", state, "--backend", "torch", code=USAGE, error="give it with --network")
    doconv("evaluate", state, "--network", NETWORK, code=USAGE, error="--backend is missing")
    assert not out.exists()


def test_runs_that_end_early_say_how_by_their_exit_codes(tmp_path, monkeypatch):
    need("torch")
    train(tmp_path / "wild", "--set", "learning_rate=1e30", code=DIVERGED, error="the run diverged")
    former = session.Session._after

    def patched(self, step):
        if step.number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        former(self, step)

    monkeypatch.setattr(session.Session, "_after", patched)
    run = tmp_path / "asked"
    train(run, code=INTERRUPTED, error="was interrupted in epoch 1 of 2; the last checkpoint is")
    monkeypatch.setattr(session.Session, "_after", former)
    lines = doconv("train", "--resume", "--out", run, "--workers", 0).stdout.splitlines()
    assert lines[0].startswith("epoch 1 of 2")
