"""Run the recipes of `docs/after_folding.md`, and measure how far what they deploy lies from float.

Run: python benchmarks/after_folding.py [--docs] [--recipe TITLE …]

Runs each recipe whose packages are installed here: the code that the page shows. Prints the largest
difference from the folded network, relative to its largest output, how many images get the same
digit, and the size of the file; writes `results/after_folding.json`; with --docs puts the rows into
the page, where those of recipes that need another environment stay.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"  # whose models TFLite converts

import numpy as np
from step_report import BEGIN, DOCS, END, put

from doconv_core import difference
from doconv_core.atomic import write_json

PAGE = DOCS / "after_folding.md"
HEAD = "| recipe | versions | largest difference | same digit | file |\n|-|-|-|-|-|"
# The packages whose versions a row names, of those that its programs import.
TOLD = ("torch", "keras", "tensorflow", "torchao", "onnxruntime", "openvino", "executorch",
        "coremltools")  # fmt: skip


class Recipe(NamedTuple):
    """A recipe of the page: the program that trains its network, and the one that goes on."""

    title: str
    network: str
    program: str

    @property
    def imports(self) -> list[str]:
        """The packages that both programs import, in their order."""
        found = re.findall(r"^(?:from|import) (\w+)", self.network + self.program, re.MULTILINE)
        return list(dict.fromkeys(found))

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed here."""
        return [name for name in self.imports if find_spec(name) is None]


class Row(NamedTuple):
    """What a recipe came to; relative and same are None where it is converted only."""

    title: str
    versions: list[str]
    relative: float | None
    same: int | None
    images: int
    size: int


def main() -> None:
    """Run, print and write."""
    options = _options()
    rows: list[Row] = []
    found = [recipe for recipe in recipes() if recipe.title in options.recipe]
    for network in dict.fromkeys(recipe.network for recipe in found):
        rows += measured([recipe for recipe in found if recipe.network == network])
    print("\n".join([HEAD, *map(line, rows)]))
    out = Path(options.out) / "after_folding.json"
    write_json(out, {"rows": [row._asdict() for row in rows]})
    print(f"Written: {out}")
    if options.docs:
        put(PAGE, merged(rows, PAGE.read_text(encoding="utf-8")))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="results", help="folder for the JSON file")
    titles = [recipe.title for recipe in recipes()]
    parser.add_argument("--recipe", nargs="+", choices=titles, default=titles, metavar="TITLE",
                        help="those to run (default: all)")  # fmt: skip
    parser.add_argument("--docs", action="store_true", help="write docs/after_folding.md's rows")
    return parser.parse_args()


def recipes(page: Path = PAGE) -> list[Recipe]:
    """Return the page's recipes, in its order; those of a section continue its first program."""
    found = []
    for section in page.read_text(encoding="utf-8").split("\n## ")[1:]:
        head, *parts = section.split("\n### ")
        for part in parts:
            (network,), (program,) = programs(head), programs(part)
            found.append(Recipe(part.partition("\n")[0], network, program))
    return found


def programs(text: str) -> list[str]:
    """Return a text's programs in Python."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def measured(chosen: list[Recipe]) -> Iterator[Row]:
    """Train the network that the recipes share, once, and yield the row of each that runs here."""
    here = [recipe for recipe in chosen if not recipe.missing]
    for recipe in chosen:
        if recipe.missing:
            print(f"{recipe.title}: left out, {', '.join(recipe.missing)} is not installed here.")
    names: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for n, recipe in enumerate(here):
            if n == 0:
                exec(compile(recipe.network, "network", "exec"), names)
            print(f"running {recipe.title}", file=sys.stderr, flush=True)
            own = dict(names)
            exec(compile(recipe.program, recipe.title, "exec"), own)
            yield _row(recipe, own)


def _row(recipe: Recipe, names: dict[str, Any]) -> Row:
    """Return what a recipe left: `deployed`, its outputs, unless it only converts; and `file`."""
    distributions = packages_distributions()
    told = [name for name in TOLD if name in recipe.imports]
    versions = [f"{name} {version(distributions[name][0])}" for name in told]
    file, expected, deployed = Path(names["file"]), names["expected"], names.get("deployed")
    size = _size(file) + (_size(file.with_suffix(".bin")) if file.suffix == ".xml" else 0)
    if deployed is None:
        return Row(recipe.title, versions, None, None, len(expected), size)
    same = int((np.argmax(deployed, 1) == np.argmax(expected, 1)).sum())
    relative = float(difference(deployed, expected).relative)
    return Row(recipe.title, versions, relative, same, len(expected), size)


def _size(file: Path) -> int:
    parts = file.rglob("*") if file.is_dir() else [file]
    return sum(part.stat().st_size for part in parts if part.is_file())


def line(row: Row) -> str:
    """Return a row of the table, in Markdown."""
    relative = "converted only" if row.relative is None else f"{row.relative:.1e}"
    same = "–" if row.same is None else f"{row.same} of {row.images}"
    size = f"{row.size / 1024:.0f} KiB"
    return f"| {row.title} | {', '.join(row.versions)} | {relative} | {same} | {size} |"


def merged(rows: list[Row], text: str) -> str:
    """Return the page's table with these rows, and its former ones of recipes that did not run."""
    before = text.partition(BEGIN)[2].partition(END)[0]
    lines = {row.split(" | ")[0].removeprefix("| "): row for row in before.split("\n")}
    lines |= {row.title: line(row) for row in rows}
    titles = [recipe.title for recipe in recipes()]
    return "\n".join([HEAD, *(lines[title] for title in titles if title in lines)])


if __name__ == "__main__":
    main()
