"""Blueprint separable convolutions: their sizes. Source: BSConv, arXiv 2003.13549."""

from __future__ import annotations

import math

from doconv_core.spec import as_integer


def mid_channels(in_channels: int, p: float = 0.25, min_mid_channels: int = 4) -> int:
    """Return how many channels lie between the two pointwise convolutions of a BSConv-S.

    That is the share p of the input channels, rounded up, of which there are at least
    min_mid_channels, and never more than in_channels. Raises TypeError or ValueError for sizes
    below 1, and for a p that is not above 0 and at most 1.
    """
    in_channels = as_integer("in_channels", in_channels)
    least = as_integer("min_mid_channels", min_mid_channels)
    if isinstance(p, bool) or not hasattr(p, "__float__"):
        raise TypeError(f"p must be a number; received p={p!r}.")
    if not 0 < p <= 1:
        raise ValueError(f"p must be above 0 and at most 1; received p={p!r}.")
    return min(in_channels, max(least, math.ceil(p * in_channels)))
