"""Compare DO-Conv in every framework that is here: with the core, and so with each other.

Runs the samples once and briefly, then gives one network, one canonical initial state and one
sequence of batches to each framework and to the NumPy core in float64; then another to the trainers
of each, by every recipe that has a name. Prints how far the frameworks' results lie from the
core's, writes `report.html`, and fails if a tolerance is exceeded.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever Keras' own settings say

import needed  # noqa: F401  # first, as it says what to install

# isort: split
import compare_core
import compare_files
import compare_recipes
import numpy as np
from compare_files import ComparisonError, Recorded
from compare_problem import ONE_PASS, TRAINED, Answer, Problem, make_problem
from compare_report import write_report
from tqdm import tqdm

from doconv_core import available_backends, difference, recipes

HERE = Path(__file__).parent


class Framework(NamedTuple):
    """How a framework is called, the module with its part of the comparison, and its sample.

    epochs: fewer than the sample's own, so that the table shows that it runs, not how well.
    """

    title: str
    package: str
    module: str
    sample: str
    epochs: int


FRAMEWORKS = {
    "torch": Framework("PyTorch", "torch", "compare_pt", "sample_pt", 60),
    "tf": Framework("Keras", "keras", "compare_tf", "sample_tf", 4),
    "mx": Framework("MXNet", "mxnet", "compare_mx", "sample_gluoncv", 8),
}


class Row(NamedTuple):
    """One line of the table: what a framework's result is, and how far from the core's it lies."""

    framework: str
    result: str
    absolute: float
    relative: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance. A NaN is not."""
        return self.relative <= self.allowed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison. Raises SystemExit, with 0 where every result is within its tolerance."""
    options = parse_options(arguments)
    try:
        problem = make_problem()
        recorded = [r for file in options.with_ for r in compare_files.read(file, problem)]
        passed = run(options, problem, recorded)
    except (ComparisonError, OSError) as error:
        sys.exit(f"compare: {error}")
    except KeyboardInterrupt:
        print("\ncompare: interrupted; no report was written.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0 if passed else 1)


def run(options: argparse.Namespace, problem: Problem, recorded: list[Recorded]) -> bool:
    """Run the samples and the comparison, write the files, and return whether all is well."""
    here = frameworks_here()
    if not here and not recorded:
        raise ComparisonError("no framework is installed here; install one, or give files --with.")
    # In a folder of their own, so that results of the samples' full runs are not overwritten.
    samples = run_samples(here, options.out / "brief") if options.samples else {}
    core = compare_core.run(problem, steps("NumPy core", problem))
    given = len(recorded)
    titles = {
        name: f"{f.title} {importlib.metadata.version(f.package)}" for name, f in here.items()
    }
    for name, framework in here.items():
        module = importlib.import_module(framework.module)
        answer = module.run(problem, steps(framework.title, problem))
        recorded.append(Recorded(name, titles[name], answer))
    itself = difference(core.folded_output, core.output)
    rows = [Row("NumPy core, float64", "folded output", *itself, ONE_PASS)]
    rows += [row for record in recorded for row in compare(record, core)]
    rows += by_recipe(titles)
    print("\n" + table(rows) + "\n")
    report = options.out / "report.html"
    write_report(report, rows, core, recorded, samples)
    print(f"Report: {report}")
    if options.save:
        compare_files.write(options.save, problem, recorded[given:])
        print(f"Saved: {options.save}")
    passed = all(row.passed for row in rows)
    print("All results are within their tolerances." if passed else "A tolerance is EXCEEDED.")
    return passed


def frameworks_here() -> dict[str, Framework]:
    """Return the frameworks that are installed and supported here, and print why others are not."""
    here = {}
    for name, backend in available_backends().items():
        if name not in FRAMEWORKS:
            print(f"{name}: left out. It has no part in this comparison.")
            continue
        try:
            if name == "tf":
                importlib.import_module("quiet_tensorflow")
            backend.load()
        except (ImportError, OSError) as error:  # OSError: a framework's own library is broken
            print(f"{name}: left out. {error}")
        else:
            here[name] = FRAMEWORKS[name]
    return here


def run_samples(here: Mapping[str, Framework], out: Path) -> dict[str, Path]:
    """Run each framework's sample once, in a process of its own, and return their JSON files."""
    results = {}
    for framework in here.values():
        command = [sys.executable, str(HERE / f"{framework.sample}.py"), "--runs", "1"]
        command += ["--epochs", str(framework.epochs), "--out", str(out)]
        print(f"\n{framework.sample}.py --runs 1 --epochs {framework.epochs}", flush=True)
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise ComparisonError(f"{framework.sample}.py failed with exit code {done.returncode}.")
        results[framework.title] = out / f"{framework.sample}.json"
    print()
    return results


