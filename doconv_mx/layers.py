"""What a Gluon block is in a canonical state: one function for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mxnet.gluon import Block, contrib, nn

from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.models.report import REPLACED, place
from doconv_core.state.file import entry
from doconv_core.state.layers import (
    BatchNormSpec,
    EmbeddingSpec,
    GroupNormSpec,
    LayerForm,
    LayerNormSpec,
    LinearSpec,
    PReLUSpec,
    TransposedConvSpec,
)
from doconv_core.state.match import check_owned, unsupported_layer
from doconv_mx.do_conv import DOConv1D, DOConv2D, DOConv3D
from doconv_mx.ordinary import is_channels_last, spec_of
from doconv_mx.view import overridden

_DO_CONVS = (DOConv1D, DOConv2D, DOConv3D)


def form_of(path: str, block: Block) -> LayerForm:
    """Return what a block that owns parameters is in a state.

    Raises TypeError, by the path, for a block without a counterpart, with a forward of its own, or
    with other parameters than its kind has; ValueError for parameters that have no values yet.
    """
    own = _own(block)
    reason = REPLACED if overridden(block) and type(block) in FORMS else REASONS.get(type(block))
    if type(block) is nn.LayerNorm and block._axis != -1:
        reason = (
            f"a layer norm over axis {block._axis} has no counterpart; if it is the last, say "
            "axis=-1"
        )
    if reason or type(block) not in FORMS:
        raise unsupported_layer(path, block, own, reason)
    _require_values(path, block)
    form = FORMS[type(block)](block)
    if form.kind == "batch_norm" and not form.scale:
        own.remove("gamma")  # which the block has, but does not compute with
    check_owned(path, block, own, form.shapes)
    return form


def layout_of(block: Block) -> str:
    """Return the core's word for the layout of a layer's weight."""
    if not hasattr(block, "_kwargs") or "layout" not in block._kwargs:
        return "OI"
    transposed = block._op_name.lower() == "deconvolution"
    if is_channels_last(block):
        return "I*O" if transposed else "O*I"
    return "IO*" if transposed else "OI*"


def check_axes(block: Block, path: str = "") -> None:
    """Refuse a norm whose axis is not that of the channels, where the layer before tells them.

    That is in a sequential block, directly or but for activations and dropout behind a convolution.
    Raises TypeError by the path.
    """
    axes: tuple[int, ...] = ()
    for name, child in block._children.items():
        place = entry(path, name)
        check_axes(child, place)
        if type(child) in _CONVS:
            rank = len(child._kwargs["kernel"]) + 2
            axes = (-1, rank - 1) if is_channels_last(child) else (1, 1 - rank)
        elif type(child) in _CHANNEL_NORMS:
            axis = child._kwargs.get("axis", 1)
            if axes and axis not in axes and type(block) in _SEQUENTIAL:
                raise unsupported_layer(
                    place,
                    child,
                    _own(child),
                    f"axis={axis} is not that of the channels in what "
                    f"the convolution before it gives; expected axis={max(axes)}",
                )
        elif type(child) not in _KEEP_AXES:
            axes = ()


def _own(block: Block) -> list[str]:
    """Return the names of the block's own parameters, whether they are its attributes or not."""
    attributes = set(block._reg_params.values())
    others = (name for name, p in block.params.items() if p not in attributes)
    return [*block._reg_params, *(name.removeprefix(block.params.prefix) for name in others)]


def _require_values(path: str, block: Block) -> None:
    for parameter in block._reg_params.values():
        try:
            parameter.list_data()
        except RuntimeError:
            raise ValueError(
                f"the state of {place(path)} needs the values of {parameter.name!r}, which has "
                "none yet: initialize the model, and where it infers in_channels, run it once."
            ) from None


def _conv(block: Any) -> LayerForm:
    options = block._kwargs
    geometry = Geometry(options["stride"], options["dilate"], symmetric(options["pad"]))
    if type(block) in _DO_CONVS:
        over_parameterized = block.depthwise_weight is not None
        return LayerForm(block.spec, over_parameterized, _has_bias(block), geometry=geometry)
    return LayerForm(spec_of(block), bias=_has_bias(block), geometry=geometry)


def _transposed(block: Any) -> LayerForm:
    options = block._kwargs
    spec = TransposedConvSpec(
        block.weight.shape[0], options["num_filter"], options["kernel"], options["num_group"]
    )
    pads = tuple((p, p - a) for p, a in zip(options["pad"], options["adj"], strict=True))
    geometry = Geometry(options["stride"], options["dilate"], pads)
    return LayerForm(spec, bias=_has_bias(block), geometry=geometry)


def _linear(block: Any) -> LayerForm:
    out_features, in_features = block.weight.shape
    return LayerForm(LinearSpec(in_features, out_features), bias=_has_bias(block))


def _batch_norm(block: Any) -> LayerForm:
    options = block._kwargs
    # Gluon's momentum is the weight of the old statistics.
    spec = BatchNormSpec(block.running_mean.shape[0], options["eps"], 1 - options["momentum"])
    return LayerForm(spec, scale=not options["fix_gamma"])


def _layer_norm(block: Any) -> LayerForm:
    return LayerForm(LayerNormSpec(block.gamma.shape[0], block._epsilon))


def _instance_norm(block: Any) -> LayerForm:
    channels = block.gamma.shape[0]
    return LayerForm(GroupNormSpec(channels, channels, block._epsilon))


def _prelu(block: Any) -> LayerForm:
    return LayerForm(PReLUSpec(block.alpha.shape[0]))


def _embedding(block: Any) -> LayerForm:
    return LayerForm(EmbeddingSpec(*block.weight.shape))


def _has_bias(block: Any) -> bool:
    return block.bias is not None


FORMS: dict[type[Block], Callable[[Any], LayerForm]] = {
    **dict.fromkeys((nn.Conv1D, nn.Conv2D, nn.Conv3D, *_DO_CONVS), _conv),
    **dict.fromkeys((nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose), _transposed),
    **dict.fromkeys((nn.BatchNorm, contrib.nn.SyncBatchNorm), _batch_norm),
    nn.Dense: _linear,
    nn.LayerNorm: _layer_norm,
    nn.InstanceNorm: _instance_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
}
_CONVS = (*_DO_CONVS, nn.Conv1D, nn.Conv2D, nn.Conv3D)
_CONVS += (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose)
_CHANNEL_NORMS = (nn.BatchNorm, contrib.nn.SyncBatchNorm, nn.InstanceNorm)
_KEEP_AXES = (
    nn.Activation, nn.Dropout, nn.ELU, nn.GELU, nn.LeakyReLU, nn.PReLU, nn.SELU, nn.Swish,
)  # fmt: skip
_SEQUENTIAL = (nn.Sequential, nn.HybridSequential)
REASONS: dict[type[Block], str] = {
    nn.GroupNorm: "it has one gamma for each group, where other frameworks have one for each "
    "channel",
    nn.BatchNormReLU: "use a BatchNorm and an Activation",
}
