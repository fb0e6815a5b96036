"""Whole models: which layers are meant, what was done to them, and how far two outputs differ.

What the whole-model tools of every backend share. A layer's path is its names from the model's own
down, joined by dots; the model itself has the empty path.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

from numpy.typing import ArrayLike

from doconv_core.maths.numeric import Difference, difference

Where: TypeAlias = (
    "str | Iterable[str] | type | tuple[type, ...] | Callable[[str, Any], Any] | None"
)

# Why a convolution is left as it is, in the words that every backend uses. What one framework alone
# has is in that backend.
ONE_TAP = "one tap, nothing to over-parameterize"
NOT_SELECTED = "not selected by where"
ALREADY = "over-parameterized already"
SUBCLASS = "a subclass, which may compute something else"
TRANSPOSED = "a transposed convolution"
QUANTIZED = "quantized"
REPLACED = "its forward pass was replaced, and may compute something else"
COMPUTED = "its weight is computed, not a parameter of its own"
NOT_PLAIN = "its weight is not a plain parameter"
TIED = "it shares a weight with what is not over-parameterized alike"

# Why a batch norm is not fused.
NOT_DIRECT = "does not directly follow an ordinary convolution"
OUTPUT = "its convolution's output is used elsewhere too"
SEVERAL = "it or its convolution is used in several places"
SHARED = "its parameters, or its convolution's, are used elsewhere too"
HOOKED = "it or its convolution has hooks, which would see other values"
AXIS = "normalizes another axis than the convolution's channels"
NOT_FINITE = "the fused kernel would not be finite"


def behind(reason: str) -> str:
    """Return why a batch norm behind a convolution is left that is itself left for `reason`."""
    return f"the convolution before it is left as it is: {reason}"


def fused_into(kind: str) -> str:
    """Return what a batch norm has become that is now a part of a convolution of this kind."""
    return f"fused into {kind}"


def place(path: str) -> str:
    """Return how a message names the layer at `path`, be it the model itself."""
    return f"layer {path!r}" if path else "the model itself"


class Selection:
    """The answer to `where`: which layers a tool is to treat.

    where: None for all; a glob pattern on the path, or several of them, in which `*` matches any
    characters, dots too, and upper and lower case differ; a type of layer, or several; or a
    predicate on (path, layer). Raises TypeError for anything else.
    """

    def __init__(self, where: Where = None) -> None:
        self._patterns: tuple[str, ...] = ()
        self._matched: set[str] = set()
        self._asked: list[str] = []
        self._any = False
        self._test: Callable[[str, Any], Any]
        if isinstance(where, str):
            where = (where,)
        types: Any = (where,) if isinstance(where, type) else ()
        if _all(where, type):
            types = tuple(where)  # type: ignore[arg-type]
        if where is None:
            self._test = lambda path, layer: True
        elif types:
            self._test = lambda path, layer: isinstance(layer, types)
        elif callable(where):
            self._test = where
        elif not isinstance(where, (bytes, Mapping)) and isinstance(where, Iterable):
            self._patterns = tuple(where)  # type: ignore[arg-type]
            if not _all(self._patterns, str):
                raise _no_selection(where)
            self._test = self._match
        else:
            raise _no_selection(where)

    def __call__(self, path: str, layer: Any) -> bool:
        """Return whether this layer is meant. To be asked of every candidate, once."""
        selected = bool(self._test(path, layer))
        self._asked.append(path)
        self._any = self._any or selected
        return selected

    def _match(self, path: str, layer: Any) -> bool:
        matching = {p for p in self._patterns if fnmatchcase(path, p)}
        self._matched |= matching
        return bool(matching)

    def warn(self, kinds: str = "convolution", *, stacklevel: int = 3) -> None:
        """Warn, once every candidate has been asked, of a `where` that matched none of them.

        Of several patterns, each that matched nothing is named. kinds: what was asked about.
        stacklevel: as in `warnings.warn`; 3 is the caller of the function that calls this.
        """
        unmatched = [p for p in self._patterns if p not in self._matched]
        if not self._asked:
            message = f"the model has no {kinds} that could be replaced."
        elif unmatched:
            close = get_close_matches(unmatched[0].strip("*"), self._asked, 3, 0.3)
            message = (
                f"where matches no {kinds}: {_listed(unmatched)}; the model has {kinds}s such as "
                f"{_places(close or self._asked[:3])}."
            )
        elif not self._any:
            hint = _places(self._asked[:3])
            message = f"where selects none of the {len(self._asked)} {kinds}s, such as {hint}."
        else:
            return
        warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _all(values: Any, kind: type) -> bool:
    sequence = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    return sequence and all(isinstance(value, kind) for value in values)


def _no_selection(where: Any) -> TypeError:
    return TypeError(
        "where must be None, a glob pattern or several, a type of layer or several, or a "
        f"predicate on (path, layer); received where={where!r}."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _places(paths: Iterable[str]) -> str:
    return ", ".join(repr(path) if path else place(path) for path in paths)


class Change(NamedTuple):
    """A layer that was replaced. path: where it is. before, after: what it was and has become."""

    path: str
    before: str
    after: str


class Left(NamedTuple):
    """A layer that was left as it was. path: where it is. kind: what it is. reason: why."""

    path: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a whole-model tool did; `str` tells it.

    action: in one word, such as "over-parameterized". changed, left: the layers that it replaced
    and left, in the model's order. parameters_before, parameters_after: the model's parameters, as
    its framework counts them, each once.
    """

    action: str
    changed: tuple[Change, ...]
    left: tuple[Left, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        """Return the report to read: layers by what became of them, and the parameters."""
        before, after = self.parameters_before, self.parameters_after
        share = f" ({(after - before) / before:+.2%})" if before and after != before else ""
        lines = [
            f"{self.action} {_counted(len(self.changed))}, left {len(self.left)}; parameters: "
            f"{before:,} before, {after:,} after{share}"
        ]
        lines += grouped((f"{c.before} -> {c.after}", c.path) for c in self.changed)
        if self.left:
            lines.append("left as they were:")
            lines += grouped((f"{kind}: {reason}", path) for path, kind, reason in self.left)
        return "\n".join(lines)


def _counted(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def grouped(entries: Iterable[tuple[str, str]]) -> list[str]:
    """Return a report's lines for (heading, path): each heading once, with its paths below it."""
    groups: dict[str, list[str]] = {}
    for heading, path in entries:
        groups.setdefault(heading, []).append(path or "(the model itself)")
    lines = []
    for heading, paths in groups.items():
        lines.append(f"  {heading} ({len(paths)})")
        text = ", ".join(paths)
        lines.append(
            textwrap.fill(
                text, 100, initial_indent="    ", subsequent_indent="    ",
                break_long_words=False, break_on_hyphens=False,
            )
        )  # fmt: skip
    return lines


class Converted(NamedTuple):
    """What the whole-model tools return. model: the new one, or with `inplace` the one given."""

    model: Any
    report: Report


def largest_difference(
    found: Mapping[str, ArrayLike], expected: Mapping[str, ArrayLike]
) -> Difference:
    """Return the largest absolute and the largest relative `difference` of a model's outputs.

    found, expected: arrays by their place in the output. The two maxima may be of different arrays.
    Raises ValueError where the places or the shapes differ.
    """
    if found.keys() != expected.keys():
        raise ValueError(
            f"the outputs have different structures: {_listed(found)} and {_listed(expected)}."
        )
    if not found:
        raise ValueError("the outputs hold no arrays, so that there is nothing to compare.")
    differences = []
    for place, array in found.items():
        try:
            differences.append(difference(array, expected[place]))
        except ValueError as error:
            raise ValueError(f"output {place!r}: {error}" if place else str(error)) from None
    return Difference(*(max(values) for values in zip(*differences, strict=True)))
