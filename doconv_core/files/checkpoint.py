"""Checkpoint files: what is in them, and folding one without the model's code.

    with open_checkpoint("model.safetensors") as checkpoint:
        for layer in checkpoint.layers:
            print(layer.path, layer.kind, layer.kernel_shape, layer.over_parameterized)
    report = fold_checkpoint("model.safetensors", "folded.safetensors")

A format is recognised by a file's content, and read by what the entry-point group
`doconv.checkpoints` names for it; so this package knows no framework. No code in a file is run.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from numpy.typing import NDArray

from doconv_core.atomic import check_absent, replacing
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import Report
from doconv_core.state.layers import LayerForm, LinearSpec

Array = NDArray[Any]
KernelSizes: TypeAlias = Mapping[str, tuple[int, ...]]
Progress: TypeAlias = Callable[[int, int], None]

CONVOLUTION, LINEAR, BATCH_NORM, OTHER = "convolution", "linear", "batch norm", "other"


class CheckpointError(ValueError):
    """A file that is damaged, hostile, foreign, or in need of what it does not tell: one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Entry:
    """An array in a file, unread. name: unique in the file.

    dtype: NumPy's word, "bfloat16", or the format's for a type that NumPy lacks. It is of two words
    for what is no plain array, such as "quantized qint8": that is not read, and is carried over.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The number of the array's elements."""
        return prod(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain array, which can be read."""
        return " " not in self.dtype


@dataclass(frozen=True)
class Layer:
    """A layer, as far as the names and shapes of a file's entries tell.

    path: where it is in the model, dots between names where the format has them; without a
    `module.` that a wrapper put before all names, and without the part.
    kind: "convolution" (a transposed one looks the same), "linear" (or an embedding),
    "batch norm", "other".
    entries: the names of the entries by role, in the file's order. Roles: weight,
    depthwise_weight, identity (the reference implementation's), bias; of a batch norm also
    running_mean, running_var, num_batches_tracked. The entries of an "other" bear their own names.
    origin: "doconv", of an "other" with a note too if it seems to be a layer of this package, and
    cannot be folded; "reference PyTorch", "reference TensorFlow" or "reference Gluon" for a layer
    of the reference implementation; "" where nothing tells.
    part: of a file with several copies of a model, such as "ema", which one; "" for the only one.
    over_parameterized: whether it has a D.
    spec: the sizes, where the file tells them all: of an ordinary convolution most files do not
    tell the groups. kernel_shape: of a convolution, `(O, I/g, *kernel_size)`, of a linear layer
    `(out, in)`; None where the kernel size is not in the file.
    layout: `doconv_core.maths.layout`'s word for the axes of a convolution's weight in the file.
    note: what a reader should know: an assumption made, or why the layer cannot be folded.
    """

    path: str
    kind: str
    entries: Mapping[str, str]
    origin: str = ""
    part: str = ""
    over_parameterized: bool = False
    spec: ConvSpec | LinearSpec | None = None
    kernel_shape: tuple[int, ...] | None = None
    layout: str = "OI*"
    note: str = ""

    @property
    def name(self) -> str:
        """The path, with the part before it where there are several."""
        return f"{self.part}/{self.path}" if self.part else self.path


@dataclass
class Checkpoint(ABC):
    """An open file. Use as a context manager; arrays are read when they are asked for.

    format: what kind of file, in words. entries: by name, in the file's order. layers: in the order
    of their first entries. others: what else the file holds and a fold carries over as it is, such
    as "optimizer". unfolded: what of it may be a copy of the model nonetheless, and why that is not
    folded. parts: the copies of the model in it, the main one first; one is named "".
    forms: of a canonical state, what it tells of its layers, by path; origin: who wrote that.
    config: of a `.keras` file, the model's. None of another.
    """

    path: Path
    format: str = ""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    others: tuple[str, ...] = ()
    unfolded: tuple[tuple[str, str], ...] = ()
    forms: Mapping[str, LayerForm] | None = None
    origin: Mapping[str, str] | None = None
    config: Mapping[str, Any] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The copies of the model that the file holds."""
        return tuple(dict.fromkeys(layer.part for layer in self.layers))

    @abstractmethod
    def read(self, name: str) -> Array:
        """Return an entry's values; bfloat16 and 8-bit floats, which NumPy lacks, as float32.

        Raises KeyError for a name that is not in `entries`.
        """

    def read_stored(self, name: str) -> Array:
        """Return an entry's values as they are stored; bfloat16 as `checkpoints.arrays.BITS`.

        A format that can do so without the values of `read`, which need twice the memory, does.
        """
        from doconv_core.files.arrays import BFLOAT16, to_storage

        is_bfloat16 = self.entries[name].dtype == BFLOAT16
        return to_storage(self.read(name), BFLOAT16) if is_bfloat16 else self.read(name)

    @abstractmethod
    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file with its over-parameterized layers folded. report: after each layer."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def pair(self, layer: Layer) -> tuple[Array, Array | None]:
        """Return a convolution's `(W, D)`, canonical: `(O, I/g, S)`, and `(I, M, S)` or None.

        Of an ordinary convolution W is its kernel, `(O, I/g, *kernel_size)`. Raises NotFoldable for
        a reference layer that composes as no canonical pair does; its `kernel` is there still.
        """
        from doconv_core.files.folding import pair

        return pair(self, layer)

    def kernel(self, layer: Layer) -> Array:
        """Return the kernel that a convolution convolves with, `(O, I/g, *kernel_size)`.

        Composed where the layer is over-parameterized, by the reference implementation's own
        arithmetic where it is one of its layers. Of a linear layer: `(out, in)`. In the dtype of
        `read`. Raises CheckpointError where the kernel size is not known.
        """
        from doconv_core.files.folding import kernel

        return kernel(self, layer)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(
    path: str | os.PathLike[str], *, kernel_sizes: KernelSizes | None = None
) -> Checkpoint:
    """Return the checkpoint at `path`, open.

    kernel_sizes: for layers whose kernel size is not in the file, by glob pattern on `Layer.name`
    or `Layer.path`; the first that matches counts.
    Raises CheckpointError for a file that is damaged, hostile or of no known format, or whose
    format needs a package that is missing; FileNotFoundError, IsADirectoryError; ValueError for a
    pattern that matches no over-parameterized layer or a kernel size that does not fit.
    """
    from doconv_core.files.formats import find_format

    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; name a checkpoint file.")
    checkpoint: Checkpoint = find_format(file)(file, dict(kernel_sizes or {}))
    return checkpoint


def fold_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    kernel_sizes: KernelSizes | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write to `target` the file at `source` with every over-parameterized layer folded.

    Names, order, metadata and everything that is no over-parameterized layer stay as they are; W's
    entry becomes the ordinary kernel, D's goes. A layer of the reference implementation becomes an
    ordinary one of the framework, and its `W` is named `weight`. Returns what was done; a layer's
    path there is its `Layer.name`. `target` is written whole or not at all, and may be `source`.

    kernel_sizes: as in `open_checkpoint`. overwrite: whether `target` may exist. progress: called
    with the number of layers folded and of layers to fold.
    Raises FileExistsError; NotFoldable, before anything is written, for a layer that cannot be
    folded exactly or whose kernel is not finite; and what `open_checkpoint` raises.
    """
    from doconv_core.files.folding import report_on

    check_absent(target, overwrite)
    with open_checkpoint(source, kernel_sizes=kernel_sizes) as checkpoint:
        report = report_on(checkpoint)
        done, total = 0, len(report.changed)

        def count() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        if progress is not None:
            progress(0, total)
        with replacing(target, overwrite=overwrite) as temporary:
            checkpoint.write_folded(temporary, count)
    return report


def check_finite(layer: Layer, kernel: Array) -> Array:
    """Return `kernel`; raise NotFoldable where an entry is infinite or not a number."""
    from doconv_core.files.arrays import all_finite

    if not all_finite(kernel):
        raise NotFoldable(
            f"layer {layer.name!r}: the folded kernel is not finite; its trained weights have "
            "overflowed."
        )
    return kernel
