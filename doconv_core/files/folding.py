"""Composing a checkpoint's layers, and what becomes of each of its entries when it is folded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doconv_core.files.arrays import from_storage
from doconv_core.files.checkpoint import (
    OTHER,
    Checkpoint,
    CheckpointError,
    Layer,
    check_finite,
)
from doconv_core.files.composition import (
    canonical_upstream,
    compose_blocks,
    compose_upstream,
)
from doconv_core.files.reference import ORIGIN
from doconv_core.files.shapes import Shape, kept_shape
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import Change, Left, Report

Array = NDArray[Any]


@dataclass(frozen=True)
class Output:
    """An entry of the folded file. source: of the entry it is or comes from. layer: if folded."""

    name: str
    source: str
    shape: Shape
    layer: Layer | None = None


def is_folded(layer: Layer) -> bool:
    """Return whether folding changes the layer: a reference layer of one tap has another shape."""
    return layer.over_parameterized or layer.origin.startswith(ORIGIN)


def check_understood(path: Path, layers: Iterable[Layer]) -> None:
    """Raise NotFoldable for what seems to be a layer of this package, and cannot be folded."""
    for layer in layers:
        if layer.kind == OTHER and layer.origin == "doconv" and layer.note:
            raise NotFoldable(f"{path}: layer {layer.name!r}: {layer.note}.")


def pair(checkpoint: Checkpoint, layer: Layer) -> tuple[Array, Array | None]:
    """As `Checkpoint.pair`."""
    weight = to_canonical(checkpoint.read(layer.entries["weight"]), layer.layout)
    if not layer.over_parameterized:
        if layer.kernel_shape is not None:
            weight = weight.reshape(layer.kernel_shape)
        return weight, None
    depthwise = checkpoint.read(layer.entries["depthwise_weight"])
    if layer.origin.startswith(ORIGIN):
        framework = layer.origin.removeprefix(ORIGIN)
        name = layer.entries.get("identity")
        identity = None if name is None else checkpoint.read(name)
        try:
            return canonical_upstream(framework, weight, depthwise, identity)
        except NotFoldable as error:
            raise NotFoldable(f"layer {layer.name!r}: {error}") from None
    return weight.reshape(*weight.shape[:2], -1), depthwise


def kernel(checkpoint: Checkpoint, layer: Layer, *, as_stored: bool = False) -> Array:
    """As `Checkpoint.kernel`. as_stored: whether a kernel of bfloat16 is rounded to that."""
    if layer.kernel_shape is None:
        problem = layer.note or f"its kind, {layer.kind}, has no kernel"
        raise CheckpointError(f"{checkpoint.path}: layer {layer.name!r}: {problem}.")
    weight = to_canonical(checkpoint.read_stored(layer.entries["weight"]), layer.layout)
    if layer.over_parameterized:
        with np.errstate(all="ignore"):  # what overflows is in the result
            weight = _composed(checkpoint, layer, weight, as_stored)
    elif not as_stored:
        weight = from_storage(weight)
    return weight.reshape(layer.kernel_shape)


def _composed(checkpoint: Checkpoint, layer: Layer, weight: Array, as_stored: bool) -> Array:
    """Return the kernel of a canonical W, as it is stored, with the layer's D."""
    depthwise = checkpoint.read_stored(layer.entries["depthwise_weight"])
    if not layer.origin.startswith(ORIGIN):
        weight = weight.reshape(*weight.shape[:2], -1)
        return compose_blocks(weight, depthwise, as_stored=as_stored)
    framework = layer.origin.removeprefix(ORIGIN)
    name = layer.entries.get("identity")
    identity = None if name is None else checkpoint.read_stored(name)
    return compose_upstream(framework, weight, depthwise, identity, as_stored=as_stored)


def folded_kernel(checkpoint: Checkpoint, layer: Layer, shape: Shape) -> Array:
    """Return the layer's kernel as the folded file stores it; NotFoldable if it is not finite."""
    composed = check_finite(layer, kernel(checkpoint, layer, as_stored=True))
    return from_canonical(composed, layer.layout, _groups(layer)).reshape(shape)


