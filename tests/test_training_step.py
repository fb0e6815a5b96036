"""The benchmark of training steps: that it runs, and what it writes; never a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import step_report
import training_step
from frameworks import fresh, need
from step_measure import Row, measure

NAMES = {"torch": "PyTorch", "tf": "Keras", "mx": "Gluon"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", NAMES)
def test_a_quick_run(backend, tmp_path):
    need(backend)
    options = ["--quick", "--patience", "0.01", "--threads", "1", "--out", tmp_path]
    done = fresh(training_step.__file__, "--backend", backend, *options)
    found = json.loads((tmp_path / "training_step.json").read_text())
    rows = [Row(**row) for row in found["rows"]]
    assert {row.backend for row in rows} == {NAMES[backend]}
    measured = {row.what.split(" of a ")[0] for row in rows}
    assert measured == {"composition alone", "layer", "training step", "inference", "peak memory"}
    for row in rows:
        assert len(row.seconds) >= 3
        assert all(value > 0 for value in (*row.seconds.values(), *row.ratios.values()))
        assert row.case in done.stdout
    assert NAMES[backend].replace("Gluon", "MXNet") in found["machine"]
    assert (tmp_path / "training_step.png").read_bytes().startswith(b"\x89PNG")


def test_ways_are_measured_by_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "abc"}
    row = measure("PyTorch", "layer", "none", ways, patience=0)
    assert calls[:12] == list("abcabcabcbca")
    assert len(calls) == 3 * (2 + row.rounds)
    assert row.ratios["a"] == 1
    assert row.seconds.keys() == row.spread.keys() == set("abc")


def test_the_page_gets_the_table_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{step_report.BEGIN}\nold\n{step_report.END}\nafter\n")
    monkeypatch.setattr(step_report, "DOCS", tmp_path)
    values = {"plain": 0.5, "formula": 1.0, "ours": 0.55}
    row = Row("PyTorch", "layer", "3×3", values, values, values, 9)
    step_report.write_docs([row], "A machine", quick=False)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "A machine." in text
    assert "plain 500 ms | formula **1.000** ± 1.000; ours **0.550** ± 0.550" in text
    assert "old" not in text
    assert (tmp_path / "performance.png").exists()
    with pytest.raises(SystemExit, match="whole run"):
        step_report.write_docs([row], "A machine", quick=True)


def test_the_page_of_this_repository_has_its_marks():
    text = (Path(step_report.DOCS) / "performance.md").read_text(encoding="utf-8")
    assert text.index(step_report.BEGIN) < text.index(step_report.END)
