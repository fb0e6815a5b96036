"""Compare what is over-parameterized, or has another kind of convolution, with what is not.

Run: python benchmarks/evidence.py --data-dir D --out DIR [--processes 2] [--only GLOB]

Small networks on images that come inside packages, baseline against DO-Conv and other kinds over
30 paired seeds: a few hours of two cores. It goes on with what DIR has; several processes, on
other machines too, may work in one DIR. Every study has its page in DIR/NAME/study.html.

Before, once: --tune, which tunes the learning rate of each baseline on a part of its training
images, and writes `docs/evidence_rates.json`. --left tells what is not yet run, and how long it
takes; --summary prints the tables, and --docs puts them into `docs/evidence.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import evidence_sets
import kinds_table
import numpy as np
from evidence_studies import CLASSES, Planned, baselines, planned, tuning
from step_report import DOCS

from doconv_core.atomic import write_json, write_text
from doconv_core.training import study as studies
from doconv_core.training.data import ImageData, as_data
from doconv_core.training.session import RunEnded
from doconv_core.training.sharing import run_shared
from doconv_core.training.study_page import costs, results, write

RATES = DOCS / "evidence_rates.json"
PAGE = DOCS / "evidence.md"
HELD_OUT = 5  # every how-manyth training image is held out where rates are tuned
COMPARED = (
    "baseline [%]", "DO-Conv [%]", "gain [points]", "wins", "training loss of the baseline's",
    "epochs to its loss",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the options ask for. Raises SystemExit with a message where something is missing."""
    options = _options(arguments)
    try:
        chosen = _chosen(options)
        if options.left:
            _print_left(chosen, options.out)
        elif options.summary or options.docs:
            _tell(chosen, options)
        elif options.processes > 1:
            _share(options)
        else:
            _run(chosen, options)
    except (OSError, ValueError, RunEnded) as error:
        sys.exit(f"evidence: {error}")
    if options.tune and not (options.left or options.one_of_several):
        _write_rates(options)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    gets = "\n".join(f"  {name}: {one.get}" for name, one in evidence_sets.SETS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"files of the data folder; sets whose files are missing are left out:\n{gets}",
    )  # fmt: skip
    parser.add_argument("--data-dir", type=Path, help="where the packages' files were put")
    parser.add_argument("--out", type=Path, default=Path("results/evidence"), help="%(default)s")
    parser.add_argument("--only", default="*", metavar="GLOB", help="studies whose names match")
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument("--tune", action="store_true", help="tune the baselines' rates")
    parser.add_argument("--left", action="store_true", help="tell what is left")
    parser.add_argument("--summary", action="store_true", help="print the tables")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/evidence.md")
    parser.add_argument("--one-of-several", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _chosen(options: argparse.Namespace) -> list[Planned]:
    """Return the studies that are asked for and whose images are there."""
    if options.tune:
        every = [tuning(name) for name in baselines()]
    elif RATES.exists():
        told = json.loads(RATES.read_text(encoding="utf-8"))
        missing = [name for name in baselines() if name not in told]
        if missing:
            raise ValueError(f"{RATES} lacks {', '.join(missing)}; make it with --tune.")
        every = planned({name: entry["rate"] for name, entry in told.items()})
    else:
        raise ValueError(f"{RATES} is missing; make it with --tune.")
    chosen = [each for each in every if fnmatchcase(each.key, options.only)]
    if not chosen:
        names = ", ".join(each.key for each in every)
        raise ValueError(f"no study matches {options.only!r}; there are {names}.")
    there = set()
    for name in sorted({each.images for each in chosen}):
        try:
            evidence_sets.load(name, options.data_dir or Path())
            there.add(name)
        except FileNotFoundError as error:
            print(f"left out: {error}", file=sys.stderr)
    return [each for each in chosen if each.images in there]


def _run(chosen: Iterable[Planned], options: argparse.Namespace) -> None:
    """Do the studies one after the other, in this process."""
    loaded: dict[tuple[str, int], ImageData] = {}
    for each in chosen:
        folder = options.out / each.key
        studies.begin(folder, each.study)
        if not studies.left(folder, each.study)[0]:
            continue
        images = each.images, each.size
        if images not in loaded:
            loaded[images] = _data(each, options)
        train = studies.trainer(each.study, loaded[images])
        studies.work(folder, each.study, train, partial(_say, each.key))
        write(folder, each.study)


def _say(key: str, text: str) -> None:
    studies.print_line(f"{key} {text}")


def _share(options: argparse.Namespace) -> None:
    """Do the studies in several processes. Raises SystemExit where one of them fails."""
    command = [sys.executable, __file__, "--out", str(options.out), "--only", options.only]
    command += ["--data-dir", str(options.data_dir)] if options.data_dir else []
    command += ["--tune"] if options.tune else []
    codes = run_shared([*command, "--one-of-several"], options.processes)
    if any(codes):
        sys.exit(f"evidence: {sum(map(bool, codes))} of {len(codes)} processes failed; see above.")


def _data(each: Planned, options: argparse.Namespace) -> ImageData:
    """Return a study's images; where rates are tuned, parts of those to train with."""
    train, val = evidence_sets.load(each.images, options.data_dir or Path())
    if options.tune:
        held = np.arange(len(train.labels)) % HELD_OUT == 0
        val, train = train.rows(held), train.rows(~held)
    classes = tuple(map(str, range(CLASSES)))
    return as_data((train.sized(each.size), val.sized(each.size)), classes=classes)


def _print_left(chosen: Iterable[Planned], out: Path) -> None:
    total = 0.0
    for each in chosen:
        runs, seconds = studies.left(out / each.key, each.study)
        total += 0 if math.isnan(seconds) else seconds
        if runs:
            print(f"{each.key}: {runs} runs, {seconds / 60:.1f} minutes of one process")
    print(f"in all at least {total / 60:.1f} minutes of one process")


def _write_rates(options: argparse.Namespace) -> None:
    """Write down each baseline's best rate: by top-1 on what was held out, then by the loss."""
    told = json.loads(RATES.read_text(encoding="utf-8")) if RATES.exists() else {}
    for name in baselines():
        each = tuning(name)
        folder = options.out / each.key
        if not (folder / studies.PLAN).exists() or studies.left(folder, each.study)[0]:
            continue
        tried = {}
        for arm in studies.findings(folder, each.study)["arms"]:
            measures = arm["measures"]
            if not arm["failed"]:
                ends = measures[studies.ACCURACY]["mean"], measures[studies.EVAL_LOSS]["mean"]
                tried[float(arm["name"])] = ends
        best = max(tried, key=lambda rate: (tried[rate][0], -tried[rate][1]))
        shares = {f"{rate:g}": round(share, 4) for rate, (share, _) in tried.items()}
        told[name] = {"rate": best, "top1": shares}
    write_json(RATES, told)
    print(f"{RATES}: {len(told)} of {len(baselines())} rates")


def _tell(chosen: Sequence[Planned], options: argparse.Namespace) -> None:
    """Print the tables, or put them into the document, each between its two marks."""
    found = [
        (each, studies.findings(options.out / each.key, each.study))
        for each in chosen
        if (options.out / each.key / studies.PLAN).exists()
        and not (options.docs and studies.left(options.out / each.key, each.study)[0])
    ]
    missing = [each.key for each in chosen if each not in [known for known, _ in found]]
    tables = {
        "tutorials": _compared(found, "tutorials"),
        "gentler": _compared(found, "gentler"),
        "small": _compared(found, "small"),
        "decay": _whole(found, "decay"),
        "kinds": _whole(found, "kinds"),
        "rules": _whole(found, "rules"),
        "gentler rules": _whole(found, "gentler rules"),
        "rates": _rates(),
        "missing": f"Not finished yet: {', '.join(missing)}." if missing else "All are finished.",
    }
    if options.docs:
        text = PAGE.read_text(encoding="utf-8")
        for name, table in tables.items():
            text = put(text, name, table)
        write_text(PAGE, text)
        write_json(kinds_table.STUDY, _gains(found))
        kinds_table.write()
        return
    for name, table in tables.items():
        print(f"## {name}\n\n{table}\n")


def put(text: str, name: str, table: str) -> str:
    """Return a document's text with a table between the two marks of this name."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{PAGE} has no marks {begin} and {end}.")
    return f"{before}{begin}\n{table}\n{end}{after}"


def _compared(found: Sequence[tuple[Planned, Mapping[str, Any]]], section: str) -> str:
    """Return a table with a row for each comparison, and a sentence on what they tell together."""
    rows, verdicts = [], []
    for each, told in found:
        if each.section != section:
            continue
        base, over = results(told)
        rows.append(
            [told["data"], base[0], told["backend"], base[2], over[2], *over[3:5], *over[7:]]
        )
        gain = told["arms"][1]["against"]
        verdicts.append((gain[studies.ACCURACY], gain["train_loss_ratio"]))
    head = ("images", "network", "backend", *COMPARED)
    return f"{_markdown(head, rows, 3)}\n{_verdict(verdicts)}"


def _verdict(verdicts: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """Return in how many comparisons the interval lies above zero, and below."""
    known = [(gain, ratio) for gain, ratio in verdicts if gain["low"] is not None]
    above = sum(gain["low"] > 0 for gain, _ in known)
    below = sum(gain["high"] < 0 for gain, _ in known)
    faster = sum(ratio["high"] is not None and ratio["high"] < 1 for _, ratio in known)
    slower = sum(ratio["low"] is not None and ratio["low"] > 1 for _, ratio in known)
    return (
        f"Of {len(known)} comparisons, the gain's interval lies above zero in {above} and below in "
        f"{below}; the training loss is lower with DO-Conv beyond its interval in {faster}, and "
        f"higher in {slower}."
    )


def _gains(found: Sequence[tuple[Planned, Mapping[str, Any]]]) -> dict[str, str]:
    """Return what each rule gains on each set of images, in points, by the rule's name."""
    gains: dict[str, list[str]] = {}
    for each, told in found:
        if each.section not in ("rules", "gentler rules"):
            continue
        where = f"{each.images}{', a quarter of the rate' if each.section != 'rules' else ''}"
        for arm, row in zip(told["arms"], results(told), strict=True):
            if arm["against"] is not None:
                gains.setdefault(arm["name"], []).append(f"{row[3]} ({where})")
    return {name: "; ".join(texts) for name, texts in gains.items()}


def _whole(found: Sequence[tuple[Planned, Mapping[str, Any]]], section: str) -> str:
    """Return the results and costs of each study of a section."""
    head = (
        "", "runs", "top-1 [%]", "gain [points]", "wins", "training loss",
        "of the baseline's", "epochs to its loss", "parameters, folded", "multiply-accumulates",
        "seconds of a run",
    )  # fmt: skip
    tables = []
    for each, told in found:
        if each.section == section:
            rows = [
                [*row[:5], *row[6:], cost[1], cost[3], cost[-1]]
                for row, cost in zip(results(told), costs(told), strict=True)
            ]
            tables.append(_markdown(head, rows, 1))
    return "\n".join(tables)


def _rates() -> str:
    """Return a table of the rates that were tried."""
    rows = []
    for name, entry in json.loads(RATES.read_text(encoding="utf-8")).items():
        tried = (f"{rate}: {100 * share:.1f}" for rate, share in entry["top1"].items())
        rows.append([name, f"{entry['rate']:g}", ", ".join(tried)])
    return _markdown(("baseline, images", "rate", "tried: top-1 [%] on what was held out"), rows, 1)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    marks = [":-"] * texts + ["-:"] * (len(head) - texts)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, marks, *rows))


if __name__ == "__main__":
    main()
