"""Networks of Keras, built from their descriptions: functional models, blocks nested in them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import keras

from doconv_core.networks import nodes
from doconv_core.networks.build import get_model as build_named
from doconv_core.networks.build import layer_type
from doconv_core.networks.shapes import Placed, infer
from doconv_core.state.file import entry
from doconv_tf.dgc import DGConv2D, DynamicHeads2D
from doconv_tf.kinds import LAYER_KINDS
from doconv_tf.normed import NormedConv2D, NormedDepthwiseConv2D
from doconv_tf.orthonormal import mark_orthonormal
from doconv_tf.pooling import PaddedAveragePooling2D, PaddedMaxPooling2D
from doconv_tf.state import load_state

_layers = keras.layers


def build(
    network: nodes.Network, *, input_shape: tuple[int, int, int] | None = None
) -> keras.Model:
    """Return the network as a functional model, with the names of its description.

    Each block is a functional model, too: `summary(expand_nested=True)` shows all layers. network:
    for images of Keras' image data format, by default `(B, H, W, C)`. input_shape: `(C, H, W)`;
    None for the network's own. Keras initializes the weights;
    `doconv_core.networks.initialize` does as the papers do.
    Raises ValueError, by path, for a description that gives no network.

    >>> build(describe("resnet18_doconv", num_classes=5)).output_shape
    (None, 5)
    """
    return _model(infer(network, input_shape), "", network.name)


def get_model(
    name: str | nodes.Network,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    **options: Any,
) -> keras.Model:
    """Return a network by name, not compiled, with the weights that it starts to train from.

    name: one of `list_models()`, or a description, which tells its own classes and channels.
    num_classes: None for as many as the network was designed for. in_channels: None for the
    network's own (3, or 1 for the tutorials). input_shape: `(C, H, W)`; None for the network's own.
    seed: of the weights, which are the same in every framework.
    options: the sizes that some families take, as `doconv_core.describe` does.
    Raises ValueError for a name, or a size, of which there is no network.

    >>> model = get_model("cifar_resnet20_doconv", num_classes=10)
    >>> model.output_shape
    (None, 10)
    """
    return build_named(
        build, load_state, name, num_classes=num_classes, in_channels=in_channels,
        input_shape=input_shape, seed=seed, options=options,
    )  # fmt: skip


class _Names:
    """The names in one model, each of one layer: the children's, and those of layers that help."""

    def __init__(self, taken: list[str]) -> None:
        self._taken = set(taken)

    def free(self, name: str) -> str:
        """Return the name, or one like it that is not taken, and take it."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _model(placed: dict[str, Placed], path: str, name: str) -> keras.Model:
    """Return what a block makes of its input, as a model."""
    node, shape = placed[path].node, placed[path].before
    names = _Names([name for name, _ in node.children])
    inputs = keras.Input(_shape(shape), name=names.free("input"))
    block: Callable[..., Any] = BLOCKS.get(type(node), _through)
    outputs = block(placed, path, inputs, names)
    if outputs is inputs:
        outputs = _layers.Identity(name=names.free("identity"))(inputs)
    return keras.Model(inputs, outputs, name=name)


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape `(C, H, W)`, or `(features,)`, as Keras has it."""
    if len(shape) == 1 or _channels_first():
        return shape
    return (*shape[1:], shape[0])


def _channels_first() -> bool:
    return bool(keras.config.image_data_format() == "channels_first")


def _axis(shape: tuple[int, ...]) -> int:
    """Return the axis of the channels."""
    return 1 if len(shape) == 1 or _channels_first() else len(shape)


def _called(placed: dict[str, Placed], path: str, name: str, x: Any, names: _Names) -> Any:
    """Return what the node of that name, a child of the block at `path`, makes of `x`."""
    below = entry(path, name)
    node = placed[below].node
    if type(node) in BLOCKS:
        return _model(placed, below, name)(x)
    return LAYERS[type(node)](placed[below], name, x, names)


def _through(placed: dict[str, Placed], path: str, x: Any, names: _Names) -> Any:
    for name, _ in placed[path].node.children:
        if name != nodes.SHORTCUT or type(placed[path].node) is not nodes.Residual:
            x = _called(placed, path, name, x, names)
    return x


def _residual(placed: dict[str, Placed], path: str, x: Any, names: _Names) -> Any:
    body, shortcut = _through(placed, path, x, names), x
    if placed[path].node.shortcut.children:
        shortcut = _called(placed, path, nodes.SHORTCUT, x, names)
    return _layers.Add(name=names.free("add"))([body, shortcut])


def _scale(placed: dict[str, Placed], path: str, x: Any, names: _Names) -> Any:
    factors = _through(placed, path, x, names)
    return _layers.Multiply(name=names.free("multiply"))([x, factors])


def _concat(placed: dict[str, Placed], path: str, x: Any, names: _Names) -> Any:
    node = placed[path].node
    branches = [_called(placed, path, name, x, names) for name, _ in node.children]
    axis = _axis(placed[path].after)
    return _layers.Concatenate(axis=axis, name=names.free("concatenate"))(branches)


