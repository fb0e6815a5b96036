"""What every backend's `train` must do: a small network with all that a run has to keep, and runs.

Also a program: `python contract_train.py BACKEND FOLDER FIRST SECOND` trains to the end, in copies
of itself of which two are killed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from dataclasses import replace
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
    Sequence,
    dynamic,
    sequence,
)
from doconv_core.state.file import entry
from doconv_core.training import session
from doconv_core.training.data import open_data
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
NETWORKS = {
    "orthonormal": Network(
        "subspace",
        sequence(
            ("conv1", Conv(8, (3, 3), stride=2)), ("tanh", Activation("tanh")),
            ("conv2", Conv(8, (3, 3), kind=kind("bsconvs", 0.5))),
            ("pool", GlobalPool()), ("flatten", Flatten()), ("fc", Linear(10)),
        ),
        (1, 8, 8),
    ),
    "lasso": Network(
        "dynamic",
        sequence(
            ("conv1", Conv(8, (3, 3), stride=2)),
            ("conv2", dynamic(8, heads=2, squeeze_rate=4, gate_factor=0.5)),
            ("pool", GlobalPool()), ("flatten", Flatten()), ("fc", Linear(10)),
        ),
        (1, 8, 8),
    ),
}  # fmt: skip
STEPS, EPOCHS = 4, 2  # of an epoch; 1,437 digits


def smooth(network):
    """Return the network without chance, and without kinks, where roundings jump."""
    children = [
        (name, Activation("tanh") if isinstance(node, Activation) else node)
        for name, node in network.body.children
        if not isinstance(node, Dropout)
    ]
    return replace(network, body=Sequence(tuple(children)))


def recipe(**changes):
    """Return a recipe whose every part leaves something to be kept."""
    given = {
        "name": "small", "epochs": EPOCHS, "batch_size": 400, "optimizer": "nesterov",
        "learning_rate": 0.05, "schedule": "cosine", "weight_decay": 1e-3, "average": 0.5,
        **changes,
    }  # fmt: skip
    return Recipe(**given)


def composed(state):
    """Return a state's arrays, with the kernels in place of what composes them."""
    found = dict(state.arrays)
    for path, form in state.layers.items():
        if form.composed is not None:
            own = {name: found[entry(path, name)] for name in form.composed.entries(form.spec)}
            found[entry(path, "weight")] = form.composed.compose(own, form.spec)
    return found


def model_of(package, network=NETWORK, seed=0):
    model = package.build(network)
    if hasattr(model, "initialize"):  # Gluon's has no values before
        model.initialize()
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


def in_a_copy(call):
    """Call a function in a copy of this process, and return with which status it ended."""
    if not (child := os.fork()):
        try:
            call()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(backend, folder, first, second):
    """Print how each copy ended, and how many steps of its epoch were kept.

    `whole` trains to the end; `killed` is killed after the step FIRST, goes on and is killed while
    it writes the checkpoint of the step SECOND, and goes on.
    """
    package, folder = importlib.import_module(f"doconv_{backend}"), Path(folder)
    open_data("digits")  # imports what takes long, once for all copies
    if backend == "torch":
        importlib.import_module("torch._dynamo")  # as its optimizers do

    def train(name, *killed, resume):
        killed_at(*killed) if killed else None
        trained(package, folder / name, resume=resume)

    told = [in_a_copy(lambda: train("whole", resume=False))]
    for killed in ((int(first), "after"), (int(second), "checkpoint"), ()):
        resume = len(told) > 1
        status = in_a_copy(lambda k=killed, r=resume: train("killed", *k, resume=r))
        told.append((status, open_run(folder / "killed").position()["done"]))
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
