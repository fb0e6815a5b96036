"""What the command prints: tables for people, JSON for programs, a progress bar on a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any

import click

from doconv_core.cli.errors import one_line
from doconv_core.models.report import Report

GAP = 2  # spaces between columns
NARROWEST = 16  # to which a column of text is folded


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object. A number that is not finite, which JSON lacks, becomes null."""
    click.echo(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 1,
    err: bool = False,
) -> None:
    """Print rows of text under headings.

    text_columns: how many columns, from the left, hold text and may be folded where a terminal is
    narrow; the others hold numbers, at the right edge, and are never cut. Into a file or a pipe
    nothing is folded, and nothing but text is written. err: whether to print on stderr.
    """
    from rich.console import Console  # here, as half of a subcommand's start would be spent on it
    from rich.table import Table
    from rich.text import Text

    terminal = (sys.stderr if err else sys.stdout).isatty()
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    rows = [[one_line(cell) for cell in row] for row in rows]
    least = 0
    for index, heading in enumerate(headings):
        text = index < text_columns
        longest = max([len(heading), *(len(row[index]) for row in rows)])
        narrowest = min(longest, NARROWEST) if text and terminal else longest
        least += narrowest + GAP
        table.add_column(
            heading,
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=not text or not terminal,
            min_width=narrowest,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    written = StringIO()
    console = Console(file=written, force_terminal=terminal, width=None if terminal else 10_000)
    console.width = max(console.width, least)  # a terminal wraps a line that is longer than it
    console.print(table)
    for line in written.getvalue().splitlines():
        click.echo(line.rstrip(), err=err)


def print_report(report: Report) -> None:
    """Print what was done, as its `str` has it."""
    for line in str(report).splitlines():
        indented = len(line) - len(line.lstrip())
        click.echo(" " * indented + one_line(line))


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of the steps done and to do; a terminal shows them as a bar."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(count: int, noun: str) -> str:
    """Return "1 layer", "2 layers"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(numbers: Iterable[int]) -> str:
    """Return sizes as the command writes them: "3x3"."""
    return "x".join(map(str, numbers))


def number(value: int | None) -> str:
    """Return a number with its thousands apart; "?" for one that is not known."""
    return "?" if value is None else f"{value:,}"
