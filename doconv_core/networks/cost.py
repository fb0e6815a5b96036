"""What a network costs, counted from its description, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from doconv_core.kinds.base import composed_by
from doconv_core.kinds.do_conv import layer_cost
from doconv_core.maths.spec import as_integer, is_sequence
from doconv_core.networks.lowering import conv_spec, lowered
from doconv_core.networks.names import describe
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Conv,
    Dropout,
    Flatten,
    GlobalPool,
    Linear,
    Network,
    Node,
    Pool,
)
from doconv_core.networks.shapes import Placed, Shape, for_input, infer

# Kinds of layers that compute something, or stand in a network for all to see.
LEAVES = (Conv, BatchNorm, Activation, Pool, GlobalPool, Flatten, Dropout, Linear)


@dataclass(frozen=True)
class CountedLayer:
    """One layer of a network, and what it costs for one image.

    path: in the network; the layers that a BSConv is made of have its path and their names. kind:
    "conv", "doconv", "bsconvu", "bsconvs", "linear", "batch_norm", "max_pool", "average_pool",
    "global_pool", "flatten", "dropout", or the activation's name. before, after: shapes of one
    image. kernel_size: of what has a kernel. parameters: what is trained; of a DO-Conv layer,
    once it is folded. flops: by BSConv's rule. macs: multiply-accumulates of convolutions and
    linear layers, without biases. training_parameters: with the D of a DO-Conv layer and its W.
    composition_macs: of composing its kernel once, for a whole batch.

    >>> layer = count("cifar_resnet20").layers[0]
    >>> layer.path, layer.kind, layer.parameters
    ('input_bn', 'batch_norm', 6)
    """

    path: str
    kind: str
    before: Shape
    after: Shape
    kernel_size: tuple[int, ...] | None = None
    parameters: int = 0
    flops: int = 0
    macs: int = 0
    training_parameters: int = 0
    composition_macs: int = 0


@dataclass(frozen=True)
class NetworkCost:
    """A network's layers in order, and their costs together, as `CountedLayer` has them.

    >>> cost = count("cifar_resnet20_doconv")
    >>> cost.parameters, cost.training_parameters
    (278330, 329117)
    """

    name: str
    input_shape: Shape
    output_shape: Shape
    layers: tuple[CountedLayer, ...]

    @property
    def parameters(self) -> int:
        """Parameters that are trained; of a network of DO-Conv layers, once it is folded."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def flops(self) -> int:
        """Operations for one image, by BSConv's rule; see `count`."""
        return sum(layer.flops for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions and linear layers for one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def training_parameters(self) -> int:
        """Parameters that are trained, D and W of DO-Conv layers among them."""
        return sum(layer.training_parameters for layer in self.layers)

    @property
    def composition_macs(self) -> int:
        """Multiply-accumulates of composing all kernels once, for a whole batch."""
        return sum(layer.composition_macs for layer in self.layers)


def count(
    name_or_description: str | Network,
    input_shape: Sequence[int] | None = (3, 32, 32),
    num_classes: int | None = 100,
) -> NetworkCost:
    """Return what a network costs for one image, with no framework.

    input_shape: `(C, H, W)`. num_classes: of a network given by name; a description has its own.
    None stands for what the network is for. Operations are counted by the rule of BSConv's tables:
    a convolution takes its weight's entries at every output position, and with a bias one more for
    each output; a linear layer inputs times outputs, and outputs for a bias; a batch norm twice
    its inputs; a ReLU its outputs; pooling its inputs; and all else nothing: other activations,
    the products of squeeze and excite, the sums of residuals.
    Raises ValueError for a name that gives no network and an input that does not fit, TypeError
    for sizes that are no integers. Source: BSConv, arXiv 2003.13549, tables of the repository.

    >>> cost = count("cifar_resnet20", (3, 32, 32), num_classes=10)
    >>> cost.parameters, cost.flops
    (272480, 41413258)
    """
    shape = None if input_shape is None else _checked(input_shape)
    if isinstance(name_or_description, Network):
        network = name_or_description
    else:
        channels = None if shape is None else shape[0]
        network = describe(name_or_description, num_classes=num_classes, in_channels=channels)
    network = for_input(network, shape)
    # A BSConv is counted as its parts, which bear its kind.
    described, placed = infer(network), infer(lowered(network))
    leaves = [at for at in placed.values() if isinstance(at.node, LEAVES)]
    layers = tuple(_counted(at, described) for at in leaves)
    return NetworkCost(network.name, placed[""].before, placed[""].after, layers)


def _checked(input_shape: Sequence[int]) -> Shape:
    if not is_sequence(input_shape) or len(input_shape) != 3:
        raise ValueError(
            "input_shape must be channels, rows and columns, such as (3, 32, 32); received "
            f"input_shape={input_shape!r}."
        )
    return tuple(as_integer(f"input_shape[{d}]", n) for d, n in enumerate(input_shape))


def _counted(at: Placed, described: Mapping[str, Placed]) -> CountedLayer:
    """Return the costs of a layer. described: the network as it was before it was lowered."""
    node = at.node
    if isinstance(node, Conv):
        whole = at if at.path in described else described[at.path.rpartition(".")[0]]
        assert isinstance(whole.node, Conv)
        return _convolution(at, node, whole.node.kind.name)
    if isinstance(node, BatchNorm):
        return _batch_norm(at, node)
    if isinstance(node, Linear):
        return _linear(at, node)
    return CountedLayer(
        at.path, _kind(node), at.before, at.after, _window(node), flops=_operations(at)
    )


def _convolution(at: Placed, conv: Conv, kind: str) -> CountedLayer:
    """Return a convolution's costs; of a layer with a composed kernel, those of the folded one."""
    spec, positions = conv_spec(conv, at.before), prod(at.after[1:])
    folded = layer_cost(spec, positions, bias=conv.bias).folded
    composed, trained = composed_by(conv.kind, spec), folded
    if composed is not None:
        trained = composed.training_cost(composed.spec(spec), positions, bias=conv.bias)
    return CountedLayer(
        at.path, kind, at.before, at.after, conv.kernel_size,
        parameters=folded.parameters,
        flops=folded.macs + (prod(at.after) if conv.bias else 0),
        macs=folded.macs,
        training_parameters=trained.parameters,
        composition_macs=trained.macs - folded.macs,
    )  # fmt: skip


def _batch_norm(at: Placed, norm: BatchNorm) -> CountedLayer:
    trained = 2 * at.before[0] if norm.affine else 0
    return CountedLayer(
        at.path, "batch_norm", at.before, at.after,
        parameters=trained, flops=2 * prod(at.before), training_parameters=trained,
    )  # fmt: skip


def _linear(at: Placed, linear: Linear) -> CountedLayer:
    macs = at.before[0] * linear.features
    biases = linear.features if linear.bias else 0
    return CountedLayer(
        at.path, "linear", at.before, at.after,
        parameters=macs + biases, flops=macs + biases, macs=macs, training_parameters=macs + biases,
    )  # fmt: skip


def _operations(at: Placed) -> int:
    """Return the operations of a layer without parameters."""
    if isinstance(at.node, (Pool, GlobalPool)):
        return prod(at.before)
    return prod(at.after) if at.node == Activation("relu") else 0


def _kind(node: Node) -> str:
    if isinstance(node, Activation):
        return node.name
    if isinstance(node, Pool):
        return f"{node.name}_pool"
    return "global_pool" if isinstance(node, GlobalPool) else type(node).__name__.lower()


def _window(node: Node) -> tuple[int, ...] | None:
    return (node.size, node.size) if isinstance(node, Pool) else None
