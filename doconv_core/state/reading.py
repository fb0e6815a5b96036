"""Reading a framework's layers as what they are in a state: what every backend checks alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from doconv_core.kinds.base import ComposedKind
from doconv_core.maths.geometry import Extra
from doconv_core.models.view import LayerKind
from doconv_core.state.match import unsupported_layer

Read = TypeVar("Read")


class NoCounterpart(Exception):
    """Why a layer of a known type has no counterpart in a state. Raised by what reads it."""


def read_layer(
    read: Callable[..., Read] | None,
    path: str,
    layer: Any,
    names: Iterable[str],
    *around: Any,
    obstacle: str | None,
) -> Read:
    """Return what `read` makes of a layer, and of what is around it.

    read: None for a type without a counterpart. names: of what the layer owns. obstacle: why this
    layer has none, if it is known beforehand. Raises TypeError, by the path, where it has none.
    """
    if read is None:
        raise unsupported_layer(path, layer, names)
    if obstacle is not None:
        raise unsupported_layer(path, layer, names, obstacle)
    try:
        return read(layer, *around)
    except NoCounterpart as error:
        raise unsupported_layer(path, layer, names, str(error)) from None


def is_composed(layer_kinds: Mapping[str, LayerKind], cls: type) -> bool:
    """Return whether layers of this very type are a kind's that composes their kernel."""
    composed = (x for x in layer_kinds.values() if isinstance(x.kind, ComposedKind))
    return any(cls in getattr(layers, "types", {}).values() for layers in composed)


def has_own_spec(layer_kinds: Mapping[str, LayerKind], cls: type) -> bool:
    """Return whether layers of this very type are a kind's and no other layers in states."""
    return any(cls in layers.state_types for layers in layer_kinds.values())


def in_outputs(uses: Iterable[Extra], stride: Iterable[int]) -> set[Extra]:
    """Return the zeros before a transposed convolution as what they take from its output.

    A zero before the input is as many positions of output as the stride. uses: as of `padded`.
    """
    stride = tuple(stride)
    return {
        tuple((-b * s, -a * s) for (b, a), s in zip(use, stride, strict=bool(use))) for use in uses
    }