def _convolution(placed: Placed, name: str, x: Any, names: _Names) -> Any:
    conv, channels = placed.node, placed.before[0]
    groups = conv.groups or channels
    word, pads = _padding(conv)
    options = {"strides": conv.stride, "padding": word, "use_bias": conv.bias, "name": name}
    depthwise = groups == channels > 1 and conv.channels % channels == 0
    cls: Any = _layers.DepthwiseConv2D if depthwise else _layers.Conv2D
    cls, more = layer_type(LAYER_KINDS, placed, cls)
    if issubclass(cls, (_layers.DepthwiseConv2D, NormedDepthwiseConv2D)):
        options["depth_multiplier"] = conv.channels // channels
    elif issubclass(cls, (_layers.Conv2D, NormedConv2D)):
        options |= {"filters": conv.channels, "groups": groups}
    else:  # of several parts, behind the first of which the padding is to come
        options |= {"filters": conv.channels, "around": pads}
        pads = (0, 0)
    if any(pads):
        x = _layers.ZeroPadding2D(pads, name=names.free(f"{name}_pad"))(x)
    layer = cls(kernel_size=conv.kernel_size, **options, **more)
    return (mark_orthonormal(layer) if conv.orthonormal else layer)(x)


def _padding(conv: nodes.Conv) -> tuple[str, tuple[int, ...]]:
    """Return Keras' word for a convolution's padding, and the zeros to add beside."""
    pads = conv.pads
    halves = tuple(k // 2 for k in conv.kernel_size if k % 2)
    if any(pads) and conv.stride == 1 and pads == halves:
        return "same", (0, 0)
    # With a stride, or an even kernel, "same" adds less before the image than behind it.
    return "valid", pads


def _dynamic(cls: Any) -> Callable[..., Any]:
    """Return the function for the node of this layer."""

    def called(placed: Placed, name: str, x: Any, names: _Names) -> Any:
        heads = dict(placed.node.children)["heads"] if cls is DGConv2D else placed.node
        word, pads = _padding(heads.conv)
        layer = cls(
            heads.channels, heads.kernel_size, heads.stride, word, heads=heads.heads, around=pads,
            squeeze_rate=heads.squeeze_rate, gate_factor=heads.gate_factor, name=name,
        )  # fmt: skip
        return layer(x)

    return called


def _batch_norm(placed: Placed, name: str, x: Any, names: _Names) -> Any:
    norm = placed.node
    return _layers.BatchNormalization(
        _axis(placed.before), 1 - norm.momentum, norm.epsilon, norm.affine, norm.affine, name=name
    )(x)


def _pool(placed: Placed, name: str, x: Any, names: _Names) -> Any:
    pool = placed.node
    options = {"pool_size": pool.size, "strides": pool.stride, "name": name}
    if pool.padding:
        cls = PaddedMaxPooling2D if pool.name == "max" else PaddedAveragePooling2D
        return cls(around=pool.padding, **options)(x)
    cls = _layers.MaxPooling2D if pool.name == "max" else _layers.AveragePooling2D
    return cls(**options)(x)


def _flatten(placed: Placed, name: str, x: Any, names: _Names) -> Any:
    shape = placed.before
    if len(shape) == 3 and not _channels_first() and shape[0] > 1 and prod(shape[1:]) > 1:
        x = _layers.Permute((3, 1, 2), name=names.free(f"{name}_permute"))(x)
    # As it is, channels first: with that data format Keras would put the channels last.
    return _layers.Flatten("channels_last", name=name)(x)


def _layer(make: Callable[[Any, str], keras.Layer]) -> Callable[..., Any]:
    """Return the function for a node that becomes one layer; make: given node and name."""
    return lambda placed, name, x, names: make(placed.node, name)(x)


BLOCKS: dict[type[Any], Callable[..., Any]] = {
    nodes.Sequence: _through,
    nodes.Residual: _residual,
    nodes.Scale: _scale,
    nodes.Concat: _concat,
}
LAYERS: dict[type[Any], Callable[..., Any]] = {
    nodes.Conv: _convolution,
    nodes.DGConv: _dynamic(DGConv2D),
    nodes.DynamicHeads: _dynamic(DynamicHeads2D),
    nodes.BatchNorm: _batch_norm,
    nodes.Activation: _layer(lambda node, name: _layers.Activation(node.name, name=name)),
    nodes.Pool: _pool,
    nodes.GlobalPool: _layer(
        lambda node, name: _layers.GlobalAveragePooling2D(keepdims=True, name=name)
    ),
    nodes.Flatten: _flatten,
    nodes.Dropout: _layer(lambda node, name: _layers.Dropout(node.rate, name=name)),
    nodes.Linear: _layer(
        lambda node, name: _layers.Dense(node.features, use_bias=node.bias, name=name)
    ),
}
