"""`doconv verify`: whether two checkpoints compute with the same kernels, and where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from math import isfinite, isnan, prod
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from doconv_core.cli.command import (
    DIFFERENT,
    counted,
    opened,
    print_json,
    print_table,
    progress,
    require_kernel_sizes,
    say,
    size,
)
from doconv_core.cli.contents import Contents, as_prelus, slopes_of
from doconv_core.cli.flattening import Sizes, check_order, features_of, takes_image
from doconv_core.cli.options import (
    KernelSizes,
    allow_option,
    epsilon_option,
    flatten_option,
    json_option,
    kernel_size_option,
    literal,
    matching,
    source_argument,
)
from doconv_core.cli.pairing import pair_by_name, pair_by_order
from doconv_core.files.blocks import Block
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.dynamic import NAMES
from doconv_core.files.entries import KERAS, compose_blocks
from doconv_core.files.layers import CONVOLUTION, DYNAMIC, LINEAR, TRANSPOSED, Layer
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.numeric import Array, difference, distances, largest
from doconv_core.state.file import entry
from doconv_core.state.flattening import channels_first, image_size


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
@allow_option
@epsilon_option
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
    allow: Sequence[str],
    epsilon: float | None,
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
    if tolerance is not None and not isfinite(tolerance):
        raise click.UsageError(f"--tolerance must be a finite number; received {tolerance}.")
    with ExitStack() as stack:
        a, b = _open(stack, first, second, kernel_sizes, allow, epsilon)
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
        check_order(a.layers, flattened)
        images = _known_images(a, b, paired.both)
        with progress("comparing") as step:
            for number, (left, right) in enumerate(paired.both):
                step(number, len(paired.both))
                for found in compare(a, left, b, right, tolerance, flattened, images):
                    missing.append(found) if isinstance(found, str) else compared.append(found)
    equal = not missing and all(found.equal for found in compared)
    if as_json:
        print_json(_as_object(first, second, equal, compared, missing))
    else:
        _print(equal, compared, missing, show_all)
    if not equal:
        ctx.exit(DIFFERENT)


def _open(
    stack: ExitStack,
    first: Path,
    second: Path,
    kernel_sizes: KernelSizes,
    allow: Sequence[str],
    epsilon: float | None,
) -> tuple[Contents, Contents]:
    """Open both files; a kernel size that one does not tell is taken from the other.

    epsilon: of the blocks in one or both.
    """
    files = [stack.enter_context(opened(file, (), allow)) for file in (first, second)]
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
        own = epsilon if file.needs_epsilon or not any(f.needs_epsilon for f in files) else None
        again = sizes or own is not None
        sized = stack.enter_context(opened(file.path, sizes, allow, own)) if again else file
        require_kernel_sizes(sized, sized.layers)
        both.append(Contents(sized))
    views = _as_in(both[0], both[1]), _as_in(both[1], both[0])
    both[0].layers, both[1].layers = views
    return both[0], both[1]


def _as_in(file: Contents, other: Contents) -> tuple[Layer, ...]:
    """Return a file's layers, with a block of branches as the convolution that the other has."""
    there = {layer.name for layer in other.layers}
    layers: list[Layer] = []
    for layer in file.checkpoint.with_blocks(file.layers):
        if isinstance(layer, Block):
            is_folded = layer.folded and layer.convolution.name in there
            layers += [layer.convolution] if is_folded else layer.layers
        else:
            layers.append(layer)
    return tuple(layers)


def _known_images(
    a: Contents, b: Contents, pairs: Sequence[tuple[Layer, Layer]]
) -> dict[str, tuple[int, ...]]:
    """Return what is flattened before layers, by their names in A, as Keras' configs tell."""
    found = {}
    for file, number in ((a, 0), (b, 1)):
        for pair in pairs:
            left = pair[0]
            size = image_size(file.fed.get(pair[number].name), features_of(a.checkpoint, left))
            if size is not None:
                found[left.name] = size
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
        "largest_absolute": largest(c.absolute for c in compared if c.absolute is not None),
        "largest_relative": largest(c.relative for c in compared if c.relative is not None),
        "arrays": [c._asdict() for c in compared],
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
        say(line)
    apart = _apart(compared)
    differing = sum(not found.equal for found in compared)
    verdict = "equal" if equal else f"{differing} differ, {len(missing)} in one file only"
    say(f"{counted(len(compared), 'array')} compared: {verdict}{apart}")


