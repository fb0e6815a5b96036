"""What the config in a Keras file tells of the model's layers, and of what feeds each of them.

Sequential and functional models are followed, nested ones too. What a class of one's own does, a
Lambda, or the call of a subclassed model, cannot be seen; nothing is said of layers behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any, TypeAlias

from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.keras_layers import CLASSES, is_node, own_class, stored_nodes
from doconv_core.files.layers import BATCH_NORM, CONVOLUTION, LINEAR, NORM, TRANSPOSED, Layer
from doconv_core.maths.geometry import Geometry, causal, cropped, same, symmetric
from doconv_core.maths.spec import as_tuple
from doconv_core.state.agreement import Metadata
from doconv_core.state.flattening import Fed, Shape, Trace, Value, given, kind_of, shape_of

Node: TypeAlias = Mapping[str, Any]
Call: TypeAlias = "tuple[str, int]"

KNOWN = ("keras.layers", "keras.src.ops")  # modules whose classes are those of Keras
_MODELS = ("Sequential", "Functional", "Model")


def fed_layers(config: Node) -> dict[str, Fed]:
    """Return what each layer in the config of a model is given, by its group in the file."""
    walk = _Walk(config)
    if _is_model(config):
        walk.model(config, None)
    return walk.trace.fed()


class _Walk:
    def __init__(self, config: Node) -> None:
        # A layer that is shared is in a config several times, and has one group.
        self._groups: dict[int, str] = {}
        shared: dict[Any, str] = {}
        for group, _, node in stored_nodes(config):
            own = node.get("shared_object_id")
            own = own if isinstance(own, int) else id(node)
            self._groups[id(node)] = shared.setdefault(own, group)
        self.trace = Trace()

    def model(self, node: Node, values: Sequence[Value] | None) -> list[Value]:
        """Follow a model, given these tensors, or by its own input layers; return its outputs."""
        layers = node["config"].get("layers")
        if not isinstance(layers, list) or not all(map(is_node, layers)):
            return [Value()]
        if node["class_name"] == "Sequential":
            return self._sequence(layers, values)
        return self._graph(node["config"], layers, values)

    def _sequence(self, layers: Sequence[Node], values: Sequence[Value] | None) -> list[Value]:
        now = list(values or [])
        for layer in layers:
            if layer["class_name"] != "InputLayer":
                now = self._layer(layer, now or [Value()])
            elif values is None:
                now = [given(layer["config"])]
        return now or [Value()]

    def _graph(
        self, config: Node, layers: Sequence[Node], values: Sequence[Value] | None
    ) -> list[Value]:
        made: dict[Call, list[Value]] = {}
        inputs = [name for name, _, _ in _histories(config.get("input_layers"))]
        for number, name in enumerate(inputs):
            if values is not None:
                fits = len(values) == len(inputs) and isinstance(config["input_layers"], list)
                made[name, 0] = [values[number] if fits else Value()]
        calls = [
            (layer, (_name(layer), number), list(_tensors(call)))
            for layer in layers
            for number, call in enumerate(_calls(layer))
        ]
        # In older configs the calls of a model in the model are counted from the second on.
        used = {history[:2] for *_, needed in calls for history, _ in needed}
        used.update(history[:2] for history in _histories(config.get("output_layers")))
        late = {_name(x) for x in layers if _is_model(x) and (_name(x), len(_calls(x))) in used}
        calls = [(x, (key[0], key[1] + (key[0] in late)), needed) for x, key, needed in calls]
        lacking = [{history[:2] for history, _ in needed} - made.keys() for *_, needed in calls]
        waiting: dict[Call, list[int]] = {}
        for number, lacks in enumerate(lacking):
            for key in lacks:
                waiting.setdefault(key, []).append(number)
        ready = [number for number, lacks in enumerate(lacking) if not lacks]
        while ready:  # in the order in which they are listed, which is that of their calls
            layer, key, needed = calls[heappop(ready)]
            if key in made:
                continue
            made[key] = self._call(layer, needed, made)
            for number in waiting.get(key, ()):
                lacking[number].discard(key)
                if not lacking[number]:
                    heappush(ready, number)
        return [
            _picked(made.get((name, number), []), place)
            for name, number, place in _histories(config.get("output_layers"))
        ]

    def _call(
        self,
        layer: Node,
        needed: Sequence[tuple[tuple[str, int, int], Shape | None]],
        made: Mapping[Call, list[Value]],
    ) -> list[Value]:
        if layer["class_name"] == "InputLayer":
            return [given(layer["config"])]
        values = []
        for (name, number, place), shape in needed:
            value = _picked(made[name, number], place)
            values.append(value if shape is None else value._replace(shape=shape))
        return self._layer(layer, values or [Value()])

    def _layer(self, node: Node, values: Sequence[Value]) -> list[Value]:
        """Note what a layer is given, and return what it gives."""
        if _is_model(node):
            return self.model(node, values)
        build = node.get("build_config")
        shape = shape_of(build.get("input_shape")) if isinstance(build, dict) else None
        if shape is not None:
            values = [v if _is_known(v.shape) else v._replace(shape=shape) for v in values]
        group = self._groups.get(id(node), "")
        return [self.trace.call(group, _kind(node), node["config"], values)]


def _is_known(shape: Shape | None) -> bool:
    return shape is not None and None not in shape


def _kind(node: Node) -> str:
    """Return what kind of layer a config is of, "" for one that is not known here."""
    own, module = own_class(node), str(node.get("module") or "")
    if own:
        return kind_of(CLASSES[own], "keras.layers")
    return kind_of(node["class_name"], module) if module.startswith(KNOWN) else ""


def _is_model(node: Node) -> bool:
    """Return whether this is a model of Keras' own classes, whose call is known."""
    module = str(node.get("module") or "")
    return node["class_name"] in _MODELS and module.partition(".")[0] == "keras"


