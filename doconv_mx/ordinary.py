"""Gluon's ordinary convolutions: what one is, and how to make one like another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import HybridBlock, Parameter, ParameterDict
from mxnet.gluon.block import _BlockScope
from mxnet.gluon.nn.conv_layers import _Conv
from mxnet.ndarray import NDArray

from doconv_core.maths.spec import ConvSpec


def spec_of(layer: _Conv, depth_multiplier: int | None = None) -> ConvSpec:
    """Return the sizes of an ordinary layer whose input channels are known."""
    options, groups = layer._kwargs, layer._kwargs["num_group"]
    return ConvSpec(
        channels_per_group(layer) * groups, options["num_filter"], tuple(options["kernel"]), groups,
        depth_multiplier,
    )  # fmt: skip


def is_channels_last(layer: _Conv) -> bool:
    """Whether the layer's layout is channels-last, such as "NHWC"."""
    return bool(layer._kwargs["layout"].endswith("C"))


def channels_per_group(layer: _Conv) -> int:
    """Return `I/g`; 0 where it is unknown, which with `mx.npx.set_np` MXNet writes as -1."""
    return max(layer.weight.shape[-1 if is_channels_last(layer) else 1], 0)


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


def require_ordinary(cls: Any, conv: Any) -> None:
    """Raise TypeError for what is not exactly the ordinary layer that `cls` stands in for."""
    if type(conv) is not cls.ordinary:
        raise TypeError(
            f"{cls.__name__}.from_conv takes over a mxnet.gluon.nn.{cls.ordinary.__name__}, "
            f"exactly; received {type(conv).__module__}.{type(conv).__qualname__}."
        )


def filled(
    cls: type[Any], like: _Conv, options: dict[str, Any], **values: tuple[list[NDArray], str]
) -> Any:
    """Return a new `cls` with the arguments, bias, names and mode of `like`, and the given values.

    values: for each parameter its arrays, one for each context, and its `grad_req`. No random
    number is drawn.
    """
    kwargs, ctx = like._kwargs, like.weight.list_ctx()
    with no_name_scope():
        layer = cls(
            in_channels=spec_of(like).in_channels, channels=kwargs["num_filter"],
            kernel_size=kwargs["kernel"], strides=kwargs["stride"], padding=kwargs["pad"],
            dilation=kwargs["dilate"], groups=kwargs["num_group"], layout=kwargs["layout"],
            activation=like.act and like.act._act_type, use_bias=like.bias is not None,
            weight_initializer=like.weight.init,
            bias_initializer=like.bias.init if like.bias is not None else "zeros",
            prefix=like.prefix, params=ParameterDict(like.params.prefix), **options,
        )  # fmt: skip
    if like.bias is not None:
        values["bias"] = (like.bias.list_data(), like.bias.grad_req)
    for name, (arrays, grad_req) in values.items():
        model = like.bias if name == "bias" else like.weight
        parameter = getattr(layer, name)
        parameter.cast(model.dtype)
        parameter.grad_req = grad_req
        parameter.lr_mult, parameter.wd_mult = model.lr_mult, model.wd_mult
        parameter.initialize(init=mx.init.Zero(), ctx=ctx)
        with autograd.pause():
            for c, array in zip(ctx, arrays, strict=True):
                parameter.data(c)[:] = array
    if like._active:
        layer.hybridize(backend=like._backend, **dict(like._flags))
    return layer


@contextmanager
def no_name_scope() -> Iterator[None]:
    """Let a block's prefix be the one it is given, in whichever block's `name_scope()` this is."""
    scope = getattr(_BlockScope._current, "value", None)
    _BlockScope._current.value = None
    try:
        yield
    finally:
        _BlockScope._current.value = scope
