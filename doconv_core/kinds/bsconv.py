"""Blueprint separable convolutions: their sizes, kernel, cost, and how they take a layer's place.

A BSConv's filters are blueprints, one `k x k` image for each output channel, weighted for each
input channel. BSConv-U is a pointwise convolution, `pw` `(O, I)`, and then a depthwise one, `dw`
`(O, M)`. BSConv-S makes the pointwise one of two: `W1` `(mid, I)`, to fewer channels, and then `W2`
`(O, mid)`. Axis letters as everywhere in this project.
Source: BSConv, arXiv 2003.13549.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.kinds.base import (
    DENSE,
    Array,
    Cost,
    PartConv,
    PartNorm,
    Recipe,
    SeparableKind,
    register,
)
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.numeric import shaped, widened
from doconv_core.maths.separable import nearest
from doconv_core.maths.spec import MAX_RANK, ConvSpec, as_integer, as_number, is_sequence

VARIANTS = ("u", "s")
FORMS = ("keep", "merge", DENSE)
P, MIN_MID_CHANNELS = 0.25, 4  # the defaults of every backend
KERNEL_SIZES = ((3, 3), (5, 5))
STARTS = ("weights", "random")

# Why a convolution does not become a BSConv.
GROUPED = "it has groups; a BSConv takes the place of a convolution with groups=1"
PART = "a part of a BSConv layer"
OVER_PARAMETERIZED = "over-parameterized; fold it first"
SHARES = "it shares a parameter with another layer"
BIAS_COMPUTED = "its bias is computed, not a parameter of its own"
WEIGHT_BOUND = "its weight has hooks, or a class of its own, and would be given up"


def mid_channels(in_channels: int, p: float = P, min_mid_channels: int = MIN_MID_CHANNELS) -> int:
    """Return the channels between BSConv-S's two pointwise convolutions.

    `min(in_channels, max(min_mid_channels, ceil(p * in_channels)))`, with the product as floating
    point gives it. p: the share of the input channels to keep, above 0 and at most 1.
    Raises TypeError for what is not a number, ValueError for one that gives no layer.
    Source: BSConv, arXiv 2003.13549, subspace BSConv.

    >>> mid_channels(64), mid_channels(8), mid_channels(64, p=1 / 6)
    (16, 4, 11)
    """
    in_channels = as_integer("in_channels", in_channels)
    least = as_integer("min_mid_channels", min_mid_channels)
    return min(in_channels, max(least, ceil(as_share("p", p) * in_channels)))


def as_share(name: str, value: Any) -> float:
    """Return `value` as a float above 0 and at most 1; TypeError or ValueError names it else."""
    if not 0 < as_number(name, value) <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1; received {name}={value!r}.")
    return float(value)


def as_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`; ValueError lists them otherwise."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}; received {name}={value!r}."
        )
    return str(value)


@dataclass(frozen=True)
class BSConvSpec:
    """The sizes of one blueprint separable convolution, validated once, and what they imply.

    in_channels: `I`; out_channels: `O`; kernel_size: one to three integers, whose product is `M`.
    variant: "u" or "s". p, min_mid_channels: as in `mid_channels`; "u" has no use for them.
    with_bn: whether a batch norm follows each pointwise convolution.
    Raises TypeError or ValueError for what gives no layer.
    Source: BSConv, arXiv 2003.13549.

    >>> BSConvSpec(64, 128, (3, 3), "s", p=0.25).pointwise_shapes
    ((16, 64), (128, 16))
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    variant: str = "u"
    p: float = P
    min_mid_channels: int = MIN_MID_CHANNELS
    with_bn: bool = False

    def __post_init__(self) -> None:
        """Validate every field, and store plain numbers and a tuple in place of what came."""
        put = object.__setattr__
        dense = ConvSpec(self.in_channels, self.out_channels, self.kernel_size)
        for name in ("in_channels", "out_channels", "kernel_size"):
            put(self, name, getattr(dense, name))
        put(self, "variant", as_choice("variant", self.variant, VARIANTS))
        put(self, "p", as_share("p", self.p))
        put(self, "min_mid_channels", as_integer("min_mid_channels", self.min_mid_channels))
        if not isinstance(self.with_bn, (bool, np.bool_)):
            raise TypeError(f"with_bn must be True or False; received with_bn={self.with_bn!r}.")
        put(self, "with_bn", bool(self.with_bn))

    @property
    def dense(self) -> ConvSpec:
        """The sizes of the ordinary convolution that it is to take the place of."""
        return ConvSpec(self.in_channels, self.out_channels, self.kernel_size)

    @property
    def rank(self) -> int:
        """The number of spatial dimensions, 1 to 3."""
        return len(self.kernel_size)

    @property
    def taps(self) -> int:
        """`M`, the number of kernel taps."""
        return prod(self.kernel_size)

    @property
    def mid_channels(self) -> int | None:
        """The channels between the two pointwise convolutions of "s"; None for "u"."""
        if self.variant == "u":
            return None
        return mid_channels(self.in_channels, self.p, self.min_mid_channels)

    @property
    def pointwise_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the pointwise weights in the order of their use: `pw`, or `W1` and `W2`."""
        mid = self.mid_channels
        if mid is None:
            return ((self.out_channels, self.in_channels),)
        return ((mid, self.in_channels), (self.out_channels, mid))

    @property
    def depthwise_shape(self) -> tuple[int, int]:
        """Shape of `dw`, `(O, M)`."""
        return (self.out_channels, self.taps)

    @property
    def parts(self) -> tuple[PartConv | PartNorm, ...]:
        """The layers that it is made of, in the order of their use."""
        numbers = ("",) if self.variant == "u" else ("1", "2")
        found: list[PartConv | PartNorm] = []
        for number, (channels, _) in zip(numbers, self.pointwise_shapes, strict=True):
            found.append(PartConv(f"pointwise{number}", channels, orthonormal=number == "1"))
            if self.with_bn:
                found.append(PartNorm(f"batch_norm{number}"))
        return (*found, PartConv("depthwise", self.out_channels, depthwise=True))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its parts, in the order of their use."""
        return tuple(part.name for part in self.parts)


