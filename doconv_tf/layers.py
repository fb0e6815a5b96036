"""What a Keras layer is in a canonical state: one function for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from doconv_core.maths.geometry import Geometry, cropped, padded, symmetric
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import REPLACED
from doconv_core.state.layers import (
    CHANNELS_FIRST,
    OWN,
    BatchNormSpec,
    EmbeddingSpec,
    GroupNormSpec,
    LayerForm,
    LayerNormSpec,
    LinearSpec,
    PReLUSpec,
    TransposedConvSpec,
)
from doconv_core.state.reading import (
    NoCounterpart,
    has_own_spec,
    in_outputs,
    is_composed,
    read_layer,
)
from doconv_tf.composed import ComposedConv
from doconv_tf.flattening import Flattenings
from doconv_tf.graph import Graph
from doconv_tf.kinds import LAYER_KINDS
from doconv_tf.ordinary import (
    CONVS,
    DEPTHWISE_CONVS,
    SEPARABLE_CONVS,
    TRANSPOSED_CONVS,
    is_replaced,
    pads,
    spec_of,
)
from doconv_tf.private import children

_layers = keras.layers
SPECIAL = "LoRA and quantized layers have no counterpart"


class Part(NamedTuple):
    """A layer, or a part of one, as a state has it.

    variables: by the entry's name. layout: the core's word for the weight's. positions: of the
    flattened image that its features are, which are to be put in canonical order; else None.
    """

    form: LayerForm
    variables: dict[str, Any]
    layout: str = "OI"
    positions: tuple[int, ...] | None = None


class Surroundings(NamedTuple):
    """What a model tells of its layers' neighbours."""

    graph: Graph
    flattenings: Flattenings


def surroundings(model: keras.Layer) -> Surroundings:
    """Return what the model's graphs, if it has any, tell of its layers' neighbours."""
    graph = Graph(model)
    return Surroundings(graph, Flattenings(graph))


def parts_of(path: str, layer: keras.Layer, around: Surroundings) -> dict[str, Part]:
    """Return what a layer that owns weights is in a state, by the path below its own.

    All but separable convolutions are one part, whose path is empty. Raises TypeError, by the path,
    for a layer without a counterpart, with a call of its own, or with other weights than its kind
    has.
    """
    own = own_weights(layer)
    path, names = path or layer.name, [weight.name for weight in own]
    special = getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False)
    obstacle = REPLACED if is_replaced(layer) else SPECIAL if special else None
    parts = read_layer(reader_of(layer), path, layer, names, around, obstacle=obstacle)
    expected = [variable for part in parts.values() for variable in part.variables.values()]
    if {id(weight) for weight in own} != {id(variable) for variable in expected}:
        raise TypeError(
            f"layer {path!r}, a {type(layer).__name__}, has {_names(own)}; expected "
            f"{_names(expected)}."
        )
    return parts


def own_weights(layer: keras.Layer) -> list[Any]:
    """Return the weights that are the layer's own, not those of a layer that it holds."""
    inherited = {id(weight) for child in children(layer) for weight in child.weights}
    return [weight for weight in layer.weights if id(weight) not in inherited]


def _names(variables: list[Any]) -> str:
    return ", ".join(repr(variable.name) for variable in variables)


def _part(
    layer: Any,
    around: Surroundings,
    spec: Any,
    layout: str = "OI",
    *,
    features: int | None = None,
    geometry: Geometry | None = None,
    **variables: Any,
) -> Part:
    """Return a layer as a state has it, with the variables that there are.

    features: of its input, where that may be a flattened image.
    """
    given = {name: variable for name, variable in variables.items() if variable is not None}
    found = None if features is None else around.flattenings.of(layer, features)
    if isinstance(spec, GroupNormSpec) and found is not None:
        found = OWN  # in another order, other features would make a group
    positions = found if isinstance(found, tuple) and geometry is None else None
    flattening = CHANNELS_FIRST if isinstance(found, tuple) else found
    kind = isinstance(layer, ComposedConv) and spec is layer.spec and layer.kind.name
    bias = not given.keys().isdisjoint({"bias", "beta"})
    form = LayerForm(spec, kind, bias, "gamma" in given, geometry, flattening)
    return Part(form, given, layout, positions)


