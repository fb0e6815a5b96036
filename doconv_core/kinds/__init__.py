"""Kinds of layers, one file each, and the register of them.

A kind is registered by its file, so that each is one line here.
"""

from doconv_core.kinds import (
    bsconv,  # noqa: F401
    do_conv,  # noqa: F401  # first: parts of the others' layers may be one
)
