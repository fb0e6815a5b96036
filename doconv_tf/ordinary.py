"""Keras' ordinary layers: which of a model are convolutions, and making one like another."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
from keras import ops

from doconv_core.maths.geometry import Pad, causal, same, symmetric
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.received import no_model
from doconv_core.models.report import QUANTIZED, REPLACED, SUBCLASS, TRANSPOSED, place
from doconv_tf.private import children, strategy_scope

_layers = keras.layers
CONVS = (_layers.Conv1D, _layers.Conv2D, _layers.Conv3D)
DEPTHWISE_CONVS = (_layers.DepthwiseConv1D, _layers.DepthwiseConv2D)
SEPARABLE_CONVS = (_layers.SeparableConv1D, _layers.SeparableConv2D)
ORDINARY = (*CONVS, *DEPTHWISE_CONVS, *SEPARABLE_CONVS)
TRANSPOSED_CONVS = (_layers.Conv1DTranspose, _layers.Conv2DTranspose, _layers.Conv3DTranspose)
_RECURRENT = (_layers.ConvLSTM1D, _layers.ConvLSTM2D, _layers.ConvLSTM3D)
CONVOLUTIONS = (*ORDINARY, *TRANSPOSED_CONVS, *_RECURRENT)


def first_occurrences(layer: keras.Layer) -> list[tuple[str, keras.Layer]]:
    """Return the layer and all below it, each with the path at which it is met first."""
    found: dict[int, tuple[str, keras.Layer]] = {}
    todo = [("", layer)]
    while todo:
        path, each = todo.pop()
        if id(each) not in found:  # or else what is below it has been found, too
            found[id(each)] = (path, each)
            todo += reversed([(below(path, child), child) for child in children(each)])
    return list(found.values())


def below(path: str, child: keras.Layer) -> str:
    """Return the path of a layer that the layer at `path` holds."""
    return f"{path}.{child.name}" if path else str(child.name)


def require_built(path: str, layer: keras.Layer) -> None:
    """Raise TypeError for what is not a layer, ValueError for one that is not built."""
    if not isinstance(layer, keras.Layer):
        raise no_model("keras.Layer", layer)
    if not layer.built:
        raise ValueError(
            f"{place(path)} ({type(layer).__name__} {layer.name!r}) is not built, so that its "
            "layers or their weights are not there yet; call the model on data, or its build(), "
            "first."
        )


def count_parameters(model: keras.Layer) -> int:
    """Return the number of the model's parameters, moving statistics included."""
    return sum(math.prod(variable.shape) for variable in model.weights)


def obstacle(layer: keras.Layer) -> str | None:
    """Return why a convolution cannot be replaced, whatever it is to become; None where it can."""
    if type(layer) in TRANSPOSED_CONVS:
        return TRANSPOSED
    if type(layer) in _RECURRENT:
        return "recurrent"
    if type(layer) not in ORDINARY:
        return SUBCLASS
    return variable_obstacle(layer)


def variable_obstacle(layer: Any) -> str | None:
    """Return why the kernel of one of Keras' own layers is not all that it computes with."""
    if layer.quantization_mode is not None:
        return QUANTIZED
    if getattr(layer, "lora_enabled", False):
        return "LoRA is enabled"
    return REPLACED if is_replaced(layer) else None


def is_replaced(layer: keras.Layer) -> bool:
    """Return whether this one layer has a method of its own in the place of its class's call."""
    return not vars(layer).keys().isdisjoint(("call", "convolution_op"))


def spec_of(layer: Any) -> ConvSpec:
    """Return the sizes of an ordinary convolution, of a separable one those of its depthwise part.

    Of one that is not built, with as few channels as there can be.
    """
    if isinstance(layer, (*DEPTHWISE_CONVS, *SEPARABLE_CONVS)):
        separable = isinstance(layer, SEPARABLE_CONVS)
        kernel = "depthwise_kernel" if separable else "kernel"
        channels = getattr(layer, kernel).shape[-2] if layer.built else 1
        outputs = channels * layer.depth_multiplier
        return ConvSpec(channels, outputs, layer.kernel_size, channels)
    channels = layer.kernel.shape[-2] * layer.groups if layer.built else layer.groups
    return ConvSpec(channels, layer.filters, layer.kernel_size, layer.groups)


