"""Studies: what pairs of runs tell, who does which run, what a folder holds, and the page."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from doconv_core import describe
from doconv_core.networks.initialize import initialize
from doconv_core.training import claim as claims
from doconv_core.training import study as studies
from doconv_core.training.claim import ClaimLost, claimed
from doconv_core.training.html import Curve, plot
from doconv_core.training.paired import epochs_to, summary, wins
from doconv_core.training.recipe import recipe
from doconv_core.training.session import NotFinite
from doconv_core.training.sharing import run_shared
from doconv_core.training.study import Arm, Study, StudyError
from doconv_core.training.study_page import markdown, page, write

# What made-up runs come to: by network, the training loss and top-1 after each epoch, which a seed
# raises a little.
CURVES = {
    "tutorial_pt": ([2.0, 1.0, 0.8], [0.5, 0.6, 0.7]),
    "tutorial_pt_doconv": ([1.8, 0.8, 0.4], [0.5, 0.7, 0.72]),
}


def arm(name="tutorial_pt", network=None, **changes):
    return Arm(name, describe(network or name), recipe("tutorial_pt", **changes))


def study(*names, seeds=2, **others):
    names = names or ("tutorial_pt", "tutorial_pt_doconv")
    return Study([arm(name) for name in names], range(seeds), "torch", "digits", **others)


def train(task, after):
    """Leave what a run leaves, without training."""
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.folder / "run.json").write_text("{}")
    (task.folder / "checkpoints").mkdir(exist_ok=True)
    (task.folder / "report.html").write_text("much")
    losses, shares = CURVES[task.arm.network.name]
    with (task.folder / "metrics.jsonl").open("w") as file:
        for epoch, (loss, share) in enumerate(zip(losses, shares, strict=True)):
            top1 = share + 0.01 * task.seed * (epoch + 1)
            line = {"train_loss": loss, "eval_loss": 2 * loss, "eval_top1": top1}
            print(json.dumps(line), file=file)
            after(epoch, line, None)


def done(folder, asked, train=train):
    """Do a study, and return the lines that it told."""
    told = []
    studies.begin(folder, asked)
    studies.work(folder, asked, train, told.append)
    return told


@pytest.mark.parametrize("count", [2, 5, 30])
def test_intervals_are_those_of_scipy(count):
    values = np.random.default_rng(count).normal(0.3, 2, count)
    found = summary(values.tolist())
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    # Both are in float64: a few roundings apart.
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert (found.mean, found.std) == pytest.approx((values.mean(), values.std(ddof=1)), rel=1e-12)


def test_one_number_has_no_interval():
    found = summary([2.0])
    assert (found.count, found.mean) == (1, 2.0)
    assert all(map(math.isnan, found[2:]))
    assert math.isnan(summary([]).mean)


def test_wins_are_counted():
    assert wins([1.0, -1.0, 0.0, 0.5]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("losses", "level", "expected"),
    [
        ([2, 1], 2.5, 1),
        ([2, 1], 1, 2),
        ([2, 1], 1.25, 1.75),
        ([2, 1, 3], 0.5, math.inf),
        ([], 1, math.inf),
    ],
)
def test_epochs_to_a_level(losses, level, expected):
    assert epochs_to(losses, level) == expected


def test_a_study_is_told(tmp_path):
    asked = study(seeds=3)
    told = done(tmp_path, asked)
    assert re.fullmatch(r"tutorial_pt, seed 0: top-1 70.00 %, \d+.\d s \(1 of 6\)", told[0])
    base, over = write(tmp_path, asked)["arms"]
    assert base["against"] is None
    # By hand: seeds 0, 1, 2 reach 0.70, 0.73, 0.76 and 0.72, 0.75, 0.78.
    assert base["measures"]["eval_top1"]["mean"] == pytest.approx(0.73)
    assert base["measures"]["eval_top1"]["std"] == pytest.approx(0.03)
    gain = over["against"]["eval_top1"]
    assert (gain["better"], gain["equal"], gain["worse"]) == (3, 0, 0)
    assert [gain[name] for name in ("mean", "low", "high")] == pytest.approx([0.02] * 3)
    assert over["against"]["train_loss"]["better"] == 3  # the lower
    assert over["against"]["train_loss_ratio"]["mean"] == pytest.approx(0.5)
    assert over["against"]["epochs_to_loss"] == {"median": 2.0, "reached": 3, "count": 3}
    assert over["cost"]["parameters"] == base["cost"]["parameters"]
    assert over["cost"]["composition_macs"] > 0
    assert json.loads((tmp_path / "study.json").read_text())["finished"] == 6


def test_tables_and_the_page_tell_the_same(tmp_path):
    asked = study(seeds=3)
    done(tmp_path, asked)
    found = write(tmp_path, asked)
    table = markdown(found)
    assert "| tutorial_pt_doconv | 3 | 75.00 ± 3.00 | +2.00 ± 0.00 | 3 of 3 |" in table
    assert "50.0 % (50.0 to 50.0) | 2.0 |" in table
    html = (tmp_path / "study.html").read_text()
    for cell in ("+2.00 ± 0.00", "3 of 3", "50.0 % (50.0 to 50.0)", "6 of 6 runs on digits"):
        assert cell in html
    assert html.count("<svg") == 5
    assert not re.search(r"(?:src|href)=", html)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([-0.31, 0.5], ["-0.2", "0", "0.2", "0.4"]),
        ([113.0, 290.0], ["150", "200", "250"]),
        ([3.0, 3.0], ["2", "3", "4"]),
        ([None, math.nan], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ],
)
def test_axes_have_round_numbers(values, ticks):
    drawn = plot("loss", [Curve("", values)], lambda value: f"<{value:g}")
    assert re.findall(r">&lt;([^<]+)<", drawn) == ticks


def test_names_are_escaped():
    asked = Study([arm("<b>&|", "tutorial_pt")], [0], "torch", "<i>")
    found = studies.findings(studies.Path("nowhere"), asked)
    html = page(found)
    assert "<b>" not in html
    assert "<i>" not in html
    assert "| <b>&\\| | 0 |" in markdown(found)


def test_any_number_of_runs_gives_a_page(tmp_path):
    asked = study(seeds=2)

    def once(task, after):
        if (task.arm.name, task.seed) != ("tutorial_pt", 0):
            raise KeyboardInterrupt
        train(task, after)

    for expected in (0, 1):
        found = write(tmp_path, asked)
        assert found["finished"] == expected
        assert found["arms"][1]["against"]["pairs"] == 0
        assert "–" in markdown(found)
        (tmp_path / "study.json").unlink()
        (tmp_path / "study.html").unlink()
        if not expected:
            with pytest.raises(KeyboardInterrupt):
                done(tmp_path, asked, once)


def test_a_study_goes_on_where_it_was_left(tmp_path):
    asked = study(seeds=2)
    tried = []

    def fails_third(task, after):
        tried.append((task.arm.name, task.seed))
        if len(tried) == 3:
            raise OSError("the power is gone")
        train(task, after)

    with pytest.raises(OSError, match="the power is gone"):
        done(tmp_path, asked, fails_third)
    assert studies.left(tmp_path, asked)[0] == 2
    assert len(done(tmp_path, asked, fails_third)) == 2
    names = ("tutorial_pt", "tutorial_pt_doconv")
    pairs = [(name, seed) for seed in (0, 1) for name in names]
    assert tried == [*pairs[:3], *pairs[2:]]
    assert studies.left(tmp_path, asked) == (0, 0)
    assert done(tmp_path, asked) == []


def test_finished_runs_keep_little(tmp_path):
    asked = study(seeds=1)
    done(tmp_path, asked)
    for task in studies.tasks(tmp_path, asked):
        assert {p.name for p in task.folder.iterdir()} == {
            "run.json",
            "metrics.jsonl",
            "finished.json",
        }
        assert [p.name for p in task.folder.parent.iterdir()] == ["00000"]  # and no claim


def test_what_is_left_takes_as_long_as_what_is_done(tmp_path):
    asked = study(seeds=3)
    assert math.isnan(studies.left(tmp_path, asked)[1])
    done(tmp_path, study(seeds=1))
    for task, seconds in zip(studies.tasks(tmp_path, asked), (2.0, 5.0), strict=False):
        told = {"seconds": seconds, "host": "here", "failed": None}
        (task.folder / "finished.json").write_text(json.dumps(told))
    assert studies.left(tmp_path, asked) == (4, 14.0)


def test_a_run_that_diverges_counts_in_no_mean(tmp_path):
    def diverges(task, after):
        if (task.arm.name, task.seed) == ("tutorial_pt", 1):
            raise NotFinite("the loss is nan", None)
        train(task, after)

    asked = study(seeds=3)
    assert "the loss is nan" in done(tmp_path, asked, diverges)[2]
    found = write(tmp_path, asked)
    assert found["arms"][0]["failed"] == {"1": "the loss is nan"}
    assert found["arms"][1]["against"]["pairs"] == 2
    assert "| tutorial_pt | 3, 1 failed |" in markdown(found)
    assert "seed 1, failed and counts in no mean" in page(found)
    assert done(tmp_path, asked) == []


def test_a_measure_that_is_not_finite_has_no_mean(tmp_path):
    asked = study(seeds=2)
    done(tmp_path, asked)
    metrics = studies.tasks(tmp_path, asked)[0].folder / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text.replace('"eval_loss": 1.6', '"eval_loss": null'))
    assert metrics.read_text() != text
    found = write(tmp_path, asked)
    assert found["arms"][0]["measures"]["eval_loss"]["mean"] is None
    assert found["arms"][1]["against"]["eval_top1"]["mean"] == pytest.approx(0.02)
    assert "| 71.50 ± 2.12 | – | – | – | 0.8000 ± 0.0000 |" in markdown(found)


def test_seeds_and_arms_may_be_added(tmp_path):
    done(tmp_path, study("tutorial_pt", seeds=1))
    assert len(done(tmp_path, study(seeds=2))) == 3
    assert write(tmp_path, study(seeds=2))["finished"] == 4


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"precision": "bfloat16"}, "is a study of precision 'float32'; received 'bfloat16'"),
        ({"backend": "mx"}, "is a study of backend 'torch'; received 'mx'"),
        ({"data": "mnist"}, "is a study of data 'digits'; received 'mnist'"),
        ({"arms": [arm(epochs=9)]}, "another arm of the name 'tutorial_pt': recipe differ"),
    ],
)
def test_another_study_is_refused(tmp_path, changes, error):
    studies.begin(tmp_path, study())
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(StudyError, match=error):
        studies.begin(tmp_path, replace(study(), **changes))
    assert (tmp_path / "plan.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "error"),
    [(None, "holds no study"), ("[", "is no JSON"), ("[]", "is no plan"), ("{}", "is no plan")],
)
def test_what_is_no_study_is_refused(tmp_path, text, error):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(StudyError, match=error):
        studies.plan(tmp_path)


def test_what_another_process_is_writing_is_no_other_folder(tmp_path):
    (tmp_path / ".plan.json.0123").mkdir()
    studies.begin(tmp_path, study())
    assert studies.plan(tmp_path)["backend"] == study().backend


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").touch()
    with pytest.raises(StudyError, match="is not empty, and holds no study"):
        studies.begin(tmp_path, study())
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("arms", "seeds", "error"),
    [
        ([], [0], "at least one arm and one seed"),
        ([arm()], [], "at least one arm and one seed"),
        ([arm(), arm()], [0], "'tutorial_pt' is there twice"),
        ([arm()], [1, 1], "seeds must differ.*received 1, 1"),
        ([arm()], [-1], "at least 0; received -1"),
    ],
)
def test_what_is_no_study_at_all(arms, seeds, error):
    with pytest.raises(ValueError, match=error):
        Study(arms, seeds, "torch", "digits")


def test_a_run_that_was_changed_is_named(tmp_path):
    asked = study(seeds=1)
    done(tmp_path, asked)
    task = studies.tasks(tmp_path, asked)[1]
    (task.folder / "metrics.jsonl").write_text("")
    with pytest.raises(StudyError, match=f"{task.folder.name} is no finished run any more"):
        studies.findings(tmp_path, asked)


def test_folders_of_arms_are_apart_and_plain():
    names = ["a/b", "a_b", "a b", "tutorial_pt@average=0.99"]
    folders = [arm(name, "tutorial_pt").folder for name in names]
    assert len({*folders}) == 4
    assert all(re.fullmatch(r"[\w.=@+-]+", folder) for folder in folders)
    assert folders[3] == names[3]


@pytest.mark.parametrize("kind", ["doconv", "bsconvu", "bsconvs_p1d4"])
def test_pairs_begin_with_the_same_weights_where_shapes_agree(kind):
    plain = initialize(describe("cifar_resnet20"), seed=7).arrays
    other = initialize(describe(f"cifar_resnet20_{kind}"), seed=7).arrays
    common = [n for n in plain if n in other and plain[n].shape == other[n].shape]
    assert "classifier.weight" in common
    assert ("stem.conv.weight" in common) == (kind == "doconv")
    for name in common:
        np.testing.assert_array_equal(plain[name], other[name])


def test_a_claim_is_held_by_one(tmp_path):
    target = tmp_path / "00000"
    claim = claimed(target)
    assert claimed(target) is None
    claim.release()
    again = claimed(target)
    assert again.file.name == "00000.claim-0"
    again.release()


def test_a_claim_of_the_same_number_is_another(tmp_path):
    """One that was silent, was taken over, and finds the file of a third, which began anew."""
    target = tmp_path / "run"
    first = claimed(target)
    first.file.unlink()  # as whoever took over did at its end
    with pytest.raises(ClaimLost, match=r"run.claim-0, by which this process claims .*, is gone"):
        first.check()
    third = claimed(target)
    assert third.file == first.file
    with pytest.raises(ClaimLost, match="was taken over by another process"):
        first.check()
    first.release()
    third.check()
    third.release()
    assert not [*tmp_path.iterdir()]


def test_of_many_one_gets_a_claim(tmp_path):
    gate, found = threading.Barrier(8), []

    def ask():
        gate.wait()
        found.append(claimed(tmp_path / "run"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (claim,) = filter(None, found)
    claim.release()


def test_a_claim_is_held_as_soon_as_its_owner_can_be_read(tmp_path, monkeypatch):
    write, found = json.dump, []

    def write_and_ask(owner, file):
        write(owner, file)
        file.flush()
        found.append(claimed(tmp_path / "run"))

    monkeypatch.setattr(claims.json, "dump", write_and_ask)
    claimed(tmp_path / "run").release()
    assert found == [None]


HERE = os.path.dirname(__file__)
GONE = {"host": claims.socket.gethostname(), "process": 2**22 + 1}  # above any process's number


@pytest.mark.parametrize(
    ("owner", "seconds", "taken"),
    [
        (GONE, 0, True),
        ({**GONE, "process": os.getpid()}, 0, True),  # a former one, of the same number
        ({**GONE, "process": os.getppid()}, 0, False),
        ({**GONE, "host": "elsewhere"}, 0, False),
        ({**GONE, "host": "elsewhere"}, 2 * claims.STALE, True),
        (None, 0, False),
        (None, 2 * claims.STALE, True),
    ],
)
def test_a_claim_whose_owner_is_gone_is_taken_over(tmp_path, owner, seconds, taken):
    target, left = tmp_path / "run", tmp_path / "run.claim-3"
    left.write_text("" if owner is None else json.dumps(owner))
    before = left.stat().st_mtime - seconds
    os.utime(left, (before, before))
    claim = claimed(target)
    assert (claim is not None) == taken
    if claim is not None:
        assert claim.file.name == "run.claim-4"
        claim.check()
        claim.release()


def test_whose_run_was_taken_over_ends(tmp_path):
    asked = study(seeds=1)

    def sleeps(task, after):
        if task.arm.name == "tutorial_pt":
            task.folder.with_name("00000.claim-1").write_text('{"host": "elsewhere"}')
        train(task, after)

    told = done(tmp_path, asked, sleeps)
    assert "was taken over by another process" in told[0]
    assert studies.left(tmp_path, asked)[0] == 1
    assert len(told) == 2


def test_processes_share_the_cores(tmp_path):
    script = "import os, sys; sys.exit(int(os.environ['TF_NUM_INTRAOP_THREADS']) + 1)"
    cores = os.cpu_count() or 1
    assert run_shared([sys.executable, "-c", script], cores) == [2] * cores


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_study
from doconv_core.training import study as studies
folder = Path(sys.argv[1])
studies.work(folder, test_study.study(seeds=20), test_study.train)
"""


def test_two_processes_share_the_runs(tmp_path, capfd):
    asked = study(seeds=20)
    studies.begin(tmp_path, asked)
    assert run_shared([sys.executable, "-c", WORKER, str(tmp_path), HERE], 2) == [0, 0]
    lines = capfd.readouterr().out.splitlines()
    runs = [line.partition(":")[0] for line in lines]
    assert sorted(runs) == sorted(
        f"{t.arm.name}, seed {t.seed}" for t in studies.tasks(tmp_path, asked)
    )
