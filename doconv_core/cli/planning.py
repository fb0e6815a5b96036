"""What a converted file will hold: each entry's name, and the values that it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from numpy.typing import NDArray

from doconv_core.cli.errors import IMPOSSIBLE, Failure
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import Layer
from doconv_core.files.folding import check_finite
from doconv_core.kinds.do_conv import from_kernel
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import place

Array = NDArray[Any]

MULTIPLIER_SECOND = ("reference TensorFlow", "reference Gluon")  # their D is `(M, S, I)`
FOLDED, AGAIN = "folded", "its kernel as W, and D = 0"


@dataclass(frozen=True)
class Planned:
    """An entry to be written. values: gives its array when it is its turn; dtype: stored as.

    sources: the entries that it comes from. how: what was done to them, where it is not plain.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], Array]
    sources: tuple[str, ...] = ()
    how: str = ""


@dataclass
class Plan:
    """All that is to be written, in its order. dropped: entries that are left out."""

    entries: list[Planned] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def arrays(self, step: Callable[[int, int], None]) -> Mapping[str, Array]:
        """Return the arrays by name, each made when it is asked for. step: called with progress."""
        return _Arrays(self.entries, step)


class _Arrays(Mapping[str, Array]):
    """Arrays that are made one at a time, so that a large file needs little memory."""

    def __init__(self, entries: Sequence[Planned], step: Callable[[int, int], None]) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._step, self._done = step, 0

    def __getitem__(self, name: str) -> Array:
        self._step(self._done, len(self))
        self._done += 1
        entry = self._entries[name]
        values = entry.values()
        assert values.shape == entry.shape, (name, values.shape, entry.shape)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class Weights:
    """What a source layer gives for W and D, canonical, in the shapes of a layer's parameters.

    shape: W's. depthwise: None for an ordinary layer, whose W is the kernel. kernel: the kernel,
    `(O, I/g, *kernel_size)`. how: as in `Planned`.
    """

    shape: tuple[int, ...]
    weight: Callable[[], Array]
    kernel: Callable[[], Array]
    depthwise_shape: tuple[int, ...] = ()
    depthwise: Callable[[], Array] | None = None
    how: str = ""


def needs_kernel_size(checkpoint: Checkpoint, layer: Layer, fold: bool) -> bool:
    """Return whether the kernel size of an over-parameterized layer must be known to convert it.

    Where S is M, a layer keeps W in the kernel's shape; where it is more, as `(O, I/g, S)`.
    """
    if not layer.over_parameterized:
        return False
    shape = checkpoint.entries[layer.entries["depthwise_weight"]].shape
    taps, multiplier = (shape[0], shape[1]) if layer.origin in MULTIPLIER_SECOND else shape[1:]
    return fold or multiplier <= taps


def weights_of(checkpoint: Checkpoint, layer: Layer, fold: bool) -> Weights:
    """Return a convolution's weights, as an ordinary layer's if `fold`.

    A layer of the reference implementation that composes as no pair does becomes its kernel, over-
    parameterized again. Raises Failure where that cannot be, for want of a depth multiplier of M.
    """
    shape = layer.kernel_shape or ()

    def kernel() -> Array:
        return checkpoint.kernel(layer)

    def finite() -> Array:
        return check_finite(layer, kernel())

    if not layer.over_parameterized:
        return Weights(shape, kernel, kernel)
    if fold:
        return Weights(shape, finite, finite, how=FOLDED)
    if layer.origin.startswith("reference"):
        spec = layer.spec
        if layer.kernel_shape is not None and not isinstance(spec, ConvSpec):
            raise Failure(
                f"{place(layer.name)} has a depth multiplier below its {prod(shape[2:])} taps, "
                "which no layer here may have; --fold carries its kernel over.",
                IMPOSSIBLE,
            )
        try:
            checkpoint.pair(layer)
        except NotFoldable:
            if isinstance(spec, ConvSpec):
                return _from_kernel(spec, kernel)
            raise
    weight, depthwise = checkpoint.pair(layer)
    assert depthwise is not None  # as the layer is over-parameterized
    taps, multiplier = depthwise.shape[1:]
    shape = shape if taps == multiplier else weight.shape
    return Weights(
        shape=shape,
        weight=lambda: checkpoint.pair(layer)[0].reshape(shape),
        kernel=kernel,
        depthwise_shape=depthwise.shape,
        depthwise=lambda: _present(checkpoint.pair(layer)[1]),
    )


def _from_kernel(spec: ConvSpec, kernel: Callable[[], Array]) -> Weights:
    return Weights(
        shape=spec.parameter_shape,
        weight=lambda: from_kernel(kernel(), spec)[0].reshape(spec.parameter_shape),
        kernel=kernel,
        depthwise_shape=spec.depthwise_shape or (),
        depthwise=lambda: _present(from_kernel(kernel(), spec)[1]),
        how=AGAIN,
    )


def _present(depthwise: Array | None) -> Array:
    assert depthwise is not None  # as the layer is over-parameterized
    return depthwise
