"""Which blocks of a Gluon model are convolutions, and why one of them is left as it is."""

from __future__ import annotations

from typing import Any

from mxnet.gluon import Block, Parameter, nn
from mxnet.gluon.nn.conv_layers import _Conv

from doconv_core.models.report import ALREADY, NOT_PLAIN, ONE_TAP, REPLACED, SUBCLASS, TRANSPOSED
from doconv_mx.do_conv import _DOConv
from doconv_mx.surgery import DO_CONV, outline
from doconv_mx.view import overridden, own_parameters

OTHER = "another operation than an ordinary convolution"

_TRANSPOSED = (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose)


def is_convolution(block: Block) -> bool:
    """Return whether a block is, or is called, a convolution of any kind."""
    named = "conv" in type(block).__name__.lower() and bool(own_parameters(block))
    return isinstance(block, _Conv) or named


def obstacle(block: Any) -> str | None:
    """Return why a convolution cannot be over-parameterized; None where it can."""
    if isinstance(block, _DOConv):
        return ALREADY
    if type(block) in DO_CONV:
        if overridden(block):
            return REPLACED
        if outline(block).taps == 1:
            return ONE_TAP
        plain = type(block.weight) is Parameter and block.weight._stype == "default"
        return None if plain else NOT_PLAIN
    if type(block) in _TRANSPOSED:
        return TRANSPOSED
    return SUBCLASS if isinstance(block, _Conv) else OTHER
