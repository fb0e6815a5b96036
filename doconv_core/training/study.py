"""Studies: networks, kinds of layers or recipes, compared over runs with the same seeds.

    study.json, study.html   what the runs that are finished tell; written anew by every process
    plan.json                what is compared, on which data, with which seeds
    runs/ARM/SEED/           a run, and `finished.json`, which says how it ended

A study is a fold over its finished runs: any number of them gives a page. Processes on one machine
or many, which share the folder, each take the next run that is neither finished nor taken.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from doconv_core.atomic import write_json
from doconv_core.backends import available_backends
from doconv_core.networks.cost import count
from doconv_core.networks.nodes import Network
from doconv_core.training.claim import Claim, ClaimLost, held
from doconv_core.training.data import ImageData
from doconv_core.training.paired import check_installed, epochs_to, summary, wins
from doconv_core.training.recipe import Recipe, to_json
from doconv_core.training.run import DESCRIBED, METRICS, RESULT, open_run
from doconv_core.training.session import NotFinite

PLAN, FOUND, PAGE, RUNS, FINISHED = "plan.json", "study.json", "study.html", "runs", "finished.json"
FORMAT, VERSION = "doconv study", 1
KEPT = frozenset((DESCRIBED, METRICS, RESULT))
ACCURACY, EVAL_LOSS, TRAIN_LOSS = "eval_top1", "eval_loss", "train_loss"
MEASURES = {ACCURACY: 1, EVAL_LOSS: -1, TRAIN_LOSS: -1}  # whether more is better, or less


class StudyError(ValueError):
    """A folder that holds another study, or none, or runs that are none any more."""


@dataclass(frozen=True)
class Arm:
    """One of what is compared: a network, of a name or one's own, and how it is trained.

    name: in tables, and of the folder of its runs. options: of the network's family, as `describe`
    takes them, by which another process makes it again. kind: for which `over_parameterize` is
    called with the network first, if that is not none.

    >>> from doconv_core.training.recipe import recipe
    >>> Arm("plain", describe("tutorial_pt"), recipe("tutorial_pt")).folder
    'plain'
    """

    name: str
    network: Network
    recipe: Recipe
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""

    @property
    def folder(self) -> str:
        """The name of the folder of its runs."""
        plain = re.sub(r"[^\w.=@+-]", "_", self.name)
        return plain if plain == self.name else f"{plain}-{_digest(self.name)}"

    def described(self) -> dict[str, Any]:
        """Return what makes it what it is, as JSON has it."""
        return {
            "name": self.name,
            "network": self.network.name,
            "options": json.loads(json.dumps(dict(self.options))),
            "input": list(self.network.input_shape),
            "digest": _digest(repr(self.network)),
            "recipe": to_json(self.recipe),
            **({"kind": self.kind} if self.kind else {}),
        }


@dataclass(frozen=True)
class Study:
    """What is compared on what. The first arm is the baseline, that others are compared with.

    backend: its name, as "torch". data: the name of the data. precision: as of a backend's `train`.
    Raises ValueError for arms of the same name, or none, and for no seeds or the same one twice.

    >>> from doconv_core.training.recipe import recipe
    >>> arm = Arm("plain", describe("tutorial_pt"), recipe("tutorial_pt"))
    >>> Study((arm, arm), range(3), "torch", "digits")
    Traceback (most recent call last):
        ...
    ValueError: arms must differ in their names; 'plain' is there twice.
    """

    arms: Sequence[Arm]
    seeds: Sequence[int]
    backend: str
    data: str
    precision: str = "float32"

    def __post_init__(self) -> None:
        """Check that runs can be told apart."""
        names = [arm.name for arm in self.arms]
        if not names or not len(self.seeds):
            raise ValueError("a study needs at least one arm and one seed; received none.")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"arms must differ in their names; {name!r} is there twice.")
        if len({*self.seeds}) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds must differ, and be at least 0; received {', '.join(map(str, self.seeds))}."
            )

    def described(self) -> dict[str, Any]:
        """Return what makes it what it is, as JSON has it."""
        return {
            "format": FORMAT, "version": VERSION,
            "arms": [arm.described() for arm in self.arms], "seeds": list(self.seeds),
            "backend": self.backend, "data": self.data, "precision": self.precision,
        }  # fmt: skip


class Task(NamedTuple):
    """One run of a study: an arm, a seed, and the run's folder."""

    arm: Arm
    seed: int
    folder: Path

    @property
    def is_finished(self) -> bool:
        """Whether it has ended, well or not."""
        return (self.folder / FINISHED).is_file()


