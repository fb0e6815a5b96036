"""What a file tells of its layers beyond their arrays, such as strides and epsilons.

Canonical states and `.keras` files do; the others hold arrays alone. Where both files of a
conversion tell, they must agree; where one does, the network of the other must have the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from doconv_core.cli.errors import IMPOSSIBLE, Failure
from doconv_core.cli.keras_told import Told, told_by_config
from doconv_core.cli.recognised import KERAS, STATE, TRANSPOSED, framework_of
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import Layer
from doconv_core.maths.geometry import Geometry, Pad
from doconv_core.models.report import place
from doconv_core.state.file import read_state
from doconv_core.state.layers import LayerForm

OUT, IN = "OUT", "IN"


class Required(NamedTuple):
    """What the network of one file, `IN` or `OUT`, must have in layers, as the other's tell."""

    network: str
    what: str
    layers: list[str]


def required_without_template(checkpoint: Checkpoint, layers: Sequence[Layer]) -> list[Required]:
    """Return what the network that OUT is for must have, by what IN tells."""
    told = _told(checkpoint, layers)
    return _grouped((OUT, text, layer) for layer in layers for text in _texts(told[layer.name]))


def compare_told(
    source: Checkpoint,
    target: Checkpoint,
    pairs: Sequence[tuple[Layer, Layer]],
    ignore_geometry: bool,
) -> list[Required]:
    """Return what cannot be compared in the two files, for the network of the other to have.

    Raises Failure where both tell and differ; of geometries, unless they are to be ignored.
    """
    theirs = _told(source, [layer for layer, _ in pairs])
    ours = _told(target, [layer for _, layer in pairs])
    found = []
    for layer, other in pairs:
        left, right = theirs[layer.name], ours[other.name]
        _check_epsilon(source, layer, left, target, right)
        _check_groups(source, layer, left, target, right)
        if not ignore_geometry:
            _check_geometry(source, layer, left, target, right)
        unseen = _open_padding(left, right)
        told = _without(left, right, unseen)
        found += [(OUT, text, layer) for text in _texts(told)]
        found += [(IN, text, other) for text in _texts(_without(right, left))]
    return _grouped(found)


def _check_epsilon(
    source: Checkpoint, layer: Layer, left: Told, target: Checkpoint, right: Told
) -> None:
    if left.epsilon is None or right.epsilon is None:
        return
    if np.float32(left.epsilon) != np.float32(right.epsilon):  # in which a backend may keep it
        raise Failure(
            f"{place(layer.name)} adds epsilon={left.epsilon:g} to the variance in {source.path}, "
            f"{right.epsilon:g} in {target.path}; build the layer there with {left.epsilon:g}, and "
            "save it again.",
            IMPOSSIBLE,
        )


def _check_groups(
    source: Checkpoint, layer: Layer, left: Told, target: Checkpoint, right: Told
) -> None:
    if left.groups is None or right.groups is None or left.groups == right.groups:
        return
    raise Failure(
        f"{place(layer.name)} is {_norm(left.groups)} in {source.path}, {_norm(right.groups)} in "
        f"{target.path}; build the layer there as it is here, and save it again.",
        IMPOSSIBLE,
    )


def _norm(groups: int) -> str:
    return f"a group norm of {groups} groups" if groups else "a layer norm"


def _check_geometry(
    source: Checkpoint, layer: Layer, left: Told, target: Checkpoint, right: Told
) -> None:
    if left.geometry is None or right.geometry is None:
        return
    differences = left.geometry.differences(right.geometry)
    if not (left.whole and right.whole):
        differences = {n: d for n, d in differences.items() if not n.startswith("padding")}
    if differences:
        told = "; ".join(
            f"{name} is {theirs} in {source.path}, {ours} in {target.path}"
            for name, (theirs, ours) in differences.items()
        )
        raise Failure(
            f"{place(layer.name)} would compute something else with the same weights: {told}; "
            "build the layer there with the same, and save it again, or, where something that the "
            "files do not tell makes up for it, use --ignore geometry.",
            IMPOSSIBLE,
        )


def _open_padding(left: Told, right: Told) -> bool:
    """Return whether paddings differ, but another layer may pad."""
    if left.geometry is None or right.geometry is None or (left.whole and right.whole):
        return False
    return left.geometry.padding != right.geometry.padding


def _without(told: Told, other: Told, keep_geometry: bool = False) -> Told:
    """Return what is told here and not there; of activations, which may be layers, also others."""
    return told._replace(
        epsilon=None if other.epsilon is not None else told.epsilon,
        geometry=told.geometry if other.geometry is None or keep_geometry else None,
        activation=None if other.activation == told.activation else told.activation,
        groups=None if other.groups is not None else told.groups,
    )


def _texts(told: Told) -> list[str]:
    """Return what a layer must have, in words, without what layers have unless asked."""
    texts = [] if told.epsilon is None else [f"epsilon {told.epsilon:g}"]
    texts += [f"{told.groups} groups"] * bool(told.groups)
    texts += [f"activation {told.activation}"] * bool(told.activation)
    moves = "" if told.geometry is None else _moves(told.geometry, told.transposed)
    return texts + [moves] * bool(moves)


def _moves(geometry: Geometry, transposed: bool) -> str:
    parts = [
        f"{name} {'x'.join(map(str, values))}"
        for name, values in (("stride", geometry.stride), ("dilation", geometry.dilation))
        if any(value != 1 for value in values)
    ]
    if any(pad != (0, 0) for pad in geometry.padding):
        mode = "" if geometry.padding_mode == "zeros" else f" ({geometry.padding_mode})"
        padding = _cropped(geometry.padding) if transposed else ""
        parts.append(padding or f"padding {'x'.join(map(_pad, geometry.padding))}{mode}")
    return ", ".join(parts)


def _cropped(padding: Sequence[Pad]) -> str:
    """Return the padding of a transposed convolution, as PyTorch and Gluon call it, if they can."""
    pairs = [pad for pad in padding if not isinstance(pad, str)]
    if len(pairs) < len(padding) or not all(before >= max(after, 0) for before, after in pairs):
        return ""
    more = [before - after for before, after in pairs]
    text = f"padding {'x'.join(str(before) for before, _ in pairs)}"
    return f"{text}, output padding {'x'.join(map(str, more))}" if any(more) else text


def _pad(pad: Pad) -> str:
    if isinstance(pad, str):
        return pad
    before, after = pad
    return str(before) if before == after else f"{before}+{after}"


def _grouped(found: Iterable[tuple[str, str, Layer]]) -> list[Required]:
    groups: dict[tuple[str, str], list[str]] = {}
    for network, text, layer in found:
        groups.setdefault((network, text), []).append(layer.name or "(the model itself)")
    return [Required(network, text, names) for (network, text), names in groups.items()]


def _told(checkpoint: Checkpoint, layers: Sequence[Layer]) -> dict[str, Told]:
    """Return what the file tells of each layer, by its name."""
    framework = framework_of(checkpoint)
    if framework == STATE:
        forms = read_state(checkpoint.path).layers
        return {layer.name: _of_state(layer, forms[layer.path]) for layer in layers}
    if framework == KERAS:
        return told_by_config(checkpoint, layers)
    return {layer.name: Told() for layer in layers}


def _of_state(layer: Layer, form: LayerForm) -> Told:
    groups = {"layer_norm": 0, "group_norm": getattr(form.spec, "groups", 0)}.get(form.kind)
    epsilon = getattr(form.spec, "epsilon", None)
    return Told(epsilon, form.geometry, groups=groups, transposed=layer.kind == TRANSPOSED)