def check_groups(name: str, groups: int) -> None:
    """Raise ValueError where a BSConv layer, named by its type, is to have groups."""
    if groups != 1:
        raise ValueError(
            f"{name} takes groups=1 alone: its pointwise convolution reads every channel, and its "
            f"depthwise one each for itself; received groups={groups}."
        )


def check_kernel(name: str, spec: BSConvSpec) -> None:
    """Raise NotFoldable where a BSConv layer, named by its type, is no mere kernel."""
    if spec.with_bn:
        raise NotFoldable(
            f"a {name} with batch norms is no mere kernel; fold(form='dense') gives the "
            "convolution where there is one."
        )


def compose_bsconv(pointwise: ArrayLike, depthwise: ArrayLike, spec: BSConvSpec) -> Array:
    """Return the kernel of the ordinary convolution that equals the pointwise, then the depthwise.

    `K[o, i, m] = dw[o, m] * pw[o, i]`. pointwise: `(O, I)`, of "s" what `merge_pointwise` gives.
    depthwise: `(O, M)`. Returns `(O, I, *kernel_size)`, in pointwise's dtype.
    Raises ValueError where a shape disagrees with `spec`, TypeError for dtypes that are not float.
    Source: BSConv, arXiv 2003.13549, unconstrained BSConv.

    >>> compose_bsconv(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0, 5.0]]), BSConvSpec(2, 1, (3,)))
    array([[[ 3.,  4.,  5.],
            [ 6.,  8., 10.]]])
    """
    pw, dw = _checked(pointwise, depthwise, spec)
    kernel: Array = widened(pw)[:, :, None] * widened(dw)[:, None, :]
    kernel = kernel.reshape(spec.dense.kernel_shape)
    return kernel.astype(pw.dtype)


