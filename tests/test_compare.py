"""The comparison: its verdict, its report, and its files for frameworks elsewhere."""

from __future__ import annotations

import re
from functools import partial

import compare
import compare_core
import compare_files
import numpy as np
import pytest
from compare_files import ComparisonError, Recorded
from compare_problem import answer_shapes, make_problem
from compare_report import draw_losses, write_report
from safetensors.numpy import save_file

from doconv_core import recipes

STEPS = 3


@pytest.fixture(scope="module")
def problem():
    return make_problem(STEPS)


@pytest.fixture(scope="module")
def core(problem):
    return compare_core.run(problem)


def recorded(core, **changes):
    return Recorded("torch", "PyTorch 2", core._replace(**changes))


def test_equal_answers_pass(core):
    rows = compare.compare(recorded(core), core)
    assert [row.result.split(" (")[0] for row in rows] == [
        "output",
        "gradient",
        "folded output",
        "loss, step by step",
        "folded after training",
    ]
    assert all(row.passed and row.absolute == row.relative == 0 for row in rows)


@pytest.mark.parametrize("value", [0.1, np.nan])
def test_a_wrong_entry_is_found_and_named(core, value):
    gradients = {name: array.copy() for name, array in core.gradients.items()}
    gradients["conv3.depthwise_weight"][5, 2, 1] += value
    rows = compare.compare(recorded(core, gradients=gradients), core)
    failed = [row for row in rows if not row.passed]
    assert [row.result for row in failed] == ["gradient (worst: conv3.depthwise_weight)"]
    assert "EXCEEDED" in compare.table(rows)
    losses = core.losses.copy()
    losses[1] *= 1.01
    rows = compare.compare(recorded(core, losses=losses), core)
    assert [row.result for row in rows if not row.passed] == ["loss, step by step"]


def test_each_recipe_is_a_row_of_each_framework(monkeypatch):
    seen = []

    def framework(backend, problem):
        seen.append((backend, problem.recipe.name, len(problem.steps)))
        wrong = (backend, problem.recipe.name) == ("mx", "digits")
        return core_of(problem).losses * (1.01 if wrong else 1), None

    core_of = compare.compare_recipes.core
    few = partial(compare.compare_recipes.make_problem, steps=2)
    monkeypatch.setattr(compare.compare_recipes, "make_problem", few)
    monkeypatch.setattr(compare.compare_recipes, "framework", framework)
    rows = compare.by_recipe({"mx": "MXNet 1", "tf": "Keras 3"})
    assert sorted(seen) == sorted((b, name, 2) for b in ("mx", "tf") for name in recipes())
    expected = [(t, f"loss by {name}") for t in ("MXNet 1", "Keras 3") for name in recipes()]
    assert [(row.framework, row.result) for row in rows] == expected
    failed = [(row.framework, row.result) for row in rows if not row.passed]
    assert failed == [("MXNet 1", "loss by digits")]


