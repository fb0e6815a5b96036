"""A run: an engine's model is trained by a recipe, checkpointed, folded, verified, reported.

What the three frameworks have in common stands here. A backend's `train` makes an `Engine` of its
framework and hands it to `train`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from doconv_core.atomic import write_json
from doconv_core.maths.spec import as_integer
from doconv_core.networks.initialize import with_zero_gammas
from doconv_core.networks.names import describe, of_kind
from doconv_core.state.file import State, write_state
from doconv_core.training import run as runs
from doconv_core.training.claim import Claim
from doconv_core.training.data import ImageData, Series, as_data, batches, open_data, series
from doconv_core.training.engine import Batch, Engine, Step, Sums, Verified
from doconv_core.training.position import Position, shares
from doconv_core.training.recipe import Recipe, check_data
from doconv_core.training.recipe import recipe as recipe_by_name
from doconv_core.training.report import cost_of, moved, write_report
from doconv_core.training.run import Run
from doconv_core.training.schedule import learning_rate, progress, steps_per_epoch
from doconv_core.training.show import Display

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # of a disk that takes no more
LOOKED_AT = 0.5  # seconds from one look at what the steps came to, to the next
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Make = Callable[[Recipe], Engine]
Callback = Callable[[int, Mapping[str, Any], Any], Any]


class RunEnded(RuntimeError):
    """A run has ended before its end. checkpoint: the last one, from which it can go on."""

    def __init__(self, message: str, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class NotFinite(RunEnded):
    """The loss, or a weight, has become infinite or no number."""


class DiskFull(RunEnded):
    """The disk takes no more of the run's files."""


class Interrupted(RunEnded):
    """The run was asked to end, by Ctrl-C or by the system."""


class Trained(NamedTuple):
    """What training returns.

    model: the one that was given, trained. folded: a copy of it, folded; of averages, where the
    recipe averages. metrics: of each epoch. run: the run's folder; None where nothing was written.
    verified: the model and the folded one, compared on the evaluation data.
    """

    model: Any
    folded: Any
    metrics: list[dict[str, Any]]
    run: Path | None
    verified: Verified


def train(
    make: Make,
    recipe: Recipe | str,
    data: Any,
    *,
    run: str | os.PathLike[str] | None,
    seed: int,
    resume: bool,
    force: bool,
    checkpoint_every: int | None,
    workers: int,
    callback: Callback | None,
    data_dir: str | os.PathLike[str] | None,
    notes: Mapping[str, Any] | None,
    quiet: bool,
) -> Trained:
    """Train as a backend's `train` says. make: the engine for a recipe."""
    recipe = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
    seed = as_integer("seed", seed, least=0)
    found = open_data(data, data_dir) if isinstance(data, str) else as_data(data)
    session = Session(
        make(recipe), recipe, found, run, seed=seed, resume=resume, force=force,
        checkpoint_every=checkpoint_every, workers=workers, callback=callback, notes=notes,
        quiet=quiet,
    )  # fmt: skip
    return session.run()


def evaluate(
    make: Make,
    recipe: Recipe | str,
    data: Any,
    *,
    workers: int,
    data_dir: str | os.PathLike[str] | None,
) -> dict[str, float]:
    """Evaluate as a backend's `evaluate` says. make: the engine for a recipe."""
    recipe = recipe_by_name(recipe) if isinstance(recipe, str) else recipe
    found = open_data(data, data_dir) if isinstance(data, str) else as_data(data)
    engine = make(dataclasses.replace(recipe, average=None))
    try:
        # What is compiled at first, or does not fit.
        engine.evaluate([_first(engine, recipe, found)])
        began = time.monotonic()
        sums = engine.total(engine.evaluate(_evaluation(engine, recipe, found, workers)))
        seconds = time.monotonic() - began
    finally:
        engine.close()
    return {**shares(sums), "images": sums.images, "seconds": seconds}


def _evaluation(
    engine: Engine, recipe: Recipe, data: ImageData, workers: int = 0
) -> Iterator[Batch]:
    return batches(
        data.val, len(data.classes), recipe, training=False, process=engine.process,
        processes=engine.processes, layout=engine.layout, workers=workers,
    )  # fmt: skip


def _first(engine: Engine, recipe: Recipe, data: ImageData) -> Batch:
    for batch in _evaluation(engine, recipe, data):
        return batch
    raise ValueError(f"the data {data.name!r} have no image to evaluate on.")


