"""What feeds each layer of a Keras model, as far as the config in its file tells.

Sequential and functional models are followed, nested ones too. What a class of one's own does, a
Lambda, or the call of a subclassed model, cannot be seen; nothing is said of layers behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from doconv_core.cli.keras_axes import (
    FLAT,
    OPEN,
    SAME,
    Shape,
    Value,
    given,
    makes_an_image,
    result,
    shape_of,
)
from doconv_core.files.keras_names import is_node, stored_nodes

Node: TypeAlias = Mapping[str, Any]
Call: TypeAlias = "tuple[str, int]"

_MODELS = ("Sequential", "Functional", "Model")


class Fed(NamedTuple):
    """What a layer is given. image: channels and size, channels first, of one that is flattened.

    It is () where there is none, and None where that is not known; a size may be None. outward:
    whether what the layer gives becomes an image.
    """

    image: Shape | None = None
    outward: bool = False


def fed_layers(config: Node) -> dict[str, Fed]:
    """Return what each layer in the config of a model is given, by its group in the file."""
    walk = _Walk(config)
    if _is_model(config):
        walk.model(config, None)
    return walk.fed()


class _Walk:
    def __init__(self, config: Node) -> None:
        # A layer that is shared is in a config several times, and has one group.
        self._groups: dict[int, str] = {}
        shared: dict[Any, str] = {}
        for group, _, node in stored_nodes(config):
            own = node.get("shared_object_id")
            own = own if isinstance(own, int) else id(node)
            self._groups[id(node)] = shared.setdefault(own, group)
        self._images: dict[str, set[Shape | None]] = {}
        self._outward: set[str] = set()

    def fed(self) -> dict[str, Fed]:
        return {
            group: Fed(next(iter(images)) if len(images) == 1 else None, group in self._outward)
            for group, images in self._images.items()
        }

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
        todo = [
            (layer, (_name(layer), number), call)
            for layer in layers
            for number, call in enumerate(_calls(layer))
        ]
        while todo:  # once, in general, as layers are listed in the order of their calls
            left = []
            for layer, key, call in todo:
                needed = list(_tensors(call))
                if all(history[:2] in made for history, _ in needed):
                    if key not in made:
                        made[key] = self._call(layer, needed, made)
                else:
                    left.append((layer, key, call))
            if len(left) == len(todo):
                break
            todo = left
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
            values = [v if v.shape is not None else v._replace(shape=shape) for v in values]
        group, found = self._groups.get(id(node)), result(node, values)
        if group is None:
            return [found]
        self._images.setdefault(group, set()).add(_image(values[0]))
        if makes_an_image(node, values[0]):
            self._outward |= values[0].makers
        if node["class_name"] == "Dense":
            found = found._replace(makers=frozenset({group}))
        return [found]


def _is_model(node: Node) -> bool:
    """Return whether this is a model of Keras' own classes, whose call is known."""
    module = str(node.get("module") or "")
    return node["class_name"] in _MODELS and module.partition(".")[0] == "keras"


def _image(value: Value) -> Shape | None:
    if value.order == FLAT:
        return value.image
    # A tensor of several axes has its features on the last, unless nothing is known of it.
    return None if value.order == OPEN or (value.order != SAME and value.is_vector) else ()


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
    """Yield where each tensor in a call's arguments comes from, and its shape."""
    if isinstance(call, dict) and call.get("class_name") == "__keras_tensor__":
        told = call.get("config")
        told = told if isinstance(told, dict) else {}
        for history in _histories(told.get("keras_history")):
            yield history, shape_of(told.get("shape"))
        return
    inner = call.values() if isinstance(call, dict) else call if isinstance(call, list) else ()
    for each in inner:
        yield from _tensors(each)


def _histories(value: Any) -> list[tuple[str, int, int]]:
    """Return the places in a nest of them: each the name of a layer, the call and the output."""
    if isinstance(value, list):
        if len(value) == 3 and [*map(type, value)] == [str, int, int]:
            return [(value[0], value[1], value[2])]
        return [found for each in value for found in _histories(each)]
    if isinstance(value, dict):
        return [found for each in value.values() for found in _histories(each)]
    return []