def compose_bsconv_gradient(
    pointwise: ArrayLike, depthwise: ArrayLike, kernel_gradient: ArrayLike, spec: BSConvSpec
) -> tuple[Array, Array]:
    """Return the gradients with respect to `pw` and `dw`, from that of `compose_bsconv`'s kernel.

    kernel_gradient: `(O, I, *kernel_size)`. Raises ValueError where a shape disagrees.

    >>> pointwise, depthwise, spec = np.array([[1.0, 2.0]]), np.ones((1, 3)), BSConvSpec(2, 1, (3,))
    >>> compose_bsconv_gradient(pointwise, depthwise, np.ones((1, 2, 3)), spec)
    (array([[3., 3.]]), array([[3., 3., 3.]]))
    """
    pw, dw = _checked(pointwise, depthwise, spec)
    shape = spec.dense.kernel_shape
    gradient = widened(shaped("kernel_gradient", kernel_gradient, shape))
    gradient = gradient.reshape(*pw.shape, spec.taps)
    return (
        np.einsum("oim,om->oi", gradient, widened(dw)).astype(pw.dtype),
        np.einsum("oim,oi->om", gradient, widened(pw)).astype(dw.dtype),
    )


def _checked(pointwise: ArrayLike, depthwise: ArrayLike, spec: BSConvSpec) -> tuple[Array, Array]:
    return (
        shaped("pointwise", pointwise, (spec.out_channels, spec.in_channels)),
        shaped("depthwise", depthwise, spec.depthwise_shape),
    )


class Blueprints(NamedTuple):
    """The BSConv that is nearest to a kernel, in the kernel's dtype.

    pointwise: weights in the order of their use: `pw` `(O, I)`, or `W1` `(mid, I)`, whose rows are
    orthonormal, and `W2` `(O, mid)`. depthwise: `dw`, `(O, M)`. explained: the share of the
    kernel's squared Frobenius norm, 0 to 1; 1 for a kernel of zeros.

    >>> found = blueprints(np.array([[[4.0, 0.0], [4.0, 0.0]]]), BSConvSpec(2, 1, (2,)))
    >>> round(found.explained, 6), found.depthwise.shape
    (1.0, (1, 2))
    """

    pointwise: tuple[Array, ...]
    depthwise: Array
    explained: float


def blueprints(kernel: ArrayLike, spec: BSConvSpec) -> Blueprints:
    """Return the BSConv of `spec`'s sizes that is nearest to a trained kernel, by SVD.

    A filter is a matrix, `(I, M)`: an image for each input channel. Where these are alike up to a
    factor, one blueprint says it all; the paper finds that they nearly are. How nearly is the
    explained variance: the share of the kernel's squared Frobenius norm that the BSConv has.
    "u": the best approximation of each filter of rank 1, the optimum. "s": the best of those whose
    pointwise weights lie in one subspace of `mid` dimensions, found by turns: the subspace that is
    best for the blueprints, then the blueprints that are best for the subspace. Each turn explains
    more; what is found may be a local optimum.
    A filter's scale is divided evenly between its blueprint and its weights. Batch norms are taken
    for the identity.

    kernel: `(O, I, *kernel_size)`. Computed in float64 and rounded once.
    Raises ValueError where the shape disagrees with `spec` or an entry is not finite, TypeError for
    what is no array of floats or no `BSConvSpec`.
    Source: BSConv, arXiv 2003.13549, on correlations within kernels.

    >>> alike = np.array([[[1.0, 2.0], [2.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]]])
    >>> round(blueprints(alike, BSConvSpec(2, 2, (2,))).explained, 3)  # one filter has two images
    0.963
    """
    if not isinstance(spec, BSConvSpec):
        raise TypeError(f"spec must be a BSConvSpec; received {type(spec).__qualname__}.")
    original = shaped("kernel", kernel, spec.dense.kernel_shape)
    filters = original.astype(np.float64).reshape(*original.shape[:2], spec.taps)
    if not np.isfinite(filters).all():
        raise ValueError("kernel must be finite; received one with infinities or NaNs.")
    weights, images, explained = nearest(filters, spec.mid_channels)
    pointwise = tuple(weight.astype(original.dtype) for weight in weights)
    return Blueprints(pointwise, images.astype(original.dtype), explained)