# Trains a task's network, in the task's folder; is to call `after` after every epoch.
Train = Callable[[Task, Callable[..., None]], Any]


def trainer(study: Study, data: ImageData) -> Train:
    """Return what trains a task's network in the study's backend, which is imported now.

    A run that was begun goes on from its last checkpoint. Raises ImportError where the backend's
    framework is not there.
    """
    backend = available_backends()[study.backend].load()

    def train(task: Task, after: Callable[..., None]) -> None:
        model = backend.get_model(task.arm.network, seed=task.seed)
        if task.arm.kind:
            model, _ = backend.over_parameterize(model, kind=task.arm.kind)
        begun = (task.folder / DESCRIBED).is_file() and open_run(task.folder).last is not None
        backend.train(
            model, task.arm.recipe, data, run=task.folder, seed=task.seed, resume=begun,
            force=not begun, precision=study.precision, callback=after, quiet=True,
            notes={"options": dict(task.arm.options)},
        )  # fmt: skip

    return train


def tasks(folder: Path, study: Study) -> list[Task]:
    """Return the runs of a study, seed by seed, so that whole pairs are finished first."""
    return [
        Task(arm, seed, folder / RUNS / arm.folder / f"{seed:05d}")
        for seed in study.seeds
        for arm in study.arms
    ]


def begin(folder: Path, study: Study) -> None:
    """Write a study's plan into its folder, where another part of it may be already.

    Seeds and arms may be more or fewer than those of the plan that is there. Raises StudyError
    where an arm of the same name, the backend or the data is another; ImportError without scipy.
    """
    check_installed()
    strange = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if (folder / PLAN).exists():  # which another may have written just now
        _check_same(folder, plan(folder), study.described())
    elif strange:
        raise StudyError(f"{folder} is not empty, and holds no study; name another folder.")
    write_json(folder / PLAN, study.described())


def plan(folder: Path) -> dict[str, Any]:
    """Return what a folder's plan says. Raises StudyError where it holds none."""
    path = folder / PLAN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StudyError(f"{folder} holds no study: it has no {PLAN}.") from None
    except ValueError as error:
        raise StudyError(f"{path} is no JSON: {error}.") from None
    told = found if isinstance(found, dict) else {}
    if (told.get("format"), told.get("version")) != (FORMAT, VERSION):
        raise StudyError(f"{path} is no plan of {FORMAT!r}, version {VERSION}.")
    return told


def _check_same(folder: Path, there: dict[str, Any], given: dict[str, Any]) -> None:
    for name in ("backend", "data", "precision"):
        if there[name] != given[name]:
            raise StudyError(
                f"{folder} is a study of {name} {there[name]!r}; received {given[name]!r}."
            )
    arms = {arm["name"]: arm for arm in there["arms"]}
    for arm in given["arms"]:
        before = arms.get(arm["name"], arm)
        if before == arm:
            continue
        names = [name for name, value in arm.items() if value != before.get(name)]
        raise StudyError(
            f"{folder} has another arm of the name {arm['name']!r}: {' and '.join(names)} differ; "
            "name another folder."
        )


