"""Folding one BSConv layer to ordinary ones: what its parts are, and what they become."""

from __future__ import annotations

from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, Parameter, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm

from doconv_core.kinds.bsconv import FORMS, as_choice
from doconv_core.kinds.bsconv_fold import (
    Folded,
    Normalization,
    Pointwise,
    Step,
    fold_dense,
    fold_pointwise,
)
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.maths.layout import from_canonical
from doconv_core.models.report import AXIS, REPLACED, SUBCLASS
from doconv_mx import private
from doconv_mx.composed import ComposedConv, check_foldable
from doconv_mx.ordinary import channels_per_group, is_channels_last, obstacle, require_values
from doconv_mx.parameter import put
from doconv_mx.surgery import copied, fold_layers
from doconv_mx.tree import is_replaced, parameters


def folded(layer: Any, form: str) -> HybridBlock:
    """Return the new layers that a BSConv layer folds to, as its `fold` says."""
    as_choice("form", form, FORMS)
    if form == "keep":
        return _kept(layer)
    check_parts(layer)
    require_values(parameters(layer), f"{type(layer).__name__}.fold")
    pointwise = {ctx: fold_pointwise(_steps(layer, ctx)) for ctx in layer[0].weight.list_ctx()}
    depthwise = _ordinary(layer.depthwise)
    if form == "dense":
        return private.hybridize_like(_dense(layer, pointwise, depthwise), layer)
    ones = (1,) * layer.rank
    with private.no_name_scope():
        new = nn.HybridSequential(prefix=layer.prefix)
    new.pointwise = _convolution(layer, pointwise, ones, f"{layer.prefix}pointwise_")
    new.depthwise = depthwise
    return private.hybridize_like(new, layer)


def check_forward(layer: Any, kind: type, form: str) -> None:
    """Raise NotFoldable where a BSConv layer may compute something else than `kind`, its type."""
    cls, methods = type(layer), ("__call__", "forward", "hybrid_forward")
    own = [m for m in methods if getattr(cls, m) is not getattr(kind, m)]
    if own or is_replaced(layer):
        hint = "" if form == "keep" else "; form='keep' leaves it in a model"
        raise NotFoldable(
            f"{cls.__module__}.{cls.__qualname__} has a forward of its own, so the convolution it "
            f"would be folded to might compute something else{hint}."
        )


def check_parts(layer: Any) -> None:
    """Raise NotFoldable where a BSConv layer's parts are not those of its type."""
    found, names = tuple(private.children(layer)), layer._outline.names
    if found != names:
        raise NotFoldable(
            f"its parts are {', '.join(found) or 'none'}; expected {', '.join(names)}."
        )
    for name, part in private.children(layer).items():
        if name == "depthwise":
            _check_depthwise(part, layer)
            continue
        norm = not name.startswith("pointwise")
        if norm and _passes_on(part):
            continue
        _check_hooks(name, part)
        if norm and isinstance(part, private.BatchNorm):
            _check_norm(name, part, layer)
        else:
            _check_convolution(name, part, layer)
            _check_pointwise(name, part)


def as_sequence(layer: Any) -> None:
    """Make a BSConv layer, in place, the ordinary sequence of its parts."""
    for name in ("_outline", "_deferred", "_layout", "explained"):
        vars(layer).pop(name, None)
    layer.__class__ = nn.HybridSequential


def is_changed(layer: Any) -> bool:
    """Return whether merging a BSConv layer makes anything else of it than keeping it."""
    return len([part for part in private.children(layer).values() if not _passes_on(part)]) > 2


def _passes_on(part: Block) -> bool:
    """Return whether a part is what a batch norm has become that was fused."""
    return type(part) is nn.Dropout and not private.setting(part, "rate")


def _kept(layer: Any) -> HybridBlock:
    new = copied(layer)
    private.remove_hooks(new)
    for part in private.children(new).values():
        if isinstance(part, ComposedConv):
            check_foldable(part)
            fold_layers([part])
    as_sequence(new)
    return new


def _ordinary(part: Any) -> Any:
    return part.fold() if isinstance(part, ComposedConv) else copied(part)


def _steps(layer: Any, ctx: mx.Context) -> list[Step]:
    """Return what comes before the depthwise convolution, of parts that have been checked."""
    steps: list[Step] = []
    for name, part in private.children(layer).items():
        if isinstance(part, private.BatchNorm):
            steps.append(_normalization(part, ctx))
        elif name != "depthwise" and not _passes_on(part):
            weight = _array(part.weight, ctx).reshape(part.weight.shape[0], -1)
            steps.append(Pointwise(weight, _values(part.bias, ctx)))
    return steps


