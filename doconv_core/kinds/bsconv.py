"""Blueprint separable convolutions: their sizes, the kernel that they make, and what they cost.

A BSConv's filters are blueprints, one `k x k` image for each output channel, weighted for each
input channel. BSConv-U is a pointwise convolution, `pw` `(O, I)`, and then a depthwise one, `dw`
`(O, M)`. BSConv-S makes the pointwise one of two: `W1` `(mid, I)`, to fewer channels, and then `W2`
`(O, mid)`. Axis letters as everywhere in this project.
Source: BSConv, arXiv 2003.13549.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, prod
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from doconv_core.maths.numeric import as_floats, widened
from doconv_core.maths.spec import ConvSpec, as_integer

Array = NDArray[Any]

VARIANTS = ("u", "s")
FORMS = ("keep", "merge", "dense")
P, MIN_MID_CHANNELS = 0.25, 4  # the defaults of every backend


def mid_channels(in_channels: int, p: float = P, min_mid_channels: int = MIN_MID_CHANNELS) -> int:
    """Return the channels between BSConv-S's two pointwise convolutions.

    `min(in_channels, max(min_mid_channels, ceil(p * in_channels)))`, with the product as floating
    point gives it. p: the share of the input channels to keep, above 0 and at most 1.
    Raises TypeError for what is not a number, ValueError for one that gives no layer.
    Source: BSConv, arXiv 2003.13549, subspace BSConv.
    """
    in_channels = as_integer("in_channels", in_channels)
    least = as_integer("min_mid_channels", min_mid_channels)
    return min(in_channels, max(least, ceil(as_share("p", p) * in_channels)))


def as_share(name: str, value: Any) -> float:
    """Return `value` as a float above 0 and at most 1; TypeError or ValueError names it else."""
    if not 0 < as_number(name, value) <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1; received {name}={value!r}.")
    return float(value)


def as_number(name: str, value: Any) -> float:
    """Return `value` as a finite float; TypeError or ValueError names it otherwise."""
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a number; received {name}={value!r}.")
    if not isfinite(value):
        raise ValueError(f"{name} must be finite; received {name}={value!r}.")
    return float(value)


def as_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`; ValueError lists them otherwise."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}; received {name}={value!r}."
        )
    return str(value)


@dataclass(frozen=True)
class BSConvSpec:
    """The sizes of one blueprint separable convolution, validated once, and what they imply.

    in_channels: `I`; out_channels: `O`; kernel_size: one to three integers, whose product is `M`.
    variant: "u" or "s". p, min_mid_channels: as in `mid_channels`; "u" has no use for them.
    with_bn: whether a batch norm follows each pointwise convolution.
    Raises TypeError or ValueError for what gives no layer.
    Source: BSConv, arXiv 2003.13549.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    variant: str = "u"
    p: float = P
    min_mid_channels: int = MIN_MID_CHANNELS
    with_bn: bool = False

    def __post_init__(self) -> None:
        """Validate every field, and store plain numbers and a tuple in place of what came."""
        put = object.__setattr__
        dense = ConvSpec(self.in_channels, self.out_channels, self.kernel_size)
        for name in ("in_channels", "out_channels", "kernel_size"):
            put(self, name, getattr(dense, name))
        put(self, "variant", as_choice("variant", self.variant, VARIANTS))
        put(self, "p", as_share("p", self.p))
        put(self, "min_mid_channels", as_integer("min_mid_channels", self.min_mid_channels))
        if not isinstance(self.with_bn, (bool, np.bool_)):
            raise TypeError(f"with_bn must be True or False; received with_bn={self.with_bn!r}.")
        put(self, "with_bn", bool(self.with_bn))

    @property
    def dense(self) -> ConvSpec:
        """The sizes of the ordinary convolution that it is to take the place of."""
        return ConvSpec(self.in_channels, self.out_channels, self.kernel_size)

    @property
    def rank(self) -> int:
        """The number of spatial dimensions, 1 to 3."""
        return len(self.kernel_size)

    @property
    def taps(self) -> int:
        """`M`, the number of kernel taps."""
        return prod(self.kernel_size)

    @property
    def mid_channels(self) -> int | None:
        """The channels between the two pointwise convolutions of "s"; None for "u"."""
        if self.variant == "u":
            return None
        return mid_channels(self.in_channels, self.p, self.min_mid_channels)

    @property
    def pointwise_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the pointwise weights in the order of their use: `pw`, or `W1` and `W2`."""
        mid = self.mid_channels
        if mid is None:
            return ((self.out_channels, self.in_channels),)
        return ((mid, self.in_channels), (self.out_channels, mid))

    @property
    def depthwise_shape(self) -> tuple[int, int]:
        """Shape of `dw`, `(O, M)`."""
        return (self.out_channels, self.taps)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layer's parts, in the order of their use."""
        numbers = ("",) if self.variant == "u" else ("1", "2")
        kinds = ("pointwise", "batch_norm") if self.with_bn else ("pointwise",)
        return (*(kind + number for number in numbers for kind in kinds), "depthwise")


