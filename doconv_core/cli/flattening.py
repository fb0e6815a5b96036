"""Layers behind a flattened image, whose numbers channels-last frameworks order otherwise."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import NamedTuple

import click

from doconv_core.cli.command import IMPOSSIBLE, Failure
from doconv_core.cli.command import size as written
from doconv_core.cli.options import literal, matching
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.layers import (
    BATCH_NORM,
    CONVOLUTION,
    DYNAMIC,
    LINEAR,
    NORM,
    SLOPES,
    Layer,
    canonical_shape,
)
from doconv_core.models.report import place
from doconv_core.state.agreement import Values
from doconv_core.state.chain import Chain
from doconv_core.state.flattening import (
    Array,
    Fed,
    Size,
    channels_first,
    channels_last,
    image_size,
    is_same,
)

Sizes = Sequence[tuple[str, Size]]


class Images(NamedTuple):
    """What is told of flattened images. sizes: as `--flatten` gives them.

    fed: what the config of `file` tells of layers, by the names of IN's. behind: the layers that
    are behind an image, of a size that is not told. ignored: whether `sizes` may disagree with the
    config.
    """

    sizes: Sizes = ()
    fed: Mapping[str, Fed] = {}
    file: str = ""
    behind: Container[str] = ()
    ignored: bool = False


class Flattenings:
    """What the inputs of each layer were, for a conversion between orders of axes.

    ordered: whether the file's layers are in the model's order; then, where nothing is told, a
    linear layer may be taken to be behind no flattened image, as `Chain` has it: `assumed` has the
    channels before it by its name. Raises Failure for a layer of which nothing tells, and for what
    cannot be reordered; UsageError where `--flatten` contradicts the layer, or the config.
    """

    def __init__(
        self, checkpoint: Checkpoint, layers: Sequence[Layer], images: Images, ordered: bool
    ) -> None:
        self._sizes: dict[str, Size] = {}
        self.assumed: dict[str, int] = {}
        chain, last = Chain(), None
        check_order(layers, images.sizes)
        for layer in layers:
            size = _known_size(checkpoint, layer, images)
            if size is None and layer.kind != LINEAR and layer.name in images.behind:
                raise _nothing_tells(checkpoint, layer, features_of(checkpoint, layer))
            if size is None and layer.kind == LINEAR:
                self.assumed[layer.name] = _assumed(checkpoint, layer, images, chain, ordered)
            if size:
                _check_norm_before(checkpoint, layer, size, last, self._sizes)
            if size is not None:
                self._sizes[layer.name] = size
            _add(chain, checkpoint, layer)
            last = layer

    def reordered(
        self, layer: Layer, values: Mapping[str, Values], *, last: bool
    ) -> dict[str, Values]:
        """Return a layer's arrays with what was flattened, the last axis, in the other order.

        last: whether channels are to be last; else they are to be first.
        """
        size, order = self._sizes.get(layer.name, ()), channels_last if last else channels_first
        if is_same(size):
            return dict(values)
        how = f"an image of {written(size)} reordered"
        return {
            name: replace(each, read=partial(_reordered, each.read, order, size), how=how)
            if takes_image(layer, name)
            else each
            for name, each in values.items()
        }


def _reordered(
    read: Callable[[], Array], order: Callable[[Array, Size], Array], size: Size
) -> Array:
    return order(read(), size)


def takes_image(layer: Layer, role: str) -> bool:
    """Return whether the last axis of a layer's array may be a flattened image."""
    if layer.kind == LINEAR:
        return role == "weight"
    return _is_elementwise(layer) and role != "num_batches_tracked"


def _is_elementwise(layer: Layer) -> bool:
    """Return whether a layer has numbers for each of what it takes: a norm, or a PReLU."""
    return layer.kind in (BATCH_NORM, NORM) or layer.is_prelu


def check_order(layers: Sequence[Layer], sizes: Sizes) -> None:
    """Raise UsageError for an image with its channels last, by what the convolutions give."""
    convolutions = [layer for layer in layers if layer.kind in (CONVOLUTION, DYNAMIC)]
    made = {layer.kernel_shape[0] for layer in convolutions if layer.kernel_shape}
    for pattern, image in sizes:
        if image and image[0] not in made and image[-1] in made:
            raise click.UsageError(
                f"--flatten: no convolution gives the {image[0]} channels of {written(image)}, and "
                f"one gives {image[-1]}; channels stand first: '{pattern}="
                f"{written((image[-1], *image[:-1]))}'."
            )


def features_of(checkpoint: Checkpoint, layer: Layer) -> int | None:
    """Return how many numbers a layer takes that a flattened image may have given; else None."""
    if layer.kind == LINEAR:
        assert layer.kernel_shape is not None  # as of every linear layer
        return layer.kernel_shape[1]
    role = {BATCH_NORM: "running_mean", NORM: "weight"}.get(layer.kind, SLOPES * layer.is_prelu)
    shape = checkpoint.entries[layer.entries[role]].shape if role else ()
    return shape[0] if len(shape) == 1 else None


