"""Pages without anything from elsewhere: their style, tables, and curves as SVG within them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from math import ceil, floor, isfinite, log10
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 460, 260, 56, 10, 34, 14  # of a plot, in pixels
COLOURS = ("#1f5fa8", "#c2571a", "#17803d", "#8a3fa0", "#a08000", "#00808a", "#b0305f", "#555")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left;
  vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.wide { overflow-x: auto; }
"""


class Curve(NamedTuple):
    """A measure after each epoch, and a band around it; None where there is no number.

    name: in the legend; none where it is "". low, high: of the band; empty where there is none.
    """

    name: str
    values: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    colour: str = COLOURS[0]


def document(title: str, parts: Iterable[str]) -> str:
    """Return a whole page. parts: of its body, in HTML.

    >>> "<title>A &amp; B</title>" in document("A & B", ["<h1>A &amp; B</h1>"])
    True
    """
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n"
        "</html>\n"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: bool = True) -> str:
    """Return a table of text; all columns but the first are of numbers, unless told otherwise.

    >>> "<tr><td>A</td><td>1</td></tr>" in table(("", "n"), [("A", "1")], numeric=False)
    True
    """
    marked = ' class="n"' if numeric else ""
    lines = []
    for tag, cells in (("th", headings), *(("td", row) for row in rows)):
        first, *others = map(escape, cells)
        more = "".join(f"<{tag}{marked}>{cell}</{tag}>" for cell in others)
        lines.append(f"<tr><{tag}>{first}</{tag}>{more}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def plot(
    title: str, curves: Sequence[Curve], text: Callable[[float], str], *, zero: bool = False
) -> str:
    """Return an SVG of curves over the epochs, with their bands. text: of a number at the axis.

    zero: whether zero is to be within the plot, and has a line of its own.

    >>> plot("loss", [Curve("", [2.0, 1.0])], str).count("polyline")
    1
    """
    rows = [row for curve in curves for row in (curve.values, curve.low, curve.high)]
    known = [value for row in rows for value in row if value is not None and isfinite(value)]
    low, high = _range([*known, 0.0] if zero else known)
    last = max(2, *(len(curve.values) for curve in curves))

    def at(epoch: int, value: float) -> tuple[float, float]:
        x = LEFT + (epoch - 1) / (last - 1) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    drawn = [_frame(title, last)]
    for tick in _ticks(low, high):
        y = at(1, tick)[1]
        drawn.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        drawn.append(_text(LEFT - 6, y + 4, text(tick), "end"))
    if zero:
        drawn.append(f'<path d="M{LEFT} {at(1, 0.0)[1]:.1f}H{WIDTH - RIGHT}" stroke="#222"/>')
    for curve in curves:
        points = [at(n, v) for n, v in enumerate(curve.values, 1) if v is not None]
        upper = [at(n, v) for n, v in enumerate(curve.high, 1) if v is not None]
        lower = [at(n, v) for n, v in enumerate(curve.low, 1) if v is not None]
        if upper and lower:
            band = _points([*upper, *reversed(lower)])
            drawn.append(f'<polygon points="{band}" fill="{curve.colour}" fill-opacity="0.15"/>')
        drawn.append(
            f'<polyline points="{_points(points)}" fill="none" stroke="{curve.colour}" '
            'stroke-width="2"/>'
        )
        if len(points) == 1:
            x, y = points[0]
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}"/>')
    named = [curve for curve in curves if curve.name]
    ends = [at(1, row[-1])[1] for row in (c.values for c in curves) if row and row[-1] is not None]
    is_high = bool(ends) and sum(ends) / len(ends) < (TOP + HEIGHT - BOTTOM) / 2
    first = HEIGHT - BOTTOM - 8 - 16 * (len(named) - 1) if is_high else TOP + 14
    for number, curve in enumerate(named):
        y = first + 16 * number  # where the curves do not end
        drawn.append(_text(WIDTH - RIGHT, y, curve.name, "end", curve.colour))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        return low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    return low, high


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers within a range: 1, 2 or 5 times a power of ten apart, a few of them."""
    least = (high - low) / 5
    power = 10.0 ** floor(log10(least))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= least)
    return [float(f"{step * n:.12g}") for n in range(ceil(low / step), floor(high / step) + 1)]


def _frame(title: str, last: int) -> str:
    """Return a plot's title, and the first and last epoch."""
    ends = ((1, "start", LEFT), (last, "end", WIDTH - RIGHT))
    drawn = [_text(x, HEIGHT - BOTTOM + 16, str(epoch), anchor) for epoch, anchor, x in ends]
    drawn.append(_text((LEFT + WIDTH) / 2, HEIGHT - 6, f"{title}, by epoch", "middle"))
    return "".join(drawn)


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#444") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="12" '
        f'font-family="system-ui, sans-serif" fill="{colour}">{escape(text)}</text>'
    )
