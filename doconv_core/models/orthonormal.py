"""Which weights of a model are to have orthonormal rows: the rule, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from doconv_core.maths.orthonormal import check_rows
from doconv_core.models.view import LayerKinds


def counted(
    model: Any, layers: Iterable[Any], layer_kinds: LayerKinds, convolution: type, types: str
) -> list[Any]:
    """Return the layers whose weights count, each once; ValueError where there is none.

    types: as `none_counted` takes them; the rest as `marked` does.
    """
    found = marked(layers, layer_kinds, convolution)
    if not found:
        raise none_counted(model, types)
    return found


def marked(layers: Iterable[Any], layer_kinds: LayerKinds, convolution: type) -> list[Any]:
    """Return the layers whose weights count, each once; there may be none.

    These are parts of kinds' layers, and convolutions with the mark. layers: all of the model's.
    convolution: what the framework's all are.
    """
    found: dict[int, Any] = {}
    for layer in layers:
        parts = [kind.orthonormal(layer) for kind in layer_kinds.values()]
        if isinstance(layer, convolution) and getattr(layer, "orthonormal", False) is True:
            parts.append(layer)
        found |= {id(part): part for part in parts if part is not None}
    return list(found.values())


def none_counted(model: Any, types: str) -> ValueError:
    """Return the error for a model without such a weight. types: of the layers that have one."""
    return ValueError(
        f"the {type(model).__name__} has no weight to make orthonormal: neither a {types}, nor a "
        "convolution that was given to mark_orthonormal."
    )


def check_convolution(conv: Any, known: bool) -> None:
    """Raise TypeError for what is no convolution, and so cannot be marked."""
    if not known:
        raise TypeError(
            f"mark_orthonormal takes a convolution; received {type(conv).__qualname__}."
        )


def check_pointwise(
    kernel_size: Sequence[int], groups: int, channels: tuple[int, int] | None
) -> None:
    """Raise ValueError for a convolution that cannot be marked: its rows cannot be orthonormal.

    channels: of its output and its input; None where the latter are not known yet, which the loss
    then looks at.
    """
    if set(kernel_size) != {1} or groups != 1:
        raise ValueError(
            "mark_orthonormal takes a pointwise convolution, of kernel_size 1 and groups=1; "
            f"received kernel_size={kernel_size}, groups={groups}."
        )
    if channels is not None:
        check_rows(*channels)
