"""What every backend must do: one table of layers, one canonical problem for each, one verdict.

A backend joins through an adapter (`adapters/`), a module that builds its layer from a case and a
canonical state and speaks NumPy arrays in canonical order otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from doconv_core import (
    ConvSpec,
    compose,
    compose_gradient,
    convolve,
    convolve_gradient,
    difference,
    pad,
    pad_gradient,
)

BATCH = 3
FLOAT32_TOLERANCE = 1e-5  # relative to the largest entry of the float64 result
HALF_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Case:
    """One layer and one input size.

    padding: a pair (before, after) for each dimension. depthwise_layer: to be built as the
    framework's own layer for depthwise convolutions, where it has one.
    """

    spec: ConvSpec
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    bias: bool = True
    depthwise_layer: bool = False

    def __str__(self) -> str:
        s = self.spec
        parts = [
            f"{s.in_channels}to{s.out_channels}",
            "x".join(map(str, s.kernel_size)),
            f"g{s.groups}",
            f"S{s.depth_multiplier}",
        ]
        for name, value in (("s", self.stride), ("d", self.dilation)):
            if set(value) != {1}:
                parts.append(name + "x".join(map(str, value)))
        if any(map(any, self.padding)):
            parts.append("p" + "x".join("+".join(map(str, pair)) for pair in self.padding))
        if self.padding_mode != "zeros":
            parts.append(self.padding_mode)
        if not self.bias:
            parts.append("nobias")
        if self.depthwise_layer:
            parts.append("depthwise")
        return "-".join(parts)

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments of the core's convolution."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.spec.groups,
            "padding_mode": self.padding_mode,
        }

    @property
    def symmetric(self) -> bool:
        """Whether each dimension is padded alike on both sides."""
        return all(before == after for before, after in self.padding)

    def same_padding(self) -> tuple[tuple[int, int], ...]:
        """The padding that gives `ceil(size / stride)` output positions, the odd one after."""
        pairs = []
        for n, k, s, d in zip(
            self.size, self.spec.kernel_size, self.stride, self.dilation, strict=True
        ):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            pairs.append((total // 2, total - total // 2))
        return tuple(pairs)

    def padded_outside(self) -> Case:
        """Return the case of the same layer without padding, on the input padded beforehand."""
        size = tuple(n + sum(pair) for n, pair in zip(self.size, self.padding, strict=True))
        none = ((0, 0),) * self.spec.rank
        return replace(self, size=size, padding=none, padding_mode="zeros")


def case(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    *,
    groups: int = 1,
    extra: int = 0,
    tiles: int = 1,
    stride: int | tuple[int, ...] = 1,
    padding: Any = 0,
    dilation: int | tuple[int, ...] = 1,
    **options: Any,
) -> Case:
    """Return a case with `S = tiles·M + extra`; padding may also be "same" or "causal"."""
    rank, taps = len(kernel), int(np.prod(kernel))
    spec = ConvSpec(in_channels, out_channels, kernel, groups, tiles * taps + extra)

    def each(value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * rank

    made = Case(spec, size, each(stride), ((0, 0),) * rank, each(dilation), **options)
    if padding == "same":
        return replace(made, padding=made.same_padding())
    if padding == "causal":
        return replace(made, padding=((made.dilation[0] * (kernel[0] - 1), 0),))
    pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in each(padding))
    return replace(made, padding=pairs)


CASES = [
    # one dimension
    case(4, 6, (3,), (9,), padding=1),
    case(4, 6, (3,), (9,), padding="causal", dilation=2),
    case(4, 6, (4,), (10,), padding="causal", groups=2, extra=3),
    case(4, 6, (2,), (9,), padding="same", bias=False),
    case(4, 6, (5,), (11,), groups=2, padding=2, tiles=2),
    case(4, 8, (3,), (9,), groups=4, stride=2, padding="same", extra=3),
    case(4, 4, (3,), (9,), groups=4, tiles=2, extra=1, padding=1),
    case(4, 6, (4,), (12,), stride=3, padding=((2, 1),)),
    case(4, 6, (3,), (9,), padding=2, padding_mode="circular"),
    case(4, 6, (3,), (9,), padding=((2, 1),), padding_mode="reflect", groups=2),
    case(4, 6, (1,), (7,), groups=2),
    case(3, 5, (1,), (7,), bias=False),
    # two dimensions: groups and depth multipliers
    case(3, 5, (3, 3), (7, 8), padding=1),
    case(3, 5, (3, 3), (7, 8), padding=1, extra=3),
    case(3, 5, (3, 3), (7, 8), padding=1, tiles=2),
    case(3, 5, (3, 3), (7, 8), padding=1, tiles=2, extra=1),
    case(4, 6, (3, 3), (7, 8), groups=2, padding=1),
    case(4, 6, (3, 3), (7, 8), groups=2, padding=1, extra=3),
    case(4, 6, (3, 3), (7, 8), groups=2, padding=1, tiles=2),
    case(4, 6, (3, 3), (7, 8), groups=2, padding=1, tiles=2, extra=1),
    case(6, 9, (3, 3), (7, 7), groups=3, padding=1),
    case(6, 9, (3, 3), (7, 7), groups=3, padding=1, extra=3, bias=False),
    case(6, 6, (3, 3), (7, 7), groups=3, tiles=2, bias=False),
    case(4, 8, (3, 3), (6, 7), groups=4, padding=1),
    case(4, 8, (3, 3), (6, 7), groups=4, padding=1, tiles=2, extra=1),
    case(4, 4, (3, 3), (6, 7), groups=4, padding=1),
    case(4, 4, (3, 3), (6, 7), groups=4, padding=1, extra=3, bias=False),
    case(8, 4, (3, 3), (6, 6), groups=4, padding=1, tiles=2),
    case(1, 4, (3, 3), (6, 6), padding=1),
    case(5, 1, (3, 3), (6, 6), padding=1, extra=3),
    # two dimensions: the framework's own layer for depthwise convolutions
    case(4, 4, (3, 3), (6, 7), groups=4, padding="same", depthwise_layer=True),
    case(4, 8, (3, 3), (6, 7), groups=4, padding="same", depthwise_layer=True),
    case(4, 12, (3, 3), (8, 7), groups=4, stride=2, extra=3, depthwise_layer=True),
    case(4, 8, (2, 4), (8, 7), groups=4, tiles=2, bias=False, depthwise_layer=True),
    case(4, 8, (3, 3), (8, 9), groups=4, dilation=2, tiles=2, extra=1, depthwise_layer=True),
    case(4, 8, (1, 1), (6, 7), groups=4, depthwise_layer=True),
    # two dimensions: even and rectangular kernels
    case(3, 5, (2, 2), (6, 7), padding="same"),
    case(3, 5, (4, 2), (8, 7), padding="same", extra=3),
    case(4, 6, (4, 4), (9, 8), groups=2, padding=((2, 1), (1, 2))),
    case(3, 5, (1, 3), (6, 7), padding=(0, 1)),
    case(3, 5, (3, 1), (6, 7), padding=(1, 0), tiles=2),
    case(4, 6, (5, 3), (9, 8), groups=2, padding=(2, 1), extra=3),
    case(4, 6, (7, 7), (11, 11), padding=3, bias=False),
    # two dimensions: strides and dilations
    case(3, 5, (3, 3), (9, 8), stride=2, padding=1),
    case(3, 5, (3, 3), (9, 8), stride=2, padding="same", tiles=2, extra=1),
    case(4, 6, (3, 3), (9, 8), stride=(2, 1), groups=2, padding=1, extra=3),
    case(4, 4, (3, 3), (9, 9), stride=(3, 2), groups=4),
    case(3, 5, (3, 3), (9, 9), dilation=2, padding=2),
    case(4, 6, (3, 2), (9, 9), dilation=(2, 3), groups=2, extra=3),
    case(4, 8, (3, 3), (9, 9), dilation=2, groups=4, padding="same", tiles=2),
    # two dimensions: paddings
    case(3, 5, (3, 3), (6, 7), padding=((0, 2), (1, 0))),
    case(3, 5, (3, 3), (6, 7), padding=2, padding_mode="reflect"),
    case(3, 5, (3, 3), (6, 7), padding=(1, 3), padding_mode="replicate", extra=3),
    case(4, 6, (3, 3), (6, 7), padding=2, padding_mode="circular", groups=2),
    case(4, 6, (2, 3), (6, 7), padding=((2, 1), (0, 3)), padding_mode="reflect", groups=2),
    case(4, 4, (3, 3), (6, 7), padding=((2, 1), (0, 3)), padding_mode="circular", groups=4),
    # two dimensions: one tap
    case(4, 6, (1, 1), (6, 7)),
    case(4, 6, (1, 1), (6, 7), groups=2, stride=2, bias=False),
    # three dimensions
    case(3, 4, (3, 3, 3), (5, 6, 5), padding=1),
    case(3, 4, (2, 3, 2), (5, 6, 5), padding="same", extra=3),
    case(4, 6, (3, 3, 3), (5, 6, 5), groups=2, padding=1),
    case(4, 6, (2, 2, 2), (5, 6, 5), groups=2, tiles=2, bias=False),
    case(4, 8, (2, 2, 3), (5, 6, 5), groups=4, tiles=2, extra=1),
    case(4, 4, (3, 1, 3), (5, 6, 5), groups=4, padding=(1, 0, 1), extra=3),
    case(3, 4, (2, 3, 3), (6, 7, 7), stride=(1, 2, 2), padding=(1, 1, 1)),
    case(3, 4, (2, 2, 2), (7, 6, 7), dilation=(2, 1, 3)),
    case(3, 4, (3, 3, 3), (5, 5, 5), padding=(1, 2, 1), padding_mode="circular"),
    case(3, 4, (3, 3, 3), (5, 5, 5), padding=((0, 2), (1, 1), (2, 0)), padding_mode="replicate"),
    case(4, 6, (1, 1, 1), (4, 5, 4), groups=2),
]

# Half types need no table of their own: every kind of grouping and multiplier, once each.
HALF_CASES = [
    case(8, 6, (3,), (9,), padding=1, extra=2),
    case(3, 5, (3, 3), (7, 8), padding=1),
    case(4, 6, (3, 3), (7, 8), groups=2, padding=1, extra=3),
    case(4, 8, (3, 3), (6, 7), groups=4, padding=1, tiles=2, extra=1),
    case(4, 6, (1, 1), (6, 7)),
    case(3, 4, (2, 3, 2), (5, 6, 5), tiles=2),
]


class Problem(NamedTuple):
    """One canonical state, one input and one gradient of the output, all in the tested dtype.

    weight: (O, I/g, S). depthwise: (I, M, S), or None for one tap. bias: (O,) or None.
    x: (B, I, *spatial). dy: (B, O, *out).
    """

    weight: np.ndarray
    depthwise: np.ndarray | None
    bias: np.ndarray | None
    x: np.ndarray
    dy: np.ndarray


class Results(NamedTuple):
    """What a layer answers to a problem: its output, and gradients of `sum(output · dy)`."""

    output: np.ndarray
    x: np.ndarray
    weight: np.ndarray
    depthwise: np.ndarray | None
    bias: np.ndarray | None


class Adapter(Protocol):
    """What a backend's adapter module offers; `layer` is whatever the framework calls a layer."""

    # The backend itself, and its name for each kind of layer in `NETWORK` of test_contract_model.
    package: Any
    types: dict[str, str]

    def network(self, kinds: dict[str, str]) -> Any:
        """Return a model of layers of these kinds, by path, each called with the former's output.

        Of four channels everywhere, without padding, in the mode of inference, and with values.
        """

    def pads(self, case: Case) -> bool:
        """Whether the framework's layer can pad like the case; else its input comes padded."""

    def build(self, case: Case, problem: Problem, dtype: str) -> Any:
        """Return the DO-Conv layer with the problem's state."""

    def ordinary(self, case: Case, kernel: Any, bias: Any) -> Any:
        """Return the framework's own layer with this kernel, (O, I/g, *kernel_size), in float32."""

    def forward(self, layer: Any, x: np.ndarray) -> np.ndarray:
        """Return the layer's output."""

    def gradients(self, layer: Any, x: np.ndarray, dy: np.ndarray) -> Results:
        """Return the layer's output and gradients."""

    def composed_kernel(self, layer: Any) -> np.ndarray:
        """Return the layer's kernel in canonical order."""

    def ordinary_type(self, case: Case) -> type:
        """Return the framework's own layer class, which `fold()` must give."""

    def round_trip(self, layer: Any, case: Case, folder: Any) -> Any:
        """Return a new layer that loaded what the framework saved of this one."""

    def state(self, layer: Any) -> dict[str, np.ndarray]:
        """Return the layer's canonical arrays, by name."""