def print_line(text: str) -> None:
    """Print a line in one piece, which those of other processes do not come into."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def work(folder: Path, study: Study, train: Train, say: Callable[[str], Any] = print_line) -> None:
    """Do runs of a study until none is left that nobody has taken, and tell of each in a line.

    Raises what `train` raises, but NotFinite: such a run has failed, which the study tells, and is
    not done again.
    """
    found = tasks(folder, study)
    while True:
        done = 0
        for task in found:
            if task.is_finished:
                continue
            task.folder.parent.mkdir(parents=True, exist_ok=True)
            with held(task.folder) as claim:
                if claim is not None and not task.is_finished:
                    done += 1
                    try:
                        told = _run(task, train, claim)
                    except ClaimLost as error:
                        told = str(error)
                    finished = sum(each.is_finished for each in found)
                    say(f"{task.arm.name}, seed {task.seed}: {told} ({finished} of {len(found)})")
        if not done:
            return


def _run(task: Task, train: Train, claim: Claim) -> str:
    """Do a run, keep of it what the study needs, and return what it came to."""
    began, failed = time.monotonic(), None
    try:
        train(task, lambda *_: claim.check())
    except NotFinite as error:
        failed = str(error)
    claim.check()
    seconds = time.monotonic() - began
    task.folder.mkdir(exist_ok=True)
    for path in task.folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in KEPT:
            path.unlink()
    told = {"seconds": round(seconds, 3), "host": socket.gethostname(), "failed": failed}
    write_json(task.folder / FINISHED, told)
    if failed is not None:
        return failed
    return f"top-1 {100 * read(task).metrics[-1][ACCURACY]:.2f} %, {seconds:.1f} s"


class Done(NamedTuple):
    """What a finished run tells. metrics: of each epoch. failed: why it has none at its end."""

    seconds: float
    metrics: list[dict[str, Any]]
    failed: str | None

    def curve(self, name: str) -> list[float]:
        """Return a measure after each epoch; NaN where it was not finite."""
        values = (metrics[name] for metrics in self.metrics)
        return [math.nan if value is None else float(value) for value in values]


def read(task: Task) -> Done:
    """Return what a finished run tells. Raises StudyError where its files are others now."""
    try:
        ended = json.loads((task.folder / FINISHED).read_text(encoding="utf-8"))
        lines: list[str] = []
        if ended["failed"] is None:
            lines = (task.folder / METRICS).read_text(encoding="utf-8").splitlines()
        done = Done(ended["seconds"], [json.loads(line) for line in lines], ended["failed"])
        if done.failed is None:
            for name in MEASURES:
                done.curve(name)[-1]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise StudyError(
            f"{task.folder} is no finished run any more ({error!r}); remove it to do it again."
        ) from None
    return done


def left(folder: Path, study: Study) -> tuple[int, float]:
    """Return how many runs are not finished, and the seconds that they take one after another.

    A run takes as long as those of its arm have, else of any; NaN where none is finished.
    """
    found = tasks(folder, study)
    known: dict[str, list[float]] = {}
    for task in found:
        if task.is_finished:
            known.setdefault(task.arm.name, []).append(read(task).seconds)
    usual = median([second for each in known.values() for second in each]) if known else math.nan
    missing = [task for task in found if not task.is_finished]
    return len(missing), sum(median(known.get(task.arm.name, [usual])) for task in missing)


def findings(folder: Path, study: Study) -> dict[str, Any]:
    """Return what the finished runs tell, as JSON has it; what is not known is None.

    `arms`: of each what it costs, its failures, its measures after the last epoch, its curves, and
    `against`: what it gains over the baseline in the pairs of which both runs are finished.
    """
    runs: dict[str, dict[int, Done]] = {arm.name: {} for arm in study.arms}
    found = tasks(folder, study)
    for task in found:
        if task.is_finished:
            runs[task.arm.name][task.seed] = read(task)
    base = _ended(runs[study.arms[0].name])
    arms = [_arm_findings(arm, runs[arm.name], base) for arm in study.arms]
    for arm in arms[:1]:
        arm["against"] = None
    told = {
        **study.described(), "runs": len(found), "finished": sum(map(len, runs.values())),
        "arms": arms,
    }  # fmt: skip
    return dict(_finite(told))


def _ended(runs: Mapping[int, Done]) -> dict[int, Done]:
    return {seed: run for seed, run in runs.items() if run.failed is None}


def _arm_findings(arm: Arm, runs: Mapping[int, Done], base: Mapping[int, Done]) -> dict[str, Any]:
    ended = _ended(runs)
    pairs = {seed: (base[seed], run) for seed, run in ended.items() if seed in base}
    return {
        **arm.described(),
        "finished": len(runs),
        "failed": {str(seed): run.failed for seed, run in runs.items() if run.failed is not None},
        "cost": _cost(arm, ended),
        "measures": {name: _ends(ended.values(), name) for name in MEASURES},
        "epochs_to_loss": _epochs_to([(run, run) for run in ended.values()]),
        "seeds": {str(seed): _last(run) for seed, run in sorted(ended.items())},
        "curves": {name: _curve([run.curve(name) for run in ended.values()]) for name in MEASURES},
        "against": _against(list(pairs.values())),
    }


def _cost(arm: Arm, ended: Mapping[int, Done]) -> dict[str, Any]:
    cost = count(arm.network, kind=arm.kind or None)
    seconds = [run.seconds for run in ended.values()]
    return {
        "parameters": cost.parameters, "training_parameters": cost.training_parameters,
        "macs": cost.macs, "composition_macs": cost.composition_macs,
        "branch_macs": cost.branch_macs,
        "seconds": median(seconds) if seconds else None,
    }  # fmt: skip


def _last(run: Done) -> dict[str, float]:
    return {name: run.curve(name)[-1] for name in MEASURES}


def _ends(runs: Any, name: str) -> dict[str, Any]:
    return summary([run.curve(name)[-1] for run in runs])._asdict()


def _against(pairs: Sequence[tuple[Done, Done]]) -> dict[str, Any]:
    """Return what the second of each pair gains over the first, the baseline."""
    told: dict[str, Any] = {"pairs": len(pairs)}
    for name, sign in MEASURES.items():
        found = [run.curve(name)[-1] - base.curve(name)[-1] for base, run in pairs]
        told[name] = {**summary(found)._asdict(), **wins([sign * f for f in found])._asdict()}
    told["train_loss_ratio"] = _ratio(
        [(base.curve(TRAIN_LOSS)[-1], run.curve(TRAIN_LOSS)[-1]) for base, run in pairs]
    )
    told["epochs_to_loss"] = _epochs_to(pairs)
    told["curves"] = {
        name: _curve(
            [_differences(base.curve(name), run.curve(name)) for base, run in pairs], interval=True
        )
        for name in MEASURES
    }
    return told


def _ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the second over the first, as the geometric mean of pairs that are above zero."""
    logs = summary([math.log(b / a) for a, b in pairs if min(a, b) > 0])
    return {"count": logs.count, **{n: math.exp(getattr(logs, n)) for n in ("mean", "low", "high")}}


def _epochs_to(pairs: Sequence[tuple[Done, Done]]) -> dict[str, Any]:
    """Return after how many epochs the second has the first's training loss of the end."""
    found = [epochs_to(run.curve(TRAIN_LOSS), base.curve(TRAIN_LOSS)[-1]) for base, run in pairs]
    reached = sum(map(math.isfinite, found))
    return {"median": median(found) if found else None, "reached": reached, "count": len(found)}


def _differences(base: Sequence[float], run: Sequence[float]) -> list[float]:
    return [after - before for before, after in zip(base, run, strict=False)]


def _curve(curves: Sequence[Sequence[float]], *, interval: bool = False) -> dict[str, list[float]]:
    """Return the mean after each epoch, with a band: a standard deviation, or its 95 % interval."""
    found = [summary(values) for values in zip(*curves, strict=False)]
    return {
        "values": [each.mean for each in found],
        "low": [each.low if interval else each.mean - each.std for each in found],
        "high": [each.high if interval else each.mean + each.std for each in found],
    }


def _finite(value: Any) -> Any:
    """Return a value with None in place of numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
