"""Linear layers behind a flattened image: channels-last frameworks order its numbers otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from doconv_core.checkpoint import BATCH_NORM, CONVOLUTION, LINEAR, Checkpoint, Layer
from doconv_core.checkpoints.shapes import canonical_shape
from doconv_core.cli.checkpoints import literal
from doconv_core.cli.errors import IMPOSSIBLE, Failure
from doconv_core.cli.parse import matching, parse_size
from doconv_core.cli.recognised import NORM
from doconv_core.model import place

Array = NDArray[Any]
Sizes = Sequence[tuple[str, tuple[int, ...]]]


def flatten_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--flatten`, which becomes pairs of pattern and channels-first size."""
    return click.option(
        "--flatten", "flattened", multiple=True, metavar="GLOB=CxHxW|no", callback=_parse,
        help="Channels and size of the image that is flattened before a linear layer, or `no`, "
        "where one of the files is Keras', whose channels are last.",
    )(function)  # fmt: skip


def _parse(
    ctx: click.Context, param: click.Parameter, values: Sequence[str]
) -> list[tuple[str, tuple[int, ...]]]:
    found = []
    for value in values:
        pattern, _, text = value.rpartition("=")
        size = () if text == "no" else parse_size(text)
        if size is None or len(size) == 1:
            raise click.BadParameter(
                f"{value!r} must end in the channels and size of what is flattened, as in "
                "'fc=64x7x7', or in 'no' where nothing is.",
                ctx, param,
            )  # fmt: skip
        found.append((pattern or "*", size))
    return found


class Flattenings:
    """What each linear layer's inputs were, for a conversion between orders of axes.

    sizes: as `--flatten` gives them. ordered: whether layers are in the model's order; then a
    linear layer that takes as many numbers as the layer before it gives channels is behind no
    flattening, by assumption: `assumed` has the channels by the layer's name. Raises Failure for a
    layer of which nothing tells.
    """

    def __init__(
        self, checkpoint: Checkpoint, layers: Sequence[Layer], sizes: Sizes, ordered: bool
    ) -> None:
        self._sizes: dict[str, tuple[int, ...]] = {}
        self.assumed: dict[str, int] = {}
        before = None
        for layer in layers:
            if layer.kind == LINEAR:
                self._sizes[layer.name] = _size(checkpoint, layer, sizes, before)
                if before is not None and matching(layer.name, sizes) is None:
                    self.assumed[layer.name] = before
            before = _outputs(checkpoint, layer, before) if ordered else None

    def last(self, layer: Layer, weight: Array) -> Array:
        """Return a linear layer's weight with its inputs in channels-last order."""
        size = self._sizes.get(layer.name, ())
        if not size:
            return weight
        return np.moveaxis(weight.reshape(-1, *size), 1, -1).reshape(weight.shape)

    def first(self, layer: Layer, weight: Array) -> Array:
        """Return a linear layer's weight with its inputs in channels-first order."""
        size = self._sizes.get(layer.name, ())
        return channels_first(weight, size) if size else weight


def channels_first(weight: Array, size: tuple[int, ...]) -> Array:
    """Return a linear layer's weight with its inputs, channels last so far, in PyTorch's order.

    size: channels and size of the image that was flattened. Raises UsageError where it is another
    number of inputs.
    """
    if prod(size) != weight.shape[1]:
        raise click.UsageError(f"--flatten: the layer has {weight.shape[1]} inputs; given {size}.")
    return np.moveaxis(weight.reshape(-1, *size[1:], size[0]), -1, 1).reshape(weight.shape)


def _size(
    checkpoint: Checkpoint, layer: Layer, sizes: Sizes, before: int | None
) -> tuple[int, ...]:
    assert layer.kernel_shape is not None  # as of every linear layer
    inputs = layer.kernel_shape[1]
    given = matching(layer.name, sizes)
    if given:
        if prod(given) != inputs:
            raise click.UsageError(
                f"--flatten: {place(layer.name)} has {inputs} inputs; received {given}."
            )
        return given
    if given is None and inputs != before:
        raise Failure(
            f"{checkpoint.path}: nothing tells whether the {inputs} inputs of "
            f"{place(layer.name)} are a flattened image, which the other framework orders "
            f"otherwise; give its channels and size, --flatten '{literal(layer.name)}=CxHxW', or "
            f"--flatten '{literal(layer.name)}=no'.",
            IMPOSSIBLE,
        )
    return ()


def _outputs(checkpoint: Checkpoint, layer: Layer, before: int | None) -> int | None:
    """Return how many channels come out of a layer; `before` where it changes none."""
    if layer.kind in (CONVOLUTION, LINEAR):
        weight = checkpoint.entries[layer.entries["weight"]]
        return canonical_shape(weight.shape, layer.layout)[0]
    if layer.kind == BATCH_NORM:
        return checkpoint.entries[layer.entries["running_mean"]].size
    return before if layer.kind == NORM else None
