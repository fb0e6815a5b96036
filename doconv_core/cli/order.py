"""Which layer feeds which, as far as their order in a file and their sizes make it likely."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from doconv_core.cli.recognised import NORM
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import BATCH_NORM, CONVOLUTION, LINEAR, Layer
from doconv_core.files.shapes import canonical_shape


@dataclass
class Made:
    """What a layer gives. inputs: of one of its groups; None of a norm. rank: 0 of a vector.

    taken: whether the next layer seems to take it, so that no layer further on does.
    """

    name: str
    inputs: int | None
    outputs: int
    rank: int
    taken: bool = False


class Image(NamedTuple):
    """An image that may be flattened: the layer that gives it, and channels and size."""

    name: str
    size: tuple[int, ...]


class Order:
    """The layers of a file that is in the model's order, up to where it has been read.

    before: what the layer that was added last gives, None where it is not known. last: that layer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._made: list[Made] = []
        self.before: Made | None = None
        self.last: Layer | None = None

    def add(self, layer: Layer) -> None:
        """Add the next layer."""
        self.last = layer
        if layer.kind in (BATCH_NORM, NORM):
            self._add_norm(layer)
        elif layer.kind in (CONVOLUTION, LINEAR):
            self._add_weight(layer)
        else:
            self.before = None

    def _add_norm(self, layer: Layer) -> None:
        entry = layer.entries["running_mean" if layer.kind == BATCH_NORM else "weight"]
        shape = self._checkpoint.entries[entry].shape
        if len(shape) != 1:
            self.before = None
        elif self.before is None or self.before.outputs != shape[0]:
            # Of another layer, of several whose channels are joined, or of a flattened image.
            rank = next((made.rank for made in reversed(self._made) if made.rank), 2)
            self._append(Made(layer.name, None, shape[0], rank))

    def _add_weight(self, layer: Layer) -> None:
        stored = self._checkpoint.entries[layer.entries["weight"]]
        shape = layer.kernel_shape or canonical_shape(stored.shape, layer.layout)
        made = Made(layer.name, shape[1], shape[0], len(shape) - 2)
        if self._made and self._takes(made, self._made[-1].outputs):
            self._made[-1].taken = True
        self._append(made)

    def _append(self, made: Made) -> None:
        self._made.append(made)
        self.before = made

    def _takes(self, made: Made, channels: int) -> bool:
        """Return whether a layer may take so many channels of the layer before it.

        Or whether its own are added to them, as those of a shortcut are.
        """
        assert made.inputs is not None  # as it is no norm
        if made.rank == 0:
            return made.inputs % channels == 0  # also of an image
        if made.inputs in (1, channels):
            return made.outputs % channels == 0 or made.inputs == channels
        earlier = any(other.outputs == made.inputs for other in self._made)
        return made.outputs == channels and (earlier or channels % made.inputs == 0)

    def image(self, inputs: int) -> Image | None:
        """Return an image that the next layer may take, as likely as what `before` gives.

        It is one that no layer seems to take; or the one that the last layer takes, where that is
        the only one of so many channels, and may be beside the path.
        """
        *earlier, last = self._made
        alone = last.rank and last.inputs != inputs and all(m.outputs != inputs for m in earlier)
        for made in reversed(earlier):
            if not made.taken or (alone and made is earlier[-1]):
                size = next(_images(made, inputs), None)
                if size is not None:
                    return Image(made.name, size)
        return None


def _images(made: Made, inputs: int) -> Iterator[tuple[int, ...]]:
    """Yield the size of an image of these channels, as wide as it is high, of so many numbers."""
    positions, rest = divmod(inputs, made.outputs)
    if made.rank and not rest and positions > 1:
        side = round(positions ** (1 / made.rank))
        if side**made.rank == positions:
            yield made.outputs, *(side,) * made.rank
