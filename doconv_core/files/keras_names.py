"""How Keras 3 names what it stores, and what those names become when layers are folded.

In a file, a layer that is an attribute of another has the attribute's name. Those in a list or dict
have their class's name in snake case, with a number from the second one on. So where a
`do_conv2d_1` becomes a `conv2d`, its number depends on the ordinary ones before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

# Classes of backends by name, and what each is in a folded file: an entry point whose value names
# that class. None is loaded.
GROUP = "doconv.keras_classes"
REGISTERED = {entry.name: entry.value for entry in metadata.entry_points(group=GROUP)}
ORDINARY = "keras.layers:"
CLASSES = {
    name: folded.removeprefix(ORDINARY)
    for name, folded in REGISTERED.items()
    if folded.startswith(ORDINARY)
}
# What a config has of D. Those that have a `depth_multiplier` of their own call S otherwise.
OF_D = {"depth_multiplier", "depthwise_initializer", "depthwise_regularizer",
        "depthwise_constraint"}  # fmt: skip
OF_D_BESIDE = {"d_multiplier", "d_initializer", "d_regularizer", "d_constraint"}
PACKAGE, MODULE = "doconv>", "doconv_tf"


def snake_case(name: str) -> str:
    """Return a class name as Keras writes it in files."""
    name = re.sub(r"\W+", "", name)
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


STEMS = {snake_case(own): snake_case(ordinary) for own, ordinary in CLASSES.items()}


def numbered(stems: Sequence[str]) -> list[str]:
    """Return the names of layers of these classes, in one list."""
    counts: dict[str, int] = {}
    names = []
    for stem in stems:
        count = counts[stem] = counts.get(stem, -1) + 1
        names.append(f"{stem}_{count}" if count else stem)
    return names


def stem_of(name: str) -> tuple[str, int]:
    """Return the class that a name in a list stands for, and its number."""
    match = re.fullmatch(r"(.+?)_(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 0)


def own_class(node: Mapping[str, Any]) -> str:
    """Return which of this package's classes that are known a config is of, "" for none."""
    name = node.get("class_name")
    return name if isinstance(name, str) and name in CLASSES and _is_own(node, name) else ""


def _is_own(node: Mapping[str, Any], name: str) -> bool:
    module = str(node.get("module")).partition(".")[0]
    return node.get("registered_name") == f"{PACKAGE}{name}" or module == MODULE


def is_kept(node: Mapping[str, Any]) -> bool:
    """Return whether a config is of a class of this package's that stays when it is folded."""
    name = node["class_name"]
    return name in REGISTERED and name not in CLASSES and _is_own(node, name)


def unknown_class(value: Any) -> tuple[str, str]:
    """Return class and name of what is of this package in a config, and not known here, or "", "".

    Such as a layer of a later version.
    """
    name = value["class_name"] if is_node(value) else ""
    if name and name not in REGISTERED and _is_own(value, name):
        return value["class_name"], str(value["config"].get("name", ""))
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in inner if any(found := unknown_class(item))), ("", ""))


def is_node(value: Any) -> bool:
    """Return whether a value in a config is an object's."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("class_name"), str)
        and isinstance(value.get("config"), dict)
    )


def folded_config(value: Any) -> Any:
    """Return a config in which every layer of this package's is an ordinary one."""
    if isinstance(value, list):
        return [folded_config(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: folded_config(item) for key, item in value.items()}
    own = own_class(value) if is_node(value) else ""
    if own:
        gone = OF_D if own.startswith("DOConv") else OF_D_BESIDE
        config = {key: item for key, item in value["config"].items() if key not in gone}
        value |= {"module": "keras.layers", "class_name": CLASSES[own], "registered_name": None}
        value["config"] = config
    return value


def stored_nodes(
    node: Mapping[str, Any], path: str = "", new_path: str = ""
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the path in the file, the path in the folded file and the config of each layer.

    Of what a config tells: the layers of Sequential and functional models, and those in a layer's
    config. A layer that occurs twice is stored at the first of its paths.
    """
    config = node["config"]
    layers = config.get("layers")
    if isinstance(layers, list):
        inner = [layer for layer in layers if is_node(layer)]
        if node["class_name"] == "Sequential":
            inner = [layer for layer in inner if layer["class_name"] != "InputLayer"]
        old = numbered([snake_case(layer["class_name"]) for layer in inner])
        stems = [CLASSES.get(own_class(layer), layer["class_name"]) for layer in inner]
        new = numbered([snake_case(stem) for stem in stems])
        for layer, before, after in zip(inner, old, new, strict=True):
            step = f"{path}/layers/{before}".lstrip("/"), f"{new_path}/layers/{after}".lstrip("/")
            yield *step, layer
            yield from stored_nodes(layer, *step)
    for key, value in config.items():
        if is_node(value):
            step = f"{path}/{key}".lstrip("/"), f"{new_path}/{key}".lstrip("/")
            yield *step, value
            yield from stored_nodes(value, *step)
