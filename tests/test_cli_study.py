"""`doconv study`: what it asks for, what it goes on with, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cases import one_test
from command_line import TARGET, USAGE, doconv
from frameworks import BACKENDS, imported

from doconv_core import describe
from doconv_core.cli import study as command
from doconv_core.training import study as studies
from doconv_core.training.data import open_data
from doconv_core.training.recipe import changed, default_recipe
from doconv_core.training.study import Arm, Study

ASKED = ("--backend", "torch", "--seeds", 2)


@pytest.fixture
def made_up(monkeypatch):
    """Runs are made up, and told; they do not train."""
    done = []

    def trainer(study, data):
        def train(task, after):
            done.append(task)
            task.folder.mkdir(parents=True)
            line = {"train_loss": 1.0, "eval_loss": 1.0, "eval_top1": 0.5 + 0.1 * task.seed}
            (task.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")

        return train

    monkeypatch.setattr(studies, "trainer", trainer)
    return done


def arms_of(folder):
    return [(arm["name"], arm["recipe"]) for arm in studies.plan(folder)["arms"]]


def test_a_study_is_done_and_gone_on_with(tmp_path, made_up):
    out = tmp_path / "out"
    first = doconv("study", "tutorial_pt", "tutorial_pt_doconv", *ASKED, "--out", out)
    assert (
        "| tutorial_pt_doconv | 2 | 55.00 ± 7.07 | +0.00 ± 0.00 | 0 of 2, 2 equal |" in first.stdout
    )
    assert first.stdout.splitlines()[-1].startswith("4 of 4 runs on digits with the backend torch")
    assert len(made_up) == 4
    doconv("study", "--out", out)
    assert len(made_up) == 4
    doconv("study", "--out", out, "--seeds", 3)
    assert [(task.arm.name, task.seed) for task in made_up[4:]] == [
        ("tutorial_pt", 2), ("tutorial_pt_doconv", 2),
    ]  # fmt: skip
    told = doconv("study", "--out", out, "--left", "--seeds", 4).stdout
    assert re.match(r"2 runs left, about 0\.0 minutes of one process\n", told)
    assert len(made_up) == 6
    assert json.loads((out / "study.json").read_text())["finished"] == 6


def test_kinds_recipes_and_changes(tmp_path, made_up):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'epochs = 3\nbatch_size = 8\noptimizer = "sgd"\nlearning_rate = 0.5\n'
        'train_images = ["resize 28 28"]\neval_images = ["resize 28 28"]\n'
    )
    doconv(
        "study", "tutorial_pt", f"tutorial_pt@{mine}", "tutorial_pt@epochs=7@momentum=0.5",
        "--set", "epochs=4", "--set", "clip_norm=2", *ASKED, "--out", tmp_path / "recipes",
    )  # fmt: skip
    fields = ("name", "epochs", "momentum", "clip_norm", "learning_rate")
    found = [[made[name] for name in fields] for _, made in arms_of(tmp_path / "recipes")]
    usual = found[0][4]
    assert found == [
        ["tutorial_pt", 4, 0.9, 2, usual], ["mine", 4, 0.9, 2, 0.5],
        ["tutorial_pt", 7, 0.5, 2, usual],
    ]  # fmt: skip
    doconv(
        "study", "cifar_resnet20@epochs=2", "--kinds", "plain,doconv,bsconvu", *ASKED,
        "--out", tmp_path / "kinds",
    )  # fmt: skip
    arms = arms_of(tmp_path / "kinds")
    assert [name for name, _ in arms] == [
        f"cifar_resnet20{kind}@epochs=2" for kind in ("", "_doconv", "_bsconvu")
    ]
    assert len({json.dumps(made) for _, made in arms}) == 1


def test_options_are_of_the_networks_that_take_them(tmp_path, made_up):
    doconv(
        "study", "cifar_densenet86", "cifar_dydensenet86", "--stages", "1-1-1", "--heads", 2,
        *ASKED, "--out", tmp_path,
    )  # fmt: skip
    options = [arm["options"] for arm in studies.plan(tmp_path)["arms"]]
    assert options == [{"stages": [1, 1, 1]}, {"stages": [1, 1, 1], "heads": 2}]
    doconv("study", "--out", tmp_path, "--left")


@one_test
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["tutorial_pt"], "--backend is missing; a study that DIR holds needs --out alone"),
        (["tutorial_p", *ASKED], "'tutorial_p' is no network.*nearest are 'tutorial_pt'"),
        (["tutorial_pt@nope", *ASKED], "'nope' is no recipe"),
        (["tutorial_pt@epochs=x", *ASKED], "epochs must be an integer; received epochs='x'"),
        (["tutorial_pt", "tutorial_pt", *ASKED], "'tutorial_pt' is there twice"),
        (
            ["tutorial_pt", "--growth", "8", *ASKED],
            "--growth is of none of the networks tutorial_pt",
        ),
        (["tutorial_pt", "tutorial_tf", "--kinds", "plain", *ASKED], "--kinds is of one NETWORK"),
        (["tutorial_pt", "--data", "mnist", *ASKED], "give the folder they are in"),
        (
            ["--seeds", 3, "--backend", "torch"],
            "takes no option but --out, --data-dir, --max-broken, ",
        ),
    ],
)
def test_wrong_usage(tmp_path, arguments, error):
    out = tmp_path / "out"
    doconv("study", *arguments, "--out", out, code=USAGE, error=error)
    assert not out.exists()


def test_other_folders_are_refused(tmp_path, made_up):
    nowhere = tmp_path / "nowhere"
    doconv("study", "--out", nowhere, code=TARGET, error="holds no study: it has no plan.json")
    (tmp_path / "letter").touch()
    asked = ("study", "tutorial_pt", *ASKED, "--out", tmp_path)
    doconv(*asked, code=TARGET, error="is not empty, and holds no study")
    asked = (*asked[:-1], nowhere)
    doconv(*asked)
    doconv(*asked, "--set", "epochs=9", code=TARGET, error="recipe differ; name another folder")
    plan = json.loads((nowhere / "plan.json").read_text())
    plan["arms"][0]["digest"] = "another"
    (nowhere / "plan.json").write_text(json.dumps(plan))
    doconv(
        "study", "--out", nowhere, code=TARGET, error="begun with another version of tutorial_pt"
    )
    assert len(made_up) == 2


def test_several_processes_are_the_same_command(tmp_path, monkeypatch):
    commands = []

    def run_shared(given, processes):
        commands.append((given[1:], processes))
        return [0, 3]

    monkeypatch.setattr(command, "run_shared", run_shared)
    asked = ("study", "tutorial_pt", *ASKED, "--out", tmp_path, "--processes", 2,
             "--max-broken", 3)  # fmt: skip
    doconv(*asked, code=3, error="1 process failed")
    module = ["-m", "doconv_core.cli", "study", "--one-of-several", "--out", str(tmp_path),
              "--max-broken", "3"]  # fmt: skip
    assert commands == [(module, 2)]
    assert studies.plan(Path(tmp_path))["seeds"] == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_study(tmp_path, backend):
    imported(backend)
    done = doconv(
        "study", "tutorial_pt", "tutorial_pt_doconv", "--backend", backend, "--seeds", 1,
        "--set", "epochs=1", "--out", tmp_path,
    )  # fmt: skip
    assert "2 of 2 runs on digits" in done.stdout
    base, over = json.loads((tmp_path / "study.json").read_text())["arms"]
    # Both begin as the same function and see the same batches, and D moves from the first step on.
    losses = [arm["seeds"]["0"]["train_loss"] for arm in (base, over)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    for arm in (base, over):
        folder = tmp_path / "runs" / arm["name"] / "00000"
        assert {p.name for p in folder.iterdir()} == {
            "run.json", "metrics.jsonl", "result.json", "finished.json",
        }  # fmt: skip


def test_a_run_that_was_under_way_goes_on(tmp_path):
    imported("torch")
    data = open_data("digits")
    trained = changed(default_recipe("tutorial_pt", "digits"), {"epochs": "2"})
    arm = Arm("plain", describe("tutorial_pt"), trained)
    study = Study([arm], [5], "torch", "digits")
    train, seen = studies.trainer(study, data), []

    def ends(task, after):
        def first(epoch, *others):
            seen.append(epoch)
            if len(seen) == 1:
                raise KeyboardInterrupt

        train(task, first)

    for name in ("whole", "ended"):
        folder = tmp_path / name
        studies.begin(folder, study)
        if name == "ended":
            with pytest.raises(KeyboardInterrupt):
                studies.work(folder, study, ends)
            studies.work(folder, study, ends)
        else:
            studies.work(folder, study, train)
    assert seen == [1, 2]  # epochs that are done: none twice
    whole, ended = (
        studies.read(studies.tasks(tmp_path / name, study)[0]).curve(studies.TRAIN_LOSS)
        for name in ("whole", "ended")
    )
    assert whole == ended
