"""The small languages of the command line: sizes, and sizes for the layers that a pattern matches.

The functions that end in `_option` are callbacks of click's options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeAlias, TypeVar

import click

_SIZE = re.compile(r"[0-9]{1,9}(x[0-9]{1,9})*")
T = TypeVar("T")
KernelSizes: TypeAlias = Sequence[tuple[str, tuple[int, ...]]]


def parse_size(text: str, *, least: int = 1) -> tuple[int, ...] | None:
    """Return the integers of a size such as "3x3", all of at least `least`; None for others."""
    text = text.strip().lower()
    found = tuple(map(int, text.split("x"))) if _SIZE.fullmatch(text) else (-1,)
    return found if min(found) >= least else None


def size_option(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Return the integers of an option such as `--input 224x224`."""
    if value is None:
        return None
    found = parse_size(value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no size; write it as 3x3 or 224x224.", ctx, param)
    return found


def by_pattern(
    parse: Callable[[str], T | None], problem: str
) -> Callable[[click.Context, click.Parameter, Sequence[str]], list[tuple[str, T]]]:
    """Return the callback of an option such as `--kernel-size conv1=3x3`: a pattern and a value.

    A value alone is for all layers. problem: what to say of a text of which `parse` makes nothing.
    """

    def parsed(
        ctx: click.Context, param: click.Parameter, values: Sequence[str]
    ) -> list[tuple[str, T]]:
        found = []
        for value in values:
            pattern, _, text = value.rpartition("=")
            made = parse(text)
            if made is None:
                raise click.BadParameter(f"{value!r} {problem}", ctx, param)
            found.append((pattern or "*", made))
        return found

    return parsed


class Place(NamedTuple):
    """The size of a layer's output: absolute, or the input's divided by `divisor`, rounded up."""

    size: tuple[int, ...] = ()
    divisor: int = 0

    def of(self, input_size: tuple[int, ...] | None) -> tuple[int, ...]:
        """Return the size. Raises ValueError where it is relative, and there is no input size."""
        if not self.divisor:
            return self.size
        if input_size is None:
            raise ValueError(f"/{self.divisor} is relative to the input; give --input, too.")
        return tuple(-(-n // self.divisor) for n in input_size)


def _place(text: str) -> Place | None:
    size, relative = parse_size(text.removeprefix("/")), text.startswith("/")
    if size is None or (relative and len(size) > 1):
        return None
    return Place(divisor=size[0]) if relative else Place(size)


def _image(text: str) -> tuple[int, ...] | None:
    size = () if text == "no" else parse_size(text)
    return None if size is None or len(size) == 1 else size


sizes_option = by_pattern(
    parse_size, "gives no size; write it as 'GLOB=3x3', or 3x3 for all layers."
)
places_option = by_pattern(
    _place,
    "gives no output size; write it as 'GLOB=56x56', or as 'GLOB=/4' for a quarter of the input's.",
)
flatten_option = click.option(
    "--flatten", "flattened", multiple=True, metavar="GLOB=CxHxW|no",
    callback=by_pattern(
        _image,
        "must end in the channels and size of what is flattened, as in 'fc=64x7x7', or in 'no' "
        "where nothing is.",
    ),
    help="Channels and size of the image that is flattened before a linear layer, or `no`, "
    "where one of the files is Keras', whose channels are last.",
)  # fmt: skip


def matching(path: str, entries: Sequence[tuple[str, T]]) -> T | None:
    """Return the value of the last pattern that matches `path`; None where none does."""
    found = None
    for pattern, value in entries:
        if fnmatchcase(path, pattern):
            found = value
    return found


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches any of these glob patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
