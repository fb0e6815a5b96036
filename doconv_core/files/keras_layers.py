"""Which layers a Keras file holds, and how Keras names them, before and after folding.

In a file, a layer that is an attribute of another has the attribute's name. Those in a list or dict
have their class's name in snake case, with a number from the second one on. So where a
`do_conv2d_1` becomes a `conv2d`, its number depends on the ordinary ones before it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

from doconv_core.files.dynamic import NAMES, kernel_of
from doconv_core.files.entries import FLOATS, CheckpointError, Entry, once
from doconv_core.files.hdf5 import Hdf5
from doconv_core.files.layers import (
    BATCH_NORM,
    CANONICAL,
    CONVOLUTION,
    DYNAMIC,
    LINEAR,
    NORM,
    OTHER,
    SLOPES,
    TRANSPOSED,
    D,
    Layer,
    Sizes,
    canonical_shape,
    composed_by,
    other_kinds,
    over_parameterized,
    unlike,
)
from doconv_core.files.normed import PART
from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.spec import ConvSpec
from doconv_core.state.flattening import KERAS_LAYERS

MODELS = ("Sequential", "Functional", "Model", "InputLayer")
D_ENTRY = "depthwise_kernel"
DIGITS = {str(number) for number in range(10)}  # names of what ordinary layers own
NOT_A_MODEL = ("optimizer", "metrics")  # the latter in files of Keras 2
DEPTHWISE = ("depthwise_conv1d", "depthwise_conv2d")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", *DEPTHWISE)
SEPARABLE = ("separable_conv1d", "separable_conv2d")


class Stored(NamedTuple):
    """How Keras stores a class of layers: what kind it is, its weight's layout, and its entries.

    axes: of the weight, 0 for any number. entries: how many there may be. by_class: whether the
    name must be the class's for sure, as an attribute's may be another's.
    """

    kind: str
    layout: str
    axes: int
    entries: tuple[int, ...] = (1, 2)
    by_class: bool = False


STORED = {
    **{f"conv{n}d": Stored(CONVOLUTION, "*IO", n + 2) for n in (1, 2, 3)},
    **{f"depthwise_conv{n}d": Stored(CONVOLUTION, "*CN", n + 2) for n in (1, 2)},
    **{f"conv{n}d_transpose": Stored(TRANSPOSED, "*IO", n + 2, by_class=True) for n in (1, 2, 3)},
    "dense": Stored(LINEAR, "*IO", 2),
    "embedding": Stored(LINEAR, CANONICAL, 2, (1,), by_class=True),
    "layer_normalization": Stored(NORM, CANONICAL, 0, (2,), by_class=True),
    "group_normalization": Stored(NORM, CANONICAL, 0, (2,), by_class=True),
}
NORM_ROLES = ("weight", "bias", "running_mean", "running_var")
# The layers in one of this package's that its own config does not tell, by attribute.
_DYNAMIC: dict[str, dict[str, Any]] = {
    name: {"class_name": own, "module": "keras.layers", "config": config}
    for name, own, config in (
        ("norm", "BatchNormalization", {"epsilon": 1e-5}), ("heads", "DynamicHeads2D", {}),
    )
}  # fmt: skip
PARTS = dict.fromkeys(("dg_conv2d", "skipping_dg_conv2d"), _DYNAMIC)


class KerasLayers:
    """The layers of a Keras 3 file. nodes: the config of each, by its group, where there is one."""

    def __init__(
        self, file: Hdf5, nodes: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Entry]
    ) -> None:
        self._file, self._nodes, self._entries = file, nodes, entries
        self._arrays: dict[str, list[str]] = {}  # by the group that they lie in
        for name in entries:
            self._arrays.setdefault(name.rpartition("/")[0], []).append(name)

    def find(self, sizes: Sizes) -> tuple[Layer, ...]:
        """Return the layers that own arrays, in the order of their groups."""
        return tuple(self._layers(sizes))

    def _layers(self, sizes: Sizes) -> Iterator[Layer]:
        used: set[str] = set()
        for group in self.owners():
            roles = {name.rpartition("/")[2]: name for name in self._arrays_of(group)}
            if roles and group.partition("/")[0] not in NOT_A_MODEL:
                found = self.parts(group, self._path(group), roles, sizes)
                if any(layer.path in used for layer in found):
                    found = self.parts(group, group.replace("/", "."), roles, sizes)
                used.update(layer.path for layer in found)
                yield from found

    def owners(self) -> Iterator[str]:
        """Yield the group of each layer, also of those that own nothing."""
        for group in self._file.groups:
            if group.rpartition("/")[2] == "vars":
                yield group.rpartition("/")[0]

    def is_owner(self, group: str) -> bool:
        """Return whether a group is a layer's, and not a list's."""
        return _in(group, "vars") in self._file.groups

    def _arrays_of(self, group: str) -> list[str]:
        def order(name: str) -> tuple[bool, int, str]:
            return not name.rpartition("/")[2].isdigit(), len(name), name

        return sorted(self._arrays.get(_in(group, "vars"), ()), key=order)

    def _path(self, group: str) -> str:
        """Return the names of the layers from the model's own down, joined by dots."""
        names, at = [], ""
        for step in group.split("/") if group else []:
            at = _in(at, step)
            if self.is_owner(at):
                told = self._nodes.get(at, {"config": {}})["config"].get("name")
                names.append(self._file.attribute(_in(at, "vars"), "name") or str(told or step))
        return ".".join(names)

    def _class(self, group: str) -> str:
        """Return a layer's class in snake case, as far as anything tells it."""
        node = self._nodes.get(group)
        if node is not None:
            return snake_case(node["class_name"])
        parent, _, name = group.rpartition("/")
        if self.is_owner(parent):  # an attribute's name; the layer's own may be its class's
            whole = self._class(parent) if parent else ""
            part = PARTS.get(whole, {}).get(name)
            if part is not None:
                return snake_case(part["class_name"])
            match = PART.fullmatch(name)
            if match is not None and STEMS.get(whole, whole) in CONVOLUTIONS:
                return STEMS.get(whole, whole) if "conv" in name else "batch_normalization"
            name = self._file.attribute(_in(group, "vars"), "name")
        return stem_of(name)[0]

    def _is_certain(self, group: str) -> bool:
        """Return whether a layer's class is told by a config, or by its name in a list."""
        return group in self._nodes or group.split("/")[-2:-1] == ["layers"]

    def _foreign(self, group: str) -> str:
        """Return the class of a layer that is known not to be one of this package's, else ""."""
        node = self._nodes.get(group)
        if node is not None:
            return "" if own_class(node) else str(node["class_name"])
        parent, _, name = group.rpartition("/")
        told = bool(group) and not self.is_owner(parent)  # in a list, whose names are by class
        return "" if not told or stem_of(name)[0] in STEMS else stem_of(name)[0]

    def parts(self, group: str, path: str, roles: dict[str, str], sizes: Sizes) -> list[Layer]:
        """Return the layer whose group this is, or the two convolutions that it consists of."""
        stem, node = self._class(group), self._nodes.get(group)
        config = node["config"] if node is not None else {}
        shapes = {role: self._entries[name].shape for role, name in roles.items()}
        if not _is_separable(stem, shapes):
            return [self._layer(group, path, stem, roles, config, sizes)]
        below = f"{path}." if path else ""
        own = "do_" if D_ENTRY in roles or stem in STEMS else ""
        rank = len(shapes["1"]) - 2
        first = {role: roles[role] for role in ("0", D_ENTRY) if role in roles}
        second = {str(int(role) - 1): roles[role] for role in ("1", "2") if role in roles}
        return [
            self._layer(group, path_, stem_, roles_, config_, sizes)
            for path_, stem_, roles_, config_ in (
                (f"{below}depthwise", f"{own}depthwise_conv{rank}d", first, config),
                (f"{below}pointwise", f"conv{rank}d", second, {"groups": 1}),
            )
        ]

    def _layer(
        self, group: str, path: str, stem: str, roles: dict[str, str],
        config: Mapping[str, Any], sizes: Sizes,
    ) -> Layer:  # fmt: skip
        shapes = {name: self._entries[name] for name in roles.values()}
        found = None
        if D_ENTRY in roles and "0" in roles:
            found = _over_parameterized(path, stem, roles, shapes, config, sizes)
        elif not {*roles} <= DIGITS:
            found = _of_other_kind(path, stem, roles, shapes)
        if found is not None:
            foreign = self._foreign(group)
            return _not_ours(found, foreign) if foreign else found
        own = stem in STEMS
        layer = self._ordinary(group, path, STEMS.get(stem, stem), roles, config)
        if D_ENTRY in roles or (own and layer.kind != CONVOLUTION):
            note = unlike({role: self._entries[name] for role, name in roles.items()})
            # Four axes are those of a depthwise kernel, which is no D.
            is_kernel = D_ENTRY in roles and len(self._entries[roles[D_ENTRY]].shape) > 3
            return Layer(path, OTHER, roles, "" if is_kernel and not own else "doconv", note=note)
        return dataclasses.replace(layer, origin="doconv") if own else layer

    def _ordinary(
        self, group: str, path: str, stem: str, roles: dict[str, str], config: Mapping[str, Any]
    ) -> Layer:
        first = self._entries[roles["0"]] if "0" in roles else None
        if first is None or first.dtype not in FLOATS:
            return Layer(path, OTHER, roles)
        if stem == "batch_normalization":
            return _norm(path, roles, config)
        if stem == "dynamic_heads2d" and len(roles) == len(NAMES):
            return self._heads(path, roles)
        if stem == "p_re_lu" and len(roles) == 1:
            return Layer(path, OTHER, {SLOPES: roles["0"]})
        kind, layout, axes, entries, by_class = STORED.get(stem, Stored(OTHER, "", 0))
        fits = axes in (0, len(first.shape)) and len(roles) in entries and {*roles} <= {"0", "1"}
        if kind == OTHER or not fits or (by_class and not self._is_certain(group)):
            return Layer(path, OTHER, roles)
        named = {"weight": roles["0"]} | ({"bias": roles["1"]} if "1" in roles else {})
        kernel = None if kind == NORM else canonical_shape(first.shape, layout)
        return _with_spec(
            Layer(path, kind, named, kernel_shape=kernel, layout=layout), first.shape, config
        )

    def _heads(self, path: str, roles: dict[str, str]) -> Layer:
        """Return the heads of a dynamic group convolution."""
        named = dict(zip(NAMES, roles.values(), strict=True))
        entries = {role: self._entries[name] for role, name in named.items()}
        weight = entries["weight"]
        shape = canonical_shape(weight.shape, "*IO")
        kernel = kernel_of({**entries, "weight": dataclasses.replace(weight, shape=shape)})
        if kernel is None:
            return Layer(path, OTHER, roles)
        return Layer(path, DYNAMIC, named, "doconv", kernel_shape=kernel, layout="*IO")


