"""Which layers of a model a tool is to treat: the answer to `where`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from doconv_core.models.report import listed, place

Where: TypeAlias = (
    "str | Iterable[str] | type | tuple[type, ...] | Callable[[str, Any], Any] | None"
)


class Selection:
    """The answer to `where`: which layers a tool is to treat.

    where: None for all; a glob pattern on the path, or several of them, in which `*` matches any
    characters, dots too, and upper and lower case differ; a type of layer, or several; or a
    predicate on (path, layer). Raises TypeError for anything else.

    >>> selected = Selection("stages.*.conv?")
    >>> selected("stages.0.conv1", None), selected("stem.conv", None)
    (True, False)
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
            _check_predicate(where)
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
                f"where matches no {kinds}: {listed(unmatched)}; the model has {kinds}s such as "
                f"{_places(close or self._asked[:3])}."
            )
        elif not self._any:
            hint = _places(self._asked[:3])
            message = f"where selects none of the {len(self._asked)} {kinds}s, such as {hint}."
        else:
            return
        warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _check_predicate(where: Any) -> None:
    """Raise TypeError for what cannot be called with a path and a layer."""
    try:
        signature = inspect.signature(where)
    except (TypeError, ValueError):  # of what is not written in Python
        return
    try:
        signature.bind("path", object())
    except TypeError:
        raise TypeError(
            "where must be called with a path and a layer, as in where=lambda path, layer: "
            f"path.startswith('stage'); received one that takes {signature}."
        ) from None


def _all(values: Any, kind: type) -> bool:
    sequence = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    return sequence and all(isinstance(value, kind) for value in values)


def _no_selection(where: Any) -> TypeError:
    return TypeError(
        "where must be None, a glob pattern or several, a type of layer or several, or a "
        f"predicate on (path, layer); received where={where!r}."
    )


def _places(paths: Iterable[str]) -> str:
    return ", ".join(repr(path) if path else place(path) for path in paths)
