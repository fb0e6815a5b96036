"""Folding a checkpoint file: what becomes of each of its entries."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from doconv_core.atomic import check_absent, replacing
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import (
    OTHER,
    Array,
    CheckpointError,
    D,
    KernelSizes,
    Layer,
    Progress,
    all_finite,
)
from doconv_core.files.formats import open_checkpoint
from doconv_core.files.reference import ORIGIN
from doconv_core.files.shapes import Shape, kept_shape
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.layout import from_canonical
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import Change, Left, Report


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


def folded_kernel(checkpoint: Checkpoint, layer: Layer, shape: Shape) -> Array:
    """Return the layer's kernel as the folded file stores it; NotFoldable if it is not finite."""
    composed = check_finite(layer, checkpoint.kernel(layer, as_stored=True))
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
            folded -= sum(sizes[role] for role in layer.gone)
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
    if layer.over_parameterized and layer.composition is not DO_CONV:
        before = f"over-parameterized, {layer.composed}"
    elif layer.over_parameterized:
        depthwise = checkpoint.entries[layer.entries[D]].shape
        multiplier = depthwise[1] if layer.layout == "*IO" and origin else depthwise[-1]
        if layer.origin == f"{ORIGIN}Gluon":
            multiplier = depthwise[1]
        before = f"over-parameterized, S = {multiplier}{origin}"
    after = f"ordinary convolution, {size}" + (f" ({layer.note})" if layer.note else "")
    return before, after


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

    >>> form = LayerForm(ConvSpec(1, 1, (2,)), "doconv", bias=False)
    >>> arrays = {"conv.weight": np.ones((1, 1, 2)), "conv.depthwise_weight": np.zeros((1, 2, 2))}
    >>> write_state(State({"conv": form}, arrays), "trained.safetensors")
    >>> fold_checkpoint("trained.safetensors", "folded.safetensors").changed[0].path
    'conv'
    """
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
    if not all_finite(kernel):
        raise NotFoldable(
            f"layer {layer.name!r}: the folded kernel is not finite; its trained weights have "
            "overflowed."
        )
    return kernel
