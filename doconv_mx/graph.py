"""Which layer's output goes where: the calls of a model's layers, as far as they can be seen.

A hybrid block shows them in its symbolic graph, a sequential one by its order. What the forward of
any other block does cannot be known without running it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, SymbolBlock, nn
from mxnet.gluon.contrib.nn import Identity
from mxnet.symbol import Symbol
from mxnet.util import is_np_array

from doconv_core.models.report import SHARED
from doconv_core.models.view import Flow
from doconv_mx.private import (
    BatchNorm,
    Conv,
    children,
    graph_of,
    is_hooked,
    registered,
    without_hooks,
)
from doconv_mx.tree import is_replaced, own_parameters, walk

CONVOLUTIONS = {"Convolution", "_npx_convolution"}
TRANSPOSED = {"Deconvolution", "_npx_deconvolution"}
NORMS = {"BatchNorm", "_npx_batch_norm", "_contrib_SyncBatchNorm"}
DENSE = {"FullyConnected", "_npx_fully_connected"}
LAYERS = CONVOLUTIONS | TRANSPOSED | DENSE | NORMS
PASSING = {"Dropout", "_npx_dropout"}  # in inference

# Why it cannot be told what a layer follows.
HIDDEN = "called by a forward that cannot be traced without data"
SAME_NAME = "another parameter has the name of one of its own or of its convolution's"


@dataclass
class Calls:
    """The calls that were seen, of layers that are known by the names of their parameters.

    A convolution or dense layer is known by its weight's, a batch norm by its gamma's. after: what
    takes a layer's output, call by call: the name of a layer, or None for anything else. before:
    what a layer's input is. hidden: ids of the blocks that are called where it cannot be seen.
    """

    after: dict[str, set[str | None]] = field(default_factory=dict)
    before: dict[str, set[str | None]] = field(default_factory=dict)
    hidden: set[int] = field(default_factory=set)

    def note(self, source: str | None, taker: str | None) -> None:
        """Note that one's output goes to the other; either may be something else."""
        if source is not None:
            self.after.setdefault(source, set()).add(taker)
        if taker is not None:
            self.before.setdefault(taker, set()).add(source)


def flow(model: Block, owned: Mapping[int, Sequence[Block]], names: Mapping[Any, int]) -> Flow:
    """Return which convolutions, dense layers and batch norms follow each other in inference.

    owned: the blocks that own each parameter, by its id. names: how many of the model's parameters
    have each name: the calls are known by names alone, so that those of two parameters of one name,
    or of two layers of one weight, cannot be told apart.
    """
    seen, found = calls(model), Flow()
    blocks = [block for _, block in walk(model) if _key(block) is not None]
    layers = {_key(block): block for block in blocks}
    for block in blocks:
        after, before = seen.after.get(_key(block), ()), seen.before.get(_key(block), ())
        found.after[id(block)] = [layers.get(name) for name in after]
        found.before[id(block)] = [layers.get(name) for name in before]
        if not isinstance(block, BatchNorm):
            if len(owned[id(block.weight)]) > 1:
                found.unseen[id(block)] = SHARED
        else:
            near = {*before, *(parameter.name for parameter in own_parameters(block))}
            if any(names[name] > 1 for name in near):
                found.unseen[id(block)] = SAME_NAME
    found.unseen |= dict.fromkeys(seen.hidden, HIDDEN)
    return found


def calls(model: Block) -> Calls:
    """Return the calls that can be seen of the model's layers in inference."""
    found = Calls()
    seen: set[int] = set()
    passing = [block for _, block in walk(model) if type(block) in (nn.Dropout, Identity)]
    through = not any(is_hooked(block) for block in passing)

    def visit(block: Block) -> None:
        if id(block) in seen:
            return
        seen.add(id(block))
        if isinstance(block, SymbolBlock):
            _read(graph_of(block)[1], found, through)
            return
        graph = trace(block) if isinstance(block, HybridBlock) and children(block) else None
        if graph is not None:
            _read(graph, found, through)
            return
        below = list(children(block).values())
        if type(block) in (nn.Sequential, nn.HybridSequential) and not is_replaced(block):
            _read_in_order(below, found)
        else:
            found.hidden.update(map(id, below))
        for child in below:
            visit(child)

    with without_hooks(block for _, block in walk(model)):
        visit(model)
    return found