def make_problem(case: Case, dtype: str, *, zero_depthwise: bool = False) -> Problem:
    """Return the case's problem, the same in every process; bfloat16 values come as float32."""
    rng = np.random.default_rng(list(str(case).encode()))

    def draw(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return rounded(scale * rng.standard_normal(shape), dtype)

    spec = case.spec
    weight = draw(spec.weight_shape, (spec.in_channels_per_group * spec.taps) ** -0.5)
    depthwise = None
    if spec.depthwise_shape is not None:
        depthwise = draw(spec.depthwise_shape, 0.0 if zero_depthwise else 0.3)
    bias = draw((spec.out_channels,), 0.5) if case.bias else None
    x = draw((BATCH, spec.in_channels, *case.size), 1.0)
    kernel = np.zeros(spec.kernel_shape, x.dtype)
    dy = draw(convolve(x, kernel, **case.geometry).shape, 1.0)
    return Problem(weight, depthwise, bias, x, dy)


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return `array` with every entry representable in `dtype`; float32 arrays for bfloat16."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def solve(case: Case, problem: Problem) -> Results:
    """Return the core's answer, computed in float64."""
    spec = case.spec
    weight, depthwise, bias, x, dy = (
        None if array is None else array.astype(np.float64) for array in problem
    )
    kernel = compose(weight, depthwise, spec)
    output = convolve(x, kernel, bias, **case.geometry)
    gradients = convolve_gradient(x, kernel, dy, **case.geometry)
    dweight, ddepthwise = compose_gradient(weight, depthwise, gradients.kernel, spec)
    return Results(output, gradients.x, dweight, ddepthwise, gradients.bias if case.bias else None)


def ask(adapter: Adapter, layer: Any, case: Case, problem: Problem, native: bool) -> Results:
    """Return a layer's answer, padding outside it where the framework cannot pad like that."""
    if native:
        return adapter.gradients(layer, problem.x, problem.dy)
    x = pad(problem.x, case.padding, case.padding_mode)
    results = adapter.gradients(layer, x, problem.dy)
    dx = pad_gradient(results.x, case.size, case.padding, case.padding_mode)
    return results._replace(x=dx)


def tolerances(
    case: Case, problem: Problem, expected: Results, dtype: str, *, sums_in_half: bool = False
) -> Results:
    """Return the relative difference allowed for each result.

    In a half type with unit roundoff u, a result that has been rounded n times on its way is off by
    at most n·u times the same sum taken over magnitudes, to first order; sums are accumulated in
    float32, which adds nothing to speak of. The composed kernel is rounded once as the product with
    D, once for each of W's tiles added, and once as their sum.

    sums_in_half: the bias's gradient, a mere sum, is accumulated in the half type, so that it is
    rounded once for each term.
    """
    if dtype == "float32":
        return Results(*(FLOAT32_TOLERANCE,) * 5)
    magnitudes = solve(case, Problem(*(None if a is None else np.abs(a) for a in problem)))
    kernel = 1 + case.spec.depth_multiplier // case.spec.taps
    roundings = Results(
        output=kernel + 2,  # the convolution and its bias
        x=kernel + 1,
        weight=3,  # the kernel's gradient, its product with D, and the sum of both
        depthwise=2,  # the kernel's gradient, and its product with W
        bias=problem.dy[:, 0].size if sums_in_half else 1,
    )
    return Results(
        *(
            None if e is None else n * HALF_ROUNDOFF[dtype] * np.abs(m).max() / np.abs(e).max()
            for n, m, e in zip(roundings, magnitudes, expected, strict=True)
        )
    )


def check(found: Results, expected: Results, allowed: Results) -> None:
    """Assert that each result is within its allowed difference, and name the one that is not."""
    for name, f, e, bound in zip(Results._fields, found, expected, allowed, strict=True):
        if e is None:
            assert f is None, f"{name}: expected none"
            continue
        off = difference(f, e)
        assert off.relative <= bound, f"{name}: {off}; allowed {bound:.2e} relative"
