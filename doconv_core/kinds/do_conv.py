"""DO-Conv: the kernel of an ordinary convolution, composed of the trained pair `(W, D)`.

`W`, weight: `(O, I/g, S)`. `D`, depthwise weight: `(I, M, S)`, a residual around the identity `E`.
Axis letters as everywhere in this project: g group, o output channel in its group, i input channel
in its group, m kernel tap, s depth-multiplier index.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.kinds.base import ONE_TAP, Array, ComposedKind, Cost, Shape, register
from doconv_core.maths.convolve import convolve
from doconv_core.maths.numeric import shaped, widened
from doconv_core.maths.spec import ConvSpec, as_integer


def identity(spec: ConvSpec, dtype: Any = np.float64) -> Array:
    """Return `E`, the depthwise weight that leaves the kernel as it is, `(M, S)`.

    `E[m, s]` is 1 where `s % M == m` and `s` lies in a whole tile of `M`, else 0: the unit matrix
    where `S == M`, as many of them side by side as fit where `S > M`.

    >>> identity(ConvSpec(1, 1, (2,), depth_multiplier=5), int)
    array([[1, 0, 1, 0, 0],
           [0, 1, 0, 1, 0]])
    """
    taps, multiplier = spec.taps, spec.depth_multiplier
    tiled = np.arange(multiplier) < taps * (multiplier // taps)
    one: Array = (np.arange(multiplier) % taps == np.arange(taps)[:, None]) & tiled
    return one.astype(dtype)


def compose(weight: ArrayLike, depthwise: ArrayLike | None, spec: ConvSpec) -> Array:
    """Return the kernel of the ordinary convolution that equals applying D, then W.

    weight: `(O, I/g, S)`. depthwise: `(I, M, S)`, a residual around the identity, or None for a
    kernel of one tap. Both of one floating dtype; half types are composed in float32 and rounded
    once. Returns `(O, I/g, *kernel_size)`, in weight's dtype.
    Raises ValueError where a shape disagrees with `spec`, TypeError for dtypes that are not float.
    Source: DO-Conv, arXiv 2006.12030, kernel composition.

    >>> spec = ConvSpec(1, 1, (2,))
    >>> compose(np.array([[[3.0, 4.0]]]), np.array([[[0.0, 1.0], [0.0, 0.0]]]), spec)
    array([[[7., 4.]]])
    """
    weight, depthwise = _checked(weight, depthwise, spec)
    if depthwise is None:
        return weight.reshape(spec.kernel_shape).copy()
    w, d = _grouped(widened(weight), widened(depthwise), spec)
    kernel: Array = _sum_tiles(w, spec) + np.einsum("gois,gims->goim", w, d)
    return kernel.reshape(spec.kernel_shape).astype(weight.dtype)


def compose_gradient(
    weight: ArrayLike, depthwise: ArrayLike | None, kernel_gradient: ArrayLike, spec: ConvSpec
) -> tuple[Array, Array | None]:
    """Return the gradients of a loss with respect to `W` and `D`, from that of the kernel.

    kernel_gradient: `(O, I/g, *kernel_size)`. Returns arrays of `weight`'s and `depthwise`'s shapes
    and dtypes; None in place of the second for a kernel of one tap.
    Raises ValueError where a shape disagrees with `spec`.

    >>> weight, spec = np.array([[[3.0, 4.0]]]), ConvSpec(1, 1, (2,))
    >>> compose_gradient(weight, np.zeros((1, 2, 2)), np.array([[[1.0, 0.0]]]), spec)
    (array([[[1., 0.]]]), array([[[3., 4.],
            [0., 0.]]]))
    """
    weight, depthwise = _checked(weight, depthwise, spec)
    gradient = shaped("kernel_gradient", kernel_gradient, spec.kernel_shape)
    if depthwise is None:
        return gradient.reshape(spec.weight_shape).astype(weight.dtype), None
    w, d = _grouped(widened(weight), widened(depthwise), spec)
    k = widened(gradient).reshape(*w.shape[:3], spec.taps)
    weight_gradient = _repeat_tiles(k, spec) + np.einsum("goim,gims->gois", k, d)
    depthwise_gradient = np.einsum("goim,gois->gims", k, w)
    return (
        weight_gradient.reshape(weight.shape).astype(weight.dtype),
        depthwise_gradient.reshape(depthwise.shape).astype(depthwise.dtype),
    )


def from_kernel(kernel: ArrayLike, spec: ConvSpec) -> tuple[Array, Array | None]:
    """Return the pair `(W, D)`, `D = 0`, that composes to a trained convolution's kernel exactly.

    kernel: `(O, I/g, *kernel_size)`. Its taps become the first `M` entries of `W`, the rest is
    zero. Returns `(O, I/g, S)` and `(I, M, S)`, in kernel's dtype; None in place of the second for
    a kernel of one tap. Raises ValueError where the shape disagrees with `spec`.

    >>> kernel, spec = np.array([[[1.0, 2.0]]]), ConvSpec(1, 1, (2,), depth_multiplier=3)
    >>> weight, depthwise = from_kernel(kernel, spec)
    >>> weight, compose(weight, depthwise, spec)
    (array([[[1., 2., 0.]]]), array([[[1., 2.]]]))
    """
    kernel = shaped("kernel", kernel, spec.kernel_shape)
    weight = np.zeros(spec.weight_shape, kernel.dtype)
    weight[..., : spec.taps] = kernel.reshape(*kernel.shape[:2], spec.taps)
    if spec.depthwise_shape is None:
        return weight, None
    return weight, np.zeros(spec.depthwise_shape, kernel.dtype)


def feature_compose(
    x: ArrayLike,
    weight: ArrayLike,
    depthwise: ArrayLike | None,
    spec: ConvSpec,
    bias: ArrayLike | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    padding_mode: str = "zeros",
) -> Array:
    """Return the layer's output by way of the features: a depthwise convolution, then a 1×1 one.

    The depthwise convolution gives each input channel `c` the `S` maps of `(E + D)[c]`; `W` then
    combines them as a 1×1 convolution with the layer's groups. Equal to convolving with
    `compose(weight, depthwise, spec)`, up to rounding, for every `groups`.

    x: `(B, I, *spatial)`. bias: `(O,)`. Stride, padding, dilation and padding mode as in
    `convolve`; they belong to the depthwise convolution. Returns `(B, O, *out)`, in x's dtype.
    Source: DO-Conv, arXiv 2006.12030, feature composition.

    >>> spec, x = ConvSpec(1, 1, (2,)), np.array([[[1.0, 2.0, 3.0]]])
    >>> weight, depthwise = np.array([[[3.0, 4.0]]]), np.array([[[0.0, 1.0], [0.0, 0.0]]])
    >>> feature_compose(x, weight, depthwise, spec)
    array([[[15., 26.]]])
    >>> convolve(x, compose(weight, depthwise, spec))
    array([[[15., 26.]]])
    """
    weight, depthwise = _checked(weight, depthwise, spec)
    multiplier = spec.depth_multiplier
    filters = np.broadcast_to(
        identity(spec, weight.dtype), (spec.in_channels, spec.taps, multiplier)
    )
    if depthwise is not None:
        filters = filters + depthwise
    filters = filters.transpose(0, 2, 1).reshape(-1, 1, *spec.kernel_size)  # (I·S, 1, *kernel)
    features = convolve(
        x, filters, stride=stride, padding=padding, dilation=dilation,
        groups=spec.in_channels, padding_mode=padding_mode,
    )  # fmt: skip
    pointwise = weight.reshape(spec.out_channels, -1, *(1,) * spec.rank)
    return convolve(features, pointwise, bias, groups=spec.groups)


def _grouped(weight: Array, depthwise: Array, spec: ConvSpec) -> tuple[Array, Array]:
    """Split the channel axes into group and channel within it: `gois` and `gims`."""
    g = spec.groups
    return (
        weight.reshape(g, spec.out_channels_per_group, *weight.shape[1:]),
        depthwise.reshape(g, spec.in_channels_per_group, *depthwise.shape[1:]),
    )


def _sum_tiles(w: Array, spec: ConvSpec) -> Array:
    """Return `W·Eᵀ` without multiplying: the sum of `W`'s whole tiles of `M`, or `W` itself."""
    taps, tiles = spec.taps, spec.depth_multiplier // spec.taps
    summed: Array = w[..., : tiles * taps].reshape(*w.shape[:-1], tiles, taps).sum(axis=-2)
    return summed