def merge_pointwise(first: ArrayLike, second: ArrayLike) -> Array:
    """Return the weight of the pointwise convolution that equals BSConv-S's two, `W2·W1`.

    first: `W1`, `(mid, I)`. second: `W2`, `(O, mid)`. Returns `(O, I)`, in W2's dtype; half types
    are computed in float32 and rounded once. Raises ValueError where the shapes do not agree.
    """
    w1, w2 = _pair(first, second)
    merged: Array = widened(w2) @ widened(w1)
    return merged.astype(w2.dtype)


def merge_pointwise_gradient(
    first: ArrayLike, second: ArrayLike, gradient: ArrayLike
) -> tuple[Array, Array]:
    """Return the gradients with respect to `W1` and `W2`, from that of `W2·W1`, `(O, I)`."""
    w1, w2 = _pair(first, second)
    product = widened(_shaped("gradient", gradient, (len(w2), w1.shape[1])))
    return (
        (widened(w2).T @ product).astype(w1.dtype),
        (product @ widened(w1).T).astype(w2.dtype),
    )


def compose_bsconv(pointwise: ArrayLike, depthwise: ArrayLike, spec: BSConvSpec) -> Array:
    """Return the kernel of the ordinary convolution that equals the pointwise, then the depthwise.

    `K[o, i, m] = dw[o, m] * pw[o, i]`. pointwise: `(O, I)`, of "s" what `merge_pointwise` gives.
    depthwise: `(O, M)`. Returns `(O, I, *kernel_size)`, in pointwise's dtype.
    Raises ValueError where a shape disagrees with `spec`, TypeError for dtypes that are not float.
    Source: BSConv, arXiv 2003.13549, unconstrained BSConv.
    """
    pw, dw = _checked(pointwise, depthwise, spec)
    kernel: Array = widened(pw)[:, :, None] * widened(dw)[:, None, :]
    kernel = kernel.reshape(spec.dense.kernel_shape)
    return kernel.astype(pw.dtype)


def compose_bsconv_gradient(
    pointwise: ArrayLike, depthwise: ArrayLike, kernel_gradient: ArrayLike, spec: BSConvSpec
) -> tuple[Array, Array]:
    """Return the gradients with respect to `pw` and `dw`, from that of `compose_bsconv`'s kernel.

    kernel_gradient: `(O, I, *kernel_size)`. Raises ValueError where a shape disagrees.
    """
    pw, dw = _checked(pointwise, depthwise, spec)
    shape = spec.dense.kernel_shape
    gradient = widened(_shaped("kernel_gradient", kernel_gradient, shape))
    gradient = gradient.reshape(*pw.shape, spec.taps)
    return (
        np.einsum("oim,om->oi", gradient, widened(dw)).astype(pw.dtype),
        np.einsum("oim,oi->om", gradient, widened(pw)).astype(dw.dtype),
    )


def as_matrix(name: str, array: ArrayLike) -> Array:
    """Return a pointwise weight as floats; ValueError names it where it has other axes than two."""
    matrix = as_floats(name, array)
    if matrix.ndim != 2:
        raise ValueError(
            f"{name} must have shape (output, input) channels; received {matrix.shape}."
        )
    return matrix


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    w1, w2 = as_matrix("first", first), as_matrix("second", second)
    if w2.shape[1] != len(w1):
        raise ValueError(
            f"second must have {len(w1)} input channels, as many as first has output channels; "
            f"received shapes {w1.shape} and {w2.shape}."
        )
    return w1, w2


def _checked(pointwise: ArrayLike, depthwise: ArrayLike, spec: BSConvSpec) -> tuple[Array, Array]:
    return (
        _shaped("pointwise", pointwise, (spec.out_channels, spec.in_channels)),
        _shaped("depthwise", depthwise, spec.depthwise_shape),
    )


def _shaped(name: str, array: ArrayLike, shape: tuple[int, ...]) -> Array:
    found = as_floats(name, array)
    if found.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; received {found.shape}.")
    return found
