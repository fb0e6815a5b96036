"""What the subcommands take: options, and their small languages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import click

_SIZE = re.compile(r"[0-9]{1,9}(x[0-9]{1,9})*")
T = TypeVar("T")
KernelSizes: TypeAlias = Sequence[tuple[str, tuple[int, ...]]]


def parse_size(text: str, *, least: int = 1) -> tuple[int, ...] | None:
    """Return the integers of a size such as "3x3", all of at least `least`; None for others."""
    text = text.strip().lower()
    found = tuple(map(int, text.split("x"))) if _SIZE.fullmatch(text) else (-1,)
    return found if min(found) >= least else None


class SizeType(click.ParamType):  # type: ignore[type-arg]  # of newer versions
    """The type of an option such as `--input 224x224`: integers."""

    name = "size"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the integers."""
        found = parse_size(value)
        return found or self.fail(f"{value!r} is no size; write it as 3x3 or 224x224.", param, ctx)


class NumbersType(click.ParamType):  # type: ignore[type-arg]  # of newer versions
    """The type of an option such as `--stages 14-14-14`: integers, one for each stage."""

    name = "numbers"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the integers."""
        found = parse_size(value.replace("-", "x"))
        return found or self.fail(f"{value!r} is no list; write it as 14-14-14.", param, ctx)


class PatternType(click.ParamType):  # type: ignore[type-arg]  # of newer versions
    """The type of an option such as `--kernel-size conv1=3x3`: a glob pattern and a value.

    A value alone is for all layers. problem: what to say of a text of which `parse` makes nothing.
    """

    name = "pattern"

    def __init__(self, parse: Callable[[str], Any], problem: str) -> None:
        self._parse, self._problem = parse, problem

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Any]:
        """Return the pattern and the value."""
        pattern, _, text = value.rpartition("=")
        made = self._parse(text)
        if made is None:
            self.fail(f"{value!r} {self._problem}", param, ctx)
        return pattern or "*", made


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


class ChangeType(click.ParamType):  # type: ignore[type-arg]  # of newer versions
    """The type of an option such as `--set epochs=20`: a field and what it is to be."""

    name = "change"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Return both texts."""
        field, equals, text = value.partition("=")
        if not equals:
            self.fail(f"{value!r} changes nothing; write it as epochs=20.", param, ctx)
        return field.strip(), text


places_type = PatternType(
    _place,
    "gives no output size; write it as 'GLOB=56x56', or as 'GLOB=/4' for a quarter of the input's.",
)
flatten_option = click.option(
    "--flatten", "flattened", multiple=True, metavar="GLOB=CxHxW|no",
    type=PatternType(
        _image,
        "must end in the channels and size of what is flattened, as in 'fc=64x7x7', or in 'no' "
        "where nothing is.",
    ),
    help="Channels and size of the image that is flattened before a linear layer, or `no`, "
    "where one of the files is Keras', whose channels are last.",
)  # fmt: skip
kernel_size_option = click.option(
    "--kernel-size", "kernel_sizes", multiple=True, metavar="[GLOB=]SIZE",
    type=PatternType(parse_size, "gives no size; write it as 'GLOB=3x3', or 3x3 for all layers."),
    help="Kernel size of the layers that GLOB matches, such as 'layer1.*=3x3', where the file "
    "does not tell it. May be repeated; the first that matches counts.",
)  # fmt: skip
set_option = click.option(
    "--set", "changes", multiple=True, metavar="FIELD=VALUE", type=ChangeType(),
    help="Another value for a field of the recipe. May be repeated.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
force_option = click.option("--force", is_flag=True, help="Replace OUT where it exists.")
allow_option = click.option(
    "--allow", multiple=True, metavar="CLASS",
    help="A class of which a PyTorch file may have objects beside the model, such as "
    "package.module.Class. Making them runs its code. May be repeated.",
)  # fmt: skip
epsilon_option = click.option(
    "--epsilon", type=float, metavar="NUMBER",
    help="Of the batch norms in blocks of branches, where the file does not tell it; 1e-5 if not "
    "given, but for Keras' .weights.h5, which need it.",
)  # fmt: skip
source_argument = click.Path(exists=True, readable=True, path_type=Path)  # a folder is told later
target_argument = click.Path(readable=False, path_type=Path)  # `check_target` says why not


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


def literal(name: str) -> str:
    """Return the glob pattern that matches just this name."""
    return re.sub(r"([*?[])", r"[\1]", name)