def test_report_is_one_file_with_tables_and_plots(core, tmp_path):
    records = [recorded(core), Recorded("mx", "MXNet <1>", core)]
    rows = [row for record in records for row in compare.compare(record, core)]
    write_report(tmp_path / "report.html", rows, core, records, {})
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 2
    assert 'name="viewport"' in html  # a phone shows it in its own width, and scrolls its tables
    assert html.count('<div class="wide"><table>') == html.count("<table>") == 1
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "MXNet &lt;1&gt;" in html
    assert html.count("<tr>") == 1 + len(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_every_curve_is_told_and_seen_in_both_plots(core):
    curves = [(name, core.losses) for name in ("MXNet", "Keras", "PyTorch")]
    left, right = draw_losses(core.losses, curves).axes
    for axes, others in ((left, {"NumPy core, float64"}), (right, {"allowed"})):
        told = {text.get_text() for text in axes.get_legend().get_texts()}
        assert told == {"MXNet", "Keras", "PyTorch"} | others
        drawn = [line for line in axes.lines if line.get_label() not in others]
        for looks in ("get_color", "get_marker", "get_markevery"):
            assert len({getattr(line, looks)() for line in drawn}) == 3
    widths = [line.get_linewidth() for line in left.lines]
    assert widths == sorted(set(widths), reverse=True)  # each is wider than what lies upon it


def test_answers_go_to_a_file_and_back(core, problem, tmp_path):
    file = tmp_path / "a.safetensors"
    compare_files.write(file, problem, [recorded(core)])
    (back,) = compare_files.read(file, problem)
    assert back.title == "PyTorch 2 (a.safetensors)"
    for found, expected in zip(back.answer, core, strict=True):
        np.testing.assert_equal(found, expected)


def test_files_that_do_not_fit_are_refused(core, problem, tmp_path):
    file = tmp_path / "a.safetensors"
    compare_files.write(file, problem, [recorded(core)])
    with pytest.raises(ComparisonError, match="answers to another problem"):
        compare_files.read(file, make_problem(STEPS + 1))
    with pytest.raises(ComparisonError, match="is a folder; name a file"):
        compare_files.read(tmp_path, problem)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ComparisonError, match="is not a whole safetensors file"):
        compare_files.read(file, problem)
    save_file({"a": np.zeros(1)}, file)
    with pytest.raises(ComparisonError, match="is no comparison: its header's format is None"):
        compare_files.read(file, problem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frameworks": "{"}, "the header's frameworks are no JSON"),
        ({"frameworks": "[]"}, r"the header's frameworks must be an object; found \[\]"),
        ({"frameworks": '{"mx": "MXNet"}'}, "mx/output is missing; expected shape"),
    ],
)
def test_headers_that_do_not_fit_are_refused(core, problem, tmp_path, change, message):
    file = tmp_path / "a.safetensors"
    header = {"format": compare_files.FORMAT, "problem": compare_files.digest(problem)}
    save_file({"torch/output": core.output}, file, metadata=header | change)
    with pytest.raises(ComparisonError, match=message):
        compare_files.read(file, problem)


def test_answers_of_another_shape_are_refused(core, problem, tmp_path):
    file = tmp_path / "a.safetensors"
    compare_files.write(file, problem, [recorded(core, losses=core.losses[:1])])
    with pytest.raises(
        ComparisonError, match=r"torch/losses has shape \(1,\); expected shape \(3,\)"
    ):
        compare_files.read(file, problem)


def test_the_shapes_of_an_answer_are_known(core, problem):
    found = {name: array.shape for name, array in compare_files._flat(core).items()}
    assert found == answer_shapes(problem)


def test_backends_that_cannot_take_part_are_left_out(monkeypatch, capsys):
    class Backend:
        def load(self):
            raise OSError("libmxnet.so: cannot open shared object file")

    monkeypatch.setattr(compare, "available_backends", lambda: {"mx": Backend(), "fourth": None})
    assert compare.frameworks_here() == {}
    printed = capsys.readouterr().out
    assert "mx: left out. libmxnet.so: cannot open" in printed
    assert "fourth: left out. It has no part" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--save", "."], "--save: . is a folder"), (["--out", __file__], "is a file; name a folder")],
)
def test_wrong_paths_stop_it_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_saved_answers_are_compared_and_decide_the_exit_code(
    core, problem, tmp_path, monkeypatch, capsys, factor
):
    monkeypatch.setattr(compare, "make_problem", lambda: problem)
    monkeypatch.setattr(compare, "frameworks_here", dict)  # as if none were installed
    answer = core._replace(output=factor * core.output)
    compare_files.write(tmp_path / "a.safetensors", problem, [Recorded("mx", "MXNet 1", answer)])
    arguments = ["--with", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        compare.main(arguments)
    assert stop.value.code == (0 if factor == 1 else 1)
    printed = capsys.readouterr().out
    assert "MXNet 1 (a.safetensors)" in printed
    assert ("EXCEEDED" in printed) == (factor != 1)
    assert (tmp_path / "out" / "report.html").exists()


def test_wrong_files_stop_it_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run", None)
    with pytest.raises(SystemExit, match=r"compare: .*absent\.safetensors"):
        compare.main(["--with", str(tmp_path / "absent.safetensors")])


def test_without_any_framework_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "frameworks_here", dict)
    with pytest.raises(SystemExit, match="no framework is installed here"):
        compare.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
