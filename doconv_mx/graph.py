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
from mxnet.symbol import Symbol
from mxnet.util import is_np_array

from doconv_core.models.report import SHARED
from doconv_core.models.view import Flow
from doconv_mx.private import (
    BatchNorm,
    Conv,
    children,
    graph_of,
    registered,
    without_hooks,
)
from doconv_mx.tree import is_replaced, own_parameters, walk

CONVOLUTIONS = {"Convolution", "_npx_convolution"}
TRANSPOSED = {"Deconvolution", "_npx_deconvolution"}
NORMS = {"BatchNorm", "_npx_batch_norm", "_contrib_SyncBatchNorm"}

# Why it cannot be told what a layer follows.
HIDDEN = "called by a forward that cannot be traced without data"
SAME_NAME = "another parameter has the name of one of its own or of its convolution's"


@dataclass
class Calls:
    """The calls that were seen, of layers that are known by the names of their parameters.

    after: for each weight, what takes the convolution's output, call by call: the name of a batch
    norm's gamma, or None for anything else. before: for each gamma, what the batch norm's input is:
    the name of a convolution's weight, or None. hidden: ids of the blocks that are called where it
    cannot be seen.
    """

    after: dict[str, set[str | None]] = field(default_factory=dict)
    before: dict[str, set[str | None]] = field(default_factory=dict)
    hidden: set[int] = field(default_factory=set)

    def note(self, weight: str | None, gamma: str | None) -> None:
        """Note one call: the output of `weight` goes to `gamma`; either may be something else."""
        if weight is not None:
            self.after.setdefault(weight, set()).add(gamma)
        if gamma is not None:
            self.before.setdefault(gamma, set()).add(weight)


def flow(model: Block, owned: Mapping[int, Sequence[Block]], names: Mapping[Any, int]) -> Flow:
    """Return which convolutions and batch norms follow each other in inference.

    owned: the blocks that own each parameter, by its id. names: how many of the model's parameters
    have each name: the calls are known by names alone, so that those of two parameters of one name,
    or of two layers of one weight, cannot be told apart.
    """
    seen, blocks, found = calls(model), [block for _, block in walk(model)], Flow()
    convolutions = {block.weight.name: block for block in blocks if isinstance(block, Conv)}
    norms = {block.gamma.name: block for block in blocks if isinstance(block, BatchNorm)}
    for block in blocks:
        if isinstance(block, Conv):
            after = seen.after.get(block.weight.name, ())
            found.after[id(block)] = [norms.get(name) for name in after]
            if len(owned[id(block.weight)]) > 1:
                found.unseen[id(block)] = SHARED
        elif isinstance(block, BatchNorm):
            before = seen.before.get(block.gamma.name, ())
            found.before[id(block)] = [convolutions.get(name) for name in before]
            near = {*before, *(parameter.name for parameter in own_parameters(block))}
            if any(names[name] > 1 for name in near):
                found.unseen[id(block)] = SAME_NAME
    found.unseen |= dict.fromkeys(seen.hidden, HIDDEN)
    return found


def calls(model: Block) -> Calls:
    """Return the calls that can be seen of the model's layers in inference."""
    found = Calls()
    seen: set[int] = set()

    def visit(block: Block) -> None:
        if id(block) in seen:
            return
        seen.add(id(block))
        if isinstance(block, SymbolBlock):
            _read(graph_of(block)[1], found)
            return
        graph = trace(block) if isinstance(block, HybridBlock) and children(block) else None
        if graph is not None:
            _read(graph, found)
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
    for block, following in zip([None, *blocks], [*blocks, None], strict=True):
        weight, gamma = _name(block, "weight"), _name(following, "gamma")
        if getattr(block, "act", None) is None:
            found.note(weight, gamma)
        else:  # an activation stands between them
            found.note(weight, None)
            found.note(None, gamma)


def _name(block: Block | None, parameter: str) -> str | None:
    own = registered(block).get(parameter) if block is not None else None
    return None if own is None else own.name


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


def _read(graph: Symbol, found: Calls) -> None:
    """Note the calls in a symbolic graph."""
    convolutions, operators = CONVOLUTIONS | TRANSPOSED, Operators(graph)
    for node in operators.of({"null"}):  # an input or a parameter
        for user, position in operators.users(node):
            if position == 0 or user["op"] not in convolutions | NORMS:
                found.note(node["name"], None)
                found.note(None, node["name"])
    for node in operators.of(convolutions):
        for user, position in operators.users(node):
            is_norm = user["op"] in NORMS and position == 0
            gamma = operators.variable(user, 1) if is_norm else None
            found.note(operators.variable(node, 1), gamma)
    for node in operators.of(NORMS):
        if operators.source(node, 0)["op"] not in convolutions:
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
