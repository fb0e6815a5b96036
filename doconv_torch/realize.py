"""Networks of PyTorch, built from their descriptions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from doconv_core.networks import nodes
from doconv_core.networks.build import get_model as build_named
from doconv_core.networks.build import layer_type
from doconv_core.networks.shapes import Placed, infer
from doconv_core.state.file import entry
from doconv_torch.dgc import DGConv2d, DynamicHeads2d
from doconv_torch.kinds import LAYER_KINDS
from doconv_torch.orthonormal import mark_orthonormal
from doconv_torch.state import load_state


def build(network: nodes.Network, *, input_shape: tuple[int, int, int] | None = None) -> Network:
    """Return the network as modules, named as its description names them, in training mode.

    network: for images `(B, C, H, W)`. input_shape: `(C, H, W)`; None for the network's own.
    PyTorch initializes the weights; `doconv_core.networks.initialize` does as the papers do.
    Raises ValueError, by path, for a description that gives no network.

    >>> from doconv_core import describe
    >>> net = build(describe("tutorial_pt"))
    >>> net(torch.zeros(1, 1, 28, 28)).shape
    torch.Size([1, 10])
    """
    placed = infer(network, input_shape)
    return Network(_children(placed, ""), name=network.name)


def get_model(
    name: str | nodes.Network,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Network:
    """Return a network by name, in training mode, with the weights that it starts to train from.

    name: one of `list_models()`, or a description, which tells its own classes and channels.
    num_classes: None for as many as the network was designed for. in_channels: None for the
    network's own (3, or 1 for the tutorials). input_shape: `(C, H, W)`; None for the network's own.
    seed: of the weights, which are the same in every framework.
    options: the sizes that some families take, as `doconv_core.describe` does.
    Raises ValueError for a name, or a size, of which there is no network.

    >>> net = get_model("cifar_resnet20", num_classes=100)
    >>> net(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 100])
    """
    return build_named(
        build, load_state, name, num_classes=num_classes, in_channels=in_channels,
        input_shape=input_shape, seed=seed, options=options,
    )  # fmt: skip


class Network(nn.Sequential):
    """A network that was built from a description: its parts, one after the other."""

    def __init__(self, *modules: Any, name: str = "") -> None:
        super().__init__(*modules)
        self.network_name = name

    def extra_repr(self) -> str:
        """Return the name of the description."""
        return self.network_name


class _Block(nn.Module):
    """Modules by name, put together by the forward of each kind of block."""

    def __init__(self, modules: OrderedDict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def _through(self, x: Tensor, but: str | None = None) -> Tensor:
        for name, module in self.named_children():
            if name != but:
                x = module(x)
        return x


class Residual(_Block):
    """The sum of what the modules make of the input, and of `shortcut`'s output or the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, of the shape of the body's output."""
        shortcut = self._modules.get(nodes.SHORTCUT)
        return self._through(x, nodes.SHORTCUT) + (x if shortcut is None else shortcut(x))


class Scale(_Block):
    """The input times what the modules make of it, one factor for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, of the input's shape `(B, C, H, W)`."""
        return x * self._through(x)


class Concat(_Block):
    """What each module makes of the input, joined along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all branches in one, `(B, C, H, W)`."""
        return torch.cat([branch(x) for branch in self.children()], 1)


def _children(placed: dict[str, Placed], path: str) -> OrderedDict[str, nn.Module]:
    names = (name for name, _ in placed[path].node.children)
    return OrderedDict((name, _module(placed, entry(path, name))) for name in names)


def _module(placed: dict[str, Placed], path: str) -> nn.Module:
    node = placed[path].node
    if type(node) in BLOCKS:
        return BLOCKS[type(node)](_children(placed, path))
    return LAYERS[type(node)](placed[path])


def _convolution(placed: Placed) -> nn.Module:
    conv = placed.node
    channels = placed.before[0]
    cls, options = layer_type(LAYER_KINDS, placed, nn.Conv2d)
    layer = cls(
        channels, conv.channels, conv.kernel_size, conv.stride, conv.pads, bias=conv.bias,
        groups=conv.groups or channels, **options,
    )  # fmt: skip
    made: nn.Module = mark_orthonormal(layer) if conv.orthonormal else layer
    return made


def _dynamic_heads(placed: Placed) -> nn.Module:
    heads = placed.node
    return DynamicHeads2d(
        placed.before[0], heads.channels, heads.kernel_size, heads.stride, heads.conv.pads,
        heads=heads.heads, squeeze_rate=heads.squeeze_rate, gate_factor=heads.gate_factor,
    )  # fmt: skip


def _batch_norm(placed: Placed) -> nn.Module:
    norm = placed.node
    shape = placed.before
    cls = nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d
    return cls(shape[0], norm.epsilon, norm.momentum, norm.affine)


def _pool(placed: Placed) -> nn.Module:
    pool = placed.node
    if pool.name == "max":
        return nn.MaxPool2d(pool.size, pool.stride, pool.padding)
    return nn.AvgPool2d(pool.size, pool.stride, pool.padding, count_include_pad=False)


def _linear(placed: Placed) -> nn.Module:
    return nn.Linear(placed.before[0], placed.node.features, placed.node.bias)


ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hard_swish": nn.Hardswish,
    "hard_sigmoid": nn.Hardsigmoid,
    "tanh": nn.Tanh,
}
BLOCKS: dict[type[Any], Callable[[OrderedDict[str, nn.Module]], nn.Module]] = {
    nodes.Sequence: nn.Sequential,
    nodes.Residual: Residual,
    nodes.Scale: Scale,
    nodes.Concat: Concat,
    nodes.DGConv: DGConv2d.of,
}
LAYERS: dict[type[Any], Callable[[Placed], nn.Module]] = {
    nodes.Conv: _convolution,
    nodes.DynamicHeads: _dynamic_heads,
    nodes.BatchNorm: _batch_norm,
    nodes.Activation: lambda placed: ACTIVATIONS[placed.node.name](),
    nodes.Pool: _pool,
    nodes.GlobalPool: lambda placed: nn.AdaptiveAvgPool2d(1),
    nodes.Flatten: lambda placed: nn.Flatten(),
    nodes.Dropout: lambda placed: nn.Dropout(placed.node.rate),
    nodes.Linear: _linear,
}
