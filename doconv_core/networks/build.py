"""A network by name, built and with the weights that it starts to train from, in any framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, TypeVar

from doconv_core.kinds.base import of_word
from doconv_core.kinds.normed import BranchedKind
from doconv_core.models.view import LayerKind
from doconv_core.networks.initialize import initialize
from doconv_core.networks.lowering import parts
from doconv_core.networks.names import describe
from doconv_core.networks.nodes import Network
from doconv_core.networks.shapes import Placed, for_input
from doconv_core.state.file import State

Model = TypeVar("Model")


def layer_type(
    layer_kinds: Mapping[str, LayerKind], placed: Placed, ordinary: Any
) -> tuple[Any, dict[str, Any]]:
    """Return the type of layer for a network's convolution, and what it takes beside its sizes.

    layer_kinds: the framework's. ordinary: the type of an ordinary one, which one of a single tap
    is but for branches with batch norms. Raises ValueError, by path, for what gives no layer.
    """
    conv = placed.node
    kind = of_word(conv.kind.name)
    if kind is None or (prod(conv.kernel_size) == 1 and not isinstance(kind, BranchedKind)):
        return ordinary, {}
    parts(placed.path, conv, placed.before)  # which refuses what gives no layer
    return layer_kinds[kind.name].realize(ordinary, conv.kind)


def get_model(
    build: Callable[[Network], Model],
    load_state: Callable[[Model, State], None],
    name: str | Network,
    *,
    num_classes: int | None,
    in_channels: int | None,
    input_shape: tuple[int, int, int] | None,
    seed: int,
    options: Mapping[str, Any],
) -> Model:
    """Return the network of this name, or described so. build, load_state: the framework's own."""
    if isinstance(name, Network):
        given = {"num_classes": num_classes, "in_channels": in_channels, **options}
        for option, value in given.items():
            if value is not None:
                raise TypeError(f"a description has its own {option}; received {option}={value!r}.")
        described = name
    else:
        described = describe(name, num_classes=num_classes, in_channels=in_channels, **options)
    network = for_input(described, input_shape)
    state = initialize(network, seed)
    model = build(network)
    load_state(model, state)
    return model
