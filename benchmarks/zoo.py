"""Over-parameterize, train, fold and compare every network of three model zoos, and our own.

Writes a table, and beside it the same as JSON. What was not asked for this time keeps the rows it
had there. The exit status is 1 if there is a failure in the table that is not explained.

Run: python benchmarks/zoo.py
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tqdm import tqdm
from zoo_networks import ZOOS, Network
from zoo_row import Row
from zoo_table import document
from zoo_worker import tried

from doconv_core.atomic import write_json, write_text

OUT = Path(__file__).parents[1] / "docs" / "zoo.md"

Rows = dict[tuple[str, str], Row]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep, and return the exit status."""
    options = _parse(arguments)
    rows = _recorded(options.out)
    selected = {zoo: _selected(zoo, options, rows) for zoo in options.zoo or ZOOS}
    if not any(selected.values()) and not options.resume:
        print("No network has such a name.", file=sys.stderr)
        return 2
    try:
        _sweep(selected, rows, options.out)
    except KeyboardInterrupt:
        print("\nInterrupted; --resume goes on from here.", file=sys.stderr)
        return 130
    write_text(options.out, document(list(rows.values())))
    networks = {(zoo, n.name): n for zoo, found in ZOOS.items() for n in found}
    failed = [key for key, row in rows.items() if row.verdict(networks[key]) == "FAILED"]
    print(f"Written: {options.out}, {len(rows)} networks, {len(failed)} failures not explained.")
    for key in failed:
        print("Not explained:", *key, file=sys.stderr)
    return bool(failed)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\nRun")[0])
    parser.add_argument("--zoo", action="append", choices=list(ZOOS), help="this zoo (repeatable)")
    parser.add_argument("--only", action="append", metavar="GLOB", help="names like this (same)")
    parser.add_argument("--quick", action="store_true", help="the quick selection")
    parser.add_argument("--resume", action="store_true", help="only what has no row yet")
    parser.add_argument("--out", type=Path, default=OUT, help="the table (default: docs/zoo.md)")
    return parser.parse_args(arguments)


def _selected(zoo: str, options: argparse.Namespace, rows: Rows) -> list[Network]:
    return [
        network
        for network in ZOOS[zoo]
        if (network.quick or not options.quick)
        and any(fnmatchcase(network.name, pattern) for pattern in options.only or ["*"])
        and not (options.resume and (zoo, network.name) in rows)
    ]


def _sweep(selected: dict[str, list[Network]], rows: Rows, out: Path) -> None:
    """Try the networks; add a row for each to `rows`, and to the JSON file as soon as it is there.

    A bar shows the progress on a terminal, where `disable=None` leaves it on.
    """
    with tqdm(total=sum(map(len, selected.values())), disable=None, unit="network") as bar:
        for zoo, networks in selected.items():
            found = tried(zoo, networks)
            for network in networks:
                bar.set_description(f"{zoo} {network.name}")
                row = rows[zoo, network.name] = next(found)
                write_json(out.with_suffix(".json"), [row.record() for row in rows.values()])
                bar.update()
                line = f"{row.seconds:6.1f} s  {row.verdict(network):9} {zoo} {network.name}"
                bar.write("\n    ".join([line, *row.problems]))


def _recorded(out: Path) -> Rows:
    """Return the rows of earlier runs, of networks that are still in the lists."""
    path = out.with_suffix(".json")
    if not path.exists():
        return {}
    names = {(zoo, network.name) for zoo, networks in ZOOS.items() for network in networks}
    rows = (Row(**record) for record in json.loads(path.read_text(encoding="utf-8")))
    return {(row.zoo, row.name): row for row in rows if (row.zoo, row.name) in names}


if __name__ == "__main__":
    sys.exit(main())
