"""Layers that take an ordinary layer's arguments, in its order, and some of their own."""

from __future__ import annotations

from typing import Any

from doconv_core.maths.geometry import Pad, same, symmetric
from doconv_core.maths.spec import as_tuple
from doconv_core.models.received import named_constructor


def as_places(rank: int, stride: Any, padding: Any, dilation: Any) -> tuple[Any, Any, Any]:
    """Return these arguments of a convolution, one integer for each dimension; or padding in words.

    Raises TypeError or ValueError, which name the argument, for what is neither.
    """
    stride, dilation = as_tuple("stride", stride, rank), as_tuple("dilation", dilation, rank)
    if not isinstance(padding, str):
        padding = as_tuple("padding", padding, rank, least=0)
    return stride, padding, dilation


def pads_of(size: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> tuple[Pad, ...]:
    """Return the pairs that a convolution's padding is: integers, "valid" or "same"."""
    if padding == "same":
        return same(size, stride, dilation)
    return symmetric([0] * len(size) if padding == "valid" else padding)


class StandIn:
    """What stands in for an ordinary layer, which each rank names; errors name that rank's class.

    Not the base in which the constructor is written, and which nobody has called.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "ordinary" in vars(cls) and "__init__" not in vars(cls):
            cls.__init__ = named_constructor(cls)  # type: ignore[method-assign]
