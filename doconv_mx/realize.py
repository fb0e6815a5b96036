"""Networks of MXNet Gluon, built from their descriptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mxnet.gluon import HybridBlock, nn

from doconv_core.networks import nodes
from doconv_core.networks.build import get_model as build_named
from doconv_core.networks.build import layer_type
from doconv_core.networks.shapes import Placed, infer
from doconv_core.state.file import entry
from doconv_mx.activations import HardSigmoid, HardSwish, ReLU6
from doconv_mx.dgc import DGConv2D, DynamicHeads2D
from doconv_mx.kinds import LAYER_KINDS
from doconv_mx.orthonormal import mark_orthonormal
from doconv_mx.private import children
from doconv_mx.state import load_state


def build(network: nodes.Network, *, input_shape: tuple[int, int, int] | None = None) -> Network:
    """Return the network as blocks, named as its description names them.

    network: for images `(B, C, H, W)`. input_shape: `(C, H, W)`; None for the network's own. Every
    shape is known, but no weight has values: `initialize()` the network, and then, with
    `doconv_core.networks.initialize` and `load_state`, it starts as the papers' do.
    Raises ValueError, by path, for a description that gives no network.

    >>> model = build(describe("resnet10_doconv", num_classes=5))
    >>> model.initialize()
    >>> model(mx.nd.ones((1, 3, 32, 32))).shape
    (1, 5)
    """
    placed = infer(network, input_shape)
    made: Network = _filled(Network(network.name), placed, "")
    return made


def get_model(
    name: str | nodes.Network,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Network:
    """Return a network by name, on the CPU, with the weights that it starts to train from.

    name: one of `list_models()`, or a description, which tells its own classes and channels.
    num_classes: None for as many as the network was designed for. in_channels: None for the
    network's own (3, or 1 for the tutorials). input_shape: `(C, H, W)`; None for the network's own.
    seed: of the weights, which are the same in every framework.
    `collect_params().reset_ctx()` puts it elsewhere.
    options: the sizes that some families take, as `doconv_core.describe` does.
    Raises ValueError for a name, or a size, of which there is no network.

    >>> model = get_model("resnet10", num_classes=5)
    >>> model(mx.nd.ones((1, 3, 32, 32))).shape
    (1, 5)
    """

    def initialized(network: nodes.Network) -> Network:
        model = build(network)
        model.initialize()
        return model

    made: Network = build_named(
        initialized, load_state, name, num_classes=num_classes, in_channels=in_channels,
        input_shape=input_shape, seed=seed, options=options,
    )  # fmt: skip
    return made


class Network(nn.HybridSequential):
    """A network that was built from a description: its parts, one after the other."""

    def __init__(self, name: str = "network", prefix: str | None = None, params: Any = None):
        self.network_name = name
        self._name_hint = name.replace(".", "_")  # a dot in a file is what divides paths
        super().__init__(prefix=prefix, params=params)

    def _alias(self) -> str:
        return str(self._name_hint)


class _Block(HybridBlock):
    """Blocks by name, put together by the forward of each kind of block."""

    def _through(self, x: Any, but: str | None = None) -> Any:
        for name, block in children(self).items():
            if name != but:
                x = block(x)
        return x


class Residual(_Block):
    """The sum of what the blocks make of the input, and of `shortcut`'s output or the input."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return the sum, of the shape of the body's output."""
        shortcut = children(self).get(nodes.SHORTCUT)
        return self._through(x, nodes.SHORTCUT) + (x if shortcut is None else shortcut(x))


class Scale(_Block):
    """The input times what the blocks make of it, one factor for each channel."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return the product, of the input's shape `(B, C, H, W)`."""
        return F.broadcast_mul(x, self._through(x))


class Concat(_Block):
    """What each block makes of the input, joined along the channels."""

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        """Return the outputs of all branches in one, `(B, C, H, W)`."""
        return F.concat(*(branch(x) for branch in children(self).values()), dim=1)


