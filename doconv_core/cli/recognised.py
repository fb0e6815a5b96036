"""A file's layers, with what the framework that wrote it tells of them beyond names and shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.keras_layers import snake_case, stem_of
from doconv_core.files.layers import CONVOLUTION, LINEAR, OTHER, Layer, canonical_shape
from doconv_core.maths.layout import to_canonical
from doconv_core.state.layers import LayerForm

Array = NDArray[Any]

PYTORCH, GLUON, KERAS, STATE = "PyTorch", "Gluon", "Keras", "doconv state"
NORM = "norm"  # a layer, group or instance norm: weight and bias
TRANSPOSED = "transposed convolution"
_NORMS = ("layer_normalization", "group_normalization")
_TRANSPOSED = ("conv1d_transpose", "conv2d_transpose", "conv3d_transpose")


def recognised_layers(checkpoint: Checkpoint) -> tuple[Layer, ...]:
    """Return the layers in the model's order, as far as that is told, norms known as such.

    Embeddings are linear layers, as they are where only shapes tell. A layer of another kind stays
    what it is.
    """
    framework = checkpoint.framework
    if framework == KERAS:
        return _keras(checkpoint)
    if framework == STATE:
        forms = checkpoint.forms or {}
        return tuple(_of_state(layer, forms[layer.path]) for layer in checkpoint.layers)
    return tuple(_norm(checkpoint, layer, framework) for layer in checkpoint.layers)


def weight_of(checkpoint: Checkpoint, layer: Layer) -> Array:
    """Return the weight of a linear layer, `(out, in)`, or of an embedding."""
    return to_canonical(checkpoint.read(layer.entries["weight"]), layer.layout)


def seems_channels_last(layer: Layer) -> bool:
    """Return whether a kernel taken to be channels-first looks like one of the other layout.

    Gluon keeps such kernels as `(O, *kernel, I/g)`, and of ordinary layers the file tells no more.
    Taken as `(O, I/g, *kernel)`, a 3×3 kernel of 64 channels would be a 3×64 one of 3 channels.
    """
    shape = layer.kernel_shape or ()
    if layer.kind != CONVOLUTION or layer.over_parameterized or len(shape) < 4:
        return False
    first, *between, last = shape[1:]
    if all(n == 1 for n in (first, *between)):
        return False  # channels-last, it would be one tap, whose numbers lie in the same order
    return all(n == first for n in between) and last > 2 * first and last >= 8


def _norm(checkpoint: Checkpoint, layer: Layer, framework: str) -> Layer:
    names = ("gamma", "beta") if framework == GLUON else ("weight", "bias")
    entries = [layer.entries.get(role, "") for role in ("weight", "bias")]
    if layer.kind != OTHER or len(layer.entries) != 2 or not all(entries):
        return layer
    a, b = (checkpoint.entries[name].shape for name in entries)
    named = all(entry.endswith(name) for entry, name in zip(entries, names, strict=True))
    return dataclasses.replace(layer, kind=NORM) if a == b and named else layer


def _of_state(layer: Layer, form: LayerForm) -> Layer:
    if form.kind in ("layer_norm", "group_norm"):
        return dataclasses.replace(layer, kind=NORM)
    if form.kind == "transposed_convolution":
        return dataclasses.replace(layer, kind=TRANSPOSED, kernel_shape=form.spec.kernel_shape)
    if form.kind == "embedding":
        shape = (form.spec.entries, form.spec.features)
        return dataclasses.replace(layer, kind=LINEAR, kernel_shape=shape)
    return layer


def _keras(checkpoint: Checkpoint) -> tuple[Layer, ...]:
    classes = _classes(checkpoint)
    layers = [_of_keras(checkpoint, layer, classes) for layer in checkpoint.layers]
    order = {group: place for place, group in enumerate(classes)}
    last = len(order)
    return tuple(sorted(layers, key=lambda layer: order.get(group_of(layer), last)))


def group_of(layer: Layer) -> str:
    """Return the group of a Keras file in which a layer's arrays are."""
    return next(iter(layer.entries.values())).rpartition("/vars/")[0]


def _classes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the class, in snake case, of each group that the config of a `.keras` file tells."""
    nodes = checkpoint.nodes or {}
    return {group: snake_case(n["class_name"]) for group, n in nodes.items()}


def _of_keras(checkpoint: Checkpoint, layer: Layer, classes: dict[str, str]) -> Layer:
    group = group_of(layer)
    stem = classes.get(group, "")
    if not stem and group.split("/")[-2:-1] == ["layers"]:  # there, Keras names by the class
        stem = stem_of(group.rpartition("/")[2])[0]
    if layer.kind != OTHER or "0" not in layer.entries:
        return layer
    names: Sequence[str] = list(layer.entries.values())
    shape = checkpoint.entries[names[0]].shape
    roles = {"weight": layer.entries["0"]}
    if "1" in layer.entries:
        roles["bias"] = layer.entries["1"]
    if len(roles) != len(names):
        return layer
    if stem in _NORMS and len(roles) == 2:
        return dataclasses.replace(layer, kind=NORM, entries=roles)
    if stem == "embedding" and len(shape) == 2 and len(roles) == 1:
        return dataclasses.replace(
            layer, kind=LINEAR, entries=roles, kernel_shape=shape, layout="OI*"
        )
    if stem in _TRANSPOSED and len(shape) == _TRANSPOSED.index(stem) + 3:
        kernel = canonical_shape(shape, "*IO")
        return dataclasses.replace(
            layer, kind=TRANSPOSED, entries=roles, kernel_shape=kernel, layout="*IO"
        )
    return layer
