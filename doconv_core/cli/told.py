"""What a file tells of its layers beyond their arrays, such as strides and epsilons.

Canonical states and `.keras` files do; the others hold arrays alone. Where both files of a
conversion tell, they must agree; where one does, the network of the other must have the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from doconv_core.checkpoint import BATCH_NORM, CONVOLUTION, Checkpoint, Layer
from doconv_core.cli.errors import IMPOSSIBLE, Failure
from doconv_core.cli.recognised import (
    KERAS,
    NORM,
    STATE,
    framework_of,
    group_of,
    nodes_of,
)
from doconv_core.geometry import Geometry, causal, same, symmetric
from doconv_core.model import place
from doconv_core.spec import as_tuple
from doconv_core.state import read_state

OUT, IN = "OUT", "IN"


class Told(NamedTuple):
    """What is told of one layer; None where nothing is.

    whole: whether the geometry's padding is all that its input gets, as no layer before it pads.
    """

    epsilon: float | None = None
    geometry: Geometry | None = None
    whole: bool = True


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
    """Return what is told here and not there."""
    return Told(
        None if other.epsilon is not None else told.epsilon,
        told.geometry if other.geometry is None or keep_geometry else None,
        told.whole,
    )


def _texts(told: Told) -> list[str]:
    """Return what a layer must have, in words, without what layers have unless asked."""
    texts = [] if told.epsilon is None else [f"epsilon {told.epsilon:g}"]
    geometry = told.geometry
    if geometry is None:
        return texts
    parts = [
        f"{name} {'x'.join(map(str, values))}"
        for name, values in (("stride", geometry.stride), ("dilation", geometry.dilation))
        if any(value != 1 for value in values)
    ]
    if any(pad != (0, 0) for pad in geometry.padding):
        mode = "" if geometry.padding_mode == "zeros" else f" ({geometry.padding_mode})"
        parts.append(f"padding {'x'.join(map(_pad, geometry.padding))}{mode}")
    return texts + [", ".join(parts)] * bool(parts)


def _pad(pad: tuple[int, int] | str) -> str:
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
        epsilons = {path: getattr(form.spec, "epsilon", None) for path, form in forms.items()}
        return {
            layer.name: Told(epsilons[layer.path], forms[layer.path].geometry) for layer in layers
        }
    nodes = nodes_of(checkpoint) if framework == KERAS else {}
    whole = not any(map(_may_pad, nodes.values()))
    return {layer.name: _of_keras(layer, nodes.get(group_of(layer)), whole) for layer in layers}


def _may_pad(node: Mapping[str, Any]) -> bool:
    """Return whether a layer may add zeros for the one behind it."""
    name, module = str(node["class_name"]), str(node.get("module") or "")
    known = module.partition(".")[0] in ("keras", "doconv_tf")
    return name.startswith("ZeroPadding") or name in ("Pad", "Lambda") or not known


def _of_keras(layer: Layer, node: Mapping[str, Any] | None, whole: bool) -> Told:
    if node is None:
        return Told()
    config = node["config"]
    if layer.kind in (BATCH_NORM, NORM):
        epsilon = config.get("epsilon")
        return Told(float(epsilon) if isinstance(epsilon, (int, float)) else None)
    if layer.kind != CONVOLUTION or layer.kernel_shape is None or "strides" not in config:
        return Told()
    return Told(geometry=_keras_geometry(layer, config), whole=whole)


def _keras_geometry(layer: Layer, config: Mapping[str, Any]) -> Geometry | None:
    size = (layer.kernel_shape or ())[2:]
    ones, none = (1,) * len(size), symmetric((0,) * len(size))
    if layer.path.endswith(".pointwise"):  # of a separable convolution, whose first half strides
        return Geometry(ones, ones, none)
    try:
        stride = as_tuple("strides", config["strides"], len(size))
        dilation = as_tuple("dilation_rate", config.get("dilation_rate", 1), len(size))
        paddings = {
            "valid": none,
            "same": same(size, stride, dilation),
            "causal": causal(size, dilation),
        }
        padding = paddings.get(config.get("padding", ""))
        if padding is None:
            return None
        return Geometry(stride, dilation, padding).for_kernel(size)
    except (TypeError, ValueError):  # of a class of one's own, whose config means something else
        return None