def branches_of(nodes: Mapping[str, Mapping[str, Any]], layer: Layer) -> Mapping[str, Any] | None:
    """Return the config of the layer of branches of which a layer is a part, where it is told."""
    node = nodes.get(group_of(layer).rpartition("/")[0])
    return node["config"] if node is not None and own_class(node) in BRANCHED else None


def group_of(layer: Layer) -> str:
    """Return the group in which a layer's arrays are."""
    return next(iter(layer.entries.values())).rpartition("/vars/")[0]


def _in(group: str, name: str) -> str:
    return f"{group}/{name}" if group else name


def _is_separable(stem: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether these are a separable convolution's: depthwise and pointwise kernel, bias."""
    depthwise, pointwise = shapes.get("0", ()), shapes.get("1", ())
    rank = len(pointwise) - 2
    if not {*shapes} <= {"0", "1", "2", D_ENTRY} or rank not in (1, 2):
        return False
    named = STEMS.get(stem, stem)
    if named in SEPARABLE and rank != SEPARABLE.index(named) + 1:
        return False
    if D_ENTRY in shapes:  # which is enough to tell: no other of this package's has two kernels
        fits = len(depthwise) in (3, rank + 2)
    else:
        fits = named in SEPARABLE and len(depthwise) == rank + 2
    matrix = (prod(depthwise[-2:]), pointwise[-1])
    bias = shapes.get("2", pointwise[-1:])
    return fits and pointwise == (*(1,) * rank, *matrix) and bias == pointwise[-1:]


def _over_parameterized(
    path: str, stem: str, roles: dict[str, str], shapes: Mapping[str, Entry],
    config: Mapping[str, Any], sizes: Sizes,
) -> Layer | None:  # fmt: skip
    names = {"weight": roles["0"], D: roles[D_ENTRY]}
    if "1" in roles:
        names["bias"] = roles["1"]
    weight, depthwise = (shapes[name].shape for name in names.values() if name != names.get("bias"))
    if len(weight) < 3 or len(depthwise) != 3 or {*roles} - {"0", "1", D_ENTRY}:
        return None
    ordinary = STEMS.get(stem, "")
    size = config.get("kernel_size")
    told = tuple(size) if isinstance(size, list) and all(type(k) is int for k in size) else None
    if told is None and ordinary.endswith("1d"):
        told = depthwise[1:2]
    # Where nothing tells, "*IO" will do unless the bias tells better: an ungrouped layer and a
    # depthwise one compose alike.
    layer = Layer(path, CONVOLUTION, names, "doconv", composed=DO_CONV)
    for layout in _layouts(ordinary):
        found = over_parameterized(layer, shapes, layout, sizes, told)
        if found is not None and _is_of_rank(found, ordinary):
            return found
    return None


def _of_other_kind(
    path: str, stem: str, roles: dict[str, str], shapes: Mapping[str, Entry]
) -> Layer | None:
    """Return the layer of another kind that composes its kernel, by the names of its entries."""
    names = {{"0": "weight", "1": "bias"}.get(role, role): name for role, name in roles.items()}
    for layout in _layouts(STEMS.get(stem, "")):
        layer = Layer(path, CONVOLUTION, names, "doconv", layout=layout)
        found = next(filter(None, (composed_by(k, layer, shapes) for k in other_kinds())), None)
        if found is not None:
            return found
    return None


def _layouts(ordinary: str) -> tuple[str, ...]:
    """Return the layouts that a kernel may have, of a layer of this class, or an unknown one."""
    return ("*CN",) if ordinary in DEPTHWISE else ("*IO",) if ordinary else ("*IO", "*CN")


def _is_of_rank(layer: Layer, stem: str) -> bool:
    """Return whether a kernel has as many dimensions as the class is named for, if it is."""
    shape = layer.kernel_shape
    return shape is None or not stem or stem.endswith(f"conv{len(shape) - 2}d")


def _not_ours(layer: Layer, name: str) -> Layer:
    note = f"it is a {name}, which may compute something else than a layer of this package"
    return dataclasses.replace(layer, note=note, kernel_shape=None, spec=None)


def _norm(path: str, roles: dict[str, str], config: Mapping[str, Any]) -> Layer:
    """Return a batch norm: which of its entries is which, four or a config must tell."""
    absent = {
        r for r, key in (("weight", "scale"), ("bias", "center")) if not config.get(key, True)
    }
    expected = [role for role in NORM_ROLES if role not in absent]
    if len(expected) != len(roles):
        return Layer(path, OTHER, roles, note="a batch norm; which of its entries is which is open")
    return Layer(path, BATCH_NORM, dict(zip(expected, roles.values(), strict=True)))


def _with_spec(layer: Layer, shape: tuple[int, ...], config: Mapping[str, Any]) -> Layer:
    groups = shape[-2] if layer.layout == "*CN" else config.get("groups")
    if layer.kind != CONVOLUTION or type(groups) is not int or layer.kernel_shape is None:
        return layer
    outputs, per_group, *kernel_size = layer.kernel_shape
    try:
        spec = ConvSpec(per_group * groups, outputs, tuple(kernel_size), groups)
    except ValueError:  # the config is of another layer; the shapes alone count then
        return layer
    return dataclasses.replace(layer, spec=spec)


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
# Those of branches with batch norms: their parts' classes follow, and their config tells of both.
BRANCHED = {
    name: name.removeprefix("Normed")
    for name, value in REGISTERED.items()
    if value.startswith("doconv_tf.normed:")
}
CLASSES |= BRANCHED
OF_BRANCHES = {"rule", "branches", "small", "bn_options"}
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
    match = re.fullmatch(r"(.+?)_(\d{1,9})", name)  # of more, int() may refuse
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


def parsed_config(path: Path, name: str, text: str | bytes) -> dict[str, Any]:
    """Return the config of a model, a node; CheckpointError where the text is none.

    name: of where it is in the file.
    """
    try:
        config = json.loads(text, object_pairs_hook=once)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: in {name}, {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} is no JSON: {error}.") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: {name} is nested too deeply.") from error
    if not isinstance(config, dict) or not isinstance(config.get("class_name"), str):
        raise CheckpointError(f"{path}: {name} is not the config of a Keras model.")
    return cast(dict[str, Any], config)