class BSConvCost(NamedTuple):
    """What a BSConv layer costs in each form that it can be folded to.

    keep: as it is trained. merge: one pointwise and the depthwise convolution, with no batch norm
    between. dense: one ordinary convolution.

    >>> bsconv_cost(BSConvSpec(64, 64, (3, 3)), 100).dense
    Cost(parameters=36928, macs=3686400)
    """

    keep: Cost
    merge: Cost
    dense: Cost


def bsconv_cost(
    spec: BSConvSpec, positions: int, *, input_positions: int | None = None, bias: bool = True
) -> BSConvCost:
    """Return what the layer costs in each form.

    positions: output positions, at which the depthwise or dense convolution is computed.
    input_positions: those at which the pointwise ones are; as many where not given, which a stride
    makes more. Biases and batch norms count as parameters, not as multiply-accumulates.
    Raises TypeError or ValueError for what is not a positive integer.

    >>> bsconv_cost(BSConvSpec(64, 64, (3, 3)), 100, bias=False).keep
    Cost(parameters=4672, macs=467200)
    """
    out = as_integer("positions", positions)
    into = out if input_positions is None else as_integer("input_positions", input_positions)
    depthwise, biases = prod(spec.depthwise_shape), spec.out_channels if bias else 0
    pointwise = sum(map(prod, spec.pointwise_shapes))
    norms = 2 * sum(shape[0] for shape in spec.pointwise_shapes) if spec.with_bn else 0
    merged, dense = spec.in_channels * spec.out_channels, prod(spec.dense.kernel_shape)
    shift = spec.out_channels if spec.with_bn else 0  # a batch norm leaves the pointwise a bias
    return BSConvCost(
        keep=Cost(pointwise + norms + depthwise + biases, pointwise * into + depthwise * out),
        merge=Cost(merged + shift + depthwise + biases, merged * into + depthwise * out),
        dense=Cost(dense + max(biases, shift), dense * out),
    )


def as_kernel_sizes(kernel_sizes: Any) -> frozenset[tuple[int, ...]]:
    """Return the kernel sizes that are meant, as tuples.

    kernel_sizes: a sequence whose entries are tuples of 1 to 3 integers, or an integer for that
    size in each number of dimensions. Raises TypeError or ValueError for anything else.
    """
    if not is_sequence(kernel_sizes) or not len(kernel_sizes):
        raise TypeError(
            "kernel_sizes must be a sequence of kernel sizes, such as ((3, 3), (5, 5)); received "
            f"kernel_sizes={kernel_sizes!r}."
        )
    sizes: set[tuple[int, ...]] = set()
    for n, entry in enumerate(kernel_sizes):
        name = f"kernel_sizes[{n}]"
        if not is_sequence(entry):
            sizes |= {(as_integer(name, entry),) * rank for rank in range(1, MAX_RANK + 1)}
        elif 1 <= len(entry) <= MAX_RANK:
            sizes.add(tuple(as_integer(f"{name}[{d}]", k) for d, k in enumerate(entry)))
        else:
            raise ValueError(
                f"{name} must have 1 to {MAX_RANK} entries; received {tuple(entry)!r}."
            )
    return frozenset(sizes)


