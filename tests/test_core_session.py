"""Runs of an engine in NumPy: folders that are damaged, what is kept, what a terminal shows."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from equal import assert_same

from doconv_core import State, read_state, recipe
from doconv_core.models.report import Converted, Report
from doconv_core.state.layers import LayerForm, LinearSpec
from doconv_core.training import run as runs
from doconv_core.training import session
from doconv_core.training.claim import ClaimLost
from doconv_core.training.data import ImageData
from doconv_core.training.data.sources import Arrays
from doconv_core.training.engine import Engine, Sums, Verified
from doconv_core.training.loss import cross_entropy, cross_entropy_gradient
from doconv_core.training.position import Position
from doconv_core.training.run import RunError, open_run
from doconv_core.training.session import DiskFull, NotFinite, Session

CLASSES, SIDE = 3, 2
FORM = LayerForm(LinearSpec(SIDE * SIDE, CLASSES), bias=False)


class Linear(Engine):
    """A linear classifier, by plain gradient descent."""

    framework, version = "toy", "1"

    def __init__(self, process=0, processes=1):
        self.process, self.processes = process, processes
        self.model = self
        self.weight = np.zeros((CLASSES, SIDE * SIDE))
        self.steps = []

    def _logits(self, batch):
        return batch.images.reshape(len(batch.images), -1) @ self.weight.T

    def _sums(self, batch):
        logits = self._logits(batch)
        correct = int((logits.argmax(1) == batch.labels).sum())
        loss = float(cross_entropy(logits, batch.targets).sum())
        return Sums(loss, correct, len(logits), len(logits))

    def train_step(self, step, batch):
        self.steps.append(self._sums(batch))
        gradient = cross_entropy_gradient(self._logits(batch), batch.targets)
        images = batch.images.reshape(len(batch.images), -1)
        self.weight = self.weight - step.learning_rate * gradient.T @ images / batch.total

    def taken(self):
        found, self.steps = self.steps, []
        return found

    def evaluate(self, batches):
        found = Sums()
        for batch in batches:
            found = found.plus(self._sums(batch))
        return found

    def total(self, sums):
        return Sums(*(self.processes * np.array(sums))) if self.processes > 1 else sums

    def save(self, folder):
        if folder is not None:
            np.save(folder / "weight.npy", self.weight)

    def load(self, folder):
        self.weight = np.load(folder / "weight.npy")

    def export_state(self):
        return State({"fc": FORM}, {"fc.weight": self.weight.copy()})

    def load_state(self, state):
        self.weight = state.arrays["fc.weight"]

    def fold(self):
        return Converted(self, Report("folded", (), (), 12, 12))

    def folded_state(self, folded):
        return folded.export_state()

    def verify(self, folded, batches):
        sums = self.evaluate(batches)
        return Verified(sums, sums, 0.0, 0.0)

    def write_folded(self, folded, folder):
        np.save(folder / "folded.npy", folded.weight)
        return folder / "folded.npy"


def data(train=10):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(train, SIDE, SIDE, 1), dtype=np.uint8)
    part = Arrays(images, np.arange(train) % CLASSES)
    return ImageData("mine", tuple("abc"), part, part)


def small(**changes):
    given = {"epochs": 3, "batch_size": 4, "learning_rate": 0.1, "train_images": (),
             "eval_images": (), "weight_decay": 0, **changes}  # fmt: skip
    return recipe("digits", **given)


def begun(out, engine=None, *, made=None, **options):
    quiet = options.pop("quiet", True)
    return Session(engine or Linear(), made or small(), data(), out, quiet=quiet, **options)


def test_what_is_kept(tmp_path):
    """The last and the best checkpoint, whatever else a killed run has left there."""
    run, kept = tmp_path / "run", []
    checkpoints = run / "checkpoints"

    def look(epoch, metrics, model):
        kept.append({path.name for path in checkpoints.iterdir()})
        (checkpoints / ".step-00000099").mkdir()
        (checkpoints / "step-00000042").mkdir()

    begun(run, callback=look, checkpoint_every=2).run()
    best = open_run(run).result["best"]["epoch"]
    assert kept[0] == {"last", "best", "epoch-0001"}
    top1 = [line["eval_top1"] for line in open_run(run).metrics()]
    assert best == 1 + int(np.argmax(top1))
    assert open_run(run).best.name == f"epoch-{best:04d}"
    assert open_run(run).last.name == "epoch-0003"
    assert [line["step"] for line in open_run(run).metrics()] == [3, 6, 9]


def test_a_weight_that_is_not_finite_is_in_no_checkpoint(tmp_path):
    class Wild(Linear):
        def train_step(self, step, batch):
            super().train_step(step, batch)
            self.weight[0, 0] = np.inf

    with pytest.raises(NotFinite, match=r"the model's fc\.weight is not finite: the run diverged"):
        begun(tmp_path / "run", Wild(), checkpoint_every=1).run()
    state = read_state(open_run(tmp_path / "run").last / "state.safetensors")
    assert np.isfinite(state.arrays["fc.weight"]).all()


def test_an_evaluation_that_is_not_finite_is_told_and_trained_on(tmp_path):
    engine = Linear()
    engine.evaluate = lambda batches: Sums(np.inf, 0, 0, len(list(batches)))
    engine.verify = lambda folded, batches: Verified(Sums(1.0), Sums(1.0), 0.0, 0.0)
    begun(tmp_path / "run", engine).run()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "Infinity" not in text
    assert [line["eval_loss"] for line in open_run(tmp_path / "run").metrics()] == [None] * 3
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("what", ["append", "keep", "write_result"])
def test_a_full_disk_is_told_wherever_it_is_met(what, tmp_path, monkeypatch):
    run = begun(tmp_path / "run")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, what, full)
        with pytest.raises(DiskFull, match=r"No space left .*; make room and resume\.$") as caught:
            run.run()
    assert caught.value.checkpoint.is_dir()
    resumed = begun(tmp_path / "run", resume=True).run()
    begun(tmp_path / "other").run()
    for name in ("folded.safetensors", "checkpoints/epoch-0003/state.safetensors"):
        found, expected = (read_state(tmp_path / r / name).arrays for r in ("run", "other"))
        assert_same(dict(found), dict(expected))
    assert len(resumed.metrics) == 3


def test_a_run_that_does_not_begin_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "keep", full)
        with pytest.raises(DiskFull, match=r"run: No space left .*; make room and begin anew\.$"):
            begun(tmp_path / "run")
    diverged = Linear()
    diverged.weight[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"the model's fc\.weight is not finite to begin with"):
        begun(tmp_path / "run", diverged)
    assert not any((tmp_path / "run").iterdir())
    begun(tmp_path / "run").run()


def test_a_run_that_is_trained_is_left_alone(tmp_path):
    """By what would replace it, go on with it or begin it, until it has ended."""
    run, tried = tmp_path / "run", []

    def ask(epoch, metrics, model):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(RunError, match=rf"is being trained by process {os.getpid()} on .*run"):
            begun(run, **[{"force": True}, {"resume": True}][epoch % 2])
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(RunError, match="holds a run already"):
            begun(run)
        tried.append(epoch)

    begun(run, callback=ask).run()
    assert tried == [1, 2, 3]
    assert not [*run.glob(".run*")]
    begun(run, force=True).run()


def test_a_run_that_was_killed_is_not_taken_for_one_that_is_trained(tmp_path):
    begun(tmp_path / "run").run()
    owner = {"host": "elsewhere", "process": 1}
    file = tmp_path / "run" / ".run.claim-0"
    file.write_text(json.dumps(owner))
    with pytest.raises(RunError, match="is being trained by process 1 on elsewhere"):
        begun(tmp_path / "run", resume=True)
    long_ago = time.time() - runs.SILENT - 1
    os.utime(file, (long_ago, long_ago))
    begun(tmp_path / "run", resume=True).run()
    assert not file.exists()


def test_a_run_that_another_process_has_taken_over_writes_no_more(tmp_path):
    run = tmp_path / "run"

    def another(epoch, *_):
        (run / ".run.claim-1").write_text(json.dumps({"host": "elsewhere", "process": 1}))

    with pytest.raises(ClaimLost, match=r"taken over by another .* of this one for 100 seconds"):
        begun(run, callback=another).run()
    assert len(open_run(run).metrics()) == 1
    assert [path.name for path in run.glob(".run*")] == [".run.claim-1"]


def test_each_process_has_its_sums_again():
    sums = [Sums(1.5, 1, 2, 3), Sums(0.1, 0, 1, 2)]
    told = json.loads(json.dumps(Position(epoch=1, done=2).told(sums)))
    assert [Position.of(told, n, 2).sums for n in (0, 1)] == sums
    assert Position.of(told, 0, 1).sums == sums[0].plus(sums[1])
    assert Position.of(told, 1, 3).sums == Sums()


def test_processes_that_would_have_no_image_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a batch of 2 images leaves some of 3 processes without"):
        begun(tmp_path / "run", Linear(processes=3))
    with pytest.raises(ValueError, match="a batch of 4 images leaves some of 5 processes without"):
        begun(tmp_path / "run", Linear(processes=5), made=small(drop_last=True))
    assert not (tmp_path / "run").exists()


def test_damaged_folders_are_refused_in_one_line(tmp_path):
    folder = tmp_path / "run"
    begun(folder).run()
    described = (folder / "run.json").read_text()

    def refused(error):
        with pytest.raises(RunError, match=error):
            begun(folder, resume=True)

    (folder / "run.json").write_text(described.replace('"version": 1', '"version": 2'))
    refused("is of 'doconv run', version 2; expected 'doconv run', version 1")
    (folder / "run.json").write_text("{")
    refused(r"run\.json is no JSON")
    (folder / "run.json").write_text("[]")
    refused(r"must hold a JSON object; found \[\]")
    (folder / "run.json").write_text(described)
    (open_run(folder).last / "position.json").unlink()
    refused(r"position\.json is missing; the checkpoint that it belongs to is not whole")
    (folder / "checkpoints" / "last").unlink()
    refused("has no checkpoint to go on from; begin it anew")
    (folder / "result.json").unlink()
    with pytest.raises(RunError, match=r"has not come to its end: it has no result\.json"):
        _ = open_run(folder).result
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is a file; name a folder for the run"):
        begun(tmp_path / "file")


def test_a_terminal_has_a_bar_and_all_else_a_line_for_each_epoch(tmp_path, monkeypatch, capsys):
    begun(tmp_path / "lines", quiet=False).run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == [f"epoch {n} of 3" for n in (1, 2, 3)]
    assert lines[3].startswith("top-1 ")
    assert lines[4] == f"{tmp_path / 'lines'}: folded.npy, folded.safetensors, report.html"
    assert len(lines) == 5

    class Slow(Linear):
        def train_step(self, step, batch):
            time.sleep(0.15)  # longer than from one drawing of the bar to the next
            super().train_step(step, batch)

    monkeypatch.setattr(session, "LOOKED_AT", 0.0)
    written, (parent, child) = b"", pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with open(child, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        begun(tmp_path / "bar", Slow(), quiet=False).run()
    with suppress(OSError):  # at the end of what a terminal that is closed has shown
        while some := os.read(parent, 1 << 16):
            written += some
    os.close(parent)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())
    assert re.search(r"epoch 1 of 3 .*/3 .*loss \d\.\d{4}  top-1 +\d+\.\d+%", shown)
    assert "epoch 3 of 3: loss" in shown