def _convolution(
    layer: Any, around: Surroundings, layout: str, kernel: str = "kernel", **variables: Any
) -> Part:
    """Return a convolution as a state has it, with the zeros that are added before it."""
    padding = padded(pads(layer), around.graph.zeros_before(layer))
    geometry = Geometry(layer.strides, layer.dilation_rate, padding)
    if isinstance(layer, ComposedConv):
        spec, weights = layer.spec, layer.entries()
        features = layer.kind.conv(spec).in_channels
    else:
        spec, weights = spec_of(layer), {"weight": getattr(layer, kernel)}
        features = spec.in_channels
    return _part(
        layer, around, spec, layout, features=features, geometry=geometry, **weights, **variables
    )


def _conv(layer: Any, around: Surroundings) -> dict[str, Part]:
    return {"": _convolution(layer, around, "*IO", bias=layer.bias)}


def _depthwise(layer: Any, around: Surroundings) -> dict[str, Part]:
    return {"": _convolution(layer, around, "*CN", bias=layer.bias)}


def _dynamic_heads(layer: Any, around: Surroundings) -> dict[str, Part]:
    own = symmetric(layer.around) if any(layer.around) else pads(layer)
    padding = padded(own, around.graph.zeros_before(layer))
    geometry = Geometry(layer.strides, layer.dilation_rate, padding)
    names = ("squeeze_weight", "saliency_weight", "saliency_bias", "inactive")
    entries = {"weight": layer.kernel, **{name: getattr(layer, name) for name in names}}
    return {"": _part(layer, around, layer.spec, "*IO", geometry=geometry, **entries)}


def _separable(layer: Any, around: Surroundings) -> dict[str, Part]:
    """Return the two convolutions that a separable one is, as other frameworks have it."""
    ones, kernel = (1,) * layer.rank, layer.pointwise_kernel
    geometry = Geometry(ones, ones, symmetric((0,) * layer.rank))
    spec = ConvSpec(kernel.shape[-2], layer.filters, ones)
    return {
        "depthwise": _convolution(layer, around, "*CN", "depthwise_kernel"),
        "pointwise": _part(
            layer, around, spec, "*IO", geometry=geometry, weight=kernel, bias=layer.bias
        ),
    }


def _transposed(layer: Any, around: Surroundings) -> dict[str, Part]:
    outputs, channels = layer.kernel.shape[-2:]
    given = layer.output_padding or (None,) * len(layer.kernel_size)
    numbers = zip(layer.kernel_size, layer.strides, layer.dilation_rate, given, strict=True)
    crops = tuple(cropped(layer.padding, *each) for each in numbers)
    padding = padded(crops, in_outputs(around.graph.zeros_before(layer), layer.strides))
    part = _part(
        layer, around, TransposedConvSpec(channels, outputs, layer.kernel_size), "*OI",
        features=channels, weight=layer.kernel, bias=layer.bias,
        geometry=Geometry(layer.strides, layer.dilation_rate, padding),
    )  # fmt: skip
    return {"": part}


def _linear(layer: Any, around: Surroundings) -> dict[str, Part]:
    spec = LinearSpec(*layer.kernel.shape)
    weights = {"weight": layer.kernel, "bias": layer.bias}
    return {"": _part(layer, around, spec, "IO", features=spec.in_features, **weights)}


def _batch_norm(layer: Any, around: Surroundings) -> dict[str, Part]:
    _check_axis(layer, around)
    statistics = {"running_mean": layer.moving_mean, "running_var": layer.moving_variance}
    # Keras' momentum is the weight of the old statistics.
    spec = BatchNormSpec(layer.moving_mean.shape[0], layer.epsilon, 1 - layer.momentum)
    return _norm(layer, around, spec, **statistics)