def replacement(
    variant: str,
    kernel_sizes: Any,
    *,
    p: float,
    min_mid_channels: int,
    with_bn: bool,
    bn_options: Mapping[str, Any] | None,
    allowed: Iterable[str],
    start: str,
) -> dict[str, Any]:
    """Return `variant`; `kernel_sizes`, those to replace; and as `layer` what `from_conv` takes.

    The arguments of `to_bsconv`; allowed: the options that the framework's batch norm takes.
    Raises TypeError or ValueError for arguments that give no layer.
    """
    as_choice("variant", variant, VARIANTS)
    as_choice("start", start, STARTS)
    sizes = as_kernel_sizes(kernel_sizes)
    BSConvSpec(1, 1, (1,), variant, p, min_mid_channels, with_bn)
    for name, value, default in (
        ("p", p, P), ("min_mid_channels", min_mid_channels, MIN_MID_CHANNELS)
    ):  # fmt: skip
        if variant == "u" and value != default:
            raise ValueError(
                f"{name} is of BSConv-S alone, which has channels between two pointwise "
                f"convolutions; received variant='u' and {name}={value!r}. Use variant='s'."
            )
    batch_norm_options(with_bn, bn_options, allowed)
    options: dict[str, Any] = {"with_bn": with_bn, "bn_options": bn_options, "start": start}
    if variant == "s":
        options |= {"p": p, "min_mid_channels": min_mid_channels}
    return {"variant": variant, "kernel_sizes": sizes, "layer": options}


def batch_norm_options(
    with_bn: bool, options: Mapping[str, Any] | None, allowed: Iterable[str]
) -> dict[str, Any]:
    """Return the options of a BSConv's batch norms.

    allowed: the names that the framework's batch norm takes. Raises TypeError for other names and
    for what is no mapping, ValueError for options of batch norms that there are not.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(
            "bn_options must be a dict of the batch norm's arguments, such as {'momentum': 0.1}; "
            f"received bn_options={options!r}."
        )
    names = tuple(allowed)
    unknown = [name for name in options if name not in names]
    if unknown:
        raise TypeError(
            f"bn_options may have {', '.join(names)}; received {', '.join(map(repr, unknown))}."
        )
    if options and not with_bn:
        raise ValueError(
            f"bn_options={dict(options)!r} are for batch norms; give with_bn=True as well."
        )
    return dict(options)


def form_costs(spec: BSConvSpec, stride: Iterable[int], *, bias: bool) -> BSConvCost:
    """Return what each form of a layer costs for one output position.

    stride: of its depthwise convolution. The pointwise ones are computed at every position of the
    input, of which there are as many for each of the output as the product of the strides.
    """
    return bsconv_cost(spec, 1, input_positions=prod(stride), bias=bias)


def obstacle(conv: ConvSpec, sizes: frozenset[tuple[int, ...]]) -> str | None:
    """Return why a convolution does not become a BSConv; None where it may. sizes: of kernels."""
    if conv.kernel_size not in sizes:
        return f"its kernel_size {conv.kernel_size} is not among kernel_sizes"
    return GROUPED if conv.groups != 1 else None


@dataclass(frozen=True)
class BSConvRecipe(Recipe):
    """How a network's BSConv is made. name: "bsconvu" or "bsconvs"; the rest as in `BSConvSpec`."""

    p: float = P
    min_mid_channels: int = MIN_MID_CHANNELS
    with_bn: bool = False

    def mid_channels(self, in_channels: int) -> int:
        """Return the channels between the pointwise convolutions of a BSConv-S."""
        return mid_channels(in_channels, self.p, self.min_mid_channels)


class BSConvKind(SeparableKind):
    """BSConv-U and BSConv-S: a pointwise convolution, or two, and then a depthwise one."""

    name = "bsconv"
    words = ("bsconvu", "bsconvs")
    forms = FORMS
    instead = "use to_bsconv"

    def recipe(self, word: str, *args: Any, **options: Any) -> BSConvRecipe:
        """Return the recipe with its options."""
        return BSConvRecipe(word, *args, **options)

    def parts(
        self, recipe: BSConvRecipe, conv: ConvSpec, groups: int
    ) -> tuple[PartConv | PartNorm, ...]:
        """Return the parts of the layer with the recipe's options, as its spec says."""
        if groups != 1:
            raise ValueError(
                "cannot be a BSConv, which has a depthwise part already, with groups: received "
                f"groups={groups}; expected 1."
            )
        return BSConvSpec(
            conv.in_channels, conv.out_channels, conv.kernel_size, recipe.name[-1], recipe.p,
            recipe.min_mid_channels, recipe.with_bn,
        ).parts  # fmt: skip


BSCONV = register(BSConvKind())
