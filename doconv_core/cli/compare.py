"""How far the layers of two files lie apart, each folded on the way."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from doconv_core.cli.contents import Contents
from doconv_core.cli.flattening import Sizes, takes_image
from doconv_core.cli.parse import matching
from doconv_core.cli.recognised import KERAS, TRANSPOSED, weight_of
from doconv_core.files.layers import CONVOLUTION, LINEAR, Layer
from doconv_core.maths.numeric import difference
from doconv_core.state.file import entry
from doconv_core.state.flattening import channels_first

Array = NDArray[Any]

# What composing in another order of additions may cost, in roundings of the coarser dtype.
COMPOSED_ROUNDINGS = 16
_EPSILONS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


class Compared(NamedTuple):
    """One array of two files. path: of the layer. role: of the array, "kernel" if it is composed.

    shapes: canonical, of either. absolute, relative: the largest difference, as
    `doconv_core.difference` has it; None where the shapes differ. at: the place of the largest in
    the canonical array. allowed: the largest relative difference that counts as equal.
    """

    path: str
    role: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    absolute: float | None
    relative: float | None
    at: tuple[int, ...] | None
    allowed: float

    @property
    def equal(self) -> bool:
        """Whether the two arrays count as equal."""
        return self.relative is not None and self.relative <= self.allowed


def compare(
    first: Contents,
    a: Layer,
    second: Contents,
    b: Layer,
    tolerance: float | None = None,
    flattened: Sizes = (),
) -> Iterator[Compared | str]:
    """Yield how far each array of layer `a` lies from that of `b`.

    tolerance: the relative difference that is allowed for all; None for what the dtypes imply: none
    at all, unless a kernel is composed here. flattened: sizes, channels first, of the images that
    layers take flattened, by pattern on names, where one of the files is Keras'. A role that
    one layer alone has is yielded as text.
    """
    size = None if _last(first) == _last(second) else matching(a.name, flattened)
    composed = a.over_parameterized or b.over_parameterized
    for role in _roles(a, b):
        there = [role in layer.entries for layer in (a, b)]
        if not all(there):
            # A count of batches, which only one framework keeps, takes no part in the output.
            if role != "num_batches_tracked":
                alone = first if there[0] else second
                yield f"{entry(a.name, role)} is in {alone.path} only"
            continue
        kernel = role == "weight" and a.kind == b.kind == CONVOLUTION
        x, y = _array(first, a, role, size), _array(second, b, role, size)
        allowed = tolerance
        if allowed is None:
            epsilons = [
                _EPSILONS.get(file.entries[layer.entries[role]].dtype, 0.0)
                for file, layer in ((first, a), (second, b))
            ]
            allowed = COMPOSED_ROUNDINGS * max(epsilons) if kernel and composed else 0.0
        yield _compared(a.name, "kernel" if kernel and composed else role, x, y, allowed)


def _last(file: Contents) -> bool:
    return file.framework == KERAS


def _array(file: Contents, layer: Layer, role: str, size: tuple[int, ...] | None) -> Array:
    """Return one of a layer's arrays, canonical; for W, the kernel."""
    if role == "weight" and layer.kind == CONVOLUTION:
        return file.checkpoint.kernel(layer)
    if role == "weight" and layer.kind in (LINEAR, TRANSPOSED):
        values = weight_of(file.checkpoint, layer).reshape(layer.kernel_shape or ())
    else:
        values = file.checkpoint.read(layer.entries[role])
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
        return Compared(path, role, (x.shape, y.shape), None, None, None, allowed)
    absolute, relative = difference(x, y)
    at = None
    if absolute:
        at = tuple(int(i) for i in np.unravel_index(_worst(x, y), x.shape))
    return Compared(path, role, (x.shape, y.shape), absolute, relative, at, allowed)


def _worst(x: Array, y: Array) -> int:
    """Return the flat index of the largest difference; of one that is not finite, if there is."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b)
    apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    return int(np.argmax(np.nan_to_num(apart, nan=np.inf)))
