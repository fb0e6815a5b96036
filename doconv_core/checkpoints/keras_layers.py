"""Which layers a Keras file holds, by the names of its groups, its config and its shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from doconv_core.checkpoint import BATCH_NORM, CONVOLUTION, LINEAR, OTHER, Entry, Layer
from doconv_core.checkpoints.arrays import FLOATS
from doconv_core.checkpoints.hdf5 import Hdf5
from doconv_core.checkpoints.keras_names import STEMS, own_class, snake_case, stem_of
from doconv_core.checkpoints.shapes import canonical_shape, over_parameterized
from doconv_core.checkpoints.sizes import Sizes
from doconv_core.spec import ConvSpec

D_ENTRY = "depthwise_kernel"
NOT_A_MODEL = ("optimizer",)
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
DEPTHWISE = ("depthwise_conv1d", "depthwise_conv2d")
NORM_ROLES = ("weight", "bias", "running_mean", "running_var")


class KerasLayers:
    """The layers of a Keras 3 file. nodes: the config of each, by its group, where there is one."""

    def __init__(
        self, file: Hdf5, nodes: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Entry]
    ) -> None:
        self._file, self._nodes, self._entries = file, nodes, entries

    def find(self, sizes: Sizes) -> tuple[Layer, ...]:
        """Return the layers that own arrays, in the order of their groups."""
        return tuple(self._layers(sizes))

    def _layers(self, sizes: Sizes) -> Iterator[Layer]:
        used: set[str] = set()
        for group in self.owners():
            roles = {name.rpartition("/")[2]: name for name in self._arrays_of(group)}
            if roles and group.partition("/")[0] not in NOT_A_MODEL:
                path = self._path(group)
                path = path if path not in used else group.replace("/", ".")
                used.add(path)
                yield self._layer(group, path, roles, sizes)

    def owners(self) -> Iterator[str]:
        """Yield the group of each layer, also of those that own nothing."""
        for group in self._file.groups:
            if group.rpartition("/")[2] == "vars":
                yield group.rpartition("/")[0]

    def is_owner(self, group: str) -> bool:
        """Return whether a group is a layer's, and not a list's."""
        return _in(group, "vars") in self._file.groups

    def _arrays_of(self, group: str) -> list[str]:
        prefix = _in(group, "vars") + "/"
        found = [n for n in self._entries if n.startswith(prefix) and "/" not in n[len(prefix) :]]
        return sorted(found, key=lambda name: (not name[len(prefix) :].isdigit(), len(name), name))

    def _path(self, group: str) -> str:
        """Return the names of the layers from the model's own down, joined by dots."""
        names, at = [], ""
        for step in group.split("/") if group else []:
            at = _in(at, step)
            if self.is_owner(at):
                names.append(self._file.attribute(_in(at, "vars"), "name") or step)
        return ".".join(names)

    def _class(self, group: str) -> str:
        """Return a layer's class in snake case, as far as anything tells it."""
        node = self._nodes.get(group)
        if node is not None:
            return snake_case(node["class_name"])
        parent, _, name = group.rpartition("/")
        if self.is_owner(parent):  # an attribute's name; the layer's own may be its class's
            name = self._file.attribute(_in(group, "vars"), "name")
        return stem_of(name)[0]

    def _layer(self, group: str, path: str, roles: dict[str, str], sizes: Sizes) -> Layer:
        stem, node = self._class(group), self._nodes.get(group)
        shapes = {name: self._entries[name] for name in roles.values()}
        config = node["config"] if node is not None else {}
        if D_ENTRY in roles and "0" in roles:
            found = _over_parameterized(path, stem, roles, shapes, config, sizes)
            if found is not None:
                foreign = node is not None and not own_class(node)
                return _not_ours(found, node["class_name"]) if node and foreign else found
        own = stem in STEMS
        stem = STEMS.get(stem, stem)
        first = self._entries[roles["0"]] if "0" in roles else None
        if first is None or first.dtype not in FLOATS:
            return Layer(path, OTHER, roles)
        if stem == "batch_normalization":
            return _norm(path, roles, config)
        kind, layout = _guess(stem, first.shape)
        if kind is None or len(roles) > 2 or {*roles} - {"0", "1"}:
            return Layer(path, OTHER, roles)
        named = {"weight": roles["0"]} | ({"bias": roles["1"]} if "1" in roles else {})
        kernel = canonical_shape(first.shape, layout)
        layer = Layer(
            path, kind, named, "doconv" if own else "", kernel_shape=kernel, layout=layout
        )
        return _with_spec(layer, first.shape, config)


def _in(group: str, name: str) -> str:
    return f"{group}/{name}" if group else name


def _over_parameterized(
    path: str, stem: str, roles: dict[str, str], shapes: Mapping[str, Entry],
    config: Mapping[str, Any], sizes: Sizes,
) -> Layer | None:  # fmt: skip
    names = {"weight": roles["0"], "depthwise_weight": roles[D_ENTRY]}
    if "1" in roles:
        names["bias"] = roles["1"]
    if len(shapes[names["weight"]].shape) < 3 or len(shapes[names["depthwise_weight"]].shape) != 3:
        return None
    # Where nothing tells, "*IO" will do: an ungrouped layer and a depthwise one compose alike.
    layout = "*CN" if stem == "do_depthwise_conv2d" else "*IO"
    size = config.get("kernel_size")
    told = tuple(size) if isinstance(size, list) and all(type(k) is int for k in size) else None
    return over_parameterized(path, "", names, shapes, layout, sizes, told)


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


def _guess(stem: str, shape: tuple[int, ...]) -> tuple[str | None, str]:
    if stem in CONVOLUTIONS and len(shape) == CONVOLUTIONS.index(stem) + 3:
        return CONVOLUTION, "*IO"
    if stem in DEPTHWISE and len(shape) == DEPTHWISE.index(stem) + 3:
        return CONVOLUTION, "*CN"
    return (LINEAR if stem == "dense" and len(shape) == 2 else None), "*IO"


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
