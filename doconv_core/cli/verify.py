"""`doconv verify`: whether two checkpoints compute with the same kernels, and where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from doconv_core.cli.checkpoints import (
    json_option,
    kernel_size_option,
    literal,
    opened,
    require_kernel_sizes,
    source_argument,
)
from doconv_core.cli.compare import Compared, compare
from doconv_core.cli.contents import Contents
from doconv_core.cli.errors import DIFFERENT, one_line
from doconv_core.cli.flattening import (
    Sizes,
    features_of,
)
from doconv_core.cli.output import counted, print_json, print_table, progress, size
from doconv_core.cli.pairing import pair_by_name, pair_by_order
from doconv_core.cli.parse import KernelSizes, flatten_option
from doconv_core.files.checkpoint import open_checkpoint
from doconv_core.files.layers import Layer
from doconv_core.state.flattening import image_size


@click.command(short_help="Compare two checkpoints, kernel by kernel.")
@click.argument("first", metavar="A", type=source_argument)
@click.argument("second", metavar="B", type=source_argument)
@click.option(
    "--match", type=click.Choice(["name", "order"]), default="name", show_default=True,
    help="How layers are paired.",
)  # fmt: skip
@click.option(
    "--tolerance", type=click.FloatRange(min=0), metavar="R",
    help="What difference counts as none, relative to the largest entry of B's array. If it is not "
    "given, arrays that both files hold must be the same exactly, and kernels that are composed on "
    "the way up to 16 roundings of the coarser type.",
)  # fmt: skip
@click.option("--all", "show_all", is_flag=True, help="List the arrays that are equal, too.")
@flatten_option
@kernel_size_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    first: Path,
    second: Path,
    match: str,
    tolerance: float | None,
    show_all: bool,
    flattened: Sizes,
    kernel_sizes: KernelSizes,
    as_json: bool,
) -> None:
    """Compare A and B: the kernels, folded on the way where they are not, and all other arrays.

    Exits with 0 where they are equal, with 1 where they are not. Files of different frameworks are
    compared in one order of axes.

    \b
    Examples:
      doconv verify model.pt folded.pt
      doconv verify model.pt other.params --match order --tolerance 1e-6
    """  # noqa: D301
    with ExitStack() as stack:
        a, b = _open(stack, first, second, kernel_sizes)
        compared: list[Compared] = []
        missing: list[str] = []
        if match == "name":
            paired = pair_by_name(a.layers, b.layers)
        else:
            paired = pair_by_order(a, a.layers, b, b.layers)
            if paired.different is not None:
                missing.append(f"{paired.different[1]}; no more layers were compared")
        missing += [
            f"{entry} is in {file.path} only"
            for file, layers in ((a, paired.first), (b, paired.second))
            for layer in layers
            for entry in layer.entries.values()
        ]
        images = [*_known_images(a, b, paired.both), *flattened]
        with progress("comparing") as step:
            for number, (left, right) in enumerate(paired.both):
                step(number, len(paired.both))
                for found in compare(a, left, b, right, tolerance, images):
                    missing.append(found) if isinstance(found, str) else compared.append(found)
    equal = not missing and all(found.equal for found in compared)
    if as_json:
        print_json(_as_object(first, second, equal, compared, missing))
    else:
        _print(equal, compared, missing, show_all)
    if not equal:
        ctx.exit(DIFFERENT)


def _open(
    stack: ExitStack, first: Path, second: Path, kernel_sizes: KernelSizes
) -> tuple[Contents, Contents]:
    """Open both files; a kernel size that one does not tell is taken from the other."""
    files = [stack.enter_context(open_checkpoint(file)) for file in (first, second)]
    layers = files[0].layers, files[1].layers
    for pattern, _ in kernel_sizes:
        if not any(_asks(layer, pattern) for found in layers for layer in found):
            raise click.UsageError(
                f"--kernel-size: {pattern!r} matches no over-parameterized layer."
            )
    both = []
    for file, here, there in ((files[0], *layers), (files[1], *layers[::-1])):
        shapes = {layer.name: layer.kernel_shape for layer in there}
        sizes = [(p, s) for p, s in kernel_sizes if any(_asks(layer, p) for layer in here)]
        for layer in here:
            shape = shapes.get(layer.name)
            if layer.over_parameterized and layer.kernel_shape is None and shape is not None:
                sizes.append((literal(layer.name), shape[2:]))
        sized = stack.enter_context(opened(file.path, sizes)) if sizes else file
        require_kernel_sizes(sized, sized.layers)
        both.append(Contents(sized))
    return both[0], both[1]


def _known_images(a: Contents, b: Contents, pairs: Sequence[tuple[Layer, Layer]]) -> Sizes:
    """Return what is flattened before layers, by their names in A, as Keras' configs tell."""
    found = []
    for file, number in ((a, 0), (b, 1)):
        for pair in pairs:
            left = pair[0]
            size = image_size(file.fed.get(pair[number].name), features_of(a.checkpoint, left))
            if size is not None:
                found.append((literal(left.name), size))
    return found


def _asks(layer: Layer, pattern: str) -> bool:
    """Return whether the pattern of a kernel size is for this layer."""
    names = {layer.name, layer.path}
    return layer.over_parameterized and any(fnmatchcase(name, pattern) for name in names)


def _as_object(
    first: Path, second: Path, equal: bool, compared: list[Compared], missing: list[str]
) -> dict[str, Any]:
    return {
        "files": [str(first), str(second)],
        "equal": equal,
        "largest_absolute": max(
            (c.absolute for c in compared if c.absolute is not None), default=0.0
        ),
        "largest_relative": max(
            (c.relative for c in compared if c.relative is not None), default=0.0
        ),
        "arrays": [{**c._asdict(), "equal": c.equal} for c in compared],
        "missing": missing,
    }


def _print(equal: bool, compared: list[Compared], missing: list[str], show_all: bool) -> None:
    shown = [found for found in compared if show_all or not found.equal]
    if shown:
        print_table(
            ["array", "shape", "absolute", "relative", "allowed", "at"],
            [_row(found) for found in shown],
            text_columns=2,
        )
        click.echo()
    for line in missing:
        click.echo(one_line(line))
    worst = max((c for c in compared if c.relative is not None), key=_relative, default=None)
    apart = ""
    if worst is not None:
        apart = f"; the largest relative difference is {worst.relative:.3g}"
        apart += f", in {worst.path} {worst.role}" if worst.relative else ""
    differing = sum(not found.equal for found in compared)
    verdict = "equal" if equal else f"{differing} differ, {len(missing)} in one file only"
    click.echo(one_line(f"{counted(len(compared), 'array')} compared: {verdict}{apart}"))


def _relative(found: Compared) -> float:
    return found.relative or 0.0


def _row(found: Compared) -> list[str]:
    path = f"{found.path} {found.role}".strip()
    if found.absolute is None or found.relative is None:
        return [path, " and ".join(map(size, found.shapes)), "", "", f"{found.allowed:.3g}", ""]
    at = "" if found.at is None else ",".join(map(str, found.at))
    numbers = (f"{number:.3g}" for number in (found.absolute, found.relative, found.allowed))
    return [path, size(found.shapes[0]), *numbers, at]
