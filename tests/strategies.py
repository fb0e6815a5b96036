"""Random layers and arrays for property tests."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from hypothesis import strategies as st

from doconv_core import (
    BSConvSpec,
    ConvSpec,
    Geometry,
    GroupNormSpec,
    LayerForm,
    State,
    TransposedConvSpec,
)
from doconv_core.kinds.dgc import DGConvSpec
from doconv_core.state.layers import CHANNELS_FIRST, KINDS, OWN, UNRECORDED


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


@st.composite
def bsconv_specs(draw, variants="us", **fixed):
    """A BSConv of any rank, small enough to try hundreds of."""
    spec = draw(specs())
    sizes = (draw(st.integers(1, 6)), draw(st.integers(1, 6)), spec.kernel_size)
    options = {
        "variant": draw(st.sampled_from(variants)),
        "p": draw(st.floats(0.05, 1)),
        "min_mid_channels": draw(st.integers(1, 4)),
        "with_bn": draw(st.booleans()),
    }
    return BSConvSpec(*sizes, **(options | fixed))


def bsconv_weights(spec, rng):
    """Return random pointwise weights, in the order of their use, and a depthwise one."""
    pointwise = [rng.standard_normal(shape) for shape in spec.pointwise_shapes]
    return pointwise, rng.standard_normal(spec.depthwise_shape)


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


@st.composite
def forms(draw):
    """A layer of any kind, as a state has it."""
    size, kind = st.integers(1, 4), draw(st.sampled_from(list(KINDS)))
    number = st.floats(0, 1)
    flags = {name: draw(st.booleans()) for name in ("over_parameterized", "bias", "scale")}
    if kind in ("convolution", "transposed_convolution"):
        spec = draw(specs())
        flags["over_parameterized"] |= spec.depth_multiplier != spec.taps
        pad = st.one_of(st.tuples(st.integers(-2, 3), st.integers(-2, 3)), st.just("same"))
        numbers = st.tuples(*[st.integers(1, 3)] * spec.rank)
        mode = st.sampled_from(["zeros", "reflect", "replicate", "circular"])
        geometry = st.builds(Geometry, numbers, numbers, st.tuples(*[pad] * spec.rank), mode)
        flags["geometry"] = draw(st.none() | geometry)
        if kind == "transposed_convolution":
            sizes = (spec.in_channels, spec.out_channels, spec.kernel_size, spec.groups)
            spec = TransposedConvSpec(*sizes)
    elif kind == "group_norm":
        groups = draw(size)
        spec = GroupNormSpec(groups * draw(size), groups, draw(number))
    elif kind == "dynamic_heads":
        heads = draw(size)
        sizes = heads * draw(st.integers(8, 10)), heads * draw(size), draw(specs()).kernel_size
        spec = DGConvSpec(*sizes, heads, draw(st.integers(1, 17)), draw(st.floats(0.1, 1)))
    else:
        cls = KINDS[kind]
        types = {"epsilon": number, "momentum": number}
        spec = cls(*(draw(types.get(field.name, size)) for field in fields(cls)))
    words = [None, CHANNELS_FIRST, OWN, UNRECORDED]
    return LayerForm(spec, **flags, flattening=draw(st.sampled_from(words)))


@st.composite
def states(draw):
    """A state of a few layers of any kind, under any names, in any of its dtypes."""
    names = st.text(st.characters(codec="utf-8", exclude_characters="."), min_size=1, max_size=5)
    paths = draw(st.lists(names, max_size=4, unique=True))
    layers = {path: draw(forms()) for path in paths}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = st.sampled_from([np.float16, np.float32, np.float64])
    arrays = {
        f"{path}.{name}": np.array(rng.standard_normal(shape) * (name != "inactive"), draw(dtype))
        for path, form in layers.items()
        for name, shape in form.shapes.items()
    }
    return State(layers, arrays, draw(st.dictionaries(names, names, max_size=2)))
