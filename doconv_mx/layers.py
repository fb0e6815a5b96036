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
from doconv_mx.composed import ComposedLayers
from doconv_mx.kinds import LAYER_KINDS
from doconv_mx.ordinary import ORDINARY, TRANSPOSES, is_channels_last, require_values, spec_of
from doconv_mx.private import children, is_transposed, registered, setting, settings
from doconv_mx.tree import is_replaced


def form_of(path: str, block: Block) -> LayerForm:
    """Return what a block that owns parameters is in a state.

    Raises TypeError, by the path, for a block without a counterpart, with a forward of its own, or
    with other parameters than its kind has; ValueError for parameters that have no values yet.
    """
    own, read = _own(block), _reader(type(block))
    reason = REPLACED if is_replaced(block) and read is not None else REASONS.get(type(block))
    axis = setting(block, "axis") if type(block) is nn.LayerNorm else -1
    if axis != -1:
        reason = f"a layer norm over axis {axis} has no counterpart; if it is the last, say axis=-1"
    if reason or read is None:
        raise unsupported_layer(path, block, own, reason)
    require_values(registered(block).values(), f"the state of {place(path)}")
    form = read(block)
    if form.kind == "batch_norm" and not form.scale:
        own.remove("gamma")  # which the block has, but does not compute with
    check_owned(path, block, own, form.shapes)
    return form


def layout_of(block: Block) -> str:
    """Return the core's word for the layout of a layer's weight."""
    if not hasattr(block, "_kwargs") or "layout" not in settings(block):
        return "OI"
    transposed = is_transposed(block)
    if is_channels_last(block):
        return "I*O" if transposed else "O*I"
    return "IO*" if transposed else "OI*"


def check_axes(block: Block, path: str = "") -> None:
    """Refuse a norm whose axis is not that of the channels, where the layer before tells them.

    That is in a sequential block, directly or but for activations and dropout behind a convolution.
    Raises TypeError by the path.
    """
    axes: tuple[int, ...] = ()
    for name, child in children(block).items():
        place = entry(path, name)
        check_axes(child, place)
        if _reader(type(child)) in (_conv, _composed, _transposed):
            rank = len(settings(child)["kernel"]) + 2
            axes = (-1, rank - 1) if is_channels_last(child) else (1, 1 - rank)
        elif type(child) in _CHANNEL_NORMS:
            axis = settings(child).get("axis", 1)
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
    attributes = set(registered(block).values())
    others = (name for name, p in block.params.items() if p not in attributes)
    return [*registered(block), *(name.removeprefix(block.params.prefix) for name in others)]


def _reader(cls: type[Block]) -> Callable[[Any], LayerForm] | None:
    """Return what makes the form of blocks of this very class; None where they have none."""
    kinds = (kind for kind in LAYER_KINDS.values() if isinstance(kind, ComposedLayers))
    return _composed if any(cls in kind.types.values() for kind in kinds) else FORMS.get(cls)


def _geometry(block: Any) -> Geometry:
    options = settings(block)
    return Geometry(options["stride"], options["dilate"], symmetric(options["pad"]))


def _conv(block: Any) -> LayerForm:
    return LayerForm(spec_of(block), bias=_has_bias(block), geometry=_geometry(block))


def _composed(block: Any) -> LayerForm:
    geometry = _geometry(block)
    return LayerForm(block.spec, block.kind.name, _has_bias(block), geometry=geometry)


def _transposed(block: Any) -> LayerForm:
    options = settings(block)
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
    options = settings(block)
    # Gluon's momentum is the weight of the old statistics.
    spec = BatchNormSpec(block.running_mean.shape[0], options["eps"], 1 - options["momentum"])
    return LayerForm(spec, scale=not options["fix_gamma"])


def _instance_norm(block: Any) -> LayerForm:
    channels = block.gamma.shape[0]
    return LayerForm(GroupNormSpec(channels, channels, setting(block, "epsilon")))


def _has_bias(block: Any) -> bool:
    return block.bias is not None


FORMS: dict[type[Block], Callable[[Any], LayerForm]] = {
    **dict.fromkeys(ORDINARY, _conv),
    **dict.fromkeys(TRANSPOSES, _transposed),
    **dict.fromkeys((nn.BatchNorm, contrib.nn.SyncBatchNorm), _batch_norm),
    nn.Dense: _linear,
    nn.LayerNorm: lambda block: LayerForm(
        LayerNormSpec(block.gamma.shape[0], setting(block, "epsilon"))
    ),
    nn.InstanceNorm: _instance_norm,
    nn.PReLU: lambda block: LayerForm(PReLUSpec(block.alpha.shape[0])),
    nn.Embedding: lambda block: LayerForm(EmbeddingSpec(*block.weight.shape)),
}
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
