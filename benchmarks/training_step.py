"""Measure what training through D costs, in each framework, beside the plain layers.

Run: python benchmarks/training_step.py [--backend torch|tf|mx …] [--quick]

In one process for each framework, by turns: the framework's own layer, the plain formula for the
composition (one einsum, or in MXNet the expanded sum), and the layers of this package. Prints a
table of ratios to the first, writes `results/training_step.json`, draws
`results/training_step.png`, and with --docs puts table and plot into `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import step_measure
from step_cases import (
    COMPOSITIONS,
    LAYERS,
    MODELS,
    QUICK_COMPOSITIONS,
    QUICK_LAYERS,
    QUICK_MODELS,
)
from step_measure import Row, emit, figure
from step_report import draw, machine, table, write_docs
from step_targets import targets
from tqdm import tqdm

from doconv_core.atomic import write_json

BACKENDS = ("torch", "tf", "mx")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


def main() -> None:
    """Measure, print, write and draw."""
    options = _options()
    if options.worker and options.memory:
        print(_peak_of(options.worker, options.memory, options.quick))
        return
    if options.worker:
        _work(options.worker, options.quick, options.patience)
        return
    if options.read:
        earlier = json.loads(options.read.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in earlier["rows"]]
        print(targets(rows), table(rows), sep="\n\n")
        if options.docs:
            write_docs(rows, earlier["machine"], options.quick)
        return
    rows, versions = [], []
    for backend in options.backend or BACKENDS:
        for found in _measured(backend, options):
            if isinstance(found, Row):
                rows.append(found)
            else:
                versions.append(found)
    described = machine(options.threads, versions)
    print(targets(rows), table(rows), sep="\n\n")
    out = Path(options.out)
    value = {"machine": described, "rows": [row._asdict() for row in rows]}
    write_json(out / "training_step.json", value)
    draw(rows, out / "training_step.png")
    print(f"Written: {out / 'training_step.json'}, {out / 'training_step.png'}")
    if options.docs:
        write_docs(rows, described, options.quick)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--quick", action="store_true", help="two layers and a small network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=15, help="seconds for each row")
    parser.add_argument("--out", default="results", help="folder for JSON and plot")
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md")
    parser.add_argument("--read", type=Path, help="JSON of an earlier run, instead of measuring")
    parser.add_argument("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(backend: str, options: argparse.Namespace) -> Iterator[Row | str]:
    """Yield the rows of one framework, and its version, from a process of its own."""
    command = [sys.executable, __file__, "--worker", backend, "--patience", str(options.patience)]
    environment = {**os.environ, **dict.fromkeys(THREADS, str(options.threads))}
    environment.update(TF_CPP_MIN_LOG_LEVEL="3", MXNET_SUBGRAPH_VERBOSE="0")
    if options.quick:
        command.append("--quick")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in tqdm(process.stdout, backend, unit="row", disable=None):
            if line.startswith('{"backend"'):
                yield Row(**json.loads(line))
            elif line.startswith('{"version"'):
                yield json.loads(line)["version"]
    if process.returncode:
        raise SystemExit(f"measuring {backend} ended with {process.returncode}")


def _work(backend: str, quick: bool, patience: float) -> None:
    driver = importlib.import_module(f"step_{backend}")
    print(json.dumps({"version": driver.version()}), flush=True)
    models = QUICK_MODELS if quick else MODELS
    if quick:
        patience, step_measure.least_rounds = min(patience, 2), 3
    for row in driver.compositions(QUICK_COMPOSITIONS if quick else COMPOSITIONS, patience):
        emit(row)
    for row in driver.layers(QUICK_LAYERS if quick else LAYERS, patience):
        emit(row)
    for row in driver.models(models, 4 * patience):
        emit(row)
    for row in driver.inference(models[0], 2 * patience):
        emit(row)
    own = hasattr(driver, "memory")
    emit(driver.memory(models[0]) if own else _memory(backend, driver.NAME, quick))
    if not quick:
        for row in driver.tools():
            emit(row)


def _memory(backend: str, name: str, quick: bool) -> Row:
    """Return the memory that a process takes for training steps, each way in one of its own."""
    bytes_of = {}
    for way in ("plain", "formula", "ours"):
        command = [sys.executable, __file__, "--worker", backend, "--memory", way]
        command += ["--quick"] * quick
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        bytes_of[way] = int(done.stdout.split()[-1])
    case = (QUICK_MODELS if quick else MODELS)[0].name
    return figure(name, "peak memory of a process", case, **bytes_of)


def _peak_of(backend: str, way: str, quick: bool) -> int:
    """Return by how many bytes this process grows at most while it makes three training steps."""
    driver = importlib.import_module(f"step_{backend}")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak from now on
    before = _status("VmRSS")
    step = driver.step(way, (QUICK_MODELS if quick else MODELS)[0])
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Return what Linux says of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