def folded_config(value: Any) -> Any:
    """Return a config in which every layer of this package's is an ordinary one."""
    if isinstance(value, list):
        return [folded_config(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: folded_config(item) for key, item in value.items()}
    own = own_class(modern(value)) if is_node(value) else ""
    if own:
        gone = OF_D if own.startswith("DOConv") else OF_D_BESIDE
        if not own.startswith("DO"):
            gone = {option for kind in other_kinds() for option in kind.options} | OF_BRANCHES
        config = {key: item for key, item in value["config"].items() if key not in gone}
        config |= {"use_bias": True} if own in BRANCHED else {}
        if "module" in value:
            value |= {"module": "keras.layers", "registered_name": None}
        value |= {"class_name": CLASSES[own], "config": config}
    return value


def modern(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a node of an older config as newer ones have it, with the module of its class.

    Older ones name a class of others' `package>Class`, and Keras' own by the class alone.
    """
    if "module" in node:
        return node
    package, _, name = node["class_name"].rpartition(">")
    known = name in KERAS_LAYERS or name in MODELS
    module = package or ("keras.layers" if known else "")
    whole = node["class_name"] if package else None
    return {**node, "class_name": name, "module": module, "registered_name": whole}


def modern_config(value: Any) -> Any:
    """Return an older config as newer ones are: every node `modern`, and layers by their name."""
    if isinstance(value, list):
        return [modern_config(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: modern_config(item) for key, item in value.items()}
    if value.get("class_name") == "Sequential" and isinstance(value.get("config"), list):
        value["config"] = {"layers": value["config"]}  # as before Keras 2.2.3
    return modern(value) if is_node(value) else value


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
    own = PARTS.get(snake_case(node["class_name"]), {}) if is_kept(node) else {}
    for key, value in [*config.items(), *own.items()]:
        if is_node(value):
            step = f"{path}/{key}".lstrip("/"), f"{new_path}/{key}".lstrip("/")
            yield *step, value
            yield from stored_nodes(value, *step)