def steps(title: str, problem: Any) -> Any:
    """Return the steps of training to iterate over, with a progress bar on a terminal."""
    return tqdm(range(len(problem.labels)), desc=f"{title:10}", unit="step", disable=None)


def compare(record: Recorded, core: Answer) -> list[Row]:
    """Return how far each of a framework's results lies from the core's; of several, the worst."""
    answer, title = record.answer, record.title
    slopes = {"input": answer.input_gradient, **answer.gradients}
    expected = {"input": core.input_gradient, **core.gradients}
    return [
        Row(title, "output", *difference(answer.output, core.output), ONE_PASS),
        worst(title, "gradient", slopes, expected, ONE_PASS),
        Row(title, "folded output", *difference(answer.folded_output, core.output), ONE_PASS),
        of_losses(title, "loss, step by step", answer.losses, core.losses),
        worst(title, "folded after training", answer.folded, core.folded, TRAINED),
    ]  # fmt: skip


def by_recipe(titles: Mapping[str, str]) -> list[Row]:
    """Return how far the losses of each framework's trainer lie from the core's, by each recipe."""
    rows = []
    for name in tqdm(recipes() if titles else (), desc="By recipe ", unit="recipe", disable=None):
        problem = compare_recipes.make_problem(name)
        core = compare_recipes.core(problem)
        for backend, title in titles.items():
            losses, _ = compare_recipes.framework(backend, problem)
            rows.append(of_losses(title, f"loss by {name}", losses, core.losses))
    return sorted(rows, key=lambda row: list(titles.values()).index(row.framework))


def of_losses(title: str, result: str, found: np.ndarray, expected: np.ndarray) -> Row:
    """Return the row of the step whose loss lies the farthest from the core's."""
    curve = np.abs(found - expected)
    return Row(title, result, curve.max(), (curve / np.abs(expected)).max(), TRAINED)


def worst(
    title: str,
    result: str,
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    allowed: float,
) -> Row:
    """Return the row of the entry with the largest relative difference, which it names."""
    differences = {name: difference(found[name], expected[name]) for name in expected}
    # A NaN compares with nothing, and is the worst of all.
    name = max(differences, key=lambda name: np.nan_to_num(differences[name].relative, nan=np.inf))
    return Row(title, f"{result} (worst: {name})", *differences[name], allowed)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = ("framework", "result", "largest difference", "relative", "allowed", "")
    cells = [head] + [
        (
            row.framework,
            row.result,
            f"{row.absolute:.2e}",
            f"{row.relative:.2e}",
            f"{row.allowed:.0e}",
            "ok" if row.passed else "EXCEEDED",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    )


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; SystemExit says which of them is wrong."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__)
    add = parser.add_argument
    add(
        "--out", type=Path, default=Path("results"), help="folder for the report (default: results)"
    )
    add(
        "--save", type=Path, metavar="FILE",
        help="also write the results of the frameworks here to FILE, for --with elsewhere",
    )  # fmt: skip
    add(
        "--with", dest="with_", type=Path, metavar="FILE", nargs="+", default=[],
        help="also compare results that --save wrote in other environments",
    )  # fmt: skip
    add(
        "--samples", action=argparse.BooleanOptionalAction, default=True,
        help="run the samples first (default: yes)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.save and options.save.is_dir():
        parser.error(f"argument --save: {options.save} is a folder; name a file.")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is a file; name a folder.")
    return options


if __name__ == "__main__":
    main()
