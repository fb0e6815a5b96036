"""The recipes of `docs/after_folding.md` run, in processes of their own; and what measures them."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import after_folding
import pytest
from after_folding import Recipe, Row
from frameworks import BACKENDS, fresh, need
from step_report import BEGIN, END

RECIPES = {recipe.title: recipe for recipe in after_folding.recipes()}
# In one process, as Core ML's converter imports TensorFlow too, which takes longest.
TOGETHER = {
    "torch, tf": ["int8 by PT2E", "int8 by ONNX Runtime", "OpenVINO", "Core ML", "TFLite int8"],
}
# It asks for NumPy 2, and so for an environment without MXNet, as CONTRIBUTING.md says.
APART = {"torch, executorch": ["ExecuTorch"]} if find_spec("executorch") else {}


def test_every_recipe_is_run_somewhere():
    titles = [title for chosen in TOGETHER.values() for title in chosen]
    assert sorted([*titles, "ExecuTorch"]) == sorted(RECIPES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("place", [*TOGETHER, *APART])
def test_recipes_deploy_the_folded_network(place, tmp_path):
    for framework in place.split(", "):
        if framework in BACKENDS:
            need(framework)
    titles = {**TOGETHER, **APART}[place]
    missing = {name for title in titles for name in RECIPES[title].missing}
    if missing and os.environ.get("CI"):
        pytest.fail(f"in CI every package must be there: {missing} missing")
    if missing:
        pytest.skip(f"{missing} missing")
    options = ["--out", tmp_path, "--recipe", *titles]
    fresh(after_folding.__file__, *options, environment={"CI": "true"})  # OpenVINO reports nothing
    found = json.loads((tmp_path / "after_folding.json").read_text())["rows"]
    assert [row["title"] for row in found] == titles
    for row in found:  # the programs themselves assert how near the outputs are
        assert row["size"] > 1000
        assert (row["relative"] is None) == (row["title"] == "Core ML")
    assert all(row["same"] is None or row["same"] > 470 for row in found)


def test_a_page_keeps_the_rows_of_recipes_that_did_not_run():
    kept = "| Core ML | coremltools 9 | converted only | – | 65 KiB |"
    page = f"{BEGIN}\n{after_folding.HEAD}\n{kept}\n| OpenVINO | openvino 0 |\n{END}"
    found = after_folding.merged([Row("OpenVINO", ["openvino 1"], 0.25, 3, 4, 2048)], page)
    row = "| OpenVINO | openvino 1 | 2.5e-01 | 3 of 4 | 2 KiB |"
    assert found == f"{after_folding.HEAD}\n{row}\n{kept}"  # in the page's order
    assert after_folding.line(Row("Core ML", ["coremltools 9"], None, None, 4, 66560)) == kept


def test_a_recipe_whose_package_is_missing_is_named(capsys):
    recipe = Recipe("one", "", "import no_such_package\n")
    assert list(after_folding.measured([recipe])) == []
    assert capsys.readouterr().out == "one: left out, no_such_package is not installed here.\n"


def test_sizes_count_every_file_of_a_package(tmp_path):
    (tmp_path / "a.mlpackage" / "b").mkdir(parents=True)
    (tmp_path / "a.mlpackage" / "b" / "c").write_bytes(bytes(7))
    (tmp_path / "a.bin").write_bytes(bytes(5))
    assert after_folding._size(Path(tmp_path / "a.mlpackage")) == 7
    assert after_folding._size(Path(tmp_path / "a.bin")) == 5