def _layer_norm(layer: Any, around: Surroundings) -> dict[str, Part]:
    if layer.rms_scaling:
        raise NoCounterpart("rms_scaling has no counterpart")
    if len(layer.axis) != 1:
        raise NoCounterpart("a layer norm over several axes has no counterpart")
    rank, (axis,) = len(layer.get_build_config()["input_shape"]), layer.axis
    if axis not in (-1, rank - 1):
        raise NoCounterpart(
            f"a layer norm over axis {axis} of {rank}, which is not the last, has no counterpart"
        )
    return _norm(layer, around, LayerNormSpec(_features(layer), layer.epsilon))


def _check_axis(layer: Any, around: Surroundings) -> None:
    """Refuse a norm of each channel whose axis is not that of the channels, where it is seen."""
    for call in around.graph.calls(layer):
        tensor = call.input_tensors[0]
        rank, format_ = len(tensor.shape), around.flattenings.format_of(tensor)
        channels = {"channels_last": rank - 1, "channels_first": 1}.get(str(format_))
        if rank > 2 and channels is not None and layer.axis % rank != channels:
            raise NoCounterpart(
                f"its axis {layer.axis} is not that of the channels, {channels}, in the "
                f"{format_} image that it is given"
            )


def _group_norm(layer: Any, around: Surroundings) -> dict[str, Part]:
    _check_axis(layer, around)
    return _norm(layer, around, GroupNormSpec(_features(layer), layer.groups, layer.epsilon))


def _features(norm: Any) -> int:
    features: int = (norm.gamma if norm.gamma is not None else norm.beta).shape[0]
    return features


def _norm(layer: Any, around: Surroundings, spec: Any, **statistics: Any) -> dict[str, Part]:
    weights = {"gamma": layer.gamma, "beta": layer.beta, **statistics}
    return {"": _part(layer, around, spec, features=spec.features, **weights)}


def _prelu(layer: Any, around: Surroundings) -> dict[str, Part]:
    shape = layer.alpha.shape
    sizes = [n for n in shape if n != 1]
    shared = set(layer.shared_axes or ()) >= set(range(2, len(shape) + 1))
    channels = shape[-1] != 1 or (shape[0] != 1 and shared)  # last, or first of all
    if len(sizes) > 1 or (sizes and not channels):
        raise NoCounterpart(
            "a slope for each position has no counterpart; name the spatial axes in shared_axes"
        )
    spec = PReLUSpec(sizes[0] if sizes else 1)
    return {"": _part(layer, around, spec, features=spec.features, alpha=layer.alpha)}


def _embedding(layer: Any, around: Surroundings) -> dict[str, Part]:
    spec = EmbeddingSpec(*layer.embeddings.shape)
    return {"": _part(layer, around, spec, weight=layer.embeddings)}


FORMS: dict[type[Any], Callable[[Any, Surroundings], dict[str, Part]]] = {
    **dict.fromkeys(CONVS, _conv),
    **dict.fromkeys(DEPTHWISE_CONVS, _depthwise),
    **dict.fromkeys(SEPARABLE_CONVS, _separable),
    **dict.fromkeys(TRANSPOSED_CONVS, _transposed),
    _layers.Dense: _linear,
    _layers.BatchNormalization: _batch_norm,
    _layers.LayerNormalization: _layer_norm,
    _layers.GroupNormalization: _group_norm,
    _layers.PReLU: _prelu,
    _layers.Embedding: _embedding,
}


def reader_of(layer: keras.Layer) -> Callable[[Any, Surroundings], dict[str, Part]] | None:
    """Return the function for a layer of this very type; None where it has no counterpart."""
    cls: Any = type(layer)
    if has_own_spec(LAYER_KINDS, cls):
        return _dynamic_heads
    return FORMS.get(cls.ordinary if is_composed(LAYER_KINDS, cls) else cls)
