"""The README does what it says: its examples run, and its two commands are there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import BACKENDS, need

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def package(example):
    """Return the package that an example is about."""
    return re.search(r"from (doconv_\w+) import", example).group(1)


def test_each_package_has_an_example():
    assert sorted(map(package, EXAMPLES)) == [
        "doconv_core",
        "doconv_mx",
        "doconv_tf",
        "doconv_torch",
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=package)
def test_examples_run(example, tmp_path):
    backend = package(example).removeprefix("doconv_")
    if backend in BACKENDS:
        need(backend)
        # Each trains, folds and checks: it must fail where folding changed anything.
        assert ".fold()" in example
    assert "assert" in example
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_two_commands_are_there_once():
    for extras, then in (("all", "python samples/compare.py"), ("all,test", "pytest")):
        line = f'python -m pip install -c constraints.txt -e ".[{extras}]" && {then}'
        assert README.splitlines().count(line) == 1


def test_files_that_the_readme_links_to_are_there():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