def _normalization(norm: Any, ctx: mx.Context) -> Normalization:
    options = private.settings(norm)
    return Normalization(
        _array(norm.running_mean, ctx), _array(norm.running_var, ctx), options["eps"],
        None if options["fix_gamma"] else _array(norm.gamma, ctx), _array(norm.beta, ctx),
    )  # fmt: skip


def _check_norm(name: str, norm: Any, layer: Any) -> None:
    reason = None
    if type(norm) not in (nn.BatchNorm, SyncBatchNorm):
        reason = SUBCLASS
    elif private.settings(norm).get("axis", 1) % (layer.rank + 2) != layer._layout.find("C"):
        reason = AXIS
    if reason is not None:
        raise NotFoldable(f"its {name} cannot be folded: {reason}.")


def _check_depthwise(part: Any, layer: Any) -> None:
    if isinstance(part, ComposedConv):
        check_foldable(part)
    else:
        _check_convolution("depthwise", part, layer)
    groups, channels = private.settings(part)["num_group"], private.settings(part)["num_filter"]
    if not groups == channels == channels_per_group(part) * groups:
        raise NotFoldable(f"its depthwise is no depthwise convolution: {part}.")


def _check_convolution(name: str, part: Block, layer: Any) -> None:
    kind = type(part).__name__
    reason = obstacle(part) if type(part) is layer.ordinary else f"it is a {kind}"
    if reason is None and private.settings(part)["layout"] != layer._layout:
        reason = f"its layout is {private.settings(part)['layout']}"
    if reason is not None:
        raise NotFoldable(
            f"its {name} cannot be folded: {reason}; expected a mxnet.gluon.nn."
            f"{layer.ordinary.__name__} of layout {layer._layout}."
        )


def _check_pointwise(name: str, part: Any) -> None:
    options = private.settings(part)
    ones = set(options["kernel"]) | set(options["stride"]) | {options["num_group"]}
    if ones != {1} or any(options["pad"]) or part.act is not None:
        raise NotFoldable(f"its {name} is no pointwise convolution of stride 1: {part}.")


def _check_hooks(name: str, part: Block) -> None:
    if private.is_hooked(part):
        raise NotFoldable(f"its {name} has hooks, which would see other values; remove them first.")
    if is_replaced(part):
        raise NotFoldable(f"its {name} cannot be folded: {REPLACED}.")


def _dense(layer: Any, pointwise: dict[mx.Context, Folded], depthwise: Any) -> HybridBlock:
    _check_hooks("depthwise", layer.depthwise)
    options = private.settings(depthwise)
    geometry = Geometry(options["stride"], options["dilate"], symmetric(options["pad"]))
    dense = {}
    for ctx, first in pointwise.items():
        kernel = _array(depthwise.weight, ctx).reshape(len(first.kernel), -1)
        dense[ctx] = fold_dense(first, kernel, _values(depthwise.bias, ctx), geometry)
    return _convolution(
        layer, dense, options["kernel"], layer.prefix, strides=options["stride"],
        padding=options["pad"], dilation=options["dilate"],
        activation=private.activation(depthwise),
    )  # fmt: skip


def _convolution(
    layer: Any, values: dict[mx.Context, Folded], size: tuple[int, ...], prefix: str, **options: Any
) -> Any:
    """Return an ordinary convolution with these values.

    size: of its kernel. options: other arguments. dtype and multipliers are those of the layer's
    first weight, and it is trainable where any of the layer's parameters is.
    """
    first, like = next(iter(values.values())), layer[0].weight
    channels, in_channels = first.kernel.shape[:2]
    with private.no_name_scope():
        conv = layer.ordinary(
            channels, size, layout=layer._layout, in_channels=in_channels,
            use_bias=first.bias is not None, prefix=prefix, **options,
        )  # fmt: skip
    conv.cast(like.dtype)
    request = next((p.grad_req for p in parameters(layer) if p.grad_req != "null"), "null")
    for parameter in (p for p in (conv.weight, conv.bias) if p is not None):
        parameter.grad_req = request
        parameter.lr_mult, parameter.wd_mult = like.lr_mult, like.wd_mult
    dtype, layout = np.dtype(like.dtype), "O*I" if is_channels_last(conv) else "OI*"
    kernels = {c: v.kernel.reshape(channels, in_channels, *size) for c, v in values.items()}
    put(conv.weight, {c: from_canonical(k, layout).astype(dtype) for c, k in kernels.items()})
    biases = {c: v.bias.astype(dtype) for c, v in values.items() if v.bias is not None}
    if biases:
        put(conv.bias, biases)
    return conv


def _values(parameter: Parameter | None, ctx: mx.Context) -> Any:
    return None if parameter is None else _array(parameter, ctx)


def _array(parameter: Parameter, ctx: mx.Context) -> Any:
    """Return a parameter's values in one context, in float64."""
    with autograd.pause():
        return parameter.data(ctx).asnumpy().astype(np.float64)
