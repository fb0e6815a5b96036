"""A Gluon model as a tree of blocks: walking, counting, copying."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from math import prod
from typing import Any

from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, Parameter

_METHODS = ("__call__", "forward", "hybrid_forward")


def walk(model: Block) -> Iterator[tuple[str, Block]]:
    """Yield every block once, with the path at which it is met first; a parent before its children.

    A path is what `save_parameters` puts before a parameter's name: the model's own is empty.
    """
    seen: set[int] = set()

    def visit(path: str, block: Block) -> Iterator[tuple[str, Block]]:
        if id(block) in seen:
            return
        seen.add(id(block))
        yield path, block
        for name, child in block._children.items():
            yield from visit(within(path, name), child)

    return visit("", model)


def all_paths(model: Block) -> dict[int, list[str]]:
    """Return every path of each block, by its id; of a block in several places, all of them."""
    found: dict[int, list[str]] = {}

    def visit(path: str, block: Block) -> None:
        found.setdefault(id(block), []).append(path)
        for name, child in block._children.items():
            visit(within(path, name), child)

    visit("", model)
    return found


def within(path: str, name: str) -> str:
    """Return the path of what is called `name` in the block at `path`."""
    return f"{path}.{name}" if path else name


def own_parameters(block: Block) -> list[Parameter]:
    """Return the block's own parameters, each once, whether they are its attributes or not."""
    found = {id(p): p for p in (*block._reg_params.values(), *block.params.values())}
    return list(found.values())


def parameters(model: Block) -> list[Parameter]:
    """Return the parameters of the whole model, each once."""
    found = {id(p): p for _, block in walk(model) for p in own_parameters(block)}
    return list(found.values())


def count(model: Block) -> int:
    """Return the number of entries of all parameters; of one whose shape is not known, none."""
    shapes = (p.shape for p in parameters(model))
    return sum(prod(shape) for shape in shapes if shape is not None and min(shape, default=1) > 0)


def owners(model: Block) -> dict[int, list[Block]]:
    """Return which blocks own each parameter, by the parameter's id."""
    found: dict[int, list[Block]] = {}
    for _, block in walk(model):
        for parameter in own_parameters(block):
            found.setdefault(id(parameter), []).append(block)
    return found


def overridden(block: Block) -> bool:
    """Whether this one block has a method of its own in the place of its class's forward."""
    return any(name in vars(block) for name in _METHODS)


def require_block(model: Any) -> None:
    """Raise TypeError for what is not a Gluon block."""
    if not isinstance(model, Block):
        raise TypeError(
            "model must be a mxnet.gluon.Block; received "
            f"{type(model).__module__}.{type(model).__qualname__}."
        )


def copied(model: Block) -> Block:
    """Return a copy of the model that shares no array with it and can be trained on its own.

    Gluon's blocks cannot all be deep-copied as they are: a hybridized one that has run holds a
    compiled graph, and a parameter holds its trainer, with the optimizer. The copy has neither. Its
    gradients are its own, which a copied array would not have.
    Raises TypeError where the model holds something else that Python cannot copy.
    """
    apart: dict[int, Any] = {}  # what copy.deepcopy is to take for the copies of these objects
    for _, block in walk(model):
        if isinstance(block, HybridBlock) and block._cached_op is not None:
            apart[id(block._cached_op)] = None
    apart |= dict.fromkeys(_outer_scopes(model))
    with autograd.pause():
        for parameter in parameters(model):
            if parameter._trainer is not None:
                apart[id(parameter._trainer)] = None
            for array in (*(parameter._data or ()), *(parameter._grad or ())):
                apart[id(array)] = array.copy()
        try:
            new = copy.deepcopy(model, apart)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{type(model).__name__} holds something that cannot be copied ({error}); with "
                "inplace=True the model itself is changed."
            ) from error
    for parameter in parameters(new):
        if parameter._grad is not None:
            autograd.mark_variables(parameter._data, parameter._grad, parameter.grad_req)
    forget_graphs(new)
    return new


def _outer_scopes(model: Block) -> set[int]:
    """Return the ids of the name scopes around the model in which its blocks were made.

    A block remembers the scope, and by it the block around it, with everything in that one.
    """
    own = [block._scope for _, block in walk(model)]
    outer = {id(scope._old_scope) for scope in own if scope._old_scope is not None}
    return outer - set(map(id, own))


def forget_graphs(model: Block) -> None:
    """Let every hybridized block build its graph anew when it is called next."""
    for _, block in walk(model):
        if isinstance(block, HybridBlock):
            block._clear_cached_op()