def _repeat_tiles(k: Array, spec: ConvSpec) -> Array:
    """Return `K·E`, the transpose of `_sum_tiles`: `K` repeated, and zero beyond the last tile."""
    tiles, rest = divmod(spec.depth_multiplier, spec.taps)
    repeated = np.tile(k, tiles)
    return np.concatenate([repeated, np.zeros_like(k[..., :rest])], axis=-1)


def _checked(
    weight: ArrayLike, depthwise: ArrayLike | None, spec: ConvSpec
) -> tuple[Array, Array | None]:
    weight = shaped("weight", weight, spec.weight_shape)
    if spec.depthwise_shape is None:
        if depthwise is not None:
            raise ValueError(
                "A kernel of one tap has no depthwise weight: pass None; received an array of "
                f"shape {np.shape(depthwise)}."
            )
        return weight, None
    if depthwise is None:
        raise ValueError(f"depthwise must have shape {spec.depthwise_shape}; received None.")
    depthwise = shaped("depthwise", depthwise, spec.depthwise_shape)
    if weight.dtype != depthwise.dtype:
        raise TypeError(
            "weight and depthwise must have the same dtype; received "
            f"{weight.dtype} and {depthwise.dtype}."
        )
    return weight, depthwise


class LayerCost(NamedTuple):
    """The cost of one layer in each of its forms.

    ordinary: the convolution it replaces. kernel_composed: in training, composing the kernel once
    for the whole batch. feature_composed: in training, a depthwise then a pointwise convolution of
    the data. folded: the ordinary convolution it becomes, so the same as `ordinary`.

    >>> cost = layer_cost(ConvSpec(8, 8, (3, 3)), 100, bias=False)
    >>> cost.kernel_composed, cost.folded
    (Cost(parameters=1224, macs=62784), Cost(parameters=576, macs=57600))
    """

    ordinary: Cost
    kernel_composed: Cost
    feature_composed: Cost
    folded: Cost


