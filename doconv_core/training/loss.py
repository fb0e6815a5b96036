"""The loss of a classifier: its targets, smoothed and mixed; the cross entropy, its gradient."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.maths.numeric import Array, as_floats


def targets(labels: ArrayLike, classes: int, smoothing: float = 0.0) -> Array:
    """Return what the softmax of the output is to be, `(B, classes)`, in float32.

    `1 - smoothing + smoothing / classes` for an image's class, and `smoothing / classes` for any
    other. labels: `(B,)`, integers from 0 to classes - 1; ValueError for others.
    Source: label smoothing, arXiv 1512.00567, section 7.

    >>> targets([1, 0], 2, smoothing=0.1)
    array([[0.05, 0.95],
           [0.95, 0.05]], dtype=float32)
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"labels must be integers of shape (B,); received {labels.dtype} of {labels.shape}."
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(f"labels must be from 0 to {classes - 1}; received {wrong}.")
    found = np.full((len(labels), classes), smoothing / classes, np.float64)
    found[np.arange(len(labels)), labels] += 1 - smoothing
    return found.astype(np.float32)


def mixed(first: Array, other: Array, share: float) -> Array:
    """Return `share` of an array and the rest of another, in their dtype: images or targets.

    Source: mixup, arXiv 1710.09412.

    >>> mixed(np.ones(2, np.float32), np.zeros(2, np.float32), 0.25)
    array([0.25, 0.25], dtype=float32)
    """
    share = first.dtype.type(share)
    return first * share + other * (1 - share)


def cross_entropy(logits: ArrayLike, targets: ArrayLike) -> Array:
    """Return the cross entropy of each image, `(B,)`, of the logits' softmax with the targets.

    logits, targets: `(B, classes)`. In the logits' dtype.

    >>> cross_entropy(np.zeros((1, 4)), np.array([[0, 1, 0, 0]])).round(4)
    array([1.3863])
    """
    logs = _log_softmax(as_floats("logits", logits))
    losses: Array = -(np.asarray(targets, logs.dtype) * logs).sum(1)
    return losses


def cross_entropy_gradient(logits: ArrayLike, targets: ArrayLike) -> Array:
    """Return the gradient of each image's cross entropy in its logits, `(B, classes)`.

    >>> cross_entropy_gradient(np.zeros((1, 4)), np.array([[0, 1, 0, 0]]))
    array([[ 0.25, -0.75,  0.25,  0.25]])
    """
    logs = _log_softmax(as_floats("logits", logits))
    wanted = np.asarray(targets, logs.dtype)
    gradient: Array = np.exp(logs) * wanted.sum(1, keepdims=True) - wanted
    return gradient


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logs
