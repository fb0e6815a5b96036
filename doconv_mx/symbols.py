"""Convolutions within a `SymbolBlock`, such as GluonCV's feature extractors: nodes of its graph.

Each is described by an ordinary layer outside of the network, which has the parameters of the node.
That layer is over-parameterized, and the kernel that it composes put into the graph.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mxnet as mx
from mxnet.gluon import Parameter, SymbolBlock, nn
from mxnet.symbol import Symbol

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.report import ALREADY, COMPUTED, REPLACED, SUBCLASS, TIED, place
from doconv_mx.graph import CONVOLUTIONS, NORMS, Operators
from doconv_mx.ordinary import channels_per_group
from doconv_mx.private import (
    Conv,
    by_name,
    graph_of,
    no_name_scope,
    registered,
    set_graph,
    shape_of,
)
from doconv_mx.surgery import compose_layers, fold_layers, set_parameter
from doconv_mx.tree import is_replaced

_LAYERS = {1: nn.Conv1D, 2: nn.Conv2D, 3: nn.Conv3D}
# Why a batch norm of a graph is not fused.
IN_A_SYMBOL = "an operator of a symbol, where convolutions alone are replaced"


@dataclass
class Node:
    """A convolution or a batch norm in a graph.

    block: whose graph. name: its weight's or gamma's in `save_parameters`, without `_weight` or
    `_gamma`. key: that name as it is. layer: an ordinary layer like it. weight: the block's
    parameter, if it is one. reason: why it is to be left, or None.
    """

    block: SymbolBlock
    name: str
    key: str
    layer: Any
    weight: Parameter | None
    reason: str | None


def node_of(layer: Any) -> Node | None:
    """Return the node that a layer describes; None for one of a model's own."""
    return getattr(layer, "_node", None)


def nodes(block: SymbolBlock) -> list[Node]:
    """Return the convolutions of a block's graph, in its order; those of one weight once."""
    composed = block._composed if isinstance(block, DOSymbolBlock) else None
    graph = graph_of(block) if composed is None else composed.graph
    operators, keys = Operators(graph[1]), _keys(block)
    found: dict[str, Node] = {}
    for node in operators.of(CONVOLUTIONS):
        parameter = by_name(block).get(operators.variable(node, 1) or "")
        layer = _layer(node, parameter)
        uses = operators.users(operators.source(node, 1))
        alike = all(
            user["op"] in CONVOLUTIONS and position == 1 and _sizes(user) == _sizes(node)
            for user, position in uses
        )
        reason = (
            COMPUTED if parameter is None
            else REPLACED if is_replaced(block)
            else SUBCLASS if type(block).forward is not SymbolBlock.forward
            else None if alike else TIED
        )  # fmt: skip
        key = node["name"] if parameter is None else keys[id(parameter)]
        name = key if parameter is None else key.removesuffix("weight").removesuffix("_")
        if composed is not None and name in composed.layers:
            layer, reason = composed.layers[name], ALREADY
        if key not in found:
            found[key] = layer._node = Node(block, name, key, layer, parameter, reason)
    return list(found.values())


def norms(block: SymbolBlock) -> list[Node]:
    """Return the batch norms in a block's graph."""
    found, operators, keys = [], Operators(graph_of(block)[1]), _keys(block)
    for node in operators.of(NORMS):
        gamma = by_name(block).get(operators.variable(node, 1) or "")
        key = node["name"] if gamma is None else keys[id(gamma)]
        layer = nn.BatchNorm(prefix="")
        name = key if gamma is None else key.removesuffix("_gamma")
        layer._node = Node(block, name, key, layer, None, IN_A_SYMBOL)
        found.append(layer._node)
    return found


def _sizes(node: dict[str, Any]) -> tuple[str, ...]:
    attributes = node.get("attrs", {})
    return tuple(attributes.get(k, "") for k in ("kernel", "num_filter", "num_group", "layout"))