def _name(node: Node) -> str:
    return str(node.get("name", node["config"].get("name")))


def _picked(values: Sequence[Value], place: int) -> Value:
    if len(values) == 1 and place == 0:
        return values[0]
    return values[place] if 0 <= place < len(values) else Value()


def _calls(node: Node) -> list[Any]:
    """Return the calls of a layer in a functional model's config; an input layer has one."""
    calls = node.get("inbound_nodes")
    return calls if isinstance(calls, list) and calls else [{}]


def _tensors(call: Any) -> Iterator[tuple[tuple[str, int, int], Shape | None]]:
    """Yield where each tensor in a call's arguments comes from, and its shape, if it is told.

    In older configs a call is a list: of each tensor the place, and what else the call is given.
    """
    if isinstance(call, list):
        for history in _histories([e[:3] if isinstance(e, list) else None for e in call]):
            yield history, None
        more = [e[3] for e in call if isinstance(e, list) and len(e) == 4]
        for history in _histories(more):
            yield history, None
        return
    yield from _tensors_of(call)


def _tensors_of(call: Any) -> Iterator[tuple[tuple[str, int, int], Shape | None]]:
    if isinstance(call, dict) and call.get("class_name") == "__keras_tensor__":
        found = call.get("config")
        tensor = found if isinstance(found, dict) else {}
        for history in _histories(tensor.get("keras_history")):
            yield history, shape_of(tensor.get("shape"))
        return
    inner = call.values() if isinstance(call, dict) else call if isinstance(call, list) else ()
    for each in inner:
        yield from _tensors_of(each)


def _histories(value: Any) -> list[tuple[str, int, int]]:
    """Return the places in a nest of them: each the name of a layer, the call and the output."""
    if isinstance(value, list):
        if len(value) == 3 and [*map(type, value)] == [str, int, int]:
            return [(value[0], value[1], value[2])]
        return [found for each in value for found in _histories(each)]
    if isinstance(value, dict):
        return [found for each in value.values() for found in _histories(each)]
    return []


def may_pad(node: Node) -> bool:
    """Return whether a layer may add zeros for the one behind it."""
    name, module = str(node["class_name"]), str(node.get("module") or "")
    known = module.partition(".")[0] in ("keras", "doconv_tf")
    return name.startswith("ZeroPadding") or name in ("Pad", "Lambda") or not known


def metadata_of_node(checkpoint: Checkpoint, layer: Layer, node: Node, whole: bool) -> Metadata:
    """Return what a layer's config tells. whole: whether no layer of the model may pad."""
    config = node["config"]
    if layer.kind in (BATCH_NORM, NORM):
        found = config.get("epsilon")
        known = isinstance(found, (int, float)) and abs(found) <= sys.float_info.max
        epsilon = float(found) if known else None
        return Metadata(epsilon, _groups(checkpoint, layer, node) if layer.kind == NORM else None)
    if layer.kind not in (CONVOLUTION, TRANSPOSED, LINEAR):
        return Metadata()
    # The first half of a separable convolution applies none.
    activation = "" if layer.path.endswith(".depthwise") else _activation(config)
    if layer.kind == LINEAR or layer.kernel_shape is None or "strides" not in config:
        return Metadata(activation=activation)
    geometry = _geometry(layer, config)
    transposed = layer.kind == TRANSPOSED
    return Metadata(geometry=geometry, whole=whole, activation=activation, transposed=transposed)


def _groups(checkpoint: Checkpoint, layer: Layer, node: Node) -> int | None:
    if node["class_name"] != "GroupNormalization":
        return 0 if node["class_name"] == "LayerNormalization" else None
    groups = node["config"].get("groups")
    features = checkpoint.entries[layer.entries["weight"]].size
    return features if groups == -1 else groups if type(groups) is int else None


def _activation(config: Node) -> str | None:
    """Return the activation in a layer's config, by its name."""
    found = config.get("activation")
    if isinstance(found, dict):  # a layer, or a function of one's own
        inner = found.get("config")
        found = inner if isinstance(inner, str) else found.get("class_name")
    if found is None or isinstance(found, str):
        return "" if found in (None, "linear") else found
    return None


def _geometry(layer: Layer, config: Node) -> Geometry | None:
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
    config: Node,
) -> Geometry | None:
    padding, more = config.get("padding"), config.get("output_padding")
    if padding not in ("valid", "same"):
        return None
    rank = len(size)
    given = (None,) * rank if more is None else as_tuple("output_padding", more, rank, least=0)
    numbers = zip(size, stride, dilation, given, strict=True)
    return Geometry(stride, dilation, tuple(cropped(padding, *each) for each in numbers))
