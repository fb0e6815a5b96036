"""Layers that a file has as several, and that become one convolution: what all such have."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from doconv_core.files.entries import FLOATS, Array, Entry
from doconv_core.files.layers import BATCH_NORM, CONVOLUTION, Layer, Shape
from doconv_core.maths.batchnorm import NotFoldable

BRANCHES = "branches"  # the kind of a block
EPSILON = 1e-5  # of the norms, where nothing tells it: PyTorch's own
NO_EPSILON = (
    "nothing in the file tells the epsilon of its batch norms, which is Keras' 0.001 unless the "
    "model has another, such as 1e-5 of networks by name; say it with epsilon=, or --epsilon"
)
NORM = {"mean": "running_mean", "variance": "running_var", "scale": "weight", "offset": "bias"}
COUNT = "num_batches_tracked"
# The roles that a layer of each kind has to have, and one that it may have beside them.
ROLES = {CONVOLUTION: (("weight",), "bias"), BATCH_NORM: ((*NORM.values(),), COUNT)}
Read: TypeAlias = Callable[[str], Array]  # gives an entry's values
KernelOf: TypeAlias = Callable[[Layer], Array]  # a convolution's canonical kernel, in float64


@dataclass(frozen=True)
class Block(Layer):
    """The layers of a block as one; its entries by their names below the block's path.

    family: what kind of block. layers: those that it is made of. count: of its branches. becomes:
    the path of the convolution below the block's, "" for that itself. folded: the names of the
    weight and bias that it becomes; sources: the entries in whose places and types they are.
    kernel_shape: that of the sum. epsilons: of the batch norms of which the file tells it, by their
    paths; epsilon: of the others, None where there is no usual one. A block with a note is none
    that can be folded.
    """

    family: str = field(kw_only=True)
    layers: tuple[Layer, ...] = field(kw_only=True)
    becomes: str = field(default="", kw_only=True)
    count: int = field(default=0, kw_only=True)
    folded: tuple[str, ...] = field(default=(), kw_only=True)
    sources: tuple[str, ...] = field(default=(), kw_only=True)
    epsilons: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    epsilon: float | None = field(default=EPSILON, kw_only=True)

    @property
    def is_untold(self) -> bool:
        """Whether it has a batch norm of which the file does not tell the epsilon."""
        norms = (layer.path for layer in self.layers if layer.kind == BATCH_NORM)
        return any(path not in self.epsilons for path in norms)

    def epsilon_of(self, norm: Layer) -> float:
        """Return the epsilon of one of its batch norms; NotFoldable where nothing tells it."""
        found = self.epsilons.get(norm.path, self.epsilon)
        if found is None:
            raise NotFoldable(f"layer {self.name!r}: {NO_EPSILON}.")
        return found

    def check_epsilons(self) -> None:
        """Raise NotFoldable where nothing tells the epsilon of a batch norm."""
        for layer in self.layers:
            if layer.kind == BATCH_NORM:
                self.epsilon_of(layer)

    @property
    def gone(self) -> tuple[str, ...]:
        """All its roles: the convolution that it becomes is another layer."""
        return tuple(self.entries)

    @property
    def convolution(self) -> Block:
        """It under the path, and with the roles, of the convolution that it becomes."""
        path = ".".join(filter(None, (self.path, self.becomes)))
        entries = dict(zip(("weight", "bias"), self.sources, strict=True))
        return dataclasses.replace(self, path=path, kind=CONVOLUTION, entries=entries)

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """The shapes of the weight, as it is stored, and the bias that it becomes."""
        assert self.kernel_shape is not None  # as of one that can be folded
        return self.stored_shape(self.kernel_shape), self.kernel_shape[:1]

    @abstractmethod
    def added_up(self, read: Read, kernel_of: KernelOf) -> tuple[Array, Array]:
        """Return the kernel and the bias of the convolution that it adds up to, in float64."""


class EpsilonError(ValueError):
    """An epsilon that is none, or of which no block has a use."""


def below(own: Mapping[str, Layer]) -> dict[str, str]:
    """Return the entries of a block's layers, those by their paths, by names below the block's."""
    return {f"{at}.{role}": x.entries[role] for at, x in own.items() for role in x.entries}


def problems(
    kinds: Mapping[str, str],
    own: Mapping[str, Layer],
    channels: Callable[[str], int],
    misfits: Callable[[str, Layer], Iterator[str]],
    entries: Mapping[str, Entry],
) -> Iterator[str]:
    """Yield why layers, by their paths, make no block.

    kinds: of those that it has. channels: how many each gives. misfits: yields why a convolution's
    kernel is none of the block's.
    """
    yield from (f"it has no {at}" for at in kinds if at not in own)
    yield from (f"it has {at} besides" for at in own if at not in kinds)
    for at, kind in kinds.items():
        layer = own[at]
        needed, beside = ROLES.get(kind, ((), ""))
        known = {*needed, beside, *layer.gone} if needed else {*layer.entries}
        yield from (f"it has no {at}.{role}" for role in needed if role not in layer.entries)
        yield from (f"it has {at}.{role} besides" for role in layer.entries if role not in known)
        if kind == CONVOLUTION:
            if layer.kind != CONVOLUTION:
                yield f"{at} is no convolution"
            elif layer.kernel_shape is None:
                yield f"of {at}, {layer.note}"
            else:
                yield from misfits(at, layer)
        for role in layer.entries if kind != CONVOLUTION else {*layer.entries} & {"bias"}:
            entry = entries[layer.entries[role]]
            if role != COUNT and (entry.size != channels(at) or entry.dtype not in FLOATS):
                given = f"{at}.{role} {entry.shape} of {entry.dtype}"
                yield f"it has {given}, where {channels(at)} floats belong"
