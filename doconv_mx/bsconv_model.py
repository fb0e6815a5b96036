"""Whole models and BSConv in MXNet Gluon: convolutions become BSConvs, and BSConvs fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doconv_core.kinds.bsconv_model import (
    GROUPED,
    KERNEL_SIZES,
    OVER_PARAMETERIZED,
    PART,
    SHARES,
    BSConvReport,
    Explained,
    other_size,
    replacement,
)
from mxnet.gluon import Block, SymbolBlock

from doconv_core.kinds.bsconv import MIN_MID_CHANNELS, P
from doconv_core.models.report import (
    ALREADY,
    NOT_SELECTED,
    ONE_TAP,
    Change,
    Converted,
    Left,
    Selection,
    Where,
    place,
)
from doconv_mx.bsconv import LAYERS
from doconv_mx.bsconv_layer import BN_OPTIONS, _BSConv
from doconv_mx.convolutions import is_convolution, obstacle
from doconv_mx.surgery import become, remove_parameter, set_parameter
from doconv_mx.symbols import nodes
from doconv_mx.view import (
    all_paths,
    copied,
    count,
    forget_graphs,
    owners,
    require_block,
    walk,
    within,
)

# Why a convolution does not become a BSConv, of what Gluon alone has.
IN_A_SYMBOL = "an operator of a symbol, not a layer"


def to_bsconv(
    model: Block,
    variant: str = "u",
    *,
    kernel_sizes: Any = KERNEL_SIZES,
    p: float = P,
    min_mid_channels: int = MIN_MID_CHANNELS,
    with_bn: bool = False,
    bn_options: Mapping[str, Any] | None = None,
    where: Where = None,
    start: str = "weights",
    inplace: bool = False,
) -> Converted:
    """Return the model with BSConvs for its convolutions, and a report of what was done.

    Every `nn.Conv1D`, `Conv2D` and `Conv3D`, exactly, with groups=1 and one of the kernel sizes,
    becomes the BSConv with its arguments. The function changes: train the model on. What is left as
    it is, is in the report with its reason.

    variant: "u" or "s". kernel_sizes: which; an entry that is an integer stands for that size in
    each number of dimensions. p, min_mid_channels, with_bn, bn_options: as the layers take them.
    where, inplace: as in `over_parameterize`, which comes after this one.
    start: "weights" begins with the BSConv that is nearest to each trained kernel, and the report
    says how much of its variance that explains; "random" throws the kernels away, and does with a
    model that has no values yet.

    In place, layers stay the same objects, with their hooks, names and attributes, and so do
    biases; all other parameters are new: create the trainer anew.
    Raises TypeError and ValueError for arguments that give no layer, and, with its path, for a
    kernel that is not finite or has no values yet; before anything is changed. Warns where `where`
    matches nothing.
    Source: BSConv, arXiv 2003.13549; the start from trained weights is this package's own.
    """
    require_block(model)
    sizes, options = replacement(
        variant,
        kernel_sizes,
        p=p,
        min_mid_channels=min_mid_channels,
        with_bn=with_bn,
        bn_options=bn_options,
        allowed=BN_OPTIONS,
        start=start,
    )
    selection = Selection(where)
    chosen, left = _choose(model, selection, sizes)
    selection.warn()
    before = count(model)
    made = {path: _made(path, layer, variant, options) for path, layer in chosen.items()}
    changed = tuple(
        Change(path, type(chosen[path]).__name__, type(new).__name__) for path, new in made.items()
    )
    target = model if inplace else copied(model)
    blocks = dict(walk(target))
    for path, new in made.items():
        _replace(blocks[path], new)
    forget_graphs(target)
    found = [(path, new.explained) for path, new in made.items()]
    explained = tuple(Explained(path, share) for path, share in found if share is not None)
    report = BSConvReport("replaced", changed, tuple(left), before, count(target), explained)
    return Converted(target, report)


def _choose(
    model: Block, selection: Selection, sizes: frozenset[tuple[int, ...]]
) -> tuple[dict[str, Any], list[Left]]:
    """Return the layers to replace, by path, and those to leave, in the model's order."""
    bsconvs = [block for _, block in walk(model) if isinstance(block, _BSConv)]
    parts = {id(part) for layer in bsconvs for _, part in walk(layer)}
    places, owned, chosen, left = all_paths(model), owners(model), {}, []
    for path, block in walk(model):
        if isinstance(block, SymbolBlock):
            kinds = ((node.name, type(node.layer).__name__) for node in nodes(block))
            left += [Left(within(path, name), kind, IN_A_SYMBOL) for name, kind in kinds]
        if not is_convolution(block):
            continue
        reason = PART if id(block) in parts else _obstacle(block, sizes)
        if reason is None and not any([selection(at, block) for at in places[id(block)]]):
            reason = NOT_SELECTED
        if reason is None and len(owned[id(block.weight)]) > 1:
            reason = SHARES
        if reason is None:
            chosen[path] = block
        else:
            left.append(Left(path, type(block).__name__, reason))
    return chosen, left


def _obstacle(layer: Any, sizes: frozenset[tuple[int, ...]]) -> str | None:
    """Return why a convolution cannot become a BSConv; None where it can."""
    reason = obstacle(layer)
    if reason == ALREADY:
        return OVER_PARAMETERIZED
    if reason not in (None, ONE_TAP):
        return reason
    size = tuple(layer._kwargs["kernel"])
    if size not in sizes:
        return other_size(size)
    return GROUPED if layer._kwargs["num_group"] != 1 else None


def _made(path: str, layer: Any, variant: str, options: dict[str, Any]) -> Any:
    try:
        return LAYERS[variant, type(layer)].from_conv(layer, **options)
    except ValueError as error:
        raise ValueError(f"{place(path)}: {error}") from None


def _replace(layer: Any, new: Any) -> None:
    """Make a convolution the BSConv, which keeps its bias."""
    if layer.bias is not None:
        remove_parameter(new.depthwise, "bias")
        set_parameter(new.depthwise, "bias", layer.bias)  # by the bias's own name
    become(layer, new)
