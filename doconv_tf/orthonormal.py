"""The loss that keeps the rows of pointwise weights orthonormal, as BSConv-S is trained with.

Which weights those are is said by the regularizer of their layer's kernel: it is what Keras stores
with a layer, and what it adds to a model's losses.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from doconv_core.maths.orthonormal import ALPHA, as_weight, check_rows
from doconv_core.models.orthonormal import check_convolution, check_pointwise, none_counted
from doconv_core.models.received import no_model
from doconv_tf.ordinary import CONVS, first_occurrences
from doconv_tf.private import kernel_variable


@keras.saving.register_keras_serializable(package="doconv")
class Orthonormality(keras.regularizers.Regularizer):
    """A penalty on a pointwise kernel whose output channels are not orthonormal.

    `alpha` times the Frobenius norm of `W·Wᵀ - I`; 0 marks the kernel alone. other: a further
    regularizer of the same kernel, whose penalty is added.
    """

    def __init__(self, alpha: float = 0.0, other: Any = None) -> None:
        self.alpha = as_weight("alpha", alpha)
        self.other = keras.regularizers.get(other)

    def __call__(self, kernel: Any) -> Any:
        """Return the penalty, a scalar in float32 or wider."""
        penalty = self.alpha * norm(kernel) if self.alpha else ops.zeros((), wide(kernel.dtype))
        if self.other is None:
            return penalty
        return penalty + ops.cast(self.other(kernel), penalty.dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return {"alpha": self.alpha, "other": keras.regularizers.serialize(self.other)}


def orthonormality_loss(model: keras.Layer, alpha: float = ALPHA) -> Any:
    """Return how far the model's pointwise weights are from orthonormal rows, to add to the loss.

    `alpha` times the sum of the Frobenius norms of `W·Wᵀ - I`, over the first pointwise weight of
    every BSConv-S layer, and the weight of every convolution given to `mark_orthonormal`; of each
    layer once. A scalar tensor, computed in float32 or wider, with mixed precision too. Where the
    rows are orthonormal its gradient is zero.

    It is for a training step of your own. `fit` adds it by itself after `add_orthonormality`, or
    where a layer was made with `orthonormality=`; it is in `model.losses` then, so that adding both
    would count it twice.
    Raises ValueError for a model that has no such weight, as a sum of nothing would hide it;
    TypeError for what is not a layer and for an alpha that is no number.
    Source: BSConv, arXiv 2003.13549, orthonormal regularization of subspace BSConv.

    >>> model = keras.Sequential([keras.Input((8, 8, 16)), BSConvS2D(16, 3)])
    >>> float(orthonormality_loss(model)) > 0
    True
    """
    alpha = as_weight("alpha", alpha)
    total, *norms = [norm(conv.kernel) for conv in _marked(model)]
    for each in norms:
        total = total + each
    return alpha * total


def add_orthonormality(model: keras.Layer, alpha: float = ALPHA) -> None:
    """Let `model.losses`, and so `fit`, have the orthonormality loss with this weight.

    It is right under distribution strategies, in compiled functions and with mixed precision, as
    other regularizers are, is stored with the model, and leaves out what is not trainable. Calling
    it again sets another weight; 0 takes the loss out. `fit` compiles its step anew; a model that
    holds this one and was fitted before has to be compiled again.
    Raises as `orthonormality_loss` does.

    >>> model = keras.Sequential([keras.Input((8, 8, 16)), BSConvS2D(16, 3)])
    >>> add_orthonormality(model, 0.1)
    >>> len(model.losses)
    1
    """
    alpha = as_weight("alpha", alpha)
    for conv in _marked(model):
        conv.kernel_regularizer.alpha = alpha
    for _, layer in first_occurrences(model):
        if isinstance(layer, keras.Model):  # whose compiled step has the former weight
            layer.train_function = layer.test_function = None


def mark_orthonormal(conv: keras.Layer) -> keras.Layer:
    """Let `orthonormality_loss` count this convolution's weight; return the convolution.

    For the linear pointwise convolutions of MobileNetV2 and V3 blocks. The mark is a regularizer of
    its kernel, around the one that it has; copies and files of the model have it too.
    Raises TypeError for what is no convolution, ValueError for one that is not pointwise, and for
    one with more output channels than input channels, whose rows cannot be orthonormal; where those
    are not known yet, `orthonormality_loss` does.
    Source: BSConv, arXiv 2003.13549, on MobileNetV2 and V3.

    >>> conv = mark_orthonormal(keras.layers.Conv2D(4, 1))
    >>> conv.build((None, 8, 8, 4))
    >>> float(orthonormality_loss(conv)) > 0
    True
    """
    check_convolution(conv, isinstance(conv, CONVS))
    channels = (conv.filters, conv.kernel.shape[-2]) if conv.built else None
    check_pointwise(conv.kernel_size, conv.groups, channels)
    if not is_marked(conv):
        _regularize(conv, Orthonormality(other=conv.kernel_regularizer))
    return conv


def unmark(conv: keras.Layer) -> None:
    """Take the mark off a convolution; its other regularizer stays."""
    if is_marked(conv):
        _regularize(conv, conv.kernel_regularizer.other)


def is_marked(layer: keras.Layer) -> bool:
    """Return whether `orthonormality_loss` counts the layer's weight."""
    regularizer = getattr(layer, "kernel_regularizer", None)
    return isinstance(layer, CONVS) and isinstance(regularizer, Orthonormality)


def norm(kernel: Any) -> Any:
    """Return the Frobenius norm of `W·Wᵀ - I` for a pointwise kernel, `(1, …, I, O)`."""
    w = ops.cast(ops.convert_to_tensor(kernel), wide(kernel.dtype))
    w = ops.reshape(w, w.shape[-2:])
    check_rows(w.shape[1], w.shape[0])
    # The operator, because ops.matmul turns float64 into float32 where Keras runs on PyTorch.
    excess = ops.transpose(w) @ w - ops.eye(w.shape[-1], dtype=w.dtype)
    square = ops.sum(excess * excess)
    # The root has no gradient at 0; the branch that is not taken must have one, too.
    positive = square > 0
    root = ops.sqrt(ops.where(positive, square, ops.ones_like(square)))
    return ops.where(positive, root, ops.zeros_like(square))


def wide(dtype: Any) -> str:
    """Return the dtype to compute in: halves are computed in float32."""
    name = keras.backend.standardize_dtype(dtype)
    return "float32" if name in ("float16", "bfloat16") else name


def _regularize(conv: keras.Layer, regularizer: Any) -> None:
    conv.kernel_regularizer = regularizer
    if conv.built:
        kernel_variable(conv).regularizer = regularizer


def _marked(model: keras.Layer) -> list[Any]:
    """Return the convolutions that count; the errors are those of `orthonormality_loss`."""
    if not isinstance(model, keras.Layer):
        raise no_model("keras.Layer", model)
    found = [layer for _, layer in first_occurrences(model) if is_marked(layer)]
    if not found:
        raise none_counted(model, "BSConvS1D, BSConvS2D or BSConvS3D that is built")
    distinct: dict[int, Any] = {}  # a weight that is tied counts once
    for conv in found:
        if not conv.built:
            raise ValueError(f"layer {conv.name!r} is not built; call the model on data first.")
        distinct.setdefault(id(kernel_variable(conv)), conv)
    return list(distinct.values())