def _layer(node: dict[str, Any], parameter: Parameter | None) -> Conv:
    """Return an ordinary layer like a convolution node, without values."""
    options = {k: v for k, v in node["attrs"].items() if not k.startswith("__")}

    def read(name: str, default: Any) -> Any:
        value = ast.literal_eval(options.get(name, "()")) if name != "layout" else options.get(name)
        return default if value in ((), None, "None") else value

    kernel = read("kernel", ())
    rank = len(kernel)
    layout = read("layout", {1: "NCW", 2: "NCHW", 3: "NCDHW"}[rank])
    groups, shape = read("num_group", 1), () if parameter is None else shape_of(parameter)
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
    layers: dict[str, Conv]


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
        set_graph(self, (data, graph))


def _kernel(layer: Any) -> Symbol:
    """Return the composed kernel as a symbol."""
    entries = {name: parameter.var() for name, parameter in layer.entries().items()}
    with mx.name.Prefix(f"{layer.weight.name}_"):
        if not channels_per_group(layer):  # only of layers that need no input for it
            entries = layer.tied(mx.sym, None, entries)
        return layer.compose(mx.sym, entries)


def compose_nodes(nodes: Iterable[tuple[Node, Any]], types: Mapping[Any, type[Any]]) -> None:
    """Over-parameterize nodes in their blocks, in place, to these sizes.

    types: of a kind's layers, by the ordinary ones.
    """
    changed = {}
    for node, spec in nodes:
        block, layer, weight = node.block, node.layer, node.weight
        assert weight is not None  # or it would have been left
        if not isinstance(block, DOSymbolBlock):
            vars(block)["_composed"] = _Composed(type(block), graph_of(block), {})
            block.__class__ = DOSymbolBlock
        if weight.shape is None:
            weight.shape = shape_of(weight) or layer.weight.shape
        set_parameter(layer, "weight", weight)
        compose_layers([layer], types, spec)
        for name, parameter in layer.entries().items():
            key = node.key if name == "weight" else f"{node.key.removesuffix('weight')}{name}"
            _set(block, key, parameter)
        del layer._node  # of the graph as it was
        block._composed.layers[node.name] = layer
        changed[id(block)] = block
    for block in changed.values():
        block._put_kernels()


def fold_nodes(nodes: Iterable[Node]) -> None:
    """Fold nodes in their blocks, in place; a block without composed kernels is what it was."""
    changed: dict[int, Any] = {}
    for node in nodes:
        block: Any = node.block
        layer = block._composed.layers.pop(node.name)
        first, *others = layer.entries().values()
        key = _key(block, first)
        for parameter in others:
            del registered(block)[_key(block, parameter)]
            del by_name(block)[parameter.name]
        fold_layers([layer])
        _set(block, key, layer.weight)
        changed[id(block)] = block
    for block in changed.values():
        if block._composed.layers:
            block._put_kernels()
        else:
            composed = vars(block).pop("_composed")
            block.__class__ = composed.kind
            set_graph(block, composed.graph)


def refuse_composition(
    path: str, block: SymbolBlock, names: Collection[str], operators: Collection[str]
) -> None:
    """Raise NotFoldable for a graph that was made of a kind's layers, as of an exported network.

    names: of their entries beside `weight`; an ordinary graph may have a weight of such a name.
    operators: what takes one of them to compose a kernel.
    """
    graph = Operators(graph_of(block)[1])

    def takers(node: dict[str, Any]) -> set[str]:
        users = [user for user, _ in graph.users(node)]
        return set().union(*(takers(u) if u["op"] == "Cast" else {u["op"]} for u in users))

    for node in graph.of({"null"}):
        if node["name"].endswith(tuple(names)) and not takers(node).isdisjoint(operators):
            raise NotFoldable(
                f"{place(path)} is a symbol that composes kernels, with {node['name']!r}, and "
                "holds no layers: fold the network before it is exported or its features are "
                "extracted."
            )


def _keys(block: SymbolBlock) -> dict[int, str]:
    """Return under which name a block has each parameter, by the parameter's id."""
    return {id(p): str(k) for k, p in reversed(registered(block).items())}


def _key(block: SymbolBlock, parameter: Parameter) -> str:
    return next(str(k) for k, v in registered(block).items() if v is parameter)


def _set(block: SymbolBlock, key: str, parameter: Parameter) -> None:
    registered(block)[key] = by_name(block)[parameter.name] = parameter
