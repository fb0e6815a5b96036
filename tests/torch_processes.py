"""A program for torchrun: what several processes come to, written to the folder that it is given.

Steps of small networks, of which each process has a part of the images; then runs, of which all
processes are killed in the last. With `resume` behind the folder they go on with that.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from contract_train import NETWORK, NETWORKS, killed_at, recipe, smooth
from torch import distributed, nn

from doconv_core.networks.initialize import initialize
from doconv_core.state.file import write_state
from doconv_core.training.engine import Batch, Step
from doconv_core.training.loss import targets
from doconv_torch import build, export_state, load_state, train
from doconv_torch.train import TorchEngine

ROWS = (5, 4, 1)  # images of the batches, of the last of which one process has none


# What is trained in steps: a network, what its recipe has, and how it is computed in processes.
CASES = {
    "orthonormal": (NETWORKS["orthonormal"], {"orthonormality": 0.3}, {}),
    "lasso": (NETWORKS["lasso"], {"lasso": 0.1}, {}),
    "kernels": (NETWORK, {"average": 0.5, "average_of": "kernels"}, {}),
    "compiled": (NETWORK, {}, {"compile": True}),
}
KILLED = 5  # after how many steps; of eight


def network(name):
    """Return the network of a case, without norms, which see a process's images alone."""
    described = smooth(CASES[name][0])
    model = build(described)
    load_state(model, initialize(described))
    for module in model.modules():
        for child, part in module.named_children():
            if isinstance(part, nn.BatchNorm2d):
                setattr(module, child, nn.Identity())
    return model


def steps(process=0, processes=1):
    """Yield steps, with what a process has of their batches."""
    rng = np.random.default_rng(0)
    for number, rows in enumerate(ROWS):
        images = rng.standard_normal((rows, 1, 8, 8)).astype(np.float32)
        labels = rng.integers(10, size=rows)
        own = np.array_split(np.arange(rows), processes)[process]
        told = targets(labels, 10)[own]
        yield Step(number, 0, 0.1, 0.5), Batch(images[own], told, labels[own], rows)


def stepped(name, **options):
    """Return the weights after the steps, and the sums of the losses of all processes."""
    made = recipe(**{"average": None, "clip_norm": 1.0, "accumulate": 2, **CASES[name][1]})
    engine = TorchEngine(network(name), made, **options)
    for step, batch in steps(engine.process, engine.processes):
        engine.train_step(step, batch)
    sums = [engine.total(sums) for sums in engine.taken()]
    model = engine._evaluated()
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters()}, sums


def run(folder, sharded, **options):
    """Train in a run."""
    return train(
        build(NETWORKS["lasso"]), recipe(average=0.5), "digits", run=folder, quiet=True,
        checkpoint_every=3, sharded=sharded, **options,
    )  # fmt: skip


def main(folder, resume=None):
    distributed.init_process_group("gloo")
    if resume:
        run(folder / "killed", True, resume=True)
        distributed.destroy_process_group()
        return
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # without a C++ compiler
    for name, (_, _, options) in CASES.items():
        for sharded in (False, True):
            arrays, sums = stepped(name, sharded=sharded, **options)
            if distributed.get_rank() == 0:
                losses = {f"loss{n}": np.array([*each]) for n, each in enumerate(sums)}
                np.savez(folder / f"{name}-{sharded}.npz", **arrays, **losses)
    for sharded in (False, True):
        trained = run(folder / f"run-{sharded}", sharded)
        if distributed.get_rank() == 0:
            write_state(export_state(trained.folded), folder / f"folded-{sharded}.safetensors")
    killed_at(KILLED, "after")
    run(folder / "killed", True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
