"""A Gluon model as a tree of blocks and their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from mxnet.gluon import Block, Parameter

from doconv_core.models.received import no_model
from doconv_core.state.file import entry
from doconv_mx.private import children, has_values, registered, shape_of

_METHODS = ("__call__", "forward", "hybrid_forward")


def check_model(model: Any) -> None:
    """Raise TypeError for what is not a Gluon block."""
    if not isinstance(model, Block):
        raise no_model("mxnet.gluon.Block", model)


def places(model: Block) -> list[tuple[Block, tuple[str, ...]]]:
    """Return every block once, a parent before its children, with its paths, the first one first.

    A path is what `save_parameters` puts before a parameter's name: the model's own is empty.
    """
    found: dict[int, tuple[Block, list[str]]] = {}

    def visit(path: str, block: Block) -> None:
        found.setdefault(id(block), (block, []))[1].append(path)
        for name, child in children(block).items():
            visit(entry(path, name), child)

    visit("", model)
    return [(block, tuple(paths)) for block, paths in found.values()]


def walk(model: Block) -> Iterator[tuple[str, Block]]:
    """Yield every block once, with the path at which it is met first; a parent before children."""
    yield from ((paths[0], block) for block, paths in places(model))


def own_parameters(block: Block) -> list[Parameter]:
    """Return the block's own parameters, each once, whether they are its attributes or not."""
    found = {id(p): p for p in (*registered(block).values(), *block.params.values())}
    return list(found.values())


def parameters(model: Block) -> list[Parameter]:
    """Return the parameters of the whole model, each once."""
    found = {id(p): p for _, block in walk(model) for p in own_parameters(block)}
    return list(found.values())


def count(model: Block) -> int:
    """Return the number of entries of all parameters; of one whose shape is not known, none."""
    return sum(prod(shape_of(p)) for p in parameters(model) if _is_known(p))


def uncounted(model: Block) -> int:
    """Return how many parameters have a shape that is not known yet, and so are not counted."""
    return sum(not _is_known(p) for p in parameters(model))


def _is_known(parameter: Parameter) -> bool:
    shape = shape_of(parameter)
    return min(shape, default=0) > 0 or has_values(parameter)


def owners(model: Block) -> dict[int, list[Block]]:
    """Return which blocks own each parameter, by the parameter's id."""
    found: dict[int, list[Block]] = {}
    for _, block in walk(model):
        for parameter in own_parameters(block):
            found.setdefault(id(parameter), []).append(block)
    return found


def is_replaced(block: Block) -> bool:
    """Return whether this one block has a method of its own in place of its class's forward."""
    return any(name in vars(block) for name in _METHODS)
