"""What the config of a `.keras` file tells of layers beyond their arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from doconv_core.cli.recognised import NORM, TRANSPOSED, group_of, nodes_of
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import BATCH_NORM, CONVOLUTION, LINEAR, Layer
from doconv_core.maths.geometry import Geometry, causal, cropped, same, symmetric
from doconv_core.maths.spec import as_tuple


class Told(NamedTuple):
    """What is told of one layer; None where nothing is.

    whole: whether the geometry's padding is all that its input gets, as no layer before it pads.
    activation: what the layer itself applies; "" for none. groups: of a group norm; 0 of a layer
    norm. transposed: whether the geometry is a transposed convolution's.
    """

    epsilon: float | None = None
    geometry: Geometry | None = None
    whole: bool = True
    activation: str | None = None
    groups: int | None = None
    transposed: bool = False


def told_by_config(checkpoint: Checkpoint, layers: Sequence[Layer]) -> dict[str, Told]:
    """Return what the config of a Keras file, if it has one, tells of each layer, by its name."""
    nodes = nodes_of(checkpoint)
    whole = not any(map(_may_pad, nodes.values()))
    return {
        layer.name: _of_layer(checkpoint, layer, nodes.get(group_of(layer)), whole)
        for layer in layers
    }


def _may_pad(node: Mapping[str, Any]) -> bool:
    """Return whether a layer may add zeros for the one behind it."""
    name, module = str(node["class_name"]), str(node.get("module") or "")
    known = module.partition(".")[0] in ("keras", "doconv_tf")
    return name.startswith("ZeroPadding") or name in ("Pad", "Lambda") or not known


def _of_layer(
    checkpoint: Checkpoint, layer: Layer, node: Mapping[str, Any] | None, whole: bool
) -> Told:
    if node is None:
        return Told()
    config = node["config"]
    if layer.kind in (BATCH_NORM, NORM):
        epsilon = config.get("epsilon")
        groups = _groups(checkpoint, layer, node) if layer.kind == NORM else None
        return Told(float(epsilon) if isinstance(epsilon, (int, float)) else None, groups=groups)
    if layer.kind not in (CONVOLUTION, TRANSPOSED, LINEAR):
        return Told()
    # The first half of a separable convolution applies none.
    activation = "" if layer.path.endswith(".depthwise") else _activation(config)
    if layer.kind == LINEAR or layer.kernel_shape is None or "strides" not in config:
        return Told(activation=activation)
    geometry = _geometry(layer, config)
    transposed = layer.kind == TRANSPOSED
    return Told(geometry=geometry, whole=whole, activation=activation, transposed=transposed)


def _groups(checkpoint: Checkpoint, layer: Layer, node: Mapping[str, Any]) -> int | None:
    if node["class_name"] != "GroupNormalization":
        return 0 if node["class_name"] == "LayerNormalization" else None
    groups = node["config"].get("groups")
    features = checkpoint.entries[layer.entries["weight"]].size
    return features if groups == -1 else groups if type(groups) is int else None


def _activation(config: Mapping[str, Any]) -> str | None:
    """Return the activation in a layer's config, by its name."""
    found = config.get("activation")
    if isinstance(found, dict):  # a layer, or a function of one's own
        inner = found.get("config")
        found = inner if isinstance(inner, str) else found.get("class_name")
    if found is None or isinstance(found, str):
        return "" if found in (None, "linear") else found
    return None


def _geometry(layer: Layer, config: Mapping[str, Any]) -> Geometry | None:
    size = (layer.kernel_shape or ())[2:]
    ones, none = (1,) * len(size), symmetric((0,) * len(size))
    if layer.path.endswith(".pointwise"):  # of a separable convolution, whose first half strides
        return Geometry(ones, ones, none)
    try:
        stride = as_tuple("strides", config["strides"], len(size))
        dilation = as_tuple("dilation_rate", config.get("dilation_rate", 1), len(size))
        if layer.kind == TRANSPOSED:
            return _transposed(size, stride, dilation, config)
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


def _transposed(
    size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    config: Mapping[str, Any],
) -> Geometry | None:
    padding, more = config.get("padding"), config.get("output_padding")
    if padding not in ("valid", "same"):
        return None
    rank = len(size)
    given = (None,) * rank if more is None else as_tuple("output_padding", more, rank, least=0)
    numbers = zip(size, stride, dilation, given, strict=True)
    return Geometry(stride, dilation, tuple(cropped(padding, *each) for each in numbers))
