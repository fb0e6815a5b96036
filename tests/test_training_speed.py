"""The benchmark of the trainer: that it runs, and what it prints; never a time."""

from __future__ import annotations

import pytest
import training
from frameworks import fresh, need


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", training.BACKENDS)
def test_a_quick_run(backend):
    need(backend)
    options = ["--quick", "--patience", "0.01", "--threads", "1"]
    done = fresh(training.__file__, "--backend", backend, *options)
    *_, row = done.stdout.splitlines()
    _, _, case, _, ratio, _ = (cell.strip() for cell in row.split("|"))
    assert case == training.QUICK[0].name
    assert float(ratio.split("**")[1]) > 0


def test_a_part_of_it_is_not_written_to_the_guide(monkeypatch):
    monkeypatch.setattr("sys.argv", ["training.py", "--docs", "--quick"])
    with pytest.raises(SystemExit, match="without --quick and --backend"):
        training.main()
