"""What is distributed, and under which name: the metadata, the wheels, an editable install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import compiled_alone
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NAME = "overconv"
TEXTS = ("*.py", "*.md", "*.toml", "*.txt", "*.cff")


def test_nothing_tells_to_install_the_strangers_distribution():
    folders = [
        *ROOT.glob("doconv_*"),
        *(ROOT / f for f in ("benchmarks", "docs", "samples", "tests")),
    ]
    files = [file for folder in folders for kind in TEXTS for file in folder.rglob(kind)]
    files += [file for kind in TEXTS for file in ROOT.glob(kind)]
    asked = re.compile(r"""pip install [^\n]*["' ]doconv\b(?!-)|version\(["']doconv""")
    assert [str(f) for f in files if asked.search(f.read_text(encoding="utf-8"))] == []


def test_the_metadata_has_links_that_lead_somewhere_on_an_index_page():
    found = metadata.metadata(NAME)
    assert found["Author"]
    assert all(", https://" in url for url in found.get_all("Project-URL"))
    assert found["Description-Content-Type"] == "text/markdown"
    text = found["Description"] or found.get_payload()
    assert "guide (docs/pytorch.md)" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert [link for link in links if not re.match("https://|#", link)] == []


def test_a_frameworks_extra_does_without_what_the_samples_need():
    asked = [Requirement(line) for line in metadata.requires(NAME)]

    def names(extra):
        return {r.name for r in asked if r.marker and r.marker.evaluate({"extra": extra})}

    samples = names("samples")
    assert samples == {"matplotlib", "scikit-learn", "tqdm"}
    for extra in ("torch", "tf", "mx"):
        assert names(extra).isdisjoint({*samples, NAME})


def test_the_citation_is_of_this_version_and_names_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == metadata.version(NAME)
    assert citation["authors"] == [{"name": metadata.metadata(NAME)["Author"]}]
    papers = {paper["url"].rpartition("/")[2] for paper in citation["references"]}
    assert papers == {"2006.12030", "2003.13549"}


COMPILED = ("_composition", "_skipping")
# In the place of each C source, which takes half a minute to compile.
MODULE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "NAME"};
PyMODINIT_FUNC PyInit_NAME(void) { return PyModule_Create(&definition); }
"""


@pytest.fixture
def tree(tmp_path):
    """Return a copy of what a distribution is built of, without what was built before."""
    copy = tmp_path / "tree"
    for folder in ROOT.glob("doconv_*"):
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in COMPILED:
        (copy / "doconv_torch" / f"{name}.c").write_text(MODULE.replace("NAME", name))
    return copy


def built(tree, out, call="build_wheel", **environment):
    """Return the wheel that a build makes of the tree, with the tools that are here."""
    code = f"from setuptools import build_meta; build_meta.{call}({str(out)!r})"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env={**os.environ, **environment},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.mark.exhaustive
def test_one_wheel_serves_every_python_of_a_platform(tree, tmp_path):
    if not (os.environ.get("CI") or shutil.which("cc")):
        pytest.skip("there is no C compiler")
    wheel = built(tree, tmp_path)
    assert re.fullmatch(rf"{NAME}-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    names = ZipFile(wheel).namelist()
    assert [name for name in names if Path(name).suffix in (".c", ".so", ".pyd")] == [
        f"doconv_torch/{name}.abi3.so" for name in COMPILED
    ]


@pytest.mark.exhaustive
def test_without_a_compiler_the_wheel_is_for_every_platform(tree, tmp_path):
    wheel = built(tree, tmp_path, CC="false")
    assert re.fullmatch(rf"{NAME}-[\d.]+-py3-none-any\.whl", wheel.name)
    names = ZipFile(wheel).namelist()
    assert {f"doconv_torch/{name}.pyi" for name in COMPILED} <= set(names)
    assert not [name for name in names if Path(name).suffix in (".c", ".so", ".pyd")]


@pytest.mark.exhaustive
def test_an_editable_install_is_a_path_which_type_checkers_follow(tree, tmp_path):
    wheel = ZipFile(built(tree, tmp_path, "build_editable", CC="false"))
    (path,) = [name for name in wheel.namelist() if name.endswith(".pth")]
    assert wheel.read(path).decode().strip() == str(tree)


@pytest.mark.parametrize("check", compiled_alone.CHECKS)
def test_what_is_compiled_is_alone_the_cores(check):
    try:
        file = check()
    except ModuleNotFoundError:
        if os.environ.get("CI") or shutil.which("cc"):
            raise
        pytest.skip("there is no C compiler")
    assert not os.environ.get("CI") or ".abi3." in file  # as it was just installed
