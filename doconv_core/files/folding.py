"""What folding makes of a checkpoint: the entries of the new file, and the report on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from doconv_core.files import dynamic
from doconv_core.files.blocks import Block
from doconv_core.files.entries import Array, CheckpointError, all_finite, to_storage
from doconv_core.files.layers import DYNAMIC, IDENTITY, OTHER, Layer, Shape
from doconv_core.files.reference import ORIGIN
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.batchnorm import NOT_FINITE, NotFoldable
from doconv_core.models.report import Change, Left, Report

if TYPE_CHECKING:
    from doconv_core.files.checkpoint import Checkpoint


@dataclass(frozen=True)
class Output:
    """An entry of the folded file. source: of the entry it is or comes from. layer: if folded."""

    name: str
    source: str
    shape: Shape
    layer: Layer | None = None


def is_folded(layer: Layer) -> bool:
    """Return whether folding changes the layer: a reference layer of one tap has another shape."""
    is_reference = layer.origin.startswith(ORIGIN) and layer.kind != DYNAMIC
    return layer.over_parameterized or is_reference or isinstance(layer, Block)


def seems_over_parameterized(layer: Layer) -> bool:
    """Return whether a layer is over-parameterized, or named as if it were."""
    is_unknown = layer.kind == OTHER and layer.origin == "doconv" and bool(layer.note)
    return is_folded(layer) or is_unknown


def check_understood(path: Path, layers: Iterable[Layer]) -> None:
    """Raise NotFoldable for what seems to be a layer of this package, and cannot be folded."""
    for layer in layers:
        if layer.kind == OTHER and layer.origin == "doconv" and layer.note:
            raise NotFoldable(f"{path}: layer {layer.name!r}: {layer.note}.")


def check_heads(path: Path, layers: Iterable[Layer]) -> None:
    """Raise CheckpointError for what is named like the heads of dynamic groups, and is none."""
    for layer in layers:
        if layer.kind == OTHER and layer.note and dynamic.is_of_source(layer.entries):
            raise CheckpointError(f"{path}: layer {layer.name!r}: {layer.note}.")


def check_finite(layer: Layer, kernel: Array) -> Array:
    """Return `kernel`; raise NotFoldable where an entry is infinite or not a number."""
    if not all_finite(kernel):
        raise NotFoldable(f"layer {layer.name!r}: {NOT_FINITE}")
    return kernel


def folded_kernel(checkpoint: Checkpoint, layer: Layer, shape: Shape) -> Array:
    """Return the layer's kernel as the folded file stores it; NotFoldable if it is not finite.

    Of a block of branches, its bias where the shape is that of one.
    """
    if isinstance(layer, Block):
        is_bias = len(shape) == 1
        with np.errstate(over="ignore"):  # what overflows is in the result
            array = checkpoint.added_up(layer)[is_bias]
            array = array if is_bias else layer.stored(array)
            stored = to_storage(array, checkpoint.entries[layer.sources[is_bias]].dtype)
        return check_finite(layer, stored)
    composed = check_finite(layer, checkpoint.kernel(layer, as_stored=True))
    return layer.stored(composed).reshape(shape)


def outputs(checkpoint: Checkpoint) -> list[Output]:
    """Return the entries of the folded file, in their order."""
    folded: dict[str, Output] = {}
    dropped: set[str] = set()
    for layer in checkpoint.with_blocks(checkpoint.layers):
        if isinstance(layer, Block):
            for name, source, shape in zip(layer.folded, layer.sources, layer.shapes, strict=True):
                folded[source] = Output(name, source, shape, layer)
            dropped |= {*layer.entries.values()} - {*layer.sources}
        elif is_folded(layer):
            assert layer.kernel_shape is not None  # as `report_on` has checked
            source = layer.entries["weight"]
            name = folded_name(layer)
            folded[source] = Output(name, source, layer.stored_shape(layer.kernel_shape), layer)
            dropped |= {layer.entries[role] for role in layer.gone}
    found = [
        folded.get(name) or Output(name, name, entry.shape)
        for name, entry in checkpoint.entries.items()
        if name not in dropped
    ]
    check_names(checkpoint, [output.name for output in found])
    return found


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
    for layer in checkpoint.layers:
        if is_folded(layer) and layer.kernel_shape is None:
            raise NotFoldable(f"{checkpoint.path}: layer {layer.name!r}: {layer.note}.")
    changed, left = [], []
    first = checkpoint.parts[0] if checkpoint.parts else ""
    before = after = 0
    for layer in checkpoint.with_blocks(checkpoint.layers):
        if isinstance(layer, Block) and layer.note:
            raise CheckpointError(f"{checkpoint.path}: layer {layer.name!r}: {layer.note}.")
        if isinstance(layer, Block):
            layer.check_epsilons()
        if is_folded(layer):
            changed.append(Change(layer.name, *_words(layer)))
        elif layer.note:
            left.append(Left(layer.name, layer.kind, layer.note))
        if layer.part == first:
            stored = layer.entries.get(IDENTITY)  # which is a parameter as its file has it
            before += checkpoint.parameters(layer) + (
                checkpoint.entries[stored].size if stored else 0
            )
            after += checkpoint.folded_parameters(layer) or 0
    left += [Left(path, "tensors", reason) for path, reason in checkpoint.unfolded]
    return Report("folded", tuple(changed), tuple(left), before, after)


def _words(layer: Layer) -> tuple[str, str]:
    """Return what a layer was, and what it has become."""
    assert layer.kernel_shape is not None  # as the caller has checked
    size = "×".join(map(str, layer.kernel_shape[2:]))
    if isinstance(layer, Block):
        branches = f"{layer.count} branch{'es' if layer.count > 1 else ''}"
        after = f"convolution {layer.becomes}" if layer.becomes else "ordinary convolution"
        told = f", epsilon {layer.epsilon:g}" if layer.is_untold else ""
        return f"{layer.family} block of {branches}{told}", f"{after}, {size}"
    origin = f" of the {layer.origin} layer" if layer.origin.startswith(ORIGIN) else ""
    before = "one tap" + origin
    if layer.composed not in (None, DO_CONV):
        before = f"over-parameterized, {layer.composed.name}"
    elif layer.d_shape is not None:
        before = f"over-parameterized, S = {layer.d_shape[2]}{origin}"
    after = f"ordinary convolution, {size}" + (f" ({layer.note})" if layer.note else "")
    return before, after
