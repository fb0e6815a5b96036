"""The loss that keeps the rows of pointwise weights orthonormal, as BSConv-S is trained with."""

from __future__ import annotations

import mxnet as mx
import numpy as np
from mxnet.gluon import Block, Parameter
from mxnet.ndarray import NDArray

from doconv_core.maths.orthonormal import ALPHA, as_weight, check_rows
from doconv_core.models.orthonormal import check_convolution, check_pointwise, counted, marked
from doconv_mx.kinds import LAYER_KINDS
from doconv_mx.ordinary import channels_per_group, require_values
from doconv_mx.parameter import native
from doconv_mx.private import Conv, is_transposed, settings
from doconv_mx.tree import check_model, walk


def orthonormality_loss(
    model: Block, alpha: float = ALPHA, *, ctx: mx.Context | None = None
) -> NDArray:
    """Return how far the model's pointwise weights are from orthonormal rows, to add to the loss.

    `alpha` times the sum of the Frobenius norms of `W·Wᵀ - I`, over the first pointwise weight of
    every BSConv-S layer, and the weight of every convolution given to `mark_orthonormal`; of each
    layer once. A scalar, computed in float32 or wider. Where the rows are orthonormal its gradient
    is zero.

    Call it within `autograd.record()`, once a step, beside the loss of the outputs, be the model
    hybridized or not, and add it to that: two calls of `backward` would write one gradient over the
    other. A loss of Gluon's has one entry for each sample, and `Trainer.step(batch_size)` divides
    by their number; so it does with this one, where it is added to each entry.
    ctx: which context's copies of the weights, and where the loss is; None for the first one that
    the first weight has. Of a model on several contexts, each context's loss gets that of its own
    copies: together they count once, as the batch does.
    Raises ValueError for a model that has no such weight, as a sum of nothing would hide it, and
    for weights without values or not on `ctx`; TypeError for what is not a block and for an alpha
    that is no number.
    Source: BSConv, arXiv 2003.13549, orthonormal regularization of subspace BSConv.

    >>> conv = mx.gluon.nn.Conv2D(1, 1, in_channels=2)
    >>> conv.initialize(mx.init.One())
    >>> orthonormality_loss(mark_orthonormal(conv), alpha=0.5).asscalar()  # |1·1 + 1·1 - 1| / 2
    0.5
    """
    check_model(model)
    alpha = as_weight("alpha", alpha)
    blocks, types = (block for _, block in walk(model)), "BSConvS1D, BSConvS2D or BSConvS3D"
    weights = [layer.weight for layer in counted(model, blocks, LAYER_KINDS, Conv, types)]
    require_values(weights, "orthonormality_loss")
    arrays = [_on(weight, ctx) for weight in weights]
    wide = any(np.dtype(weight.dtype).itemsize > 4 for weight in weights)
    norms = [_norm(array, "float64" if wide else "float32") for array in arrays]
    total = norms[0]
    for norm in norms[1:]:
        total = total + norm.as_in_context(total.context)
    return native(alpha * total)


def has_orthonormal(model: Block) -> bool:
    """Return whether a model has a weight that `orthonormality_loss` counts."""
    return bool(marked((block for _, block in walk(model)), LAYER_KINDS, Conv))


def mark_orthonormal(conv: Conv) -> Conv:
    """Let `orthonormality_loss` count this convolution's weight; return the convolution.

    For the linear pointwise convolutions of MobileNetV2 and V3 blocks. The mark is the attribute
    `orthonormal`; copies of the block have it too.
    Raises TypeError for what is no convolution, ValueError for one that is not pointwise, and for
    one with more output channels than input channels, whose rows cannot be orthonormal; where those
    are not known yet, `orthonormality_loss` does.
    Source: BSConv, arXiv 2003.13549, on MobileNetV2 and V3.

    >>> mark_orthonormal(mx.gluon.nn.Conv2D(4, 1)).orthonormal
    True
    """
    check_convolution(conv, isinstance(conv, Conv) and not is_transposed(conv))
    inputs, options = channels_per_group(conv), settings(conv)
    channels = (options["num_filter"], inputs) if inputs else None
    check_pointwise(tuple(options["kernel"]), options["num_group"], channels)
    conv.orthonormal = True
    return conv


def _on(weight: Parameter, ctx: mx.Context | None) -> NDArray:
    """Return the weight's copy on a context, by default its first."""
    held = weight.list_ctx()
    if ctx is not None and ctx not in held:
        raise ValueError(
            f"ctx must be a context that has the values of {weight.name!r}, {held}; received "
            f"ctx={ctx!r}."
        )
    return weight.data(held[0] if ctx is None else ctx).as_nd_ndarray()


def _norm(weight: NDArray, dtype: str) -> NDArray:
    rows = weight.shape[0]
    w = weight.reshape((rows, -1)).astype(dtype, copy=False)
    check_rows(*w.shape)
    excess = mx.nd.dot(w, w, transpose_b=True) - mx.nd.eye(rows, ctx=w.context, dtype=dtype)
    squares = (excess * excess).sum()
    # A root has no gradient at 0, where the norm has a kink, at its least value.
    apart = squares > 0
    return mx.nd.sqrt(mx.nd.where(apart, squares, mx.nd.ones_like(squares))) * apart
