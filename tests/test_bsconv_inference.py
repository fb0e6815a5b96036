"""The benchmark of BSConvs in inference: that it runs, and what it writes; never a time."""

from __future__ import annotations

import json
import sys

import pytest
from frameworks import fresh, need

need("torch")

import bsconv_inference  # noqa: E402
import step_report  # noqa: E402
from step_measure import Row  # noqa: E402


@pytest.mark.exhaustive
def test_a_quick_run_measures_every_form_that_there_is(tmp_path):
    options = ["--quick", "--patience", "0.01", "--threads", "1", "--out", tmp_path]
    done = fresh(bsconv_inference.__file__, *options)
    found = json.loads((tmp_path / "bsconv_inference.json").read_text())
    rows = {row["case"]: Row(**row) for row in found["rows"]}
    every = ["ordinary", "keep", "merge", "dense"]
    forms = {case: list(row.seconds) for case, row in rows.items()}
    assert forms == {
        "BSConv-U 64→64 @56²": every,
        "BSConv-S 64→64 @56²": every,
        "cifar_resnet20_bsconvu": every,
        "cifar_resnet20_bsconvs_p1d4": every[:-1],
        "cifar_resnet20_bsconvs_p1d4, no inner batch norms": every,
    }
    for case, row in rows.items():
        assert all(value > 0 for value in (*row.seconds.values(), *row.ratios.values()))
        assert case in done.stdout
    assert "PyTorch" in found["machine"]


def test_a_form_that_is_refused_has_no_figure():
    values = {"ordinary": 0.002, "keep": 0.5, "merge": 0.25}
    row = Row("PyTorch", "network", "one", values, values, values, 9)
    line = bsconv_inference.table([row]).splitlines()[-1]
    assert line == "| one | 2 ms | 0.50 ± 0.50 | 0.25 ± 0.25 | - |"


def test_a_quick_run_is_not_for_the_page(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bsconv_inference.py", "--quick", "--docs"])
    with pytest.raises(SystemExit, match="for a whole run, without --quick"):
        bsconv_inference.main()


def test_the_page_of_this_repository_has_its_marks():
    text = bsconv_inference.PAGE.read_text(encoding="utf-8")
    assert text.index(step_report.BEGIN) < text.index(step_report.END)
