"""Folding batch norms into the convolutions before them, for inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mxnet as mx
import numpy as np
from mxnet.gluon import Block, Parameter, nn
from mxnet.gluon.contrib.nn import SyncBatchNorm

from doconv_core.maths.batchnorm import fuse_batchnorm
from doconv_core.maths.numeric import Array
from doconv_core.models.report import AXIS, HOOKED, NOT_FINITE, REPLACED, SHARED, SUBCLASS, behind
from doconv_mx.graph import SAME_NAME
from doconv_mx.ordinary import obstacle
from doconv_mx.parameter import put
from doconv_mx.private import has_values, is_hooked, options_of, pass_on, registered, settings
from doconv_mx.surgery import remove_parameter, set_parameter
from doconv_mx.tree import is_replaced

NO_VALUES = "it or its convolution has no values yet"


def norm_obstacle(norm: Block) -> str | None:
    """Return why a batch norm cannot be fused, wherever it stands; None where it can."""
    if type(norm) not in (nn.BatchNorm, SyncBatchNorm):
        return SUBCLASS
    return REPLACED if is_replaced(norm) else None


def pair_obstacle(
    conv: Any, norm: Any, owned: Mapping[int, Sequence[Block]], names: Mapping[Any, int]
) -> str | None:
    """Return why this convolution and this batch norm cannot be fused.

    owned: the blocks that own each parameter, by its id. names: how many parameters have each.
    """
    reason = obstacle(conv)
    if reason is not None:
        return behind(reason)
    pair = (norm, conv)
    if any(is_hooked(block) for block in pair):
        return HOOKED
    own = [p for block in pair for p in registered(block).values()]
    if any(len(owned[id(p)]) > 1 for p in own):
        return SHARED
    if any(names[p.name] > 1 for p in own):
        return SAME_NAME
    if not all(map(has_values, own)) or len({tuple(p.list_ctx()) for p in own}) > 1:
        return NO_VALUES
    layout = settings(conv)["layout"]
    return None if settings(norm).get("axis", 1) % len(layout) == layout.find("C") else AXIS


def fuse(conv: Any, norm: Any) -> str | None:
    """Fuse a batch norm into a convolution, in place; or return why that cannot be.

    Each context has its own statistics. A fused batch norm becomes an `nn.Dropout` of rate 0, which
    passes on its input. (The contrib package's Identity, hybridized by itself, is a graph without
    an operator, at which MXNet's autograd stops.)
    """
    with np.errstate(all="ignore"):  # what is not finite is refused below
        fused = {context: _fused(conv, norm, context) for context in conv.weight.list_ctx()}
    if not all(np.isfinite(array).all() for pair in fused.values() for array in pair):
        return NOT_FINITE
    old, bias = conv.weight, conv.bias
    weight = Parameter(old.name, shape=old.shape, **options_of(old))
    if bias is None:
        name, options = f"{conv.params.prefix}bias", {**options_of(old), "init": "zeros"}
    else:
        name, options = bias.name, options_of(bias)
    bias = Parameter(name, shape=(old.shape[0],), **options)
    put(weight, {context: kernel for context, (kernel, _) in fused.items()})
    put(bias, {context: offset for context, (_, offset) in fused.items()})
    set_parameter(conv, "weight", weight)
    set_parameter(conv, "bias", bias)
    settings(conv)["no_bias"] = False
    for name in list(registered(norm)):
        remove_parameter(norm, name)
    pass_on(norm)
    return None


def _fused(conv: Any, norm: Any, context: mx.Context) -> tuple[Array, Array]:
    def values(parameter: Parameter | None) -> Any:
        return None if parameter is None else parameter.data(context).asnumpy()

    return fuse_batchnorm(
        values(conv.weight), values(conv.bias),
        mean=values(norm.running_mean), variance=values(norm.running_var),
        epsilon=settings(norm)["eps"],
        scale=None if settings(norm)["fix_gamma"] else values(norm.gamma),
        offset=values(norm.beta),
    )  # fmt: skip
