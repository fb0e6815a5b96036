"""Measure what the trainer costs beside each framework's own bare loop, on the same batches.

Run: python benchmarks/training.py [--backend torch|tf|mx …] [--quick] [--docs]

In one process for each framework, by turns: the loop that its users write themselves (in Keras,
`fit`), and an epoch of a run, which also shuffles nothing, counts what is right, looks for losses
that are not finite, and changes the learning rate at every step. Both see the same arrays, which
lie in memory. Prints a table of ratios, and with --docs writes it into `docs/training.md`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import step_measure
from step_measure import Row, emit, measure
from step_report import machine, put
from tqdm import tqdm

from doconv_core.training import session
from doconv_core.training.data import as_data
from doconv_core.training.engine import Batch
from doconv_core.training.recipe import Recipe

BACKENDS = {"torch": "TorchEngine", "tf": "KerasEngine", "mx": "GluonEngine"}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
DOCS = Path(__file__).parents[1] / "docs"
LEARNING_RATE, MOMENTUM = 0.01, 0.9


class Case(NamedTuple):
    """A network with its batches. steps: of an epoch."""

    name: str
    network: str
    classes: int
    batch: int
    size: int
    steps: int


CASES = (
    Case("ResNet-18, 16×224²", "resnet18_v1b", 1000, 16, 224, 6),
    Case("cifar_resnet20, 128×32²", "cifar_resnet20", 100, 128, 32, 12),
)
QUICK = (Case("tutorial_pt, 8×28²", "tutorial_pt", 10, 8, 28, 3),)


def main() -> None:
    """Measure, print, and write if asked to."""
    options = _options()
    if options.worker:
        _work(options.worker, options.quick, options.patience)
        return
    if options.docs and (options.quick or options.backend):
        raise SystemExit("--docs is for a whole run, without --quick and --backend.")
    rows, versions = [], []
    for backend in options.backend or BACKENDS:
        for found in _measured(backend, options):
            (rows if isinstance(found, Row) else versions).append(found)
    told = f"{machine(options.threads, versions)}.\n\n{table(rows)}"
    print(told)
    if options.docs:
        put(DOCS / "training.md", told)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--quick", action="store_true", help="one small network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=90, help="seconds for each row")
    parser.add_argument("--docs", action="store_true", help="write docs/training.md")
    parser.add_argument("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(backend: str, options: argparse.Namespace) -> Iterator[Row | str]:
    """Yield the rows of one framework, and its version, from a process of its own."""
    command = [sys.executable, __file__, "--worker", backend, "--patience", str(options.patience)]
    command += ["--quick"] * options.quick
    environment = {**os.environ, **dict.fromkeys(THREADS, str(options.threads))}
    environment.update(TF_CPP_MIN_LOG_LEVEL="3", MXNET_SUBGRAPH_VERBOSE="0")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in tqdm(process.stdout, backend, unit="row", disable=None):
            if line.startswith('{"backend"'):
                yield Row(**json.loads(line))
            elif line.startswith('{"version"'):
                yield json.loads(line)["version"]
    if process.returncode:
        raise SystemExit(f"measuring {backend} ended with {process.returncode}")


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| framework | what | bare loop, ms a step | trainer: bare |", "|---|---|---|---|"]
    for row in rows:
        steps = next(case.steps for case in (*CASES, *QUICK) if case.name == row.case)
        lines.append(
            f"| {row.backend} | {row.case} | {1000 * row.seconds['bare'] / steps:.0f} | "
            f"**{row.ratios['trainer']:.3f}** ± {row.spread['trainer']:.3f} |"
        )
    return "\n".join(lines)


def _work(backend: str, quick: bool, patience: float) -> None:
    package = importlib.import_module(f"doconv_{backend}")
    engine = getattr(importlib.import_module(f"doconv_{backend}.train"), BACKENDS[backend])
    print(json.dumps({"version": f"{engine.framework} {engine.version}"}), flush=True)
    if quick:
        step_measure.least_rounds = 3
    for case in QUICK if quick else CASES:
        ways = {
            "bare": LOOPS[backend](package.get_model(case.network), _batches(case, backend)),
            "trainer": _trainer(engine, package.get_model(case.network), case, backend),
        }
        emit(measure(engine.framework, "training", case.name, ways, patience))


def _batches(case: Case, backend: str) -> list[Batch]:
    rng = np.random.default_rng(0)
    channels = 1 if case.network.startswith("tutorial") else 3
    shape = (channels, case.size, case.size)
    if backend == "tf":
        shape = (*shape[1:], channels)
    made = []
    for _ in range(case.steps):
        labels = rng.integers(case.classes, size=case.batch)
        images = rng.random((case.batch, *shape), np.float32)
        wanted = np.eye(case.classes, dtype=np.float32)[labels]
        made.append(Batch(images, wanted, labels, case.batch))
    return made


def _trainer(engine: Any, model: Any, case: Case, backend: str) -> Callable[[], None]:
    """Return an epoch of a run on the same batches."""
    recipe = Recipe(
        name="benchmark", epochs=1000, batch_size=case.batch, optimizer="nesterov",
        learning_rate=LEARNING_RATE, momentum=MOMENTUM, schedule="cosine",
    )  # fmt: skip
    prepared = _batches(case, backend)
    session.batches = lambda *args, **told: iter(prepared[:1])  # on which the model is tried
    count = case.batch * case.steps
    channels = 1 if case.network.startswith("tutorial") else 3
    images = np.broadcast_to(np.uint8(0), (count, case.size, case.size, channels))
    labels = np.arange(count) % case.classes
    labels[-1] = case.classes - 1
    data = as_data(((images, labels), (images, labels)))
    run = session.Session(engine(model, recipe), recipe, data, None, quiet=True)

    def epoch() -> None:
        run.position = session.Position()
        run.drawn = SimpleNamespace(part=lambda: iter(prepared))
        run._train_epoch()  # what there is no public call for: an epoch without its evaluation

    return epoch


def _torch_loop(model: Any, batches: list[Batch]) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, nesterov=True)
    model.train()

    def epoch() -> None:
        losses = []
        for batch in batches:
            output = model(torch.from_numpy(batch.images))
            loss = torch.nn.functional.cross_entropy(output, torch.from_numpy(batch.targets))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.stack(losses).mean().item()

    return epoch


def _keras_loop(model: Any, batches: list[Batch]) -> Callable[[], None]:
    import keras

    class Data(keras.utils.PyDataset):
        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, index: int) -> Any:
            return batches[index].images, batches[index].targets

    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(LEARNING_RATE, MOMENTUM, nesterov=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return lambda: model.fit(Data(), shuffle=False, verbose=0)


def _gluon_loop(model: Any, batches: list[Batch]) -> Callable[[], None]:
    import mxnet as mx

    options = {"learning_rate": LEARNING_RATE, "momentum": MOMENTUM}
    trainer = mx.gluon.Trainer(model.collect_params(), "nag", options)
    loss_of = mx.gluon.loss.SoftmaxCrossEntropyLoss(sparse_label=False)
    model.hybridize()

    def epoch() -> None:
        losses = []
        for batch in batches:
            with mx.autograd.record():
                loss = loss_of(model(mx.nd.array(batch.images)), mx.nd.array(batch.targets))
            loss.backward()
            trainer.step(batch.total)
            losses.append(loss)
        mx.nd.concat(*losses, dim=0).mean().asscalar()

    return epoch


LOOPS = {"torch": _torch_loop, "tf": _keras_loop, "mx": _gluon_loop}


if __name__ == "__main__":
    main()
