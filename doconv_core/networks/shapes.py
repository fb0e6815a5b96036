"""Where each node of a network is, and the shapes that go in and come out of it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from doconv_core.maths.spec import as_tuple, is_sequence
from doconv_core.networks.nodes import Block, Network, Node, Unfit
from doconv_core.state.file import entry
from doconv_core.state.layers import LayerForm, Shape


class Placed(NamedTuple):
    """A node at its place. path: names from the network's own down, joined by dots.

    before, after: the shapes of one image before and after it, `(C, H, W)` or `(features,)`.
    """

    path: str
    node: Any  # a `Node`: who asks for its type knows what it has
    before: Shape
    after: Shape

    @property
    def form(self) -> LayerForm | None:
        """What it is in a state; None where it has no arrays. Raises ValueError, by path."""
        try:
            return None if isinstance(self.node, Block) else _form(self.node, self.before)
        except ValueError as error:
            raise ValueError(f"{self.path!r}: {error}") from error


@lru_cache(maxsize=4096)
def _form(node: Any, before: Shape) -> LayerForm | None:
    """Return a leaf's form, made once: networks repeat few different layers."""
    form: LayerForm | None = node.form(before)
    return form


def check_network(network: Any) -> None:
    """Raise TypeError for what describes no network, such as its name."""
    if isinstance(network, str):
        raise TypeError(f"network must be a Network; received {network!r}: describe it first.")
    if not isinstance(network, Network):
        raise TypeError(f"network must be a Network; received {type(network).__name__}.")


def infer(network: Network, input_shape: Shape | None = None) -> dict[str, Placed]:
    """Return every node of the network by its path, in order, each before its children.

    The network's body has the empty path. input_shape: `(C, H, W)`; None for the network's own.
    Raises ValueError, by path, where the input is too small, or a shape does not fit.
    """
    check_network(network)
    placed: dict[str, Any] = {}

    def place(path: str, node: Node, before: Shape) -> Shape:
        if path in placed:
            raise ValueError(f"the name {path!r} must be of one node alone; received two of it.")
        placed[path] = None  # so that a node comes before its children
        try:
            if isinstance(node, Block):
                after = node.after(before, lambda name, *child: place(entry(path, name), *child))
            else:
                after = node.after(before)
        except Unfit as reason:
            raise ValueError(f"{path!r} {reason}") from None
        placed[path] = Placed(path, node, before, after)
        return after

    place("", network.body, tuple(input_shape or network.input_shape))
    return placed


def for_input(network: Network, input_shape: Shape | None = None) -> Network:
    """Return the network for images of another size, `(C, H, W)`; None for its own.

    Raises TypeError or ValueError for what is no such size, has another number of channels than the
    network's, or is too small.
    """
    check_network(network)
    if input_shape is None:
        return network
    if not is_sequence(input_shape):
        raise TypeError(f"input_shape must be (C, H, W); received input_shape={input_shape!r}.")
    channels, height, width = as_tuple("input_shape", input_shape, 3)
    if channels != network.input_shape[0]:
        raise ValueError(
            f"input_shape must have the {network.input_shape[0]} channels of the network; received "
            f"input_shape={(channels, height, width)}. in_channels gives it others."
        )
    sized = replace(network, input_shape=(channels, height, width))
    infer(sized)
    return sized
