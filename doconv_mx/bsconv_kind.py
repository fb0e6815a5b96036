"""What BSConv layers are made of in Gluon: how their parts are read, folded and put in models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, Parameter, nn

from doconv_core.kinds.bsconv import obstacle
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.maths.layout import from_canonical
from doconv_core.maths.separable import Folded, Normalization, Pointwise
from doconv_core.models.report import AXIS
from doconv_core.models.separable import HOOKED, SeparableLayers
from doconv_core.models.view import Folding, ModelView, Site
from doconv_mx import ordinary, private, tree
from doconv_mx.batchnorm import norm_obstacle
from doconv_mx.composed import ComposedConv, check_foldable
from doconv_mx.ordinary import channels_per_group, is_channels_last, outline, require_values
from doconv_mx.parameter import put
from doconv_mx.surgery import become, copied, fold_layers, remove_parameter, set_parameter
from doconv_mx.symbols import node_of
from doconv_mx.tree import parameters

# Why a convolution does not become a BSConv, of what Gluon alone has.
IN_A_SYMBOL = "an operator of a symbol, not a layer"


class BSConvLayers(SeparableLayers):
    """The BSConv layers of Gluon."""

    composed, sequence, batch_norm = ComposedConv, nn.HybridSequential, private.BatchNorm
    methods = ("forward", "__call__", "hybrid_forward")
    is_replaced = staticmethod(tree.is_replaced)

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        if node_of(layer) is not None:
            return IN_A_SYMBOL
        return obstacle(outline(layer), options["kernel_sizes"])

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs, which keep their biases."""
        for site, new in chosen:
            if site.layer.bias is not None:
                remove_parameter(new.depthwise, "bias")
                set_parameter(new.depthwise, "bias", site.layer.bias)  # by the bias's own name
            become(site.layer, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs. A depthwise convolution that stays is the one that was there."""
        for site, (_, new) in planned:
            if new is None:
                _as_sequence(site.layer)
                continue
            if isinstance(new, nn.HybridSequential):
                new.depthwise = site.layer.depthwise
            become(site.layer, new)

    def _parts(self, layer: Block) -> dict[str, Block]:
        return private.children(layer)

    def _names(self, layer: Any) -> tuple[str, ...]:
        names: tuple[str, ...] = layer._outline.names
        return names

    def _contexts(self, layer: Any) -> Sequence[Any]:
        require_values(parameters(layer), f"{type(layer).__name__}.fold")
        contexts: list[mx.Context] = layer.depthwise.weight.list_ctx()
        return contexts

    def _strides(self, layer: Any) -> Sequence[int] | None:
        known = isinstance(self._parts(layer).get("depthwise"), private.Conv)
        if not known or not layer.inferred_in_channels():
            return None
        found: Sequence[int] = private.settings(layer.depthwise)["stride"]
        return found

    def _passes_on(self, part: Block) -> bool:
        return type(part) is nn.Dropout and not private.setting(part, "rate")

    def _watcher(self, part: Block) -> str | None:
        return HOOKED if private.is_hooked(part) else None

    def _norm_obstacle(self, layer: Any, norm: Any) -> str | None:
        axis = private.settings(norm).get("axis", 1) % (layer.rank + 2)
        return norm_obstacle(norm) or (None if axis == layer._layout.find("C") else AXIS)

    def _conv_obstacle(self, layer: Any, name: str, part: Any) -> str | None:
        kind = layer.ordinary
        reason = ordinary.obstacle(part) if type(part) is kind else f"it is a {type(part).__name__}"
        if reason is None and private.settings(part)["layout"] != layer._layout:
            reason = f"its layout is {private.settings(part)['layout']}"
        expected = f"mxnet.gluon.nn.{kind.__name__} of layout {layer._layout}"
        return reason and f"{reason}; expected a {expected}"

    def _is_pointwise(self, conv: Any) -> bool:
        options = private.settings(conv)
        ones = {*options["kernel"], *options["stride"], options["num_group"]}
        return ones == {1} and not any(options["pad"]) and conv.act is None

    def _is_depthwise(self, conv: Any) -> bool:
        groups, channels = (private.settings(conv)[name] for name in ("num_group", "num_filter"))
        return bool(groups == channels == channels_per_group(conv) * groups)

    def _matrix(self, conv: Any, context: Any) -> Pointwise:
        weight = _array(conv.weight, context)
        return Pointwise(weight.reshape(len(weight), -1), _array(conv.bias, context))

    def _normalization(self, norm: Any, context: Any) -> Normalization:
        options = private.settings(norm)
        values = (norm.running_mean, norm.running_var, norm.gamma, norm.beta)
        mean, variance, scale, offset = (_array(parameter, context) for parameter in values)
        scale = None if options["fix_gamma"] else scale
        return Normalization(mean, variance, options["eps"], scale, offset)

    def _geometry(self, layer: Any, depthwise: Any) -> Geometry:
        options = private.settings(depthwise)
        return Geometry(options["stride"], options["dilate"], symmetric(options["pad"]))

    def _ordinary(self, part: Any) -> Any:
        return part.fold() if isinstance(part, ComposedConv) else copied(part)

    def _kept_parts(self, layer: Any) -> HybridBlock:
        new = copied(layer)  # which may have no values yet
        private.remove_hooks(new)
        for part in self._parts(new).values():
            if isinstance(part, ComposedConv):
                check_foldable(part)
                fold_layers([part])
        _as_sequence(new)
        return new

    def _sequenced(self, layer: Any, parts: Mapping[str, Block]) -> HybridBlock:
        with private.no_name_scope():
            new = nn.HybridSequential(prefix=layer.prefix)
        for name, part in parts.items():
            setattr(new, name, part)
        return private.hybridize_like(new, layer)

    def _convolution(
        self, layer: Any, values: Mapping[Any, Folded], depthwise: Any = None
    ) -> HybridBlock:
        """Return an ordinary convolution with these values.

        dtype and multipliers are those of the layer's first weight, and it is trainable where any
        of the layer's parameters is.
        """
        first, like = next(iter(values.values())), layer[0].weight
        channels, in_channels = first.kernel.shape[:2]
        source, prefix = depthwise, layer.prefix
        if depthwise is None:
            source, prefix = layer[0], f"{layer.prefix}pointwise_"
        options = private.settings(source)
        size = options["kernel"]
        with private.no_name_scope():
            conv = layer.ordinary(
                channels, size, options["stride"], options["pad"], options["dilate"],
                layout=layer._layout, in_channels=in_channels, use_bias=first.bias is not None,
                activation=private.activation(source), prefix=prefix,
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
        return private.hybridize_like(conv, layer)


def _as_sequence(layer: Any) -> None:
    """Make a BSConv layer, in place, the ordinary sequence of its parts."""
    for name in ("_outline", "_deferred", "_layout", "explained"):
        vars(layer).pop(name, None)
    layer.__class__ = nn.HybridSequential


def _array(parameter: Parameter | None, ctx: mx.Context) -> Any:
    """Return a parameter's values in one context, in float64; None for none."""
    if parameter is None:
        return None
    with autograd.pause():
        return parameter.data(ctx).asnumpy().astype(np.float64)
