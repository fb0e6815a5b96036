"""Many cases in one test: every case runs, and all that fail are told."""

from __future__ import annotations

import functools
import inspect
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest


def one_test(function: Callable[..., None]) -> Callable[..., None]:
    """Make one test of all cases that the `parametrize` marks below this decorator describe.

    A case that fails does not keep the others from running; the message names each that failed.
    `tmp_path` is a folder for each case, and what a case does with `monkeypatch` is undone after
    it. No case may be skipped, as that would go unseen.
    """
    marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
    rest = [m for m in getattr(function, "pytestmark", []) if m.name != "parametrize"]
    if not marks:
        raise TypeError(f"{function.__name__} has no cases below @one_test.")
    cases = [list(_cases(*mark.args, **mark.kwargs)) for mark in marks]
    given = {name for group in cases for name in group[0][1]}

    @functools.wraps(function)
    def test(**fixtures: Any) -> None:
        failures: list[tuple[str, BaseException]] = []
        for i, parts in enumerate(itertools.product(*cases)):
            name = "-".join(part[0] for part in parts)
            arguments = {**fixtures, **{k: v for part in parts for k, v in part[1].items()}}
            try:
                _run(function, arguments, i)
            except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
                failures.append((name, error))
        if failures:
            told = "\n\n".join(f"[{name}] {_where(error)}" for name, error in failures)
            count = f"{len(failures)} of {i + 1} cases failed"
            raise AssertionError(f"{count}:\n\n{told}") from failures[0][1]

    parameters = inspect.signature(function).parameters.values()
    left = [p for p in parameters if p.name not in given]
    test.__signature__ = inspect.Signature(left)  # type: ignore[attr-defined]
    test.pytestmark = rest  # type: ignore[attr-defined]
    return test


def tail_but(values: Iterable[Any], *brief: Any) -> list[Any]:
    """Return a test's parameters, of which all but some are of the long tail."""
    return [v if v in brief else pytest.param(v, marks=pytest.mark.exhaustive) for v in values]


def refuses(call: Callable[[Any], Any], *cases: tuple[Any, type[Exception], str]) -> Any:
    """Return one test: what `call` is given in each case is refused by this error and message."""

    @one_test
    @pytest.mark.parametrize("case", cases, ids=lambda case: repr(case[0]))
    def test(case: tuple[Any, type[Exception], str]) -> None:
        given, error, message = case
        with pytest.raises(error, match=message):
            call(given)

    return test


def _run(function: Callable[..., None], arguments: dict[str, Any], number: int) -> None:
    if "tmp_path" in arguments:
        folder = arguments["tmp_path"] / str(number)
        folder.mkdir()
        arguments["tmp_path"] = folder
    if "monkeypatch" in arguments:
        with arguments["monkeypatch"].context() as arguments["monkeypatch"]:
            function(**arguments)
    else:
        function(**arguments)


def _cases(
    names: str | list[str] | tuple[str, ...], values: Any, *, ids: Any = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each case of a mark: its name, and its arguments by name."""
    names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    labels = list(ids) if ids is not None and not callable(ids) else None
    for i, value in enumerate(values):
        label = labels[i] if labels else None
        if isinstance(value, type(pytest.param())):
            if value.marks:
                raise TypeError("a case of one test has no marks of its own.")
            value, label = value.values if len(names) > 1 else value.values[0], value.id or label
        case = dict(zip(names, value if len(names) > 1 else [value], strict=True))
        if label is None:
            label = "-".join(map(str, map(ids or _name, case.values())))
        yield str(label), case


def _name(value: Any) -> str:
    return getattr(value, "__name__", None) or str(value)


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    last = "".join(traceback.format_exception_only(type(error), error)).rstrip()
    return f"{frame.filename}:{frame.lineno}: {last}"
