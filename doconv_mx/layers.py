"""What a Gluon block is in a canonical state: one function for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from doconv_core.state.reading import NoCounterpart, has_own_spec, is_composed, read_layer
from doconv_mx.composed import ComposedConv
from doconv_mx.kinds import LAYER_KINDS
from doconv_mx.ordinary import ORDINARY, TRANSPOSES, is_channels_last, require_values, spec_of
from doconv_mx.private import Conv, children, is_transposed, registered, setting, settings
from doconv_mx.tree import is_replaced


def form_of(path: str, block: Block) -> LayerForm:
    """Return what a block that owns parameters is in a state.

    Raises TypeError, by the path, for a block without a counterpart, with a forward of its own, or
    with other parameters than its kind has; ValueError for parameters that have no values yet.
    """
    own, cls = _own(block), type(block)
    of_kind = is_composed(LAYER_KINDS, cls) or has_own_spec(LAYER_KINDS, cls)
    read = _form if cls in SPECS or cls in REASONS or of_kind else None
    obstacle = REPLACED if is_replaced(block) else REASONS.get(cls)
    form = read_layer(read, path, block, own, path, obstacle=obstacle)
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
        if isinstance(child, Conv):
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


def _form(block: Any, path: str) -> LayerForm:
    axis, options = setting(block, "axis") if type(block) is nn.LayerNorm else -1, settings(block)
    if axis != -1:
        raise NoCounterpart(
            f"a layer norm over axis {axis} has no counterpart; if it is the last, say axis=-1"
        )
    require_values(registered(block).values(), f"the state of {place(path)}")
    cls, composed = type(block), isinstance(block, ComposedConv)
    own = composed or has_own_spec(LAYER_KINDS, cls)
    return LayerForm(
        block.spec if own else SPECS[cls](block),
        block.kind.name if composed else False,
        bias=getattr(block, "bias", None) is not None or hasattr(block, "beta"),
        scale=not options.get("fix_gamma", False),
        geometry=_geometry(options) if own or isinstance(block, Conv) else None,
    )


def _geometry(options: Mapping[str, Any]) -> Geometry:
    pads = symmetric(options["pad"])
    if "adj" in options:  # of a transposed convolution
        pads = tuple((p, p - a) for p, a in zip(options["pad"], options["adj"], strict=True))
    return Geometry(options["stride"], options["dilate"], pads)


def _transposed(block: Any) -> TransposedConvSpec:
    options = settings(block)
    return TransposedConvSpec(
        block.weight.shape[0], options["num_filter"], options["kernel"], options["num_group"]
    )


def _batch_norm(block: Any) -> BatchNormSpec:
    options = settings(block)
    # Gluon's momentum is the weight of the old statistics.
    return BatchNormSpec(block.running_mean.shape[0], options["eps"], 1 - options["momentum"])


def _instance_norm(block: Any) -> GroupNormSpec:
    (channels,) = block.gamma.shape
    return GroupNormSpec(channels, channels, setting(block, "epsilon"))


SPECS: dict[type[Block], Callable[[Any], Any]] = {
    **dict.fromkeys(ORDINARY, spec_of),
    **dict.fromkeys(TRANSPOSES, _transposed),
    **dict.fromkeys((nn.BatchNorm, contrib.nn.SyncBatchNorm), _batch_norm),
    nn.Dense: lambda block: LinearSpec(*block.weight.shape[::-1]),
    nn.LayerNorm: lambda block: LayerNormSpec(block.gamma.shape[0], setting(block, "epsilon")),
    nn.InstanceNorm: _instance_norm,
    nn.PReLU: lambda block: PReLUSpec(block.alpha.shape[0]),
    nn.Embedding: lambda block: EmbeddingSpec(*block.weight.shape),
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