def _known_size(checkpoint: Checkpoint, layer: Layer, images: Images) -> Size | None:
    """Return the size that is told of what a layer is behind; None where it is not."""
    features, fed = features_of(checkpoint, layer), images.fed.get(layer.name)
    by_config = image_size(fed, features)
    if features is None:
        if fed is not None and fed.image:
            raise Failure(
                f"{images.file}: {place(layer.name)} is behind a flattened image, and its numbers "
                "cannot be reordered here; carry it over in Python, with export_state.",
                IMPOSSIBLE,
            )
        return None
    if fed is not None and fed.outward and not images.ignored:
        raise Failure(
            f"{images.file}: what {place(layer.name)} gives becomes an image, which the other "
            "framework orders otherwise, and is not reordered here; use --ignore flattening where "
            "the other network makes the same image of it.",
            IMPOSSIBLE,
        )
    size = matching(layer.name, images.sizes)
    if layer.kind != LINEAR and size and prod(size) != features:
        size = None  # which was meant for linear layers
    if size is None:
        return by_config
    if size and prod(size) != features:
        raise click.UsageError(
            f"--flatten: {place(layer.name)} has {features} inputs; received {size}."
        )
    if by_config is not None and not images.ignored:
        _check_agrees(layer, size, by_config, images.file)
    return size


def _check_agrees(layer: Layer, size: Size, by_config: Size, file: str) -> None:
    if is_same(size) and is_same(by_config):
        return
    if not is_same(size) and not is_same(by_config) and size[0] == by_config[0]:
        return
    image = f"an image of {written(by_config)}" if by_config else "no image"
    raise click.UsageError(
        f"--flatten: by its config, {file} flattens {image} before {place(layer.name)}; received "
        f"{written(size) or 'no'}. Leave it out, or, where the other network flattens another, "
        "add --ignore flattening."
    )


def _assumed(
    checkpoint: Checkpoint, layer: Layer, images: Images, chain: Chain, ordered: bool
) -> int:
    """Return the channels before a linear layer that is taken to be behind no flattened image."""
    features, name = features_of(checkpoint, layer), literal(layer.name)
    before = chain.before if ordered and layer.name not in images.behind else None
    if before is None or before.outputs != features:
        raise _nothing_tells(checkpoint, layer, features)
    image = chain.image(features)
    if image is not None:
        raise Failure(
            f"{checkpoint.path}: the {features} inputs of {place(layer.name)} may be the channels "
            f"of {place(before.name)}, or an image that is flattened, such as "
            f"{written(image.size)} of {place(image.name)}, which the other framework orders "
            f"otherwise; give --flatten '{name}=no', or --flatten "
            f"'{name}={written(image.size)}'.",
            IMPOSSIBLE,
        )
    return features


def _nothing_tells(checkpoint: Checkpoint, layer: Layer, features: int | None) -> Failure:
    name = literal(layer.name)
    return Failure(
        f"{checkpoint.path}: nothing tells whether the {features} inputs of {place(layer.name)} "
        "are a flattened image, which the other framework orders otherwise; give its channels and "
        f"size, --flatten '{name}=CxHxW', or --flatten '{name}=no'.",
        IMPOSSIBLE,
    )


def _check_norm_before(
    checkpoint: Checkpoint,
    layer: Layer,
    size: Size,
    before: Layer | None,
    sizes: Mapping[str, Size],
) -> None:
    """Raise Failure where a norm before a linear layer may have the flattened image, too."""
    if layer.kind != LINEAR or before is None or before.name in sizes or is_same(size):
        return
    if _is_elementwise(before) and features_of(checkpoint, before) == prod(size):
        name, text = literal(before.name), written(size)
        raise Failure(
            f"{checkpoint.path}: nothing tells whether {place(before.name)} is behind the image of "
            f"{text} that is flattened before {place(layer.name)}; give --flatten "
            f"'{name}={text}', or --flatten '{name}=no'.",
            IMPOSSIBLE,
        )


def _add(chain: Chain, checkpoint: Checkpoint, layer: Layer) -> None:
    """Add a layer to those that may feed the next."""
    features = features_of(checkpoint, layer) if layer.kind in (BATCH_NORM, NORM) else None
    if layer.kind in (CONVOLUTION, LINEAR, DYNAMIC):
        shape = layer.kernel_shape
        if shape is None:
            stored = checkpoint.entries[layer.entries["weight"]].shape
            shape = canonical_shape(stored, layer.layout)
        chain.add_weight(layer.name, shape)
    elif features is not None:
        chain.add_norm(layer.name, features)
    else:
        chain.add_other()
