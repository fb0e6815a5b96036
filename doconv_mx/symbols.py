"""Convolutions within a `SymbolBlock`, such as GluonCV's feature extractors: nodes of its graph.

Each is described by an ordinary layer outside of the network, which has the parameters of the node.
That layer is over-parameterized, and the kernel that it composes put into the graph.
"""

from __future__ import annotations

import ast
import copy
import json
from dataclasses import dataclass
from math import prod
from typing import Any

import mxnet as mx
from mxnet.gluon import Parameter, SymbolBlock, nn
from mxnet.gluon.nn.conv_layers import _Conv
from mxnet.symbol import Symbol

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import ALREADY, COMPUTED, ONE_TAP, REPLACED, SUBCLASS, TIED, place
from doconv_mx.compose import tied
from doconv_mx.graph import CONVOLUTIONS, NORMS
from doconv_mx.ordinary import channels_per_group, no_name_scope
from doconv_mx.surgery import fold_layers, over_parameterize_layers, set_parameter
from doconv_mx.view import overridden

_LAYERS = {1: nn.Conv1D, 2: nn.Conv2D, 3: nn.Conv3D}
# What takes a D in the graphs of DO-Conv layers; an ordinary graph may have a weight of that name.
_COMPOSING = {"batch_dot", "broadcast_add", "elemwise_add", "_identity_with_attr_like_rhs"}


@dataclass
class Node:
    """A convolution in a graph.

    name: its weight's in `save_parameters`, without `_weight`. key: that name as it is. layer: one
    like it. weight: the block's parameter, if it is one. reason: why it is to be left, or None.
    """

    name: str
    key: str
    layer: _Conv
    weight: Parameter | None
    reason: str | None


def nodes(block: SymbolBlock) -> list[Node]:
    """Return the convolutions of a block's graph, in its order; those of one weight once."""
    composed = block._composed if isinstance(block, DOSymbolBlock) else None
    graph = block._cached_graph if composed is None else composed.graph
    described = json.loads(graph[1].tojson())["nodes"]
    users: dict[int, list[dict[str, Any]]] = {}
    for node in described:
        for position, (source, *_) in enumerate(node["inputs"]):
            right = node["op"] in CONVOLUTIONS and position == 1
            users.setdefault(source, []).append(node if right else {})
    found: dict[str, Node] = {}
    for node in (node for node in described if node["op"] in CONVOLUTIONS):
        source = node["inputs"][1][0]
        weight = described[source]
        parameter = block.params._params.get(weight["name"]) if weight["op"] == "null" else None
        layer = _layer(node, parameter)
        alike = len({_sizes(user) for user in users[source]}) == 1
        reason = (
            COMPUTED if parameter is None
            else REPLACED if overridden(block)
            else SUBCLASS if type(block).forward is not SymbolBlock.forward
            else ONE_TAP if prod(layer._kwargs["kernel"]) == 1
            else None if alike else TIED
        )  # fmt: skip
        key = node["name"] if parameter is None else _key(block, parameter)
        name = key if parameter is None else key.removesuffix("weight").removesuffix("_")
        if composed is not None and name in composed.layers:
            layer, reason = composed.layers[name], ALREADY
        found.setdefault(key, Node(name, key, layer, parameter, reason))
    return list(found.values())


def norms(block: SymbolBlock) -> list[tuple[str, str]]:
    """Return the names and the operators of the batch norms in a block's graph."""
    described = json.loads(block._cached_graph[1].tojson())["nodes"]
    found = []
    for node in (node for node in described if node["op"] in NORMS):
        gamma = block.params._params.get(described[node["inputs"][1][0]]["name"])
        name = node["name"] if gamma is None else _key(block, gamma).removesuffix("_gamma")
        found.append((name, node["op"]))
    return found


def _sizes(node: dict[str, Any]) -> tuple[str, ...]:
    attributes = node.get("attrs", {})
    return tuple(attributes.get(k, "") for k in ("kernel", "num_filter", "num_group", "layout"))


