"""The documents do what they say: every Python example runs, and every link leads somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cases import one_test
from frameworks import BACKENDS, fresh, is_here

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
CONTINUED = "after_folding"  # whose programs go on from one another, in test_after_folding.py


def text_of(document):
    return document.read_text(encoding="utf-8")


def examples(document):
    """Return the Python examples of a document, each a program of its own."""
    return re.findall(r"^```python\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


def packages(example):
    """Return the packages of this project that an example imports, without their prefix."""
    return set(re.findall(r"(?:from|import) doconv_(\w+)", example))


# Runs the examples that it is given, one after the other, as programs of their own but for what
# they import, which takes the longest: each with its own names, in a folder of its own.
RUN = """
import json, os, sys, tempfile
for name, example in json.load(sys.stdin).items():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        os.chdir(folder)
        print("running", name, file=sys.stderr, flush=True)
        exec(compile(example, name, "exec"), {"__name__": "__main__"})
        os.chdir(sys.argv[1])
"""


def programs(groups):
    """Return the documents' examples of some groups, by name.

    Those of TensorFlow take as long as all others; whole: those of the guides' whole networks in
    Keras. The README has such a network; smaller ones are folded and exported alike.
    """

    def group_of(document, example):
        if "tf" not in packages(example):
            return "others"
        return "whole" if document != README and "keras.applications" in example else "tf"

    return {
        f"{document.stem}-{number}": example
        for document in DOCUMENTS
        if document.stem != CONTINUED
        for number, example in enumerate(examples(document))
        if group_of(document, example) in groups
    }


@pytest.mark.parametrize(
    "groups",
    [
        ["others"],
        pytest.param(["tf"], marks=pytest.mark.brief),
        pytest.param(["tf", "whole"], marks=pytest.mark.exhaustive),
    ],
    ids=" ".join,
)
def test_examples_run(groups, tmp_path):
    """The examples of some groups, in one process."""
    chosen = programs(groups)
    missing = [name for name in BACKENDS if not is_here(name)]
    chosen = {name: e for name, e in chosen.items() if packages(e).isdisjoint(missing)}
    for example in chosen.values():
        assert packages(example)
        assert "assert" in example  # it shows what it claims
    done = fresh("-c", RUN, tmp_path, input=json.dumps(chosen))
    assert re.findall("^running (.+)$", done.stderr, re.MULTILINE) == list(chosen)


@one_test
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_links_lead_somewhere(document):
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (document.parent / link).exists(), link


def test_the_readme_shows_every_package():
    shown = set().union(*map(packages, examples(README)))
    assert shown == {"core", *BACKENDS}


def test_the_readme_shows_the_three_calls_in_every_backend():
    for backend in BACKENDS:
        text = "".join(e for e in examples(README) if backend in packages(e))
        for call in ("over_parameterize(", "fold(", "verify("):
            assert call in text, (backend, call)


def test_the_two_commands_are_in_the_readme_once():
    lines = text_of(README).splitlines()
    for extras, then in (("all", "python samples/compare.py"), ("all,test", "pytest")):
        line = f'python -m pip install -c constraints.txt -e ".[{extras}]" && {then}'
        assert lines.count(line) == 1
