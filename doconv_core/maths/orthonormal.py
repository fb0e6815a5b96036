"""How far a pointwise weight is from orthonormal rows: the loss that BSConv-S is trained with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.maths.numeric import Array, as_matrix, widened
from doconv_core.maths.spec import as_number

ALPHA = 0.1  # the weight of the loss, in every backend
APART = "drive the rows apart from orthonormal ones"


def as_weight(name: str, value: Any, otherwise: str = APART) -> float:
    """Return the weight of a loss as a float of at least 0; TypeError or ValueError names it.

    otherwise: what training would do with one below.
    """
    if as_number(name, value) < 0:
        raise ValueError(
            f"{name} must not be negative, or training would {otherwise}; received "
            f"{name}={value!r}."
        )
    return float(value)


def check_rows(rows: int, columns: int) -> None:
    """Raise ValueError where so many rows cannot be orthonormal. rows: `O`; columns: `I`."""
    if rows > columns:
        raise ValueError(
            "mark_orthonormal takes a convolution of at most as many output channels as input "
            f"channels, as more rows cannot be orthonormal; received {columns} input channels and "
            f"{rows} output channels."
        )


def orthonormality(weight: ArrayLike) -> float:
    """Return how far the rows of a pointwise weight are from orthonormal.

    The Frobenius norm of `W·Wᵀ - I`. weight: `W1` of BSConv-S, `(mid, I)`, or another pointwise
    weight, such as the linear one of a MobileNetV2 block.
    Raises ValueError for another number of axes.
    Source: BSConv, arXiv 2003.13549, orthonormal regularization of subspace BSConv.

    >>> orthonormality(np.array([[1.0, 0.0], [0.0, 3.0]]))
    8.0
    """
    return float(np.linalg.norm(_excess(widened(as_matrix("weight", weight)))))


def orthonormality_gradient(weight: ArrayLike) -> Array:
    """Return the gradient of `orthonormality`, `(mid, I)`: `2·G·W / |G|`, `G` being `W·Wᵀ - I`.

    Zero where the rows are orthonormal: the norm has a kink there, at its least value.

    >>> orthonormality_gradient(np.array([[1.0, 0.0], [0.0, 3.0]]))
    array([[0., 0.],
           [0., 6.]])
    """
    original = as_matrix("weight", weight)
    w = widened(original)
    excess = _excess(w)
    norm = np.linalg.norm(excess)
    gradient: Array = 2 * excess @ w / norm if norm else np.zeros_like(w)
    return gradient.astype(original.dtype)


def _excess(weight: Array) -> Array:
    excess: Array = weight @ weight.T - np.eye(len(weight), dtype=weight.dtype)
    return excess