def _read_in_order(blocks: list[Block], found: Calls) -> None:
    """Note the calls of a sequential block's children, each with the output of the one before."""
    blocks = [block for block in blocks if not passes_on(block)]
    for block, following in zip([None, *blocks], [*blocks, None], strict=True):
        source, taker = _key(block), _key(following)
        if getattr(block, "act", None) is None:
            found.note(source, taker)
        else:  # an activation stands between them
            found.note(source, None)
            found.note(None, taker)


def passes_on(block: Block | None) -> bool:
    """Return whether a block returns, in inference, what it is given, and nobody watches."""
    own = type(block) in (nn.Dropout, Identity) and not is_replaced(block)
    return own and not is_hooked(block)


def _key(block: Block | None) -> Any:
    """Return the name by which a layer is known; None for what is none of these layers."""
    if isinstance(block, BatchNorm):
        return block.gamma.name if "gamma" in registered(block) else None
    return block.weight.name if isinstance(block, (Conv, nn.Dense)) else None


class Operators:
    """A symbol's operators and variables, as MXNet describes them; the last takes the outputs."""

    def __init__(self, symbol: Symbol) -> None:
        described = json.loads(symbol.tojson())
        outputs = {"op": "output", "name": "", "inputs": described["heads"]}
        self.nodes: list[dict[str, Any]] = [*described["nodes"], outputs]
        self._users: dict[int, list[tuple[dict[str, Any], int]]] = {}
        for node in self.nodes:
            for position in range(len(node["inputs"])):
                source = self.source(node, position)
                self._users.setdefault(id(source), []).append((node, position))

    def of(self, names: Container[str]) -> list[dict[str, Any]]:
        """Return the operators of these names, in order."""
        return [node for node in self.nodes if node["op"] in names]

    def source(self, node: dict[str, Any], position: int) -> dict[str, Any]:
        """Return what gives a node its input at this position."""
        index: int = node["inputs"][position][0]
        return self.nodes[index]

    def variable(self, node: dict[str, Any], position: int) -> str | None:
        """Return the name of the variable that is an input of a node; None for what is none."""
        source = self.source(node, position)
        return source["name"] if source["op"] == "null" else None

    def users(self, node: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
        """Return what takes a node's output, each with the position of its input."""
        return self._users.get(id(node), [])


def _read(graph: Symbol, found: Calls, through: bool) -> None:
    """Note the calls in a symbolic graph. through: whether it is looked through dropout."""
    layers, operators = LAYERS, Operators(graph)

    def is_passed(node: dict[str, Any]) -> bool:
        mode = node.get("attrs", {}).get("mode", "training")
        return through and node["op"] in PASSING and mode == "training"

    def takers(node: dict[str, Any]) -> Iterator[str | None]:
        for user, position in operators.users(node):
            if is_passed(user):
                yield from takers(user)
            else:
                is_taken = user["op"] in layers and position == 0
                yield operators.variable(user, 1) if is_taken else None

    for node in operators.of({"null"}):  # an input or a parameter
        for user, position in operators.users(node):
            if position == 0 or user["op"] not in layers:
                found.note(node["name"], None)
                found.note(None, node["name"])
    for node in operators.of(layers):
        for taker in takers(node):
            found.note(operators.variable(node, 1), taker)
        source = operators.source(node, 0)
        while is_passed(source):
            source = operators.source(source, 0)
        if source["op"] not in layers:
            found.note(None, operators.variable(node, 1))


def trace(block: Block) -> Symbol | None:
    """Return the graph of a block, or None where it cannot be had without data."""
    try:
        data = [mx.sym.var(f"doconv_input{i}") for i in range(_inputs(block))]
        with mx.name.NameManager(), autograd.pause(train_mode=False):
            out = block(*(x.as_np_ndarray() for x in data) if is_np_array() else data)
        outputs = [x.as_nd_ndarray() for x in _flat(out)]
        return mx.sym.Group(outputs) if outputs else None
    except Exception:  # a forward that needs data may fail in any way at all
        return None


def _flat(output: Any) -> Iterator[Symbol]:
    if isinstance(output, (list, tuple)):
        for part in output:
            yield from _flat(part)
    elif output is not None:
        yield output


def _inputs(block: Block) -> int:
    """Return the number of inputs that the block's forward asks for."""
    own = type(block).forward is not HybridBlock.forward
    names = list(
        inspect.signature(block.forward if own else block.hybrid_forward).parameters.values()
    )
    names = names if own else names[1:]  # without F
    required = [
        p for p in names
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        and p.name not in registered(block)
    ]  # fmt: skip
    return max(len(required), 1)
