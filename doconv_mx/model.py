"""Whole Gluon models: over-parameterized, folded, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from mxnet import autograd
from mxnet.gluon import Block
from mxnet.ndarray import NDArray

from doconv_core.model import (
    Converted,
    Report,
    Selection,
    Where,
    largest_difference,
)
from doconv_core.numeric import Difference
from doconv_core.spec import as_integer
from doconv_mx.batchnorm import fuse_batchnorms
from doconv_mx.blocks import (
    copied,
    count,
    forget_graphs,
    parameters,
    require_block,
    walk,
    within,
)
from doconv_mx.convert import fold_layers, over_parameterize_layers
from doconv_mx.plan import places, plan_folding, plan_over_parameterization
from doconv_mx.symbols import fold_nodes, over_parameterize_nodes


def over_parameterize(
    model: Block,
    *,
    where: Where = None,
    depth_multiplier: int | None = None,
    inplace: bool = False,
) -> Converted:
    """Make the model's convolutions DO-Conv layers that compute the same; return it and a report.

    model: any block; its `nn.Conv1D`, `Conv2D` and `Conv3D` of more than one tap are meant, at any
    depth, initialized or not, and the convolutions in the graphs of `SymbolBlock`s. where: which of
    them, as in `doconv_core.Selection`; paths are those of `save_parameters`, and of a layer in
    several places one of them is enough. depth_multiplier: S for all; None for each layer's taps M.
    inplace: change the model itself, not a copy; then a layer stays the object it was, and where
    `S == M` its weight too.
    The output does not change, in float32 where `S == M` not by one bit. What the layers share
    stays shared; names, order, contexts, dtypes, `grad_req`, multipliers, hooks and hybridization
    are kept. Layers that are left are in the report, with the reason. Warns of a `where` that
    selects nothing. Raises, before anything is changed, TypeError for what is not a block, cannot
    be copied or is no selection; ValueError, by path, for a depth multiplier below a layer's taps.
    """
    require_block(model)
    if depth_multiplier is not None:
        depth_multiplier = as_integer("depth_multiplier", depth_multiplier)
    selection = Selection(where)
    plan = plan_over_parameterization(model, selection, depth_multiplier)
    target = model if inplace else copied(model)
    selection.warn()
    blocks, before = dict(walk(target)), count(target)
    for paths, spec in plan.groups:
        over_parameterize_layers([blocks[path] for path in paths], spec)
    for path, chosen in plan.nodes.items():
        over_parameterize_nodes(blocks[path], chosen)
    forget_graphs(target)
    changed, left = tuple(plan.changed), tuple(plan.left)
    return Converted(target, Report("over-parameterized", changed, left, before, count(target)))


def fold(model: Block, *, fuse_batchnorm: bool = False, inplace: bool = False) -> Converted:
    """Make the model's DO-Conv layers ordinary ones that compute the same; return it and a report.

    fuse_batchnorm: also make batch norms that directly follow a convolution part of it, for
    inference: in training a batch norm computes something else. inplace: change the model itself,
    not a copy.
    Nothing of this package is left in the model, its parameters or its files. The kernels are new
    parameters, for which a trainer is to be created anew. What is shared stays shared; names,
    order, contexts, dtypes, `grad_req`, multipliers, hooks and hybridization are kept. A batch norm
    that cannot be fused is left as it is, and the report says why.
    Raises, before anything is changed, TypeError for what is not a block or cannot be copied;
    NotFoldable, by path, for a layer that no ordinary one computes; ValueError, by path, for one
    that has no values for all of its parameters.
    """
    require_block(model)
    plan = plan_folding(model)
    target = model if inplace else copied(model)
    blocks, before = dict(walk(target)), count(target)
    for paths in plan.groups:
        fold_layers([blocks[path] for path in paths])
    for path in plan.symbols:
        fold_nodes(blocks[path])
    changed, left = plan.changed, []
    if fuse_batchnorm:
        fused, left = fuse_batchnorms(target)
        order = places(target)
        changed = sorted([*changed, *fused], key=lambda change: order[change.path])
    forget_graphs(target)
    report = Report("folded", tuple(changed), tuple(left), before, count(target))
    return Converted(target, report)


def verify(a: Callable[..., Any], b: Callable[..., Any], inputs: Any) -> Difference:
    """Return how far b's outputs lie from a's in inference: the largest difference of any array.

    a, b: blocks, or other callables, such as one that runs an exported network. inputs: one array,
    or a tuple or list of the positional arguments, on a context that both models have their values
    on; each model gets a copy of its own. Outputs may be nested tuples, lists and dictionaries;
    numbers and NumPy's arrays may stand in the place of MXNet's, and None counts as nothing.
    MXNet's random numbers cannot be put back: what draws some in inference too draws others in each
    run, and differs from itself.
    Raises TypeError for what cannot be called and for an output of another kind; ValueError where
    the outputs differ in structure or shape, or where a model got its values by this very run, so
    that the outputs were those of random numbers.
    """
    for name, model in (("a", a), ("b", b)):
        if not callable(model):
            raise TypeError(
                f"{name} must be a mxnet.gluon.Block or another callable; received "
                f"{type(model).__module__}.{type(model).__qualname__}."
            )
    expected, found = _outputs("a", a, inputs), _outputs("b", b, inputs)
    return largest_difference(found, expected)


def _outputs(name: str, model: Callable[..., Any], inputs: Any) -> dict[str, Any]:
    """Return the arrays of a model's outputs in inference; `name` is the model's in messages."""
    owned = parameters(model) if isinstance(model, Block) else []
    waiting = [p for p in owned if p._deferred_init]
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    with autograd.pause(train_mode=False):
        output = model(*_own(arguments))
    drawn = [p.name for p in waiting if p._data is not None]
    if drawn:
        raise ValueError(
            f"{name} had no values for {drawn[0]!r} before this run, which has drawn them at "
            "random: run a model once before it is over-parameterized, folded or compared."
        )
    return dict(_arrays("", output))


def _own(inputs: Any) -> Any:
    """Return the inputs with arrays of their own: a model may change its input in place."""
    if isinstance(inputs, (NDArray, np.ndarray)):
        return inputs.copy()
    if isinstance(inputs, dict):
        return {key: _own(value) for key, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(map(_own, inputs))
    return inputs


def _arrays(at: str, output: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of a nested output by their place in it, such as `boxes.0`."""
    if isinstance(output, NDArray):
        yield at, output.asnumpy()
    elif isinstance(output, (bool, int, float, np.generic, np.ndarray)):
        yield at, np.asarray(output)
    elif isinstance(output, (tuple, list, Mapping)):
        parts = output.items() if isinstance(output, Mapping) else enumerate(output)
        for name, part in parts:
            yield from _arrays(within(at, str(name)), part)
    elif output is not None:
        raise TypeError(
            f"output {at!r} is a {type(output).__module__}.{type(output).__qualname__}; expected "
            "arrays or numbers, or tuples, lists and dictionaries of them."
        )
