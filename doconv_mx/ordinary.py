"""Gluon's ordinary convolutions: what one is, why one is left, and how to make one like another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mxnet as mx
from mxnet.gluon import Block, HybridBlock, Parameter, ParameterDict, SymbolBlock, nn
from mxnet.ndarray import NDArray

from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import NOT_PLAIN, REPLACED, SUBCLASS, TRANSPOSED
from doconv_mx.parameter import put
from doconv_mx.private import (
    Conv,
    activation,
    hybridize_like,
    is_dense,
    no_name_scope,
    registered,
    settings,
)
from doconv_mx.tree import is_replaced, own_parameters

OTHER = "another operation than an ordinary convolution"

ORDINARY = (nn.Conv1D, nn.Conv2D, nn.Conv3D)
TRANSPOSES = (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose)


def is_convolution(block: Block) -> bool:
    """Return whether a block is, or is called, a convolution of any kind."""
    if isinstance(block, SymbolBlock):
        return False
    named = "conv" in type(block).__name__.lower() and bool(own_parameters(block))
    return isinstance(block, Conv) or named


def obstacle(block: Any) -> str | None:
    """Return why a convolution cannot be replaced; None where it can. Not of a kind's layers."""
    if type(block) in ORDINARY:
        if is_replaced(block):
            return REPLACED
        plain = type(block.weight) is Parameter and is_dense(block.weight)
        return None if plain else NOT_PLAIN
    if type(block) in TRANSPOSES:
        return TRANSPOSED
    return SUBCLASS if isinstance(block, Conv) else OTHER


def outline(layer: Conv) -> ConvSpec:
    """Return an ordinary layer's sizes; where it infers its input channels, as many as groups."""
    return _sizes(layer, channels_per_group(layer) or 1)


def spec_of(layer: Conv) -> ConvSpec:
    """Return the sizes of an ordinary layer; ValueError where it has yet to infer some."""
    return _sizes(layer, channels_per_group(layer))


def _sizes(layer: Conv, per_group: int) -> ConvSpec:
    options, groups = settings(layer), settings(layer)["num_group"]
    return ConvSpec(per_group * groups, options["num_filter"], tuple(options["kernel"]), groups)


def is_channels_last(layer: Conv) -> bool:
    """Whether the layer's layout is channels-last, such as "NHWC"."""
    return bool(settings(layer)["layout"].endswith("C"))


def channels_per_group(layer: Conv) -> int:
    """Return `I/g`; 0 where it is unknown, which with `mx.npx.set_np` MXNet writes as -1."""
    return max(int(layer.weight.shape[-1 if is_channels_last(layer) else 1]), 0)


def contexts(block: HybridBlock, purpose: str) -> list[mx.Context]:
    """Return the contexts that hold the values of a convolution or dense layer.

    Raises ValueError, by name, for a parameter that has no values yet.
    """
    require_values(registered(block).values(), purpose)
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
    like: Conv,
    options: dict[str, Any],
    kernels: list[NDArray],
    grad_req: str,
    as_kept: Callable[[Any, NDArray], NDArray] = lambda layer, kernel: kernel,
) -> Any:
    """Return a new `cls` with the arguments, bias, names and mode of `like`, and these kernels.

    kernels: one for each context. grad_req: of all parameters but the bias. as_kept: returns what
    the layer keeps of a kernel. No random number is drawn.
    """
    kwargs, ctx, bias = settings(like), like.weight.list_ctx(), like.bias
    with no_name_scope():
        layer = cls(
            in_channels=channels_per_group(like) * kwargs["num_group"],
            channels=kwargs["num_filter"], kernel_size=kwargs["kernel"], strides=kwargs["stride"],
            padding=kwargs["pad"], dilation=kwargs["dilate"], groups=kwargs["num_group"],
            layout=kwargs["layout"], activation=activation(like),
            use_bias=bias is not None, weight_initializer=like.weight.init,
            bias_initializer="zeros" if bias is None else bias.init,
            prefix=like.prefix, params=ParameterDict(like.params.prefix), **options,
        )  # fmt: skip
    for name, parameter in registered(layer).items():
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
    return hybridize_like(layer, like)
