"""What the subcommands do alike with files: options, opening, counting, refusing to overwrite."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import isqrt, prod
from pathlib import Path
from typing import Any

import click
from numpy.typing import NDArray

from doconv_core.cli.errors import IMPOSSIBLE, TARGET, Failure
from doconv_core.cli.parse import KernelSizes, sizes_option
from doconv_core.files.checkpoint import Checkpoint, open_checkpoint
from doconv_core.files.entries import CheckpointError
from doconv_core.files.layers import D, Layer
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.report import place

Array = NDArray[Any]

STATISTICS = {"running_mean", "running_var", "num_batches_tracked", "identity"}

source_argument = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
target_argument = click.Path(path_type=Path)


def kernel_size_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--kernel-size`, which becomes pairs of pattern and size."""
    return click.option(
        "--kernel-size", "kernel_sizes", multiple=True, metavar="[GLOB=]SIZE",
        callback=sizes_option,
        help="Kernel size of the layers that GLOB matches, such as 'layer1.*=3x3', where the file "
        "does not tell it. May be repeated; the first that matches counts.",
    )(function)  # fmt: skip


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(
        function
    )


def force_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--force`."""
    return click.option("--force", is_flag=True, help="Replace OUT where it exists.")(function)


def opened(file: Path, kernel_sizes: KernelSizes) -> Checkpoint:
    """Return the open checkpoint. A kernel size that does not fit is wrong usage."""
    try:
        return open_checkpoint(file, kernel_sizes=dict(kernel_sizes))
    except CheckpointError:
        raise
    except ValueError as error:
        if not kernel_sizes:
            raise
        raise click.UsageError(f"{file}: {error}") from None


def check_target(target: Path, force: bool) -> None:
    """Raise Failure where `target` cannot be written, or exists and is not to be replaced."""
    folder = target.parent
    if target.is_dir():
        raise Failure(f"{target} is a folder; name a file to write.", TARGET)
    if target.exists() and not target.is_file():  # such as /dev/null, which a rename would replace
        raise Failure(f"{target} is no ordinary file; name one to write.", TARGET)
    if os.path.lexists(target) and not force:
        raise target_exists(target)
    if not folder.is_dir():
        raise Failure(f"the folder {folder} of {target} does not exist.", TARGET)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Failure(f"the folder {folder} of {target} is not writable.", TARGET)


@contextmanager
def writing_to(target: Path) -> Iterator[None]:
    """Tell of what goes wrong in the block, which writes `target`, as a Failure."""
    try:
        yield
    except FileExistsError:  # it came into being meanwhile
        raise target_exists(target) from None
    except OSError as error:
        problem = error.strerror or str(error)
        raise Failure(f"{target} could not be written: {problem}.", TARGET) from error


def target_exists(target: Path) -> Failure:
    """Return the error for a target that must not be replaced."""
    return Failure(f"{target} exists; use --force to replace it.", TARGET)


def parameters_of(checkpoint: Checkpoint, layer: Layer) -> int:
    """Return how many numbers of the layer are trained; statistics and the identity are not."""
    return sum(
        checkpoint.entries[name].size
        for role, name in layer.entries.items()
        if role not in STATISTICS
    )


def folded_parameters_of(checkpoint: Checkpoint, layer: Layer) -> int | None:
    """Return how many of its parameters remain when it is folded; None where M is not known."""
    parameters = parameters_of(checkpoint, layer)
    if not layer.over_parameterized:
        return parameters
    if layer.kernel_shape is None:
        return None
    gone = (role for role in ("weight", *layer.gone) if role not in STATISTICS)
    return (
        parameters
        - sum(checkpoint.entries[layer.entries[role]].size for role in gone)
        + prod(layer.kernel_shape)
    )


def require_kernel_sizes(checkpoint: Checkpoint, layers: Iterable[Layer]) -> None:
    """Raise Failure, with the option that settles it, for a layer of unknown kernel size."""
    for layer in layers:
        if layer.over_parameterized and layer.kernel_shape is None:
            raise Failure(
                f"{checkpoint.path}: {place(layer.name)}: {note_of(checkpoint, layer)}.",
                IMPOSSIBLE,
            )


def note_of(checkpoint: Checkpoint, layer: Layer) -> str:
    """Return a layer's note, in the words of the command line."""
    if layer.over_parameterized and layer.kernel_shape is None and "kernel_sizes=" in layer.note:
        shape = checkpoint.entries[layer.entries[D]].shape
        taps = shape[0] if layer.origin == "reference TensorFlow" else shape[1]
        side = isqrt(taps)
        example = f"{side}x{side}" if side * side == taps else f"{taps}"
        return (
            f"its kernel size is not in the file, which tells {taps} taps; give it, such as "
            f"--kernel-size '{literal(layer.name)}={example}'"
        )
    return layer.note


def literal(name: str) -> str:
    """Return the glob pattern that matches just this name."""
    return re.sub(r"([*?[])", r"[\1]", name)


def depthwise_of(checkpoint: Checkpoint, layer: Layer) -> Array | None:
    """Return an over-parameterized layer's D, `(I, M, S)`; None where its S is below M."""
    try:
        return checkpoint.pair(layer)[1]
    except NotFoldable:
        # Of a grouped layer of the reference's in PyTorch, only how W meets D is another.
        depthwise = checkpoint.read(layer.entries[D])
        is_pytorch = layer.origin == "reference PyTorch"
        return depthwise if is_pytorch and depthwise.shape[1] <= depthwise.shape[2] else None
