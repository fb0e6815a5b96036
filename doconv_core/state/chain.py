"""Which layer feeds which, as far as the order of layers and their sizes make it likely."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple


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


class Chain:
    """The layers of a file that is in the model's order, up to where it has been read.

    before: what the layer that was added last gives, None where it is not known.
    """

    def __init__(self) -> None:
        self._last: Made | None = None  # that gives something known
        self._earlier: Made | None = None  # the one before it
        self._number = 0  # of those that were added
        self._rank = 2  # of the last image
        self._outputs = Counter[int]()  # how many give so many channels, the last one too
        # Of all before the last, those that none seems to take: the latest of each size.
        self._free: dict[tuple[int, int], tuple[int, Made]] = {}
        self.before: Made | None = None

    def add_other(self) -> None:
        """Add a layer of which nothing tells what it gives."""
        self.before = None

    def add_norm(self, name: str, features: int) -> None:
        """Add a norm of one number for each feature."""
        if self.before is None or self.before.outputs != features:
            # Of another layer, of several whose channels are joined, or of a flattened image.
            self._append(Made(name, None, features, self._rank))

    def add_weight(self, name: str, shape: tuple[int, ...]) -> None:
        """Add a convolution, `(O, I/g, *kernel_size)`, or a linear layer, `(out, in)`."""
        made = Made(name, shape[1], shape[0], len(shape) - 2)
        if self._last is not None and self._takes(made, self._last.outputs):
            self._last.taken = True
        self._append(made)

    def _append(self, made: Made) -> None:
        last = self._last
        if last is not None and last.rank and not last.taken:
            self._free[last.outputs, last.rank] = self._number, last
        self._earlier, self._last, self.before = last, made, made
        self._outputs[made.outputs] += 1
        self._number += 1
        self._rank = made.rank or self._rank

    def _takes(self, made: Made, channels: int) -> bool:
        """Return whether a layer may take so many channels of the layer before it.

        Or whether its own are added to them, as those of a shortcut are.
        """
        assert made.inputs is not None  # as it is no norm
        if made.rank == 0:
            return made.inputs % channels == 0  # also of an image
        if made.inputs in (1, channels):
            return made.outputs % channels == 0 or made.inputs == channels
        earlier = made.inputs in self._outputs
        return made.outputs == channels and (earlier or channels % made.inputs == 0)

    def image(self, inputs: int) -> Image | None:
        """Return an image that the next layer may take, as likely as what `before` gives.

        It is one that no layer seems to take; or the one that the last layer takes, where that is
        the only one of so many channels, and may be beside the path.
        """
        last, earlier = self._last, self._earlier
        assert last is not None  # as `before` is known
        others = self._outputs[inputs] - (last.outputs == inputs)
        alone = last.rank and last.inputs != inputs and not others
        if alone and earlier is not None and (size := _size(earlier, inputs)):
            return Image(earlier.name, size)
        free = [(n, made) for n, made in self._free.values() if _size(made, inputs)]
        if not free:
            return None
        _, made = max(free, key=lambda each: each[0])
        return Image(made.name, _size(made, inputs))


def _size(made: Made, inputs: int) -> tuple[int, ...]:
    """Return the size of an image of so many numbers, as wide as it is high; () for none."""
    positions, rest = divmod(inputs, made.outputs)
    side = round(positions ** (1 / made.rank)) if made.rank else 0
    square = not rest and positions > 1 and side**made.rank == positions
    return (made.outputs, *(side,) * made.rank) if square else ()