def folded_shape(layer: Layer) -> Shape:
    """Return the shape of the folded kernel in the file, in the layout of its framework."""
    assert layer.kernel_shape is not None  # as `report_on` has checked
    return kept_shape(layer.kernel_shape, layer.layout, _groups(layer))


def _groups(layer: Layer) -> int:
    return layer.spec.groups if isinstance(layer.spec, ConvSpec) else 1


def outputs(checkpoint: Checkpoint) -> list[Output]:
    """Return the entries of the folded file, in their order."""
    folded: dict[str, Output] = {}
    dropped: set[str] = set()
    for layer in checkpoint.layers:
        if is_folded(layer):
            source = layer.entries["weight"]
            name = folded_name(layer)
            folded[source] = Output(name, source, folded_shape(layer), layer)
            dropped |= {layer.entries[r] for r in GONE if r in layer.entries}
    found = [
        folded.get(name) or Output(name, name, entry.shape)
        for name, entry in checkpoint.entries.items()
        if name not in dropped
    ]
    check_names(checkpoint, [output.name for output in found])
    return found


GONE = ("depthwise_weight", "identity")


def folded_name(layer: Layer) -> str:
    """Return the name of the folded kernel's entry: W's, which the reference calls otherwise."""
    name = layer.entries["weight"]
    if layer.origin == f"{ORIGIN}PyTorch":
        return name.removesuffix("W") + "weight"
    return name


def check_names(checkpoint: Checkpoint, names: list[str]) -> None:
    """Raise CheckpointError where folding would give two entries one name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(
                f"{checkpoint.path}: a folded kernel would be named {name!r}, as another entry is."
            )
        seen.add(name)


def report_on(checkpoint: Checkpoint) -> Report:
    """Return what folding the file will do; raise for a layer that cannot be folded.

    Parameters are the elements of the first copy of the model, without its batch norms' statistics.
    """
    check_understood(checkpoint.path, checkpoint.layers)
    changed, left = [], []
    first = checkpoint.parts[0] if checkpoint.parts else ""
    before = after = 0
    for layer in checkpoint.layers:
        sizes = {role: checkpoint.entries[name].size for role, name in layer.entries.items()}
        count = sum(size for role, size in sizes.items() if role not in STATISTICS)
        folded = count
        if is_folded(layer):
            if layer.kernel_shape is None:
                raise NotFoldable(f"{checkpoint.path}: layer {layer.name!r}: {layer.note}.")
            folded += prod(layer.kernel_shape) - sizes["weight"]
            folded -= sum(sizes.get(role, 0) for role in GONE)
            changed.append(Change(layer.name, *_words(layer, checkpoint)))
        elif layer.note:
            left.append(Left(layer.name, layer.kind, layer.note))
        if layer.part == first:
            before, after = before + count, after + folded
    left += [Left(path, "tensors", reason) for path, reason in checkpoint.unfolded]
    return Report("folded", tuple(changed), tuple(left), before, after)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _words(layer: Layer, checkpoint: Checkpoint) -> tuple[str, str]:
    assert layer.kernel_shape is not None  # as the caller has checked
    size = "×".join(map(str, layer.kernel_shape[2:]))
    origin = f" of the {layer.origin} layer" if layer.origin.startswith(ORIGIN) else ""
    before = "one tap" + origin
    if layer.over_parameterized:
        depthwise = checkpoint.entries[layer.entries["depthwise_weight"]].shape
        multiplier = depthwise[1] if layer.layout == "*IO" and origin else depthwise[-1]
        if layer.origin == f"{ORIGIN}Gluon":
            multiplier = depthwise[1]
        before = f"over-parameterized, S = {multiplier}{origin}"
    after = f"ordinary convolution, {size}" + (f" ({layer.note})" if layer.note else "")
    return before, after