def _apart(compared: Sequence[Compared]) -> str:
    """Return what the verdict says of how far the arrays lie apart."""
    known = [c for c in compared if c.relative is not None]
    told = ""
    finite = [c for c in known if isfinite(c.relative or 0.0)]
    if finite:
        worst = max(finite, key=lambda c: c.relative or 0.0)
        told = f"; the largest relative difference is {worst.relative:.3g}"
        told += f", in {worst.path} {worst.role}" if worst.relative else ""
    unknown = [c for c in known if not isfinite(c.absolute or 0.0)]
    if unknown:
        many = counted(len(unknown), "array")
        told += f"; {many} not finite, of which no difference can be told"
    if zeros := len(known) - len(finite) - len(unknown):
        told += f"; {counted(zeros, 'array')} all zeros in B alone"
    return told


def _row(found: Compared) -> list[str]:
    path = f"{found.path} {found.role}".strip()
    if found.absolute is None or found.relative is None:
        return [path, " and ".join(map(size, found.shapes)), "", "", f"{found.allowed:.3g}", ""]
    at = "" if found.at is None else ",".join(map(str, found.at))
    numbers = (f"{number:.3g}" for number in (found.absolute, found.relative, found.allowed))
    return [path, size(found.shapes[0]), *numbers, at]


# What composing in another order of additions may cost, in roundings of the coarser dtype.
COMPOSED_ROUNDINGS = 16
_EPSILONS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


class Compared(NamedTuple):
    """One array of two files. path: of the layer. role: of the array, "kernel" if it is composed.

    shapes: canonical, of either. absolute, relative: the largest difference, as
    `doconv_core.difference` has it; None where the shapes differ. at: the place of the largest in
    the canonical array. allowed: the largest relative difference that counts as equal. equal:
    whether they count so: equal infinities do, and a NaN is equal to nothing.
    """

    path: str
    role: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    absolute: float | None
    relative: float | None
    at: tuple[int, ...] | None
    allowed: float
    equal: bool


def compare(
    first: Contents,
    a: Layer,
    second: Contents,
    b: Layer,
    tolerance: float | None = None,
    flattened: Sizes = (),
    images: Mapping[str, tuple[int, ...]] = {},  # never changed
) -> Iterator[Compared | str]:
    """Yield how far each array of layer `a` lies from that of `b`.

    tolerance: the relative difference that is allowed for all; None for what the dtypes imply: none
    at all, unless a kernel is composed here. flattened: sizes, channels first, of the images that
    layers take flattened, by pattern on names, where one of the files is Keras'; images: those that
    are told by the files, by name. A role that one layer alone has is yielded as text.
    """
    size = None
    a, b = as_prelus(a, b)
    if _last(first) != _last(second):
        size = matching(a.name, flattened)
        size = images.get(a.name) if size is None else size
    added_up = isinstance(a, Block) or isinstance(b, Block)
    composed = a.over_parameterized or b.over_parameterized or added_up
    if a.kind == b.kind == DYNAMIC:
        for name in NAMES:
            x, y = (file.checkpoint.heads(layer, name) for file, layer in ((first, a), (second, b)))
            yield _compared(a.name, name, x, y, tolerance or 0.0)
        return
    for role in _roles(a, b):
        there = [role in layer.entries for layer in (a, b)]
        if not all(there):
            # A count of batches, which only one framework keeps, takes no part in the output.
            if role != "num_batches_tracked":
                alone = first if there[0] else second
                yield f"{entry(a.name, role)} is in {alone.path} only"
            continue
        kernel = (role == "weight" or added_up) and a.kind == b.kind == CONVOLUTION
        x, y = _array(first, a, role, size), _array(second, b, role, size)
        allowed = tolerance
        if allowed is None:
            epsilons = [
                _EPSILONS.get(file.entries[layer.entries[role]].dtype, 0.0)
                for file, layer in ((first, a), (second, b))
            ]
            allowed = COMPOSED_ROUNDINGS * max(epsilons) if kernel and composed else 0.0
        own = "kernel" if kernel and composed and role == "weight" else role
        found = _compared(a.name, own, x, y, allowed)
        relative = None if found.equal else found.relative
        if kernel and composed and tolerance is None and relative is not None:
            # Where what is added nearly cancels, its roundings are large beside the sum.
            terms = max(_terms(file.checkpoint, layer) for file, layer in ((first, a), (second, b)))
            largest = float(np.abs(y).max(initial=0))
            if terms > largest > 0:
                allowed *= terms / largest
                found = found._replace(allowed=allowed, equal=relative <= allowed)
        yield found