def _filled(block: HybridBlock, placed: dict[str, Placed], path: str) -> Any:
    """Return the block with its node's children, each with its name in the parameters' names."""
    with block.name_scope():
        for name, _ in placed[path].node.children:
            if hasattr(block, name):
                raise ValueError(f"{path!r} cannot have a child named {name!r}, a block's own.")
            setattr(block, name, _block(placed, entry(path, name), f"{name}_"))
    return block


def _block(placed: dict[str, Placed], path: str, prefix: str) -> HybridBlock:
    node = placed[path].node
    if type(node) in BLOCKS:
        return _filled(BLOCKS[type(node)](prefix=prefix), placed, path)
    return LAYERS[type(node)](placed[path], prefix)


def _convolution(placed: Placed, prefix: str) -> HybridBlock:
    conv = placed.node
    channels = placed.before[0]
    cls, options = layer_type(LAYER_KINDS, placed, nn.Conv2D)
    layer: HybridBlock = cls(
        in_channels=channels, channels=conv.channels, kernel_size=conv.kernel_size,
        strides=(conv.stride, conv.stride), padding=conv.pads, groups=conv.groups or channels,
        use_bias=conv.bias, prefix=prefix, **options,
    )  # fmt: skip
    return mark_orthonormal(layer) if conv.orthonormal else layer


def _dynamic_heads(placed: Placed, prefix: str) -> HybridBlock:
    heads = placed.node
    return DynamicHeads2D(
        placed.before[0], heads.channels, heads.kernel_size, heads.stride, heads.conv.pads,
        heads=heads.heads, squeeze_rate=heads.squeeze_rate, gate_factor=heads.gate_factor,
        prefix=prefix,
    )  # fmt: skip


def _batch_norm(placed: Placed, prefix: str) -> HybridBlock:
    norm = placed.node
    return nn.BatchNorm(  # whose momentum is the old statistics' weight
        momentum=1 - norm.momentum, epsilon=norm.epsilon, center=norm.affine, scale=norm.affine,
        in_channels=placed.before[0], prefix=prefix,
    )  # fmt: skip


def _pool(placed: Placed, prefix: str) -> HybridBlock:
    pool = placed.node
    sizes = (pool.size, pool.stride, pool.padding)
    if pool.name == "max":
        return nn.MaxPool2D(*sizes, prefix=prefix)
    return nn.AvgPool2D(*sizes, count_include_pad=False, prefix=prefix)


def _activation(placed: Placed, prefix: str) -> HybridBlock:
    return ACTIVATIONS[placed.node.name](prefix=prefix)


def _linear(placed: Placed, prefix: str) -> HybridBlock:
    linear = placed.node
    return nn.Dense(linear.features, use_bias=linear.bias, in_units=placed.before[0], prefix=prefix)


ACTIVATIONS: dict[str, Callable[..., HybridBlock]] = {
    "relu": lambda prefix: nn.Activation("relu", prefix=prefix),
    "relu6": ReLU6,
    "hard_swish": HardSwish,
    "hard_sigmoid": HardSigmoid,
    "tanh": lambda prefix: nn.Activation("tanh", prefix=prefix),
}
BLOCKS: dict[type[Any], Callable[..., HybridBlock]] = {
    nodes.Sequence: nn.HybridSequential,
    nodes.Residual: Residual,
    nodes.Scale: Scale,
    nodes.Concat: Concat,
    nodes.DGConv: DGConv2D.of,
}
LAYERS: dict[type[Any], Callable[[Placed, str], HybridBlock]] = {
    nodes.Conv: _convolution,
    nodes.DynamicHeads: _dynamic_heads,
    nodes.BatchNorm: _batch_norm,
    nodes.Activation: _activation,
    nodes.Pool: _pool,
    nodes.GlobalPool: lambda placed, prefix: nn.GlobalAvgPool2D(prefix=prefix),
    nodes.Flatten: lambda placed, prefix: nn.Flatten(prefix=prefix),
    nodes.Dropout: lambda placed, prefix: nn.Dropout(placed.node.rate, prefix=prefix),
    nodes.Linear: _linear,
}
