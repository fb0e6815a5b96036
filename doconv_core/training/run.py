"""The folder of a run: what it is a run of, its metrics, and its checkpoints, each whole or absent.

    run.json          what is trained on what, how, with which versions, on which machine
    metrics.jsonl     one JSON object for each epoch
    events.out.tfevents.doconv    the same for TensorBoard
    checkpoints/      a folder for each that is kept; the files `last` and `best` name one
    result.json       of a run that has come to its end, as are `report.html` and what is folded

A checkpoint says how long the two files that grow were when it was made, and going on from it cuts
what came after. So a run that was killed and resumed has the same lines as one that was not.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from doconv_core.atomic import write_json, write_text
from doconv_core.training.claim import BEAT, Claim, claimed, owner
from doconv_core.training.data.needed import needed

FORMAT, VERSION = "doconv run", 1
DESCRIBED, METRICS, RESULT = "run.json", "metrics.jsonl", "result.json"
EVENTS = "events.out.tfevents.doconv"
REPORT, FOLDED = "report.html", "folded"
CHECKPOINTS, LAST, BEST = "checkpoints", "last", "best"
STATE, POSITION = "state.safetensors", "position.json"
VERSIONS = ("overconv", "numpy", "grain", "pillow")  # of distributions, beside the framework's
# What a checkpoint's folder is called until it is whole.
UNFINISHED = "."
CLAIM = ".run"  # whose claim says that a process writes into the folder
SILENT = 5 * BEAT  # seconds, after which a process on another machine is taken to be gone


class RunError(ValueError):
    """A folder that is no run, or not one that can be gone on with, or begun, as asked.

    >>> open_run("nowhere")
    Traceback (most recent call last):
        ...
    doconv_core.training.run.RunError: nowhere is no run folder: it has no run.json.
    """


@dataclass(frozen=True)
class Run:
    """The folder of a run. described: what `run.json` says.

    >>> run = begin("new_run", {"recipe": {"epochs": 3}})
    >>> run.described["recipe"], run.metrics(), run.last
    ({'epochs': 3}, [], None)
    """

    folder: Path
    described: Mapping[str, Any]

    @property
    def last(self) -> Path | None:
        """The folder of the last checkpoint; None where there is none yet."""
        return self._named(LAST)

    @property
    def best(self) -> Path | None:
        """The folder of the checkpoint after the epoch that was the best in evaluation."""
        return self._named(BEST)

    @property
    def is_complete(self) -> bool:
        """Whether the run has come to its end."""
        return (self.folder / RESULT).is_file()

    @property
    def result(self) -> dict[str, Any]:
        """What `result.json` says. Raises RunError where the run has not come to its end."""
        if not self.is_complete:
            raise RunError(f"{self.folder} has not come to its end: it has no {RESULT}.")
        return _read_json(self.folder / RESULT)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the metrics of each epoch that is done; of a line that is not whole, nothing."""
        try:
            lines = (self.folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def _named(self, name: str) -> Path | None:
        try:
            checkpoint = (self.folder / CHECKPOINTS / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        return self.folder / CHECKPOINTS / checkpoint

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Add an epoch's metrics to those of the run, and to TensorBoard's."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics)) + "\n")
        with (self.folder / EVENTS).open("ab") as events:
            if not events.tell():
                events.write(_record(file_version="brain.Event:2"))
            events.write(_record(step=metrics["step"], summary=_summary(metrics)))

    def cut(self, lengths: Mapping[str, int]) -> None:
        """Shorten the files that grow to these lengths, in bytes."""
        for name in (METRICS, EVENTS):
            path = self.folder / name
            if path.exists():
                os.truncate(path, lengths[name])

    def lengths(self) -> dict[str, int]:
        """Return the lengths of the files that grow, in bytes."""
        paths = {name: self.folder / name for name in (METRICS, EVENTS)}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}

    def keep(self, name: str, fill: Callable[[Path], None], *, best: bool = False) -> Path:
        """Make a checkpoint of this name, the last one; `fill` writes its files into a folder.

        It gets its name when it is whole. best: whether it is the best so far, too. Those that are
        neither the last nor the best any more are removed.
        """
        checkpoints = self.folder / CHECKPOINTS
        checkpoints.mkdir(exist_ok=True)
        unfinished, final = checkpoints / f"{UNFINISHED}{name}", checkpoints / name
        for left in (unfinished, final):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(final)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        if best:
            write_text(checkpoints / BEST, name + "\n")
        write_text(checkpoints / LAST, name + "\n")
        kept = {self.last, self.best}
        for path in checkpoints.iterdir():
            if path.is_dir() and path not in kept:
                shutil.rmtree(path, ignore_errors=True)
        return final

    def position(self) -> dict[str, Any]:
        """Return where the last checkpoint stands. Raises RunError where there is none."""
        if self.last is None:
            raise RunError(f"{self.folder} has no checkpoint to go on from; begin it anew.")
        return _read_json(self.last / POSITION)

    def remove(self) -> None:
        """Remove what the run has written into its folder, and nothing else."""
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        paths = (self.folder / name for name in (DESCRIBED, METRICS, EVENTS, RESULT, REPORT))
        for path in (*paths, *self.folder.glob(f"{FOLDED}.*")):
            path.unlink(missing_ok=True)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write what the run came to; it has come to its end then."""
        write_json(self.folder / RESULT, finite(result))


def open_run(folder: str | os.PathLike[str]) -> Run:
    """Return the run in a folder. Raises RunError where it holds none."""
    path = Path(folder)
    if not (path / DESCRIBED).is_file():
        raise RunError(f"{path} is no run folder: it has no {DESCRIBED}.")
    described = _read_json(path / DESCRIBED)
    if described.get("format") != FORMAT or described.get("version") != VERSION:
        raise RunError(
            f"{path / DESCRIBED} is of {described.get('format')!r}, version "
            f"{described.get('version')!r}; expected {FORMAT!r}, version {VERSION}."
        )
    return Run(path, described)


def check_new(folder: str | os.PathLike[str], force: bool) -> None:
    """Raise RunError where a new run cannot be in this folder: it holds something already.

    force: whether what is there of a run may be replaced.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; name a folder for the run.")
    there = (each.name for each in path.iterdir()) if path.exists() else ()
    if force or all(name.startswith(f"{CLAIM}.") for name in there):
        return
    if (path / DESCRIBED).is_file():
        raise RunError(
            f"{path} holds a run already; resume it, replace it by force, or name another folder."
        )
    raise RunError(f"{path} is not empty; name another folder for the run, or use force.")


def claim(folder: str | os.PathLike[str]) -> Claim:
    """Return this process's claim on a run's folder, which is made where it is missing.

    Raises RunError where another process trains there.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    found = claimed(path / CLAIM, SILENT)
    if found is None:
        raise RunError(
            f"{path} is being trained by {owner(path / CLAIM)}; let it end, or end it, before."
        )
    return found


def begin(folder: str | os.PathLike[str], described: Mapping[str, Any], force: bool = False) -> Run:
    """Return a new run in a folder, which is made where it is missing.

    described: what is trained on what, and how; versions and the machine are added. force: replace
    what is there of another run; other files in the folder stay. Raises RunError as `check_new`.
    """
    check_new(folder, force)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    Run(path, described).remove()
    whole = {"format": FORMAT, "version": VERSION, **described, **_surroundings()}
    write_json(path / DESCRIBED, whole)
    return Run(path, _read_json(path / DESCRIBED))


def resume(folder: str | os.PathLike[str], described: Mapping[str, Any]) -> Run:
    """Return the run in a folder, to go on with it.

    Raises RunError where it is a run of something else than what is described, and says of what.
    """
    run = open_run(folder)
    for name, value in json.loads(json.dumps(described)).items():
        there = run.described.get(name)
        if there != value:
            raise RunError(f"{run.folder} is a run of another {name}: {_difference(there, value)}")
    run.position()
    return run


def _difference(there: Any, given: Any) -> str:
    """Return in what two values differ, as a sentence; of objects, the first fields that do."""
    if not (isinstance(there, dict) and isinstance(given, dict)):
        return f"{there!r} there, {given!r} given."
    names = [name for name in {**there, **given} if there.get(name) != given.get(name)]
    told = [f"{name} is {there.get(name)!r} there, {given.get(name)!r} given" for name in names[:3]]
    more = f", and {len(names) - 3} more differ" if len(names) > 3 else ""
    return f"{'; '.join(told)}{more}."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is no JSON: {error}.") from None
    except FileNotFoundError:
        raise RunError(
            f"{path} is missing; the checkpoint that it belongs to is not whole."
        ) from None
    if not isinstance(value, dict):
        raise RunError(f"{path} must hold a JSON object; found {value!r}.")
    return value


def _surroundings() -> dict[str, Any]:
    """Return what is installed, and on which machine this is."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    machine = {
        "system": platform.platform(), "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }  # fmt: skip
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"versions": versions, "machine": machine, "began": began, "arguments": sys.argv[1:]}


def finite(value: Any) -> Any:
    """Return numbers, nested in dicts, with None for those that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(**event: Any) -> bytes:
    """Return an event as a record of TensorBoard's."""
    written = io.BytesIO()
    made = needed("tensorboard.compat.proto.event_pb2").Event(wall_time=time.time(), **event)
    writer = needed("tensorboard.summary.writer.record_writer").RecordWriter(written)
    writer.write(made.SerializeToString())
    return written.getvalue()


def _summary(metrics: Mapping[str, Any]) -> Any:
    """Return an epoch's numbers by TensorBoard's names: "train/loss" of "train_loss"."""
    summary = needed("tensorboard.compat.proto.summary_pb2").Summary
    numbers = {n: v for n, v in metrics.items() if n != "step" and isinstance(v, (int, float))}
    values = []
    for name, value in numbers.items():
        part, _, rest = name.partition("_")
        tag = f"{part}/{rest}" if part in ("train", "eval") else name
        values.append(summary.Value(tag=tag, simple_value=value))
    return summary(value=values)


def check_installed() -> None:
    """Raise ImportError where what writes TensorBoard's events is not installed."""
    needed("tensorboard.summary.writer.record_writer")
