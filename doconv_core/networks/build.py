"""A network by name, built and with the weights that it starts to train from, in any framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from doconv_core.networks.initialize import initialize
from doconv_core.networks.names import describe
from doconv_core.networks.nodes import Network
from doconv_core.networks.shapes import for_input
from doconv_core.state.file import State

Model = TypeVar("Model")


def get_model(
    build: Callable[[Network], Model],
    load_state: Callable[[Model, State], None],
    name: str,
    *,
    num_classes: int | None,
    in_channels: int | None,
    input_shape: tuple[int, int, int] | None,
    seed: int,
) -> Model:
    """Return the network of this name. build, load_state: the framework's own."""
    described = describe(name, num_classes=num_classes, in_channels=in_channels)
    network = for_input(described, input_shape)
    state = initialize(network, seed)
    model = build(network)
    load_state(model, state)
    return model
