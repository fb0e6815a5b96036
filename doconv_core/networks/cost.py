"""What a network costs, counted from its description, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum, prod
from typing import Any

from doconv_core.kinds.base import Cost
from doconv_core.kinds.dgc import DGConvCost, dgc_cost
from doconv_core.kinds.normed import BranchedSpec
from doconv_core.kinds.normed import training_cost as branches_cost
from doconv_core.maths.spec import as_integer, is_sequence
from doconv_core.networks.lowering import lowered
from doconv_core.networks.names import describe, of_kind
from doconv_core.networks.nodes import (
    BatchNorm,
    Conv,
    DynamicHeads,
    Leaf,
    Linear,
    Network,
    Pool,
)
from doconv_core.networks.normed import Branches
from doconv_core.networks.shapes import Placed, for_input, infer
from doconv_core.state.file import entry
from doconv_core.state.layers import LayerForm, Shape


@dataclass(frozen=True)
class CountedLayer:
    """One layer of a network, and what it costs for one image.

    path: in the network; the layers that a BSConv is made of have its path and their names. kind:
    "conv", "doconv", "bsconvu", "bsconvs", "linear", "batch_norm", "max_pool", "average_pool",
    "global_pool", "flatten", "dropout", or the activation's name. before, after: shapes of one
    image. kernel_size: of what has a kernel. parameters: what is trained; of a DO-Conv layer,
    once it is folded. flops: by BSConv's rule. macs: multiply-accumulates of convolutions and
    linear layers, without biases. training_parameters: with the D of a DO-Conv layer and its W.
    composition_macs: of composing its kernel once, for a whole batch. branch_macs: of further
    branches, while it trains. dgc_flops: by the rule of
    DGC's tables. heads: of dynamic group convolutions, what they really run.

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
    branch_macs: int = 0
    dgc_flops: float = 0
    heads: DGConvCost | None = None


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

    @property
    def branch_macs(self) -> int:
        """Multiply-accumulates of further branches for one image, while it trains."""
        return sum(layer.branch_macs for layer in self.layers)

    @property
    def dgc_flops(self) -> float:
        """Multiply-accumulates for one image, by DGC's rule; see `count`."""
        return fsum(layer.dgc_flops for layer in self.layers)

    @property
    def heads(self) -> DGConvCost:
        """What the heads of all dynamic group convolutions really run, together."""
        found = [layer.heads for layer in self.layers if layer.heads is not None]
        return DGConvCost(*map(sum, zip(*found, strict=True))) if found else NO_HEADS


NO_HEADS = DGConvCost(0, 0, 0, 0, 0, 0)


def count(
    name_or_description: str | Network,
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    *,
    kind: str | None = None,
    **options: Any,
) -> NetworkCost:
    """Return what a network costs for one image, with no framework.

    input_shape: `(C, H, W)`. num_classes: of a network given by name; a description has its own.
    None stands for the data set that the network is for, as for `doconv cost`. options: of the
    family, as `describe` takes them. kind: of over-parameterized layers in the places of the
    network's convolutions, as its word has it; those with batch norms in their branches take that
    behind a convolution.
    Operations are counted by the rule of BSConv's tables: a convolution takes its weight's entries
    at every output position, and with a bias one more for each output; a linear layer inputs times
    outputs, and outputs for a bias; a batch norm twice its inputs; a ReLU its outputs; pooling its
    inputs; and all else nothing: other activations, the products of squeeze and excite, the sums of
    residuals.
    By the rule of DGC's tables a convolution's bias and a batch norm cost nothing, pooling the taps
    of its windows, and a dynamic group convolution the share of its channels that it keeps.
    Raises ValueError for a name that gives no network and an input that does not fit, TypeError
    for sizes that are no integers. Source: BSConv, arXiv 2003.13549, tables of the
    repository; DGC, arXiv 2007.04242, and its implementation.

    >>> cost = count("cifar_resnet20", (3, 32, 32), num_classes=10)
    >>> cost.parameters, cost.flops
    (272480, 41413258)
    >>> count("resnet50_v1b").input_shape
    (3, 224, 224)
    """
    shape = None if input_shape is None else _checked(input_shape)
    if isinstance(name_or_description, Network):
        network = name_or_description
    else:
        network = describe(name_or_description, num_classes=num_classes, **options)
        if shape is not None:
            _check_order(shape, network.input_shape[0])
            network = replace(network, input_shape=(shape[0], shape[1], shape[2]))
    network = for_input(network if kind is None else of_kind(network, kind), shape)
    described, placed = infer(network), infer(lowered(network))
    specs = {path: at.node.spec for path, at in placed.items() if isinstance(at.node, Branches)}
    # Of a layer of branches, a convolution and its batch norm alone are what the network has.
    inside = {
        entry(path, name) for path, s in specs.items() for name in s.parts if name != s.trained_norm
    }
    places = {path: described[path] if path in specs else at for path, at in placed.items()}
    leaves = (at for at in places.values() if isinstance(at.node, Leaf) and at.path not in inside)
    layers = tuple(_counted(at, described, specs.get(at.path)) for at in leaves)
    return NetworkCost(network.name, placed[""].before, placed[""].after, layers)


