"""What a DO-Conv layer is, before any framework: its sizes, and the shapes they imply."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf, isfinite, prod
from numbers import Real
from typing import Any

import numpy as np

MAX_RANK = 3


def as_integer(name: str, value: Any, *, least: int = 1, most: float = inf) -> int:
    """Return `value` as an int in these bounds; TypeError or ValueError names it otherwise."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer; received {name}={value!r}.") from None
    if integer < least:
        raise ValueError(f"{name} must be at least {least}; received {name}={integer}.")
    if integer > most:
        raise ValueError(f"{name} must be at most {most}; received {name}={integer}.")
    return integer


def as_number(name: str, value: Any) -> float:
    """Return `value` as a finite float; TypeError or ValueError names it otherwise."""
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a number; received {name}={value!r}.")
    try:
        number = float(value)
    except OverflowError:  # of an integer
        number = inf
    if not isfinite(number):
        raise ValueError(f"{name} must be finite; received {name}={value!r}.")
    return number


def as_tuple(name: str, value: Any, rank: int, *, least: int = 1) -> tuple[int, ...]:
    """Return `value`, one integer for all dimensions or one for each, as a tuple of `rank` ints."""
    if is_sequence(value):
        if len(value) != rank:
            raise ValueError(
                f"{name} must be one integer or {rank} of them; received {name}={value!r}."
            )
        return tuple(as_integer(f"{name}[{d}]", v, least=least) for d, v in enumerate(value))
    return (as_integer(name, value, least=least),) * rank


def check_divisible(name: str, channels: int, parts: int, into: str = "groups") -> None:
    """Raise ValueError, with the argument's name, for channels that are not divisible by parts."""
    if channels % parts:
        raise ValueError(
            f"{name} must be divisible by {into}; received {name}={channels}, {into}={parts}."
        )


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise ValueError, which lists the choices, for a value that is none of them."""
    if value not in tuple(choices):  # of which not all can be asked for what has no hash
        raise ValueError(f"{name} must be one of {', '.join(choices)}; received {value!r}.")


def is_sequence(value: Any) -> bool:
    """Return whether `value` has entries in an order: a sequence or a 1-D array, but not text."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def as_depth_multiplier(
    value: Any, kernel_size: Sequence[int], *, name: str = "depth_multiplier"
) -> int:
    """Return `S` for a kernel of this size; None means its number of taps `M`.

    name: of the argument, where another has that of `S`. Raises TypeError for what is no integer,
    ValueError for one below `M`.
    """
    taps = prod(kernel_size)
    if value is None:
        return taps
    multiplier = as_integer(name, value)
    if taps == 1:
        return 1
    if multiplier < taps:
        raise ValueError(
            f"{name} must be at least the number of kernel taps, or some kernels cannot be "
            f"expressed; received {name}={multiplier} for kernel_size={tuple(kernel_size)}, which "
            f"has {taps} taps."
        )
    return multiplier


@dataclass(frozen=True)
class ConvSpec:
    """The sizes of one over-parameterized convolution, validated once, and every shape they imply.

    in_channels: `I`, and out_channels: `O`, both divisible by groups: `g`.
    kernel_size: one to three integers, one for each spatial dimension; their product is `M`.
    depth_multiplier: `S >= M`, the length of each weight vector; `None` means `M`. A kernel of one
    tap has no depthwise weight, whatever was asked for: its depth multiplier is 1.

    Raises TypeError for what is not an integer, ValueError for sizes that give no layer.
    Source: DO-Conv, arXiv 2006.12030, section "Depthwise over-parameterized convolutional layer".

    >>> spec = ConvSpec(8, 16, (3, 3), groups=2, depth_multiplier=12)
    >>> spec.weight_shape, spec.depthwise_shape, spec.kernel_shape
    ((16, 4, 12), (8, 9, 12), (16, 4, 3, 3))
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int = 1
    depth_multiplier: int = None  # type: ignore[assignment]  # never None after __post_init__

    def __post_init__(self) -> None:
        """Validate every field, and store plain ints and a tuple in place of what came."""
        put = object.__setattr__
        for name in ("in_channels", "out_channels", "groups"):
            put(self, name, as_integer(name, getattr(self, name)))
        put(self, "kernel_size", self._validated_kernel_size())
        for name in ("in_channels", "out_channels"):
            check_divisible(name, getattr(self, name), self.groups)
        multiplier = as_depth_multiplier(self.depth_multiplier, self.kernel_size)
        put(self, "depth_multiplier", multiplier)

    def _validated_kernel_size(self) -> tuple[int, ...]:
        size = self.kernel_size
        if not is_sequence(size):
            raise TypeError(
                "kernel_size must be a sequence of 1 to 3 integers, one for each spatial "
                f"dimension; received kernel_size={size!r}."
            )
        if not 1 <= len(size) <= MAX_RANK:
            raise ValueError(
                f"kernel_size must have 1 to {MAX_RANK} entries, one for each spatial dimension; "
                f"received kernel_size={tuple(size)!r}."
            )
        return tuple(as_integer(f"kernel_size[{d}]", k) for d, k in enumerate(size))

    @property
    def rank(self) -> int:
        """The number of spatial dimensions, 1 to 3."""
        return len(self.kernel_size)

    @property
    def taps(self) -> int:
        """`M`, the number of kernel taps."""
        return prod(self.kernel_size)

    @property
    def over_parameterized(self) -> bool:
        """Whether the layer has a depthwise weight: whether its kernel has more than one tap."""
        return self.taps > 1

    @property
    def in_channels_per_group(self) -> int:
        """`I/g`, the input channels that one output channel reads."""
        return self.in_channels // self.groups

    @property
    def out_channels_per_group(self) -> int:
        """`O/g`, the output channels of one group."""
        return self.out_channels // self.groups

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the ordinary kernel, `(O, I/g, *kernel_size)`."""
        return (self.out_channels, self.in_channels_per_group, *self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """Shape of `W`, `(O, I/g, S)`."""
        return (self.out_channels, self.in_channels_per_group, self.depth_multiplier)

    @property
    def depthwise_shape(self) -> tuple[int, int, int] | None:
        """Shape of `D`, `(I, M, S)`; None for a kernel of one tap, which has no `D`."""
        if not self.over_parameterized:
            return None
        return (self.in_channels, self.taps, self.depth_multiplier)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what an ordinary convolution of these sizes may have, as `W` and bias."""
        return {"weight": self.weight_shape, "bias": (self.out_channels,)}

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape in which a layer keeps `W`: the ordinary kernel's where `S == M`, else `W`'s own.

        So an ordinary convolution's checkpoint loads into the layer as it is.
        """
        return self.kernel_shape if self.depth_multiplier == self.taps else self.weight_shape
