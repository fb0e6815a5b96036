"""Kinds of layers, one file each, and the register of them.

A kind is registered by its file; each is one line here, in the order in which tools list them. A
kind whose layers may be parts of another's layers comes before that.
"""

# isort: off
from doconv_core.kinds import do_conv
from doconv_core.kinds import branches
from doconv_core.kinds import expand
from doconv_core.kinds import bsconv
from doconv_core.kinds import dgc
from doconv_core.kinds import normed

__all__ = ["branches", "bsconv", "dgc", "do_conv", "expand", "normed"]
