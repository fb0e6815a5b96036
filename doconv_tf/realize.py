"""Networks of Keras, built from their descriptions: functional models, blocks nested in them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import keras

from doconv_core.networks import nodes
from doconv_core.networks.lowering import parts
from doconv_core.networks.shapes import Placed, children, for_input, infer, padding
from doconv_core.state.file import entry
from doconv_tf.bsconv import BSConvS2D, BSConvU2D
from doconv_tf.depthwise_conv import DODepthwiseConv2D
from doconv_tf.do_conv import DOConv2D
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
    """
    return _model(infer(network, input_shape), "", network.name)


def get_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
) -> keras.Model:
    """Return a network by name, not compiled, with the weights that it starts to train from.

    name: one of `list_models()`. num_classes: None for as many as the network was designed for.
    in_channels: None for the network's own (3, or 1 for the tutorials). input_shape: `(C, H, W)`;
    None for the network's own. seed: of the weights, which are the same in every framework.
    Raises ValueError for a name, or a size, of which there is no network.
    """
    from doconv_core.networks.initialize import initialize
    from doconv_core.networks.names import describe

    described = describe(name, num_classes=num_classes, in_channels=in_channels)
    network = for_input(described, input_shape)
    state = initialize(network, seed)
    model = build(network)
    load_state(model, state)
    return model


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that `get_model` knows, of those that a glob pattern matches."""
    from doconv_core.networks.names import list_models as known

    return known(pattern)


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
    names = _Names([name for name, _ in children(node)])
    inputs = keras.Input(_shape(shape), name=names.free("input"))
    outputs = BLOCKS[type(node)](placed, path, inputs, names)
    if outputs is inputs:
        outputs = _layers.Identity(name=names.free("identity"))(inputs)
    return keras.Model(inputs, outputs, name=name)


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape `(C, H, W)`, or `(features,)`, as Keras has it."""
    if len(shape) == 1 or _channels_first():
        return shape
    return (*shape[1:], shape[0])


def _channels_first() -> bool:
    return keras.config.image_data_format() == "channels_first"


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
    for name, _ in children(placed[path].node):
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
    branches = [_called(placed, path, name, x, names) for name, _ in children(node)]
    axis = _axis(placed[path].after)
    return _layers.Concatenate(axis=axis, name=names.free("concatenate"))(branches)


def _convolution(placed: Placed, name: str, x: Any, names: _Names) -> Any:
    conv = placed.node
    kind = conv.kind.name if prod(conv.kernel_size) > 1 else "conv"  # which has nothing to separate
    return CONVOLUTIONS[kind](placed, name, x, names)


def _ordinary(
    placed: Placed,
    name: str,
    x: Any,
    names: _Names,
    dense: type[keras.Layer] = _layers.Conv2D,
    depthwise: type[keras.Layer] = _layers.DepthwiseConv2D,
) -> Any:
    conv, channels = placed.node, placed.before[0]
    pad, x = _padded(conv, name, x, names)
    options = {"strides": conv.stride, "padding": pad, "use_bias": conv.bias, "name": name}
    groups = conv.groups or channels
    if groups == channels > 1 and conv.channels % channels == 0:
        layer = depthwise(conv.kernel_size, depth_multiplier=conv.channels // channels, **options)
    else:
        layer = dense(conv.channels, conv.kernel_size, groups=groups, **options)
    if conv.orthonormal:
        mark_orthonormal(layer)
    return layer(x)


def _padded(conv: nodes.Conv, name: str, x: Any, names: _Names) -> tuple[str, Any]:
    """Return Keras' word for a convolution's padding, and its input, padded where need be."""
    word, pads = _padding(conv)
    if any(pads):
        x = _layers.ZeroPadding2D(pads, name=names.free(f"{name}_pad"))(x)
    return word, x


def _padding(conv: nodes.Conv) -> tuple[str, tuple[int, ...]]:
    """Return Keras' word for a convolution's padding, and the zeros to add beside."""
    pads = padding(conv)
    halves = tuple(k // 2 for k in conv.kernel_size if k % 2)
    if any(pads) and conv.stride == 1 and pads == halves:
        return "same", (0, 0)
    # With a stride, or an even kernel, "same" adds less before the image than behind it.
    return "valid", pads


def _do_conv(placed: Placed, name: str, x: Any, names: _Names) -> Any:
    return _ordinary(placed, name, x, names, DOConv2D, DODepthwiseConv2D)


def _bsconv(placed: Placed, name: str, x: Any, names: _Names) -> Any:
    conv, kind = placed.node, placed.node.kind
    described = dict(parts(placed.path, conv, placed.before).children)
    norm = described.get("batch_norm", described.get("batch_norm1"))
    word, pads = _padding(conv)
    options = {"padding": word, "around": pads, "use_bias": conv.bias, "name": name}
    if norm is not None:
        options |= {"with_bn": True, "bn_options": _norm_options(norm)}
    if kind.name == "bsconvu":
        return BSConvU2D(conv.channels, conv.kernel_size, conv.stride, **options)(x)
    options |= {"p": kind.p, "min_mid_channels": kind.min_mid_channels}
    return BSConvS2D(conv.channels, conv.kernel_size, conv.stride, **options)(x)


def _batch_norm(placed: Placed, name: str, x: Any, names: _Names) -> Any:
    options = _norm_options(placed.node)
    return _layers.BatchNormalization(_axis(placed.before), **options, name=name)(x)


def _norm_options(norm: nodes.BatchNorm) -> dict[str, Any]:
    return {
        "momentum": 1 - norm.momentum, "epsilon": norm.epsilon, "center": norm.affine,
        "scale": norm.affine,
    }  # fmt: skip


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


CONVOLUTIONS = {
    "conv": _ordinary,
    "doconv": _do_conv,
    "bsconvu": _bsconv,
    "bsconvs": _bsconv,
}
BLOCKS = {
    nodes.Sequence: _through,
    nodes.Residual: _residual,
    nodes.Scale: _scale,
    nodes.Concat: _concat,
}
LAYERS = {
    nodes.Conv: _convolution,
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