def _layer(node: dict[str, Any], parameter: Parameter | None) -> _Conv:
    """Return an ordinary layer like a convolution node, without values."""
    options = {k: v for k, v in node["attrs"].items() if not k.startswith("__")}

    def read(name: str, default: Any) -> Any:
        value = ast.literal_eval(options.get(name, "()")) if name != "layout" else options.get(name)
        return default if value in ((), None, "None") else value

    kernel = read("kernel", ())
    rank = len(kernel)
    layout = read("layout", {1: "NCW", 2: "NCHW", 3: "NCDHW"}[rank])
    groups, shape = read("num_group", 1), getattr(parameter, "shape", None)
    per_group = max(shape[-1 if layout.endswith("C") else 1], 0) if shape else 0
    prefix = "" if parameter is None else parameter.name.removesuffix("weight")
    with no_name_scope():
        return _LAYERS[rank](
            read("num_filter", 0), kernel, read("stride", (1,) * rank), read("pad", (0,) * rank),
            read("dilate", (1,) * rank), groups, layout, use_bias=False, prefix=prefix,
            in_channels=per_group * groups,
        )  # fmt: skip


@dataclass
class _Composed:
    """What a block was, and the layers that compose its kernels, by the names of its nodes."""

    kind: type[SymbolBlock]
    graph: tuple[list[Symbol], Symbol]
    layers: dict[str, _Conv]


class DOSymbolBlock(SymbolBlock):
    """A `SymbolBlock` of which some convolutions are over-parameterized, in its graph.

    `over_parameterize` turns blocks into it, and `fold` back into what they were.
    """

    _composed: _Composed

    def cast(self, dtype: Any) -> None:
        """Cast the parameters, and compose the kernels in the new dtype."""
        super().cast(dtype)
        self._put_kernels()

    def _put_kernels(self) -> None:
        data, graph = self._composed.graph
        graph = copy.copy(graph)
        graph._compose(**{x.weight.name: _kernel(x) for x in self._composed.layers.values()})
        self._cached_graph = data, graph
        self._clear_cached_op()


def _kernel(layer: Any) -> Symbol:
    """Return the composed kernel as a symbol."""
    w, d = layer.weight.var(), layer.depthwise_weight.var()
    with mx.name.Prefix(f"{layer.weight.name}_"):
        if not channels_per_group(layer):  # only where S == M
            w, d = tied(mx.sym, None, w, d, layer._outline, layer._kwargs["layout"].find("C"))
        return layer._compose(mx.sym, w, d)


def over_parameterize_nodes(block: SymbolBlock, chosen: list[tuple[str, ConvSpec]]) -> None:
    """Over-parameterize, in place, the convolutions of these names with these sizes."""
    found = {node.name: node for node in nodes(block)}
    if not isinstance(block, DOSymbolBlock):
        vars(block)["_composed"] = _Composed(type(block), block._cached_graph, {})
        block.__class__ = DOSymbolBlock
    for name, spec in chosen:
        key, layer, weight = found[name].key, found[name].layer, found[name].weight
        if weight.shape is None:
            weight.shape = layer.weight.shape
        set_parameter(layer, "weight", weight)
        over_parameterize_layers([layer], spec)
        _set(block, key, layer.weight)
        _set(block, f"{key.removesuffix('weight')}depthwise_weight", layer.depthwise_weight)
        block._composed.layers[name] = layer
    block._put_kernels()


def fold_nodes(block: DOSymbolBlock) -> None:
    """Make a block, in place, what it was before, with the folded kernels."""
    composed = vars(block).pop("_composed")
    for layer in composed.layers.values():
        key = _key(block, layer.weight)
        del block._reg_params[_key(block, layer.depthwise_weight)]
        del block.params._params[layer.depthwise_weight.name]
        fold_layers([layer])
        _set(block, key, layer.weight)
    block._cached_graph = composed.graph
    block.__class__ = composed.kind
    block._clear_cached_op()


def refuse_composition(path: str, block: SymbolBlock) -> None:
    """Raise NotFoldable for a graph that was made of DO-Conv layers, as of an exported network."""
    described = json.loads(block._cached_graph[1].tojson())["nodes"]

    def users(index: int) -> set[str]:
        found = set()
        for other, node in enumerate(described):
            if any(source == index for source, *_ in node["inputs"]):
                found |= users(other) if node["op"] == "Cast" else {node["op"]}
        return found

    for index, node in enumerate(described):
        is_d = node["op"] == "null" and node["name"].endswith("depthwise_weight")
        if is_d and users(index) & _COMPOSING:
            raise NotFoldable(
                f"{place(path)} is a symbol that composes kernels, with {node['name']!r}, and "
                "holds no layers: fold the network before it is exported or its features are "
                "extracted."
            )


def _key(block: SymbolBlock, parameter: Parameter) -> str:
    return next(k for k, v in block._reg_params.items() if v is parameter)


def _set(block: SymbolBlock, key: str, parameter: Parameter) -> None:
    block._reg_params[key] = block.params._params[parameter.name] = parameter