def _checked(input_shape: Sequence[int]) -> Shape:
    if not is_sequence(input_shape) or len(input_shape) != 3:
        raise ValueError(
            "input_shape must be channels, rows and columns, such as (3, 32, 32); received "
            f"input_shape={input_shape!r}."
        )
    return tuple(as_integer(f"input_shape[{d}]", n) for d, n in enumerate(input_shape))


def _check_order(shape: Shape, channels: int) -> None:
    """Raise ValueError where channels seem to be last; `channels` are the network's, if not told.

    An image that is as narrow as that is none.
    """
    if shape[0] != channels and shape[2] in (1, 3, 4, channels) and shape[0] > shape[2]:
        channels_first = (shape[2], *shape[:2])
        raise ValueError(
            "input_shape must be channels, rows and columns, in this order; received input_shape="
            f"{tuple(shape)}, which has the channels last, as Keras does: write {channels_first}."
        )


def _counted(
    at: Placed, described: Mapping[str, Placed], branches: BranchedSpec | None
) -> CountedLayer:
    """Return the costs of a layer. described: the network as it was before it was lowered.

    branches: what a convolution is in training; its batch norm is counted apart.
    """
    kind, form, composed = at.node.word, at.form, None
    if isinstance(at.node, Conv) and at.path not in described:  # a part, which bears its kind
        kind = described[at.path.rpartition(".")[0]].node.word
    if form is not None and form.composed is not None:
        composed, spec = form.composed, form.spec
        form = LayerForm(composed.conv(spec), bias=form.bias)
    shapes = {} if form is None else form.shapes
    held = (prod(s) for name, s in shapes.items() if not name.startswith(("running_", "inactive")))
    parameters, positions = sum(held), prod(at.after[1:])
    macs = prod(shapes["weight"]) * positions if "weight" in shapes else 0
    biases = prod(at.after) if "bias" in shapes else 0
    trained = Cost(parameters, macs)
    if composed is not None:
        trained = composed.training_cost(spec, positions, bias=bool(biases))
    more = Cost(0, 0)
    if branches is not None:
        own, norm = branches_cost(branches, positions), 2 * branches.conv.out_channels
        more = Cost(own.parameters - norm - prod(shapes["weight"]), own.macs - macs)
    heads = None
    if isinstance(at.node, DynamicHeads):
        heads = dgc_cost(at.node.spec(at.before), positions, prod(at.before[1:]))
    return CountedLayer(
        at.path, kind, at.before, at.after, getattr(at.node, "kernel_size", None),
        parameters=parameters,
        flops=macs + biases if macs else at.node.per_input * prod(at.before),
        macs=macs,
        training_parameters=trained.parameters + more.parameters,
        composition_macs=trained.macs - macs,
        branch_macs=more.macs,
        dgc_flops=_by_dgc(at, macs, biases) if heads is None else heads.counted,
        heads=heads,
    )  # fmt: skip


def _by_dgc(at: Placed, macs: int, biases: int) -> int:
    """Return what another layer than a dynamic one costs by DGC's rule."""
    if isinstance(at.node, Pool):
        return prod(at.after) * at.node.size**2
    if isinstance(at.node, BatchNorm):
        return 0
    if macs:
        return macs + biases * isinstance(at.node, Linear)
    return int(at.node.per_input * prod(at.before))