class Session:
    """One run of an engine's model. `run` does it all.

    out: the run's folder; None to write nothing. checkpoint_every: steps; None for each epoch,
    after which there always is one. callback: called after each epoch, with how many are
    done, its metrics and the model. notes: what else `run.json` keeps. quiet: print nothing.
    Raises ValueError, before anything is written, for what cannot be trained so.
    """

    def __init__(
        self,
        engine: Engine,
        recipe: Recipe,
        data: ImageData,
        out: str | os.PathLike[str] | None,
        *,
        seed: int = 0,
        resume: bool = False,
        force: bool = False,
        checkpoint_every: int | None = None,
        workers: int = 0,
        callback: Callback | None = None,
        notes: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        if checkpoint_every is not None and checkpoint_every < 1:
            raise ValueError(
                f"checkpoint_every must be at least 1 step; received {checkpoint_every}."
            )
        if out is None and resume:
            raise ValueError("resume goes on with a run; give its folder as run.")
        if resume and force:
            raise ValueError("resume goes on with a run, and force replaces it; give one of them.")
        self.engine, self.recipe, self.data = engine, recipe, data
        self.seed, self.workers, self.callback = seed, workers, callback
        self.checkpoint_every = checkpoint_every
        self.writes = engine.process == 0 and out is not None
        self.out = None if out is None else Path(out)
        self.display = Display(quiet or engine.process > 0)
        check_data(recipe, len(data.classes), len(data.train))
        self.per_epoch = steps_per_epoch(recipe, len(data.train))
        _check_processes(recipe, len(data.train), engine.processes)
        self.metrics: list[dict[str, Any]] = []
        self.position = Position()
        self.signalled: int | None = None
        self.looked = time.monotonic()
        self.drawn: Series
        self.folder: Run | None = None  # of the process that writes it, or that goes on with it
        self.notes = dict(notes or {})
        self.kind: str | None = self.notes.get("job", {}).get("kind")
        self.claim: Claim | None = None
        try:
            self._begin(resume, force)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write into the run's folder."""
        if self.claim is not None:
            self.claim.release()

    def _begin(self, resume: bool, force: bool) -> None:
        """Check what can be checked, then open the run's folder, and take up its checkpoint."""
        described = self._described()
        if self.out is not None and resume:
            self.folder = runs.resume(self.out, described)
            if self.writes:
                self.claim = runs.claim(self.out)
        elif self.out is not None and self.writes:
            runs.check_new(self.out, force)
        if self.writes:
            runs.check_installed()
        self._try_model()
        if self.folder is not None:
            self._take_up(self.folder)
            return
        if self.recipe.zero_last_gamma:
            self._zero_last_gammas()
        if self.writes and self.out is not None:
            whole = {**described, **self._told(), "notes": self.notes}
            with self._ended_clearly():
                self.claim = runs.claim(self.out)
                self.folder = runs.begin(self.out, whole, force)
        try:
            with self._ended_clearly():
                self._checkpoint("step-00000000")
        except BaseException:
            if self.folder is not None:
                self.folder.remove()
            raise

    def _zero_last_gammas(self) -> None:
        """Let the residual units of a network by name start as identities."""
        if self.network is None:
            raise ValueError(
                "zero_last_gamma is for networks by name; in a model of your own, set gammas to 0."
            )
        options = self.notes.get("options", {})
        network = describe(self.network, num_classes=len(self.data.classes), **options)
        network = network if self.kind is None else of_kind(network, self.kind)
        self.engine.load_state(with_zero_gammas(self.engine.export_state(), network))

    def _try_model(self) -> None:
        """Let the model see images, so that one that does not fit says so before anything else."""
        first = _first(self.engine, self.recipe, self.data)
        self.image = first.images.shape[1:]
        self.engine.evaluate([first])
        state = self.engine.export_state()
        self.network = state.origin.get("network")
        for entry in _not_finite_in(state) if self.folder is None else ():
            raise ValueError(f"the model's {entry} is not finite to begin with.")

    def _described(self) -> dict[str, Any]:
        """Return what must be the same when the run is gone on with."""
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "data": {
                "name": self.data.name, "classes": len(self.data.classes),
                "train": len(self.data.train), "val": len(self.data.val),
            },
            "framework": self.engine.framework,
            "seed": self.seed,
        }  # fmt: skip

    def _told(self) -> dict[str, Any]:
        """Return what is told of the run besides, and may be other when it is gone on with."""
        return {
            "framework_version": self.engine.version,
            "network": self.network,
            "processes": self.engine.processes,
            "engine": dict(self.engine.described),
            "checkpoint_every": self.checkpoint_every,
            "classes": list(self.data.classes),
        }

    def _take_up(self, folder: Run) -> None:
        """Go to where the last checkpoint stands."""
        told = folder.position()
        assert folder.last is not None  # or it had no position
        self.position = Position.of(told, self.engine.process, self.engine.processes)
        if self.writes:
            folder.cut(told["lengths"])
        self.metrics = folder.metrics()[: self.position.epoch]
        self.engine.load(folder.last)

    def run(self) -> Trained:
        """Train to the end, fold, verify and report; see `train` of a backend.

        Raises NotFinite, DiskFull or Interrupted, with what to do, where the run ends before;
        ClaimLost where this process was silent for long, and another goes on with the run.
        """
        self.drawn = self._series()
        ended, watching = self._ended_clearly(), self._watching_signals()
        with closing(self), ended, watching, self.display, closing(self.drawn):
            while self.position.epoch < self.recipe.epochs:
                self._train_epoch()
                self._finish_epoch()
            return self._finish()

    def _train_epoch(self) -> None:
        """Train on what is left of the epoch."""
        self.began = self.looked = time.monotonic()
        epoch, start = self.position.epoch, self.position.done
        drawn = self.drawn.part()
        if start < self.per_epoch:
            self.display.epoch(epoch, self.recipe.epochs, self.per_epoch)
            for number, batch in enumerate(drawn, epoch * self.per_epoch + start):
                step = self._step(number)
                self.engine.train_step(step, batch)
                self._after(step)
            self._look()

    def _step(self, number: int) -> Step:
        rate = learning_rate(self.recipe, number, self.per_epoch)
        come = progress(self.recipe, number, self.per_epoch)
        return Step(number, number // self.per_epoch, rate, come)

    def _after(self, step: Step) -> None:
        """Do what is to be done after a step: look, make a checkpoint, end if that was asked."""
        self.position.done += 1
        if time.monotonic() - self.looked > LOOKED_AT:
            self._look()
        asked = self.signalled and self.engine.processes == 1  # others may be at another step
        every = self.checkpoint_every
        if asked or (every is not None and (step.number + 1) % every == 0):
            self._checkpoint(f"step-{step.number + 1:08d}")
        self._end_if_asked()

    def _look(self) -> None:
        """Add up what the steps came to since the last look, in their order, and show it."""
        position = self.position
        for taken in self.engine.taken():
            position.sums = position.sums.plus(taken)
            position.taken += 1
            if not math.isfinite(taken.loss):
                number = position.epoch * self.per_epoch + position.taken
                raise self._not_finite(f"the loss of step {number} is {taken.loss}")
        now = time.monotonic()
        position.seconds += now - self.looked
        self.looked = now
        self.display.step(position.done, position.sums, position.seconds)

    def _checkpoint(self, name: str, best: bool = False) -> None:
        """Make a checkpoint of where the run stands. Every process takes part in it."""
        if self.out is None:
            return
        self._look()
        gathered = self._gathered(self.position.sums)
        state = self.engine.export_state()
        for entry in _not_finite_in(state):
            raise self._not_finite(f"the model's {entry} is not finite")
        folder = self._writable()
        if folder is not None:
            told = {**self.position.told(gathered), "lengths": folder.lengths()}
            folder.keep(name, partial(self._fill, state, told), best=best)
        else:
            self.engine.save(None)

    def _writable(self) -> Run | None:
        """Return the folder, where this process writes it; ClaimLost if another does by now."""
        if self.claim is not None:
            self.claim.check()
        return self.folder if self.writes else None

    def _fill(self, state: State, position: Mapping[str, Any], folder: Path) -> None:
        self.engine.save(folder)
        self._write_state(state, folder / runs.STATE)
        write_json(folder / runs.POSITION, position)

    def _write_state(self, state: State, file: Path) -> None:
        """Write a state, and in it with which options and kind its network is made again."""
        told = {} if self.kind is None else {"kind": self.kind}
        if self.notes.get("options"):
            told["options"] = json.dumps(self.notes["options"])
        write_state(dataclasses.replace(state, origin={**state.origin, **told}), file)

    def _gathered(self, sums: Sums) -> list[Sums]:
        """Return each process's sums, the same in all of them."""
        engine = self.engine
        return [
            engine.total(sums if process == engine.process else Sums())
            for process in range(engine.processes)
        ]

    def _finish_epoch(self) -> None:
        """Evaluate, write the epoch's metrics, make a checkpoint, call back."""
        engine, position = self.engine, self.position
        epoch, last = position.epoch, (position.epoch + 1) * self.per_epoch - 1
        self.display.evaluating()
        trained = engine.total(position.sums)
        evaluated = engine.total(engine.evaluate(self.drawn.part()))
        metrics = {
            "epoch": epoch + 1, "step": last + 1, "learning_rate": self._step(last).learning_rate,
            **{f"train_{name}": value for name, value in shares(trained).items()},
            **{f"eval_{name}": value for name, value in shares(evaluated).items()},
            "seconds": round(position.seconds, 3),
        }  # fmt: skip
        self.metrics.append(metrics)
        folder = self._writable()
        if folder is not None:
            folder.append(metrics)
        is_best = position.next_epoch(evaluated)
        self.looked = time.monotonic()
        self._checkpoint(f"epoch-{epoch + 1:04d}", is_best)
        self.display.line(metrics, self.recipe.epochs)
        if self.callback is not None:
            self.callback(epoch + 1, metrics, engine.model)
        self._end_if_asked()

    def _series(self) -> Series:
        """Return all batches from where the run stands."""
        return series(
            self.data, self.recipe, epoch=self.position.epoch, start=self.position.done,
            seed=self.seed, process=self.engine.process, processes=self.engine.processes,
            layout=self.engine.layout, workers=self.workers,
        )  # fmt: skip

    def _finish(self) -> Trained:
        """Fold, verify and write what has come of it."""
        engine = self.engine
        self.display.evaluating()
        folded, report = engine.fold()
        verified = self._verified(folded)
        state = engine.export_state()
        folder = self._writable()
        if folder is not None:
            self._write(folder, state, folded, str(report), verified)
        return Trained(engine.model, folded, self.metrics, self.out, verified)

    def _verified(self, folded: Any) -> Verified:
        """Return how the model and the folded one compare, over all processes."""
        engine = self.engine
        own = engine.verify(folded, self.drawn.part())
        before, after = engine.total(own.before), engine.total(own.after)
        return Verified(before, after, self._largest(own.absolute), self._largest(own.relative))

    def _largest(self, value: float) -> float:
        """Return the largest of all processes' values."""
        return max(sums.loss for sums in self._gathered(Sums(loss=value)))

    def _write(
        self, folder: Run, state: State, folded: Any, report: str, verified: Verified
    ) -> None:
        """Write the folded weights, the result and the report; say where everything is."""
        engine, out = self.engine, folder.folder
        own = engine.write_folded(folded, out)
        self._write_state(engine.folded_state(folded), out / f"{runs.FOLDED}.safetensors")
        files = [own.name, f"{runs.FOLDED}.safetensors"]
        result = {
            "epochs": self.recipe.epochs,
            "trained": shares(verified.before),
            "folded": shares(verified.after),
            "difference": {"absolute": verified.absolute, "relative": verified.relative},
            "best": {"epoch": self.position.best_epoch, "eval_top1": self.position.best},
            "cost": cost_of(folder.described, state, self._input_shape()),
            "moved": moved(state),
            "fold": report,
            "files": files,
        }
        folder.write_result(result)
        write_report(folder)
        self.display.end(out, verified, [*files, runs.REPORT])

    def _input_shape(self) -> tuple[int, int, int]:
        first, second, third = self.image
        return (first, second, third) if self.engine.layout == "NCHW" else (third, first, second)

    def _end_if_asked(self) -> None:
        if self.signalled is not None:
            raise Interrupted(f"the run was interrupted{self._stands()}", self._last)

    def _not_finite(self, what: str) -> NotFinite:
        return NotFinite(
            f"{what}: the run diverged{self._stands()}; begin anew with a lower learning_rate, "
            "with warmup_epochs, or with clip_norm.",
            self._last,
        )

    @property
    def _last(self) -> Path | None:
        return None if self.folder is None else self.folder.last

    def _stands(self) -> str:
        """Return where the run stands, as the end of a clause."""
        where = f" in epoch {self.position.epoch + 1} of {self.recipe.epochs}"
        return where if self._last is None else f"{where}; the last checkpoint is {self._last}"

    @contextmanager
    def _ended_clearly(self) -> Iterator[None]:
        """Tell of a full disk in the words of a run."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise DiskFull(
                f"{self.out}: {error.strerror}{self._stands()}; make room and "
                f"{'begin anew' if self._last is None else 'resume'}.",
                self._last,
            ) from error

    @contextmanager
    def _watching_signals(self) -> Iterator[None]:
        """Let the first signal to end wait for the step that is computed; the next does not."""
        if threading.current_thread() is not threading.main_thread():
            yield  # which alone gets signals
            return

        def asked(number: int, frame: FrameType | None) -> None:
            if self.signalled is not None:
                raise KeyboardInterrupt
            self.signalled = number

        former = {number: signal.signal(number, asked) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def _not_finite_in(state: State) -> Iterator[str]:
    """Yield the names of arrays that have an entry that is infinite or no number."""
    return (name for name, array in state.arrays.items() if not np.isfinite(array).all())


def _check_processes(recipe: Recipe, images: int, processes: int) -> None:
    """Raise ValueError where a batch would leave a process without an image."""
    rest = 0 if recipe.drop_last else images % recipe.batch_size
    for size in (min(recipe.batch_size, images), rest or recipe.batch_size):
        if size < processes:
            raise ValueError(
                f"a batch of {size} images leaves some of {processes} processes without; "
                "choose another batch_size, or drop_last."
            )
