"""Gluon's ordinary convolutions: what one is, why one is left, and how to make one like another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mxnet as mx
from mxnet.gluon import Block, HybridBlock, Parameter, ParameterDict, SymbolBlock, nn
from mxnet.gluon.nn.conv_layers import _Conv
from mxnet.ndarray import NDArray

from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import NOT_PLAIN, REPLACED, SUBCLASS, TRANSPOSED
from doconv_mx.parameter import put
from doconv_mx.private import no_name_scope
from doconv_mx.tree import is_replaced, own_parameters

OTHER = "another operation than an ordinary convolution"

ORDINARY = (nn.Conv1D, nn.Conv2D, nn.Conv3D)
TRANSPOSES = (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose)


def is_convolution(block: Block) -> bool:
    """Return whether a block is, or is called, a convolution of any kind."""
    if isinstance(block, SymbolBlock):
        return False
    named = "conv" in type(block).__name__.lower() and bool(own_parameters(block))
    return isinstance(block, _Conv) or named


def obstacle(block: Any) -> str | None:
    """Return why a convolution cannot be replaced; None where it can. Not of a kind's layers."""
    if type(block) in ORDINARY:
        if is_replaced(block):
            return REPLACED
        plain = type(block.weight) is Parameter and block.weight._stype == "default"
        return None if plain else NOT_PLAIN
    if type(block) in TRANSPOSES:
        return TRANSPOSED
    return SUBCLASS if isinstance(block, _Conv) else OTHER


def outline(layer: _Conv) -> ConvSpec:
    """Return an ordinary layer's sizes; where it infers its input channels, as many as groups."""
    options, groups = layer._kwargs, layer._kwargs["num_group"]
    channels = (channels_per_group(layer) or 1) * groups
    return ConvSpec(channels, options["num_filter"], tuple(options["kernel"]), groups)


def spec_of(layer: _Conv) -> ConvSpec:
    """Return the sizes of an ordinary layer; ValueError where it has yet to infer some."""
    options, groups = layer._kwargs, layer._kwargs["num_group"]
    channels = channels_per_group(layer) * groups
    return ConvSpec(channels, options["num_filter"], tuple(options["kernel"]), groups)


def is_channels_last(layer: _Conv) -> bool:
    """Whether the layer's layout is channels-last, such as "NHWC"."""
    return bool(layer._kwargs["layout"].endswith("C"))


def channels_per_group(layer: _Conv) -> int:
    """Return `I/g`; 0 where it is unknown, which with `mx.npx.set_np` MXNet writes as -1."""
    return max(int(layer.weight.shape[-1 if is_channels_last(layer) else 1]), 0)


def has_values(parameter: Parameter) -> bool:
    """Whether the parameter has been initialized, and no longer waits for its shape."""
    return parameter._data is not None


def is_pending(parameter: Parameter) -> bool:
    """Whether the parameter waits for its shape with data that it was given meanwhile."""
    return bool(parameter._deferred_init) and parameter._deferred_init[3] is not None


def contexts(block: HybridBlock, purpose: str) -> list[mx.Context]:
    """Return the contexts that hold the values of a convolution or dense layer.

    Raises ValueError, by name, for a parameter that has no values yet.
    """
    require_values(block._reg_params.values(), purpose)
    return list(block.weight.list_ctx())


def require_values(parameters: Iterable[Parameter], purpose: str) -> None:
    """Raise ValueError, by name, for a parameter that has no values yet."""
    for parameter in parameters:
        try:
            parameter.list_data()
        except RuntimeError:
            raise ValueError(
                f"{purpose} needs the values of {parameter.name!r}, which has none yet: initialize "
                "the model, and where it infers in_channels, run it once."
            ) from None


def check_ordinary(cls: Any, conv: Any) -> None:
    """Raise TypeError for what is not exactly the ordinary layer that `cls` stands in for."""
    if type(conv) is not cls.ordinary:
        raise TypeError(
            f"{cls.__name__}.from_conv takes over a mxnet.gluon.nn.{cls.ordinary.__name__}, "
            f"exactly; received {type(conv).__module__}.{type(conv).__qualname__}."
        )


def filled(
    cls: type[Any],
    like: _Conv,
    options: dict[str, Any],
    kernels: list[NDArray],
    grad_req: str,
    as_kept: Callable[[Any, NDArray], NDArray] = lambda layer, kernel: kernel,
) -> Any:
    """Return a new `cls` with the arguments, bias, names and mode of `like`, and these kernels.

    kernels: one for each context. grad_req: of all parameters but the bias. as_kept: returns what
    the layer keeps of a kernel. No random number is drawn.
    """
    kwargs, ctx, bias = like._kwargs, like.weight.list_ctx(), like.bias
    with no_name_scope():
        layer = cls(
            in_channels=channels_per_group(like) * kwargs["num_group"],
            channels=kwargs["num_filter"], kernel_size=kwargs["kernel"], strides=kwargs["stride"],
            padding=kwargs["pad"], dilation=kwargs["dilate"], groups=kwargs["num_group"],
            layout=kwargs["layout"], activation=like.act and like.act._act_type,
            use_bias=bias is not None, weight_initializer=like.weight.init,
            bias_initializer="zeros" if bias is None else bias.init,
            prefix=like.prefix, params=ParameterDict(like.params.prefix), **options,
        )  # fmt: skip
    for name, parameter in layer._reg_params.items():
        model = bias if name == "bias" else like.weight
        parameter.cast(model.dtype)
        parameter.grad_req = bias.grad_req if name == "bias" else grad_req
        parameter.lr_mult, parameter.wd_mult = model.lr_mult, model.wd_mult
        if name == "weight":
            put(parameter, {c: as_kept(layer, k) for c, k in zip(ctx, kernels, strict=True)})
        elif name == "bias":
            put(parameter, dict(zip(ctx, bias.list_data(), strict=True)))
        else:
            parameter.initialize(ctx=ctx)  # as the constant that it starts as
    if like._active:
        layer.hybridize(backend=like._backend, **dict(like._flags))
    return layer