def layer_cost(spec: ConvSpec, positions: int, *, batch: int = 1, bias: bool = True) -> LayerCost:
    """Return what the layer costs as an ordinary, a composed and a folded convolution.

    positions: output positions of one image, `H·W` in two dimensions. batch: images, `B`.
    Biases count as parameters, not as multiply-accumulates. A kernel of one tap has no D, and all
    forms cost the same. Raises TypeError or ValueError for what is not a positive integer.
    Source: DO-Conv, arXiv 2006.12030, section on training and inference cost.

    >>> layer_cost(ConvSpec(8, 8, (3, 3)), 100).ordinary
    Cost(parameters=584, macs=57600)
    """
    images = as_integer("positions", positions) * as_integer("batch", batch)
    biases = spec.out_channels if bias else 0
    kernel = prod(spec.kernel_shape)
    ordinary = Cost(kernel + biases, kernel * images)
    if spec.depthwise_shape is None:
        return LayerCost(ordinary, ordinary, ordinary, ordinary)
    weight, depthwise = prod(spec.weight_shape), prod(spec.depthwise_shape)
    trained = weight + depthwise + biases
    composition = depthwise * spec.out_channels_per_group
    return LayerCost(
        ordinary=ordinary,
        kernel_composed=Cost(trained, ordinary.macs + composition),
        feature_composed=Cost(trained, (depthwise + weight) * images),
        folded=ordinary,
    )


class DOConvKind(ComposedKind):
    """DO-Conv: `weight`, W, `(O, I/g, S)`, and `depthwise_weight`, D, `(I, M, S)`."""

    name = "doconv"
    words = ("doconv",)
    options = ("depth_multiplier",)
    names = ("weight", "depthwise_weight")
    constants = MappingProxyType({"depthwise_weight": 0.0})

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError for a depth multiplier that is no integer above 0."""
        if options.get("depth_multiplier") is not None:
            as_integer("depth_multiplier", options["depth_multiplier"])

    def obstacle(self, conv: ConvSpec) -> str | None:
        """Return that a kernel of one tap has nothing to over-parameterize."""
        return ONE_TAP if conv.taps == 1 else None

    def spec(self, conv: ConvSpec, **options: Any) -> ConvSpec:
        """Return the sizes with `depth_multiplier`; ValueError for one below the taps."""
        sizes = conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups
        return ConvSpec(*sizes, **options)

    def entries(self, spec: ConvSpec) -> dict[str, Shape]:
        """Return the shapes of W and of D, which a kernel of one tap lacks."""
        shapes: dict[str, Shape] = {"weight": spec.weight_shape}
        if spec.depthwise_shape is not None:
            shapes["depthwise_weight"] = spec.depthwise_shape
        return shapes

    def compose(self, entries: Mapping[str, Array], spec: ConvSpec) -> Array:
        """Return `compose` of W and D."""
        return compose(entries["weight"], entries.get("depthwise_weight"), spec)

    def gradient(
        self, entries: Mapping[str, Array], kernel_gradient: Array, spec: ConvSpec
    ) -> dict[str, Array]:
        """Return `compose_gradient` of W and D, by name."""
        weights = entries["weight"], entries.get("depthwise_weight")
        return _named(*compose_gradient(*weights, kernel_gradient, spec))

    def start(self, kernel: Array, spec: ConvSpec) -> dict[str, Array]:
        """Return `from_kernel`'s W and D, by name."""
        return _named(*from_kernel(kernel, spec))

    def composition_macs(self, spec: ConvSpec) -> int:
        """Return what `layer_cost` says of composing the kernel."""
        cost = layer_cost(spec, 1)
        return cost.kernel_composed.macs - cost.ordinary.macs


def _named(weight: Array, depthwise: Array | None) -> dict[str, Array]:
    return {"weight": weight, **({} if depthwise is None else {"depthwise_weight": depthwise})}


DO_CONV = register(DOConvKind())
