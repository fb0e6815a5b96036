"""Write the page of all networks: their names, what each costs, and published accuracies.

Run: python docs/make_models.py
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import draw_models
from model_texts import INTRODUCTION, PLOTS, SECTIONS

from doconv_core import count
from doconv_core.atomic import write_text
from doconv_core.networks.families import FAMILIES, Family, enumerated
from doconv_core.networks.names import LISTED, list_models

DOCS = Path(__file__).parent
HEAD = ("network", "parameters", "FLOPs", "MACs")
DOCONV = "_doconv"
DOCONV_HEAD = (f"parameters, `{DOCONV}`", "MACs of composing")


class Published(NamedTuple):
    """Columns of published figures: their heads, and their cells by the network's name."""

    head: tuple[str, ...]
    cells: dict[str, tuple[str, ...]]


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a file of published figures."""
    with (DOCS / "data" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def published() -> tuple[Published, ...]:
    """Return the published accuracies, on CIFAR100 and on ImageNet, in percent."""
    cifar = {row["model"]: (row["accuracy_percent"],) for row in read("bsconv_cifar100.csv")}
    imagenet = {
        row["model"]: (
            row["reference_percent"],
            row["baseline_percent"],
            str(Decimal(row["baseline_percent"]) + Decimal(row["gain_percent"])),
        )
        for row in read("doconv_imagenet.csv")
    }
    return (
        Published(("accuracy [%]",), cifar),
        Published(("reference [%]", "baseline [%]", "DO-Conv [%]"), imagenet),
    )


def page() -> str:
    """Return the page, in Markdown. Raises KeyError for a family that no section tells of."""
    families = {family.usual[0]: family for family in FAMILIES}
    figures = published()
    parts = [INTRODUCTION, PLOTS]
    for section in SECTIONS:
        parts += [f"## {section.title}\n", section.text]
        for first in section.families:
            parts += _family(families.pop(first), figures)
    if families:
        raise KeyError(f"no section of docs/model_texts.py has the families of {[*families]}")
    return "\n".join(parts)


def _family(family: Family, figures: Iterable[Published]) -> Iterator[str]:
    """Yield what a family is for, its names, and its table, with the figures that it has any of."""
    classes, shape = family.dataset
    names = names_of(family)
    figures = [each for each in figures if not each.cells.keys().isdisjoint(names)]
    suffixes = enumerated(f"`{suffix}`" for suffix in (*LISTED[family.variants], DOCONV))
    yield (
        f"{'×'.join(map(str, shape))}, {classes:,} classes: {compact(family.usual)}, also with "
        f"{suffixes} behind.\n"
    )
    head = [*HEAD, *DOCONV_HEAD, *(title for each in figures for title in each.head)]
    rows = [
        [f"`{name}`", *_costs(name), *(cell for each in figures for cell in _cells(each, name))]
        for name in names
    ]
    yield table(head, rows)


def names_of(family: Family) -> list[str]:
    """Return the names that are listed, but for those of DO-Conv, which have a plain one's row."""
    return [name + suffix for suffix in ("", *LISTED[family.variants]) for name in family.usual]


def compact(names: Sequence[str]) -> str:
    """Return the names in one, such as `resnet{10,18}`, where they differ by numbers alone."""
    start = commonprefix(names).rstrip("0123456789.")  # noqa: RUF071  # names are no paths
    rests = [name.removeprefix(start) for name in names]
    if len(names) == 1 or any(rest[0].isalpha() for rest in rests):
        return enumerated((f"`{name}`" for name in names), "and")
    return f"`{start}{{{','.join(rests)}}}`"


def _costs(name: str) -> list[str]:
    """Return what a network costs, and what DO-Conv adds to it in training, where it is listed."""
    found = count(name, None, None)
    cells = [found.parameters, found.flops, found.macs]
    if not list_models(name + DOCONV):
        return [*(f"{cell:,}" for cell in cells), "", ""]
    over = count(name + DOCONV, None, None)
    return [f"{cell:,}" for cell in (*cells, over.training_parameters, over.composition_macs)]


def _cells(figures: Published, name: str) -> tuple[str, ...]:
    return figures.cells.get(name, ("",) * len(figures.head))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, the first column to the left and the others to the right."""
    marks = [":-", *["-:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, marks, *rows))


def write(folder: Path) -> None:
    """Write `models.md` and its plots into a folder, each whole or not at all."""
    write_text(folder / "models.md", page())
    for amount in draw_models.AMOUNTS:
        draw_models.draw(read("bsconv_cifar100.csv"), amount, folder / f"models_{amount}.svg")


if __name__ == "__main__":
    write(DOCS)