def pads(layer: Any) -> tuple[Pad, ...]:
    """Return the padding of a convolution, which Keras says in words."""
    size, dilation = layer.kernel_size, layer.dilation_rate
    if layer.padding == "same":
        return same(size, layer.strides, dilation)
    if layer.padding == "causal":
        return causal(size, dilation)
    return symmetric([0] * len(size))


def check_ordinary(cls: type[Any], conv: keras.Layer) -> None:
    """Raise TypeError or ValueError where `cls.from_conv` cannot take over this layer."""
    if type(conv) is not cls.ordinary:
        raise TypeError(
            f"{cls.__name__}.from_conv takes over a keras.layers.{cls.ordinary.__name__}, "
            f"exactly; received {type(conv).__module__}.{type(conv).__qualname__}."
        )
    if getattr(conv, "lora_enabled", False) or conv.quantization_mode is not None:
        raise TypeError(
            f"{cls.__name__}.from_conv needs a layer whose kernel is a plain variable; layer "
            f"{conv.name!r} is quantized or has LoRA enabled."
        )
    if not conv.built:
        raise ValueError(
            f"layer {conv.name!r} is not built, so it has no kernel to take over. Build it, or "
            f"create a {cls.__name__} in its place."
        )


def policy_of(layer: keras.Layer) -> Any:
    """Return the dtype policy in force for `layer`, also where a map gives one to each path."""
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap) and layer.path:
        return policy[layer.path]
    return policy


def like(old: keras.Layer, cls: type[Any], options: dict[str, Any] | None = None) -> Any:
    """Return a new, built `cls` with the arguments of `old`, and all its variables but the kernel.

    options: further arguments, or others.
    The arguments are passed on as objects, so that what Keras could not serialize is kept too. The
    initializers come last: no random number is drawn only to be overwritten.
    """
    ordinary = getattr(cls, "ordinary", cls)
    parameters = inspect.signature(ordinary.__init__).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    arguments = {name: getattr(old, name) for name in names}
    arguments["activation"] = _unshared(old.activation)
    initializers = {name: arguments[name] for name in names if name.endswith("_initializer")}
    arguments |= {**dict.fromkeys(initializers, "zeros"), **(options or {})}
    layer = cls(
        **arguments, name=old.name, dtype=policy_of(old), trainable=old.trainable,
        autocast=old.autocast,
    )  # fmt: skip
    with name_scopes(old):
        layer.build_from_config(old.get_build_config())
    for name, initializer in initializers.items():
        setattr(layer, name, initializer)
    for name in ("pointwise_kernel", "bias"):
        variable = getattr(old, name, None)
        if variable is not None:
            put(getattr(layer, name), variable)
            getattr(layer, name).trainable = variable.trainable
    return layer


def put(variable: Any, value: Any) -> None:
    """Give a variable a copy of this value.

    Where Keras runs on JAX, `assign` takes over the array itself, and what trains the one variable
    then deletes the other's.
    """
    variable.assign(ops.copy(value))


@contextmanager
def name_scopes(layer: keras.Layer) -> Iterator[None]:
    """Open the name scopes in which a layer was built: they are in the paths of its variables.

    And that of a distribution strategy, which new variables are to belong to as well.
    """
    with ExitStack() as stack:
        stack.enter_context(strategy_scope(layer))
        for name in (layer.path or "").split("/")[:-1]:
            stack.enter_context(keras.name_scope(name))
        yield


def _unshared(activation: Any) -> Any:
    """Return an activation for a second layer: a clone of one that has weights, or may get some."""
    if not isinstance(activation, keras.Layer) or (activation.built and not activation.variables):
        return activation
    config = activation.get_config()
    if "dtype" in config:
        config["dtype"] = policy_of(activation)
    clone = type(activation).from_config(config)
    if activation.built and not clone.built:
        clone.build_from_config(activation.get_build_config())
    for new, old in zip(clone.variables, activation.variables, strict=True):
        put(new, old)
        new.trainable = old.trainable
    return clone
