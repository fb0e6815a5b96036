"""The documents do what they say: every Python example runs, and every link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import BACKENDS, need

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(document):
    return document.read_text(encoding="utf-8")


def examples(document):
    """Return the Python examples of a document, each a program of its own."""
    return re.findall(r"^```python\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


def packages(example):
    """Return the packages of this project that an example imports, without their prefix."""
    return set(re.findall(r"(?:from|import) doconv_(\w+)", example))


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, id=f"{document.stem}-{number}")
        for document in DOCUMENTS
        for number, example in enumerate(examples(document))
    ],
)
def test_examples_run(example, tmp_path):
    assert packages(example)
    for backend in packages(example) & set(BACKENDS):
        need(backend)
    assert "assert" in example  # it shows what it claims
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_links_lead_somewhere(document):
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (document.parent / link).exists(), link


def test_the_readme_shows_every_package():
    shown = set().union(*map(packages, examples(ROOT / "README.md")))
    assert shown == {"core", *BACKENDS}


def test_the_readme_shows_the_three_calls_in_every_backend():
    for backend in BACKENDS:
        text = "".join(e for e in examples(ROOT / "README.md") if backend in packages(e))
        for call in ("over_parameterize(", "fold(", "verify("):
            assert call in text, (backend, call)


def test_the_two_commands_are_in_the_readme_once():
    lines = text_of(ROOT / "README.md").splitlines()
    for extras, then in (("all", "python samples/compare.py"), ("all,test", "pytest")):
        line = f'python -m pip install -c constraints.txt -e ".[{extras}]" && {then}'
        assert lines.count(line) == 1
