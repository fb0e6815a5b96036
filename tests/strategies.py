"""Random layers and arrays for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from doconv_core import ConvSpec


@st.composite
def specs(draw, ranks=(1, 2, 3), min_taps=1):
    """A layer of any rank, grouping and depth multiplier, small enough to try hundreds of."""
    rank = draw(st.sampled_from(ranks))
    largest = {1: 6, 2: 3, 3: 2}[rank]
    size = st.tuples(*[st.integers(1, largest)] * rank)
    kernel_size = draw(size.filter(lambda k: np.prod(k) >= min_taps))
    groups = draw(st.integers(1, 4))
    in_channels = groups * draw(st.integers(1, 3))
    out_channels = groups * draw(st.integers(1, 3))
    taps = int(np.prod(kernel_size))
    multiplier = draw(st.one_of(st.none(), st.integers(taps, 2 * taps + 2)))
    return ConvSpec(in_channels, out_channels, kernel_size, groups, multiplier)


@st.composite
def layers(draw, **kinds):
    """A layer with its two weights, as `(spec, weight, depthwise, rng)`, in float64."""
    spec = draw(specs(**kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return spec, *weights(spec, rng), rng


def weights(spec, rng):
    """Return a random W and D; None for the D of one tap."""
    shape = spec.depthwise_shape
    weight = rng.standard_normal(spec.weight_shape)
    return weight, None if shape is None else rng.standard_normal(shape)


@st.composite
def geometries(draw, spec):
    """An input size, and a stride, padding, dilation and padding mode that suit it."""
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    rank = spec.rank
    dilation = draw(st.tuples(*[st.integers(1, 2)] * rank))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, spec.kernel_size, strict=True)]
    size = tuple(e + draw(st.integers(1, 2)) for e in extents)
    padding = tuple(draw(st.tuples(*[st.integers(0, min(2, n - 1))] * 2)) for n in size)
    stride = draw(st.tuples(*[st.integers(1, 2)] * rank))
    return size, {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "padding_mode": mode,
    }
