"""Fusing the batch norms of a Keras model into the convolutions that they directly follow.

Keras has no utility for it. What follows what is known in functional and sequential models alone;
what a subclassed model's `call` does is in no structure, nor how it calls the models inside it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from doconv_core.maths.batchnorm import fuse_batchnorm
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.models.report import (
    AXIS,
    NOT_DIRECT,
    NOT_FINITE,
    ONE_TAP,
    OUTPUT,
    REPLACED,
    SEVERAL,
    SUBCLASS,
    Change,
    Left,
    behind,
    fused_into,
)
from doconv_tf.become import become
from doconv_tf.convolutions import CONVOLUTIONS, is_replaced, obstacle
from doconv_tf.ordinary import like, policy_of, put
from doconv_tf.view import children, first_occurrences, walk

# Why a batch norm is left, of what Keras alone has.
UNKNOWN = "what it follows is known only where functional and sequential models alone hold it"
ACTIVATION = "its convolution has an activation before it"
REGULARIZED = "it or its convolution has an activity regularizer"
TRAINING = "called with training=True, whatever the model does"


class _Call(NamedTuple):
    """A call of a layer in a graph.

    sources: the operations that give its inputs. targets: those that take its output, None for the
    graph itself. training: whether it was asked to train, whatever the model does.
    """

    sources: list[Any]
    targets: list[Any]
    training: bool


def fuse_batchnorms(model: keras.Layer) -> tuple[list[Change], list[Left]]:
    """Fuse, in the model itself, the batch norms that can be; return them, and those left.

    Their convolutions are ordinary ones by now. A `keras.layers.Identity` of the same name takes
    the place of each, so that the graph stays as it is.
    """
    changed, left = [], []
    calls = _calls(model)
    for path, norm in first_occurrences(model):
        if isinstance(norm, keras.layers.BatchNormalization):
            conv, reason = _partner(norm, calls)
            reason = reason or _fuse(conv, norm)
            if reason is None:
                into = fused_into(type(conv).__name__)
                changed.append(Change(path, "BatchNormalization", into))
            else:
                left.append(Left(path, type(norm).__name__, reason))
    return changed, left


def _calls(model: keras.Layer) -> dict[int, list[_Call]]:
    """Return the calls of each layer in the graphs of the model, by the layer's id.

    A layer that several layers hold has one more, since what else they do with it is not known.
    """
    layers = [layer for _, layer in first_occurrences(model)]
    calls: dict[int, list[_Call]] = {}
    opaque = _opaque(layers)
    for graph in filter(None, (_graph(layer) for layer in layers if id(layer) not in opaque)):
        nodes = [node for nodes in graph._nodes_by_depth.values() for node in nodes]
        made = {id(tensor): node.operation for node in nodes for tensor in node.outputs}
        takers: dict[int, list[Any]] = {id(tensor): [None] for tensor in graph.outputs}
        for node in nodes:
            for tensor in node.input_tensors:
                takers.setdefault(id(tensor), []).append(node.operation)
        for node in nodes:
            sources = [made.get(id(tensor)) for tensor in node.input_tensors]
            targets = [taker for tensor in node.outputs for taker in takers.get(id(tensor), [])]
            call = _Call(sources, targets, node.arguments.kwargs.get("training") is True)
            calls.setdefault(id(node.operation), []).append(call)
    held = Counter(id(child) for layer in layers for child in children(layer))
    for key in calls.keys() & {key for key, count in held.items() if count > 1}:
        calls[key].append(_Call([], [], False))
    for layer in layers:
        if any(call.training for call in calls.get(id(layer), [])):
            for _, inner in walk(layer):
                calls[id(inner)] = [
                    call._replace(training=True) for call in calls.get(id(inner), [])
                ]
    return calls


def _opaque(layers: list[keras.Layer]) -> set[int]:
    """Return the ids of the layers that are called, at any depth, by a `call` in no structure.

    It may train a model inside it, whatever itself is asked for, or take a single layer out of it.
    `TimeDistributed` calls what it holds plainly, and passes `training` on.
    """
    holders = (
        layer
        for layer in layers
        if _graph(layer) is None
        and (type(layer) is not keras.layers.TimeDistributed or "call" in vars(layer))
    )
    held = (child for layer in holders for child in children(layer))
    return {id(inner) for child in held for _, inner in first_occurrences(child)}


def _graph(layer: keras.Layer) -> Any:
    """Return the graph of a functional or sequential model; None for any other layer.

    One with a `call` of its own need not follow its graph.
    """
    if "call" in vars(layer) or not type(layer).call.__module__.startswith("keras."):
        return None
    return layer if isinstance(layer, keras.Function) else getattr(layer, "_functional", None)


def _partner(norm: keras.Layer, calls: dict[int, list[_Call]]) -> tuple[Any, str | None]:
    """Return the convolution into which the norm can be fused, or why there is none."""
    if type(norm) is not keras.layers.BatchNormalization:
        return None, SUBCLASS
    if is_replaced(norm):
        return None, REPLACED
    own = calls.get(id(norm), [])
    if not own:
        return None, UNKNOWN
    sources = [source for call in own for source in call.sources]
    if len(own[0].sources) > 1 or not all(isinstance(each, CONVOLUTIONS) for each in sources):
        return None, NOT_DIRECT
    conv = sources[0]
    if any(target is not norm for call in calls[id(conv)] for target in call.targets):
        return None, OUTPUT
    if len(own) > 1 or len(calls[id(conv)]) > 1:
        return None, SEVERAL
    if obstacle(conv) not in (None, ONE_TAP):
        return None, behind(obstacle(conv))
    if own[0].training:
        return None, TRAINING
    if conv.activation not in (None, keras.activations.linear):
        return None, ACTIVATION
    if conv.activity_regularizer or norm.activity_regularizer:
        return None, REGULARIZED
    ndim = conv.rank + 2
    axis = -1 if conv.data_format == "channels_last" else 1
    return conv, None if norm.axis % ndim == axis % ndim else AXIS


def _fuse(conv: keras.Layer, norm: keras.Layer) -> str | None:
    """Fuse the norm into the convolution, in their model; or return why not."""
    name, layout, groups = _last_kernel(conv)
    last = getattr(conv, name)
    statistics = {
        "mean": norm.moving_mean, "variance": norm.moving_variance, "scale": norm.gamma,
        "offset": norm.beta,
    }  # fmt: skip
    with np.errstate(all="ignore"):
        kernel, bias = fuse_batchnorm(
            to_canonical(_array(last), layout), _array(conv.bias), epsilon=norm.epsilon,
            **{key: _array(variable) for key, variable in statistics.items()},
        )  # fmt: skip
    if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
        return NOT_FINITE
    new = like(conv, type(conv), {"use_bias": True})
    for each in ("kernel", "depthwise_kernel"):
        if hasattr(conv, each):
            put(getattr(new, each), getattr(conv, each))
            getattr(new, each).trainable = getattr(conv, each).trainable
    getattr(new, name).assign(from_canonical(kernel, layout, groups))
    new.bias.assign(bias)
    become(conv, new, frozenset())
    policy = keras.dtype_policies.serialize(policy_of(norm))  # Identity's arguments are stored
    identity = keras.layers.Identity(name=norm.name, dtype=policy)
    become(norm, identity, frozenset(vars(norm)))
    for node in norm._inbound_nodes:  # which passed a mask, and may have passed training=False
        arguments = node.arguments
        inputs = arguments.args[0] if arguments.args else arguments.kwargs["inputs"]
        node.arguments = type(arguments)(inputs)
    return None


def _last_kernel(conv: keras.Layer) -> tuple[str, str, int]:
    """Return which of the convolution's kernels gives its output, its layout, and the groups."""
    if isinstance(conv, (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)):
        return "pointwise_kernel", "*IO", 1
    if isinstance(conv, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
        return "kernel", "*CN", conv.kernel.shape[-2]
    return "kernel", "*IO", conv.groups


def _array(variable: Any) -> Any:
    """Return a variable as an array, None as None; half types as float32, which NumPy all has."""
    if variable is None:
        return None
    array = ops.convert_to_numpy(variable)
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array