def _terms(checkpoint: Checkpoint, layer: Layer) -> float:
    """Return the largest sum of magnitudes in composing a layer's kernel; 0 where it is not.

    Of kinds other than DO-Conv, and of what composes as no pair does, it is not told.
    """
    if layer.composed is not DO_CONV:
        return 0.0
    try:
        weight, depthwise = checkpoint.pair(layer)
    except NotFoldable:
        return 0.0
    if depthwise is None:
        return 0.0
    sizes = np.abs(weight.reshape(*weight.shape[:2], -1).astype(np.float64))
    found = compose_blocks(sizes, np.abs(depthwise.astype(np.float64))).max(initial=0)
    return float(found) if np.isfinite(found) else 0.0


def _last(file: Contents) -> bool:
    return file.framework == KERAS


def _array(file: Contents, layer: Layer, role: str, size: tuple[int, ...] | None) -> Array:
    """Return one of a layer's arrays, canonical; for W, the kernel."""
    if isinstance(layer, Block):
        return file.checkpoint.added_up(layer)[role == "bias"]
    if role == "weight" and layer.kind == CONVOLUTION:
        return file.checkpoint.kernel(layer)
    if role == "weight" and layer.kind in (LINEAR, TRANSPOSED):
        values = layer.canonical(file.checkpoint.read(layer.entries[role])).reshape(
            layer.kernel_shape or ()
        )
    else:
        values = file.checkpoint.read(layer.entries[role])
    if layer.is_prelu:
        values = values.reshape(slopes_of(values.shape))
    if not size or not _last(file) or not takes_image(layer, role):
        return values
    # A size by a pattern may be meant for other layers than this norm.
    if layer.kind != LINEAR and values.shape != (prod(size),):
        return values
    try:
        return channels_first(values, size)
    except ValueError as error:
        raise click.UsageError(f"--flatten: {error}") from None


def _roles(a: Layer, b: Layer) -> list[str]:
    """Return the roles that one of the layers has, without those that folding takes away."""
    roles = [*a.entries, *(role for role in b.entries if role not in a.entries)]
    gone = {role for layer in (a, b) if layer.over_parameterized for role in layer.gone}
    return [role for role in roles if role not in gone]


def _compared(path: str, role: str, x: Array, y: Array, allowed: float) -> Compared:
    if x.shape != y.shape:
        return Compared(path, role, (x.shape, y.shape), None, None, None, allowed, False)
    absolute, relative = difference(x, y)
    equal = relative <= allowed or np.array_equal(x, y)
    at = None
    if absolute and not (equal and isnan(absolute)):
        at = tuple(int(i) for i in np.unravel_index(_worst(x, y), x.shape))
    return Compared(path, role, (x.shape, y.shape), absolute, relative, at, allowed, equal)


def _worst(x: Array, y: Array) -> int:
    """Return the flat index of the largest difference; of one that is not finite, if there is."""
    apart = np.where(x == y, 0.0, distances(x, y))
    return int(np.argmax(np.nan_to_num(apart, nan=np.inf)))
