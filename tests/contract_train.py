"""What every backend's `train` must do: a small network with all that a run has to keep, and runs.

Also a program: `python contract_train.py BACKEND whole FOLDER` trains to the end, `killed FOLDER
STEP HOW` is killed at a step, `resumed FOLDER` goes on.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path

from frameworks import BACKENDS

from doconv_core import read_state
from doconv_core.kinds.base import recipe as kind
from doconv_core.networks.initialize import initialize
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Conv,
    Dropout,
    Flatten,
    GlobalPool,
    Linear,
    Network,
    sequence,
)
from doconv_core.training import session
from doconv_core.training.recipe import Recipe
from doconv_core.training.run import open_run

ROOT = Path(__file__).parents[1]
TRAINED = [name for name in BACKENDS if (ROOT / f"doconv_{name}" / "train.py").exists()]
# A norm has statistics, dropout random states, and the layers are of a kind that is folded.
NETWORK = Network(
    "small",
    sequence(
        ("conv1", Conv(6, (3, 3), stride=2, kind=kind("doconv"))), ("bn", BatchNorm()),
        ("relu", Activation("relu")), ("dropout", Dropout(0.25)),
        ("conv2", Conv(6, (3, 3), bias=True, kind=kind("doconv"))),
        ("pool", GlobalPool()), ("flatten", Flatten()), ("fc", Linear(10)),
    ),
    (1, 8, 8),
)  # fmt: skip
STEPS, EPOCHS = 4, 2  # of an epoch; 1,437 digits


def recipe(**changes):
    """Return a recipe whose every part leaves something to be kept."""
    given = {
        "name": "small", "epochs": EPOCHS, "batch_size": 400, "optimizer": "nesterov",
        "learning_rate": 0.05, "schedule": "cosine", "weight_decay": 1e-3, "average": 0.5,
        **changes,
    }  # fmt: skip
    return Recipe(**given)


def model_of(package, network=NETWORK, seed=0):
    model = package.build(network)
    package.load_state(model, initialize(network, seed))
    return model


def trained(package, run, *, seed=0, checkpoint_every=1, **options):
    """Train the small network, in a run or going on with one."""
    given = options.pop("recipe", None) or recipe()
    return package.train(
        model_of(package), given, "digits", run=run, seed=seed, quiet=True,
        checkpoint_every=checkpoint_every, **options,
    )  # fmt: skip


def bits(folder):
    """Return what two runs that came to the same have alike: weights, metrics, the result."""
    run = open_run(folder)
    files = [run.last / "state.safetensors", run.best / "state.safetensors"]
    files.append(run.folder / "folded.safetensors")
    metrics = [{**line, "seconds": 0} for line in run.metrics()]
    arrays = [{n: a.tobytes() for n, a in read_state(file).arrays.items()} for file in files]
    return arrays, metrics, run.result


def killed_at(step, how):
    """Let this process be killed at a step; how: "after" it, or in its "checkpoint"."""
    name = {"after": "_after", "checkpoint": "_fill"}[how]
    former = getattr(session.Session, name)

    def patched(self, *args):
        if self.position.done + 1 + STEPS * self.position.epoch > step:
            if how == "checkpoint":
                (args[-1] / "torn").write_text("half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return former(self, *args)

    setattr(session.Session, name, patched)


def main(backend, action, folder, step="0", how="after"):
    package = importlib.import_module(f"doconv_{backend}")
    if action == "whole":
        trained(package, folder)
        return
    if int(step):
        killed_at(int(step), how)
    trained(package, folder, resume=action == "resumed")


if __name__ == "__main__":
    main(*sys.argv[1:])
