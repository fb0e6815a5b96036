"""Keras' older HDF5: files of Keras 2, weights and whole models, and the `.h5` that Keras 3 writes.

Attributes tell what is in them: `layer_names` lists the layers of a model in its order, each a
group; `weight_names` lists the arrays of a group by the names of variables, `conv/kernel:0`. The
layers in a nested model have one group together, and what stands before a variable's own name tells
them apart. A whole model has its config in `model_config`, and the weights in a group of their own.
Source: the names and attributes in files that Keras 2.15 and 3.15 have written.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from doconv_core.files.entries import TENSORFLOW, CheckpointError, Entry, shown
from doconv_core.files.hdf5 import Hdf5
from doconv_core.files.keras_hdf5 import KerasHdf5Checkpoint
from doconv_core.files.keras_layers import (
    D_ENTRY,
    KerasLayers,
    folded_config,
    is_node,
    modern_config,
    parsed_config,
    snake_case,
    stem_of,
    stored_nodes,
)
from doconv_core.files.layers import OTHER, Layer, Sizes, find_layers
from doconv_core.files.reference import ORIGIN

Node: TypeAlias = Mapping[str, Any]

WEIGHTS, CONFIG, TRAINING = "model_weights", "model_config", "training_config"
OPTIMIZER, OWN = "optimizer_weights", "top_level_model_weights"
LAYERS, ARRAYS = "layer_names", "weight_names"
# The variables of a layer, in the order in which newer files number them.
VARIABLES = (
    ("gamma", "beta", "moving_mean", "moving_variance"),
    ("depthwise_kernel", "pointwise_kernel", "bias"),
    ("depthwise_kernel", "bias"),
    ("kernel", "bias"),
    ("embeddings",),
    ("alpha",),
)
KNOWN = {name for names in VARIABLES for name in names}
OF_D = ("d_kernel", "depthwise_kernel")  # the latter in older versions, beside a kernel
STATISTICS = {"moving_mean": "running_mean", "moving_variance": "running_var"}
WRAPPERS = ("TimeDistributed",)  # whose variables are those of the layer in it
PROJECTIONS = ("query", "key", "value", "attention_output", "einsum_dense")  # of three axes


def is_legacy(file: Hdf5) -> bool:
    """Return whether a file is of the older kind; of newer ones, the groups tell."""
    told = file.groups[""].attrs
    if CONFIG in told or any(f"{LAYERS}{part}" in told for part in ("", "0")):
        return True
    owners = (group for group in file.groups if group.rpartition("/")[2] == "vars")
    return bool(file.arrays) and next(owners, None) is None


class Found(NamedTuple):
    """The variables of a layer.

    top: the layer of the model that lists them. prefix: what stands before their own names. roles:
    their entries, by their own names. group: of the layer's config, if there is one. path: of the
    layer.
    """

    top: str
    prefix: str
    roles: dict[str, str]
    group: str = ""
    path: str = ""


class KerasLegacyCheckpoint(KerasHdf5Checkpoint):
    """An open HDF5 file of the older kind."""

    disorder = "lists last what is frozen in a layer, and does not tell the order of the model"

    def __init__(self, path: Path, file: Hdf5, sizes: Sizes) -> None:
        self.path, self._file = path, file
        self._root = WEIGHTS if WEIGHTS in file.groups else ""
        self._check_origin()
        text = file.attribute("", CONFIG)
        self._stored_config = parsed_config(path, CONFIG, text) if text else None
        self._folded_config = folded_config(self._stored_config)
        config = modern_config(self._stored_config)
        if config is not None and not is_node(config):
            raise CheckpointError(f"{path}: {CONFIG} is not the config of a Keras model.")
        tree = Names(config)
        self.config, self.nodes = config, tree.nodes if config else None
        kind = "Keras" if config else "Keras weights"
        self.format = f"{kind} (older HDF5)"
        self.others = (OPTIMIZER,) if OPTIMIZER in file.groups else ()
        self._is_listed = file.texts(self._root, LAYERS) is not None
        found = _with_paths(tree, self._listed() if self._is_listed else self._by_path())
        names = [name for each in found for name in each.roles.values()]
        self.entries = {n: Entry(n, tuple(file.arrays[n].shape), file.dtype(n)) for n in names}
        self._check_all(names)
        self._groups = {name: x.group for x in found for name in x.roles.values()}
        self.layers = tuple(self._layers(found, tree.nodes, sizes))
        several = Counter(each.top for each in found)
        settled = all(x.group in tree.nodes for x in found if several[x.top] > 1)
        self.ordered = self._is_listed and settled
        training = file.attribute("", TRAINING)
        self._note_unfolded(_json(training), "optimizer_config")
        sizes.check_used()

    def _check_origin(self) -> None:
        """Raise CheckpointError for arrays whose order Keras 2 changes when it loads them."""
        version = self._file.attribute(self._root, "keras_version")
        backend = self._file.attribute(self._root, "backend")
        problem = ""
        if version.startswith(("0.", "1.")):
            problem = f"was written by Keras {shown(version)}"
        elif backend in ("theano", "cntk"):
            problem = f"was written with the backend {backend}"
        if problem:
            raise CheckpointError(
                f"{self.path} {problem}, whose arrays are in another order; load it in Keras 2 "
                "with TensorFlow, and save it again."
            )

    def _listed(self) -> Iterator[Found]:
        """Yield the layers in the order in which the file lists them."""
        tops = self._file.texts(self._root, LAYERS) or []
        own = [OWN] if _in(self._root, OWN) in self._file.groups and OWN not in tops else []
        for top in [*tops, *own]:
            group = _in(self._root, top)
            names = self._file.texts(group, ARRAYS) if group in self._file.groups else None
            if names is None:
                raise CheckpointError(
                    f"{self.path} lists the layer {shown(top)}, and has no group of that name that "
                    "lists its arrays."
                )
            by_prefix: dict[str, dict[str, str]] = {}
            for name in names:
                if f"{group}/{name}" not in self._file.arrays:
                    raise CheckpointError(
                        f"{self.path} lists the array {shown(name)} of the layer {shown(top)}, and "
                        "has none of that name."
                    )
                prefix, _, own_name = name.rpartition("/")
                _add(by_prefix.setdefault(prefix, {}), own_name, f"{group}/{name}")
            for prefix, roles in by_prefix.items():
                yield Found("" if top == OWN else top, prefix, roles)

    def _by_path(self) -> Iterator[Found]:
        """Yield the layers of a file without lists, by the groups of their arrays."""
        by_group: dict[str, dict[str, str]] = {}
        for name in filter(self._is_of_model, self._file.arrays):
            group, _, own_name = name.rpartition("/")
            _add(by_group.setdefault(group, {}), own_name, name)
        for group, roles in by_group.items():
            yield Found(group, group, roles)

    def _is_of_model(self, name: str) -> bool:
        return name.partition("/")[0] != OPTIMIZER

    def _check_all(self, names: list[str]) -> None:
        """Raise CheckpointError for an array that is listed twice, or not at all."""
        for name in filter(self._is_of_model, self._file.arrays):
            if name not in self.entries:
                raise CheckpointError(
                    f"{self.path}: the array {shown(name)} is in no layer's list of arrays."
                )
        if len(names) > len(self.entries):
            (twice, _), *_ = Counter(names).most_common(1)
            raise CheckpointError(f"{self.path} lists the array {shown(twice)} twice.")

    def _layers(
        self, found: Sequence[Found], nodes: Mapping[str, Node], sizes: Sizes
    ) -> Iterator[Layer]:
        keys = {f"{each.path}/{own}": name for each in found for own, name in each.roles.items()}
        reference = {
            name: layer
            for layer in find_layers(self.entries, keys, sizes, separators="/",
                                     framework=TENSORFLOW, layouts=("*IO",))
            if layer.origin.startswith(ORIGIN)
            for name in layer.entries.values()
        }  # fmt: skip
        for each in found:
            told = next((reference[n] for n in each.roles.values() if n in reference), None)
            if told is not None:
                yield told
                continue
            numbers, node = self._read_variables(each, nodes.get(each.group))
            finder = KerasLayers(self._file, {each.path: node}, self.entries)
            own = {name: own for own, name in each.roles.items()}
            for layer in finder.parts(each.path, each.path, numbers, sizes):
                yield layer if layer.kind != OTHER else _other(layer, own)

    def _read_variables(self, found: Found, node: Node | None) -> tuple[dict[str, str], Node]:
        """Return a layer's entries as newer files number them, and its config so far as told."""
        numbered = {number: found.roles[own] for own, number in _numbered(found.roles).items()}
        numbers = dict(sorted(numbered.items(), key=lambda item: (not item[0].isdigit(), item[0])))
        if node is None:
            entries = {own: self.entries[name] for own, name in found.roles.items()}
            node = {"class_name": _class_of(entries, found.prefix), "config": {}}
        config = dict(node["config"])
        if "moving_mean" in found.roles:
            config |= {"scale": "gamma" in found.roles, "center": "beta" in found.roles}
        return numbers, {**node, "config": config}

    def with_blocks(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """Return layers as they are: this package's of branches are in none of these files."""
        return (*layers,)

    def group(self, layer: Layer) -> str:
        """Return the group by which `nodes` has a layer's config."""
        return self._groups[next(iter(layer.entries.values()))]

    def write_folded(self, target: Path, report: Callable[[], None]) -> None:
        """Write the file, folded, as `Checkpoint.write_folded` says."""
        self._check_foldable()
        changed = self._folded_config != self._stored_config
        self._write(
            target, report, {}, {CONFIG: json.dumps(self._folded_config)} if changed else {}
        )


class Names:
    """What the config of a model, if there is one, tells of layers by their names.

    nodes: each layer's config, by its group in a newer file.
    """

    def __init__(self, config: Node | None) -> None:
        self.nodes: dict[str, Node] = {}
        self.paths: dict[str, tuple[str, ...]] = {}  # the names from the model's own down
        self._by_ending: dict[tuple[str, str], list[str]] = {}  # by the model's own layer, too
        for group, _, node in () if config is None else stored_nodes(config):
            if group in self.nodes:
                continue
            parent = self.paths.get(_parent(group), ())
            name = node["config"].get("name")
            if not isinstance(name, str) or (not parent and group.count("/") != 1):
                continue
            self.nodes[group], path = node, (*parent, name)
            self.paths[group] = path
            for start in range(len(path)):
                key = path[0], "/".join(path[start:])
                self._by_ending.setdefault(key, []).append(group)

    def find(self, top: str, prefix: str) -> str:
        """Return the group of the layer whose variables' names begin so, "" where that is open."""
        for start in _starts(prefix):
            groups = self._by_ending.get((top, prefix[start:]), ())
            if groups:
                return self._inner(groups[0]) if len(groups) == 1 else ""
        return ""

    def _inner(self, group: str) -> str:
        """Return the group of the layer in one that has no variables but those."""
        inner = f"{group}/layer"
        wraps = self.nodes[group]["class_name"] in WRAPPERS and inner in self.nodes
        return self._inner(inner) if wraps else group

    def around(self, top: str, prefix: str) -> str:
        """Return the group of the closest layer that has the one whose variables begin so."""
        while prefix:
            prefix = prefix.rpartition("/")[0]
            group = self.find(top, prefix)
            if group:
                return group
        return self.find(top, top)


def _with_paths(tree: Names, found: Iterable[Found]) -> list[Found]:
    """Return the layers with their groups and paths, those of one list in the config's order."""
    by_top: dict[str, list[Found]] = {}
    for each in found:
        group = tree.find(each.top, each.prefix)
        if not group and (outer := tree.around(each.top, each.prefix)):
            group = f"{outer}/{each.prefix}"
        by_top.setdefault(each.top, []).append(each._replace(group=group))
    place = {group: number for number, group in enumerate(tree.nodes)}
    used: set[str] = set()
    done = []
    for inner in by_top.values():
        if all(each.group in place for each in inner):
            inner.sort(key=lambda each: place[each.group])
        for each in inner:
            path = ".".join(tree.paths.get(each.group, ())) or _path(each.top, each.prefix)
            if path in used:
                path = f"{each.top}/{each.prefix}".replace("/", ".")
            used.add(path)
            done.append(each._replace(path=path))
    return done


def _path(top: str, prefix: str) -> str:
    """Return the path of a layer of which no config tells: names below that of the model's own."""
    before, own, below = f"/{prefix}/".rpartition(f"/{top}/") if top else ("", "", "")
    inner = below if own else before or prefix * bool(top)
    return ".".join(filter(None, (top, inner.strip("/").replace("/", "."))))


def _numbered(names: Iterable[str]) -> dict[str, str]:
    """Return the names that a layer's variables have in newer files, where they are numbers."""
    names = [*names]
    d = next((n for n in OF_D if n in names and (n == OF_D[0] or "kernel" in names)), "")
    rest = {name for name in names if name in KNOWN} - {d}
    order = next((known for known in VARIABLES if rest <= {*known}), ())
    numbers = {n: str(i) for i, n in enumerate(name for name in order if name in rest)}
    return {name: D_ENTRY if name == d else numbers.get(name, name) for name in names}


def _class_of(entries: Mapping[str, Entry], prefix: str) -> str:
    """Return the class of an ordinary layer by its variables, "" where they leave it open."""
    names = {*entries}
    for name, some, others in (
        ("BatchNormalization", {"moving_mean", "moving_variance"}, {"gamma", "beta"}),
        ("LayerNormalization", {"gamma", "beta"}, set()),
        ("Embedding", {"embeddings"}, set()),
        ("PReLU", {"alpha"}, set()),
    ):
        if some <= names <= some | others:
            return name
    depthwise = "depthwise_kernel" in names
    own = "depthwise_kernel" if depthwise else "kernel"
    if own not in names or not names <= {own, "pointwise_kernel", "bias"}:
        return ""
    kernel = entries[own].shape
    rank, stem = len(kernel) - 2, stem_of(prefix.rpartition("/")[2])[0]
    if "pointwise_kernel" in names:
        return f"SeparableConv{rank}D" if depthwise else ""
    if rank == 1 and stem in PROJECTIONS:
        return ""
    biases = {
        f"Conv{rank}D" if rank else "Dense": kernel[-1:],
        f"Conv{rank}DTranspose": kernel[-2:-1],
        f"DepthwiseConv{rank}D": (prod(kernel[-2:]),),
    }
    fitting = [n for n, shape in biases.items() if names == {own} or entries["bias"].shape == shape]
    if depthwise:
        return next((name for name in fitting if name.startswith("Depthwise")), "")
    named = (name for name in fitting if snake_case(name) == stem)
    return next(named, next((n for n in fitting if not n.startswith("Depthwise")), ""))


def _other(layer: Layer, own: Mapping[str, str]) -> Layer:
    """Return a layer of no known kind, whose entries have their own names."""
    names = (own[name] for name in layer.entries.values())
    roles = {STATISTICS.get(n, n): e for n, e in zip(names, layer.entries.values(), strict=True)}
    return dataclasses.replace(layer, entries=roles)


def _add(roles: dict[str, str], name: str, entry: str) -> None:
    """Add an entry by a variable's own name, without the `:0` behind it where that tells enough."""
    short = re.sub(r":\d+\Z", "", name)
    roles[name if short in roles else short] = entry


def _json(text: str) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:  # of how the model was trained, which is none of a fold's concern
        return None


def _starts(name: str) -> Iterator[int]:
    """Yield where a name's parts begin, from the first on."""
    yield 0
    yield from (match.end() for match in re.finditer("/", name))


def _parent(group: str) -> str:
    """Return the group of the layer that has the one of this group."""
    parent = group.rpartition("/")[0]
    return parent.removesuffix("/layers")


def _in(group: str, name: str) -> str:
    return f"{group}/{name}" if group else name
