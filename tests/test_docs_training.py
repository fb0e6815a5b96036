"""`docs/training.md`: every command line in it can be given, and the tables name what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from cases import one_test

from doconv_core import describe
from doconv_core.cli.evaluate import evaluate
from doconv_core.cli.train import Job, train
from doconv_core.training import run as runs
from doconv_core.training.data import DATA_SETS
from doconv_core.training.fields import FIELDS
from doconv_core.training.recipe import changed, default_recipe

TEXT = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
FLAGS = {flag for command in (train, evaluate) for option in command.params for flag in option.opts}


def lines():
    """Yield the arguments of each `doconv train` in a block for the shell."""
    for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            _, begin, rest = line.partition("doconv train ")
            _, module, others = line.partition("doconv_core.cli train ")
            if begin or module:
                yield shlex.split(rest or others, comments=True)


@one_test
@pytest.mark.parametrize("arguments", lines(), ids=" ".join)
def test_every_command_line_is_one(arguments):
    given = train.make_context("train", list(arguments)).params
    given.pop("out"), given.pop("force")
    if given.pop("resume"):
        return
    job = Job.of(given)
    assert job.data in DATA_SETS
    assert describe(job.network, **job.options)
    assert changed(default_recipe(job.network, job.data), dict(given["changes"]))


def test_the_tables_name_flags_and_fields_that_there_are():
    rows = re.findall(r"^\| `.*\|$", TEXT.partition("## The scripts")[2], re.MULTILINE)
    assert len(rows) > 50
    for row in rows:
        here = row.replace(r"\|", "/").split("|")[2]
        assert set(re.findall(r"--[a-z-]+", here)) <= FLAGS | {"--nproc-per-node", "--warmup-lr"}
        assert set(re.findall(r"--set (\w+)=", here)) <= FIELDS.keys(), here


def test_the_data_and_the_files_of_a_run_are_told():
    data = TEXT.partition("## Data")[2].partition("## ")[0]
    assert all(f"`{name}`" in data for name in DATA_SETS)
    files = TEXT.partition("## What is in the folder")[2].partition("## ")[0]
    names = (runs.DESCRIBED, runs.METRICS, runs.EVENTS, runs.RESULT, runs.REPORT, runs.STATE,
             runs.POSITION)  # fmt: skip
    assert all(f"`{name}`" in files for name in names)
