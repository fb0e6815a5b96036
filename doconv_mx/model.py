"""Whole Gluon models: over-parameterized, and folded."""

from __future__ import annotations

from doconv_core.kinds.bsconv_model import FoldReport, as_form
from mxnet.gluon import Block

from doconv_core.maths.spec import as_integer
from doconv_core.models.report import Converted, Report, Selection, Where
from doconv_mx.batchnorm import fuse_batchnorms
from doconv_mx.bsconv_convert import fold_bsconvs, plan_bsconvs
from doconv_mx.plan import places, plan_folding, plan_over_parameterization
from doconv_mx.surgery import fold_layers, over_parameterize_layers
from doconv_mx.symbols import fold_nodes, over_parameterize_nodes
from doconv_mx.view import copied, count, forget_graphs, require_block, walk


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


def fold(
    model: Block, *, fuse_batchnorm: bool = False, bsconv: str = "keep", inplace: bool = False
) -> Converted:
    """Make the model's DO-Conv and BSConv layers ordinary ones that compute the same; return it and
    a report.

    bsconv: what BSConv layers become. "keep": an `nn.HybridSequential` of the same parts. "merge":
    one of a pointwise and a depthwise convolution, with batch norms in the former, for inference.
    "dense": one convolution. Each is exact, but none is always fastest: the report, a `FoldReport`,
    has the cost of all three. Merging makes two pointwise convolutions one with more operations
    where the channels between are few; dense has about as many times more as the kernel has taps.
    fuse_batchnorm: also make batch norms that directly follow a convolution part of it, for
    inference: in training a batch norm computes something else. inplace: change the model itself,
    not a copy.
    Nothing of this package is left in the model, its parameters or its files. The kernels are new
    parameters, for which a trainer is to be created anew. What is shared stays shared; names,
    order, contexts, dtypes, `grad_req`, multipliers, hooks and hybridization are kept. A batch norm
    that cannot be fused is left as it is, and the report says why.
    Raises, before anything is changed, TypeError for what is not a block or cannot be copied;
    NotFoldable, by path, for a layer that no ordinary one computes exactly; ValueError for another
    form of BSConv, and, by path, for a layer that has no values for all of its parameters, which a
    BSConv that is kept need not have.
    """
    require_block(model)
    form = as_form(bsconv)
    plan, bsconvs = plan_folding(model), plan_bsconvs(model, form)
    target = model if inplace else copied(model)
    blocks, before = dict(walk(target)), count(target)
    for paths in plan.groups:
        fold_layers([blocks[path] for path in paths])
    for path in plan.symbols:
        fold_nodes(blocks[path])
    changed, left = [*plan.changed, *fold_bsconvs(blocks, bsconvs)], [*bsconvs.left]
    if fuse_batchnorm:
        fused, kept = fuse_batchnorms(target)
        changed, left = [*changed, *fused], [*left, *kept]
    if fuse_batchnorm or bsconvs.layers:
        order = places(target)  # in which a part of a BSConv that is dense now is no more
        changed = sorted((c for c in changed if c.path in order), key=lambda c: order[c.path])
    forget_graphs(target)
    parts = tuple(changed), tuple(left), before, count(target)
    if bsconvs.choices:
        return Converted(target, FoldReport("folded", *parts, form, bsconvs.choices))
    return Converted(target, Report("folded", *parts))
