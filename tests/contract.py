"""What every backend must do: tables of layers, one canonical problem for each, one verdict.

A backend joins through an adapter (`adapters/`), a module that builds layers and models and speaks
NumPy arrays, channels first, and names entries as a canonical state does. What is particular to
BSConv is in `contract_bsconv.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from equal import assert_close

from doconv_core import (
    BSConvSpec,
    ConvSpec,
    LayerForm,
    State,
    compose,
    compose_gradient,
    convolve,
    convolve_gradient,
    pad,
    pad_gradient,
)

BATCH = 3
EPSILON = 1e-3  # of a case's batch norms
FLOAT32_TOLERANCE = 1e-5  # relative to the largest entry of the float64 result
HALF_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Case:
    """One layer and one input size.

    padding: a pair (before, after) for each dimension. depthwise_layer: to be built as the
    framework's own layer for depthwise convolutions, where it has one.
    """

    spec: ConvSpec | BSConvSpec
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    bias: bool = True
    depthwise_layer: bool = False

    def __str__(self) -> str:
        s = self.spec
        parts = [f"{s.in_channels}to{s.out_channels}", "x".join(map(str, s.kernel_size))]
        if self.kind == "do_conv":
            parts += [f"g{s.groups}", f"S{s.depth_multiplier}"]
        else:
            parts += [self.kind, *([f"mid{s.mid_channels}"] if self.kind == "s" else [])]
            parts += ["bn"] if s.with_bn else []
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
    def kind(self) -> str:
        """What adapters call the layer: do_conv, or u or s for the variants of BSConv."""
        return getattr(self.spec, "variant", "do_conv")

    def options(self, kind: str, epsilon: str) -> dict[str, Any]:
        """Return what a layer of the kind takes beside its sizes; epsilon: a batch norm's word."""
        spec, options = self.spec, {}
        if kind in ("u", "s"):
            options = {"with_bn": spec.with_bn}
            if spec.with_bn:
                options["bn_options"] = {epsilon: EPSILON}
            if kind == "s":
                options |= {"p": spec.p, "min_mid_channels": spec.min_mid_channels}
            return options
        multiplier = {"depth_multiplier": spec.depth_multiplier} if kind == "do_conv" else {}
        return {"groups": spec.groups, **multiplier}

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments of the core's convolution, but for groups."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": self.padding_mode,
        }

    @property
    def symmetric(self) -> bool:
        """Whether each dimension is padded alike on both sides."""
        return all(before == after for before, after in self.padding)

    @property
    def dense(self) -> bool:
        """Whether the layer folds to one dense convolution."""
        padded = any(map(any, self.padding)) and self.padding_mode == "zeros"
        return self.kind == "do_conv" or not (self.spec.with_bn and padded)

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
        """Return the case of the same layer without padding, on the input padded beforehand.

        That is the same where there are no zeros around what batch norms shift: all else that is
        before a depthwise convolution treats each position alike.
        """
        assert self.dense or self.padding_mode != "zeros"
        size = tuple(n + sum(pair) for n, pair in zip(self.size, self.padding, strict=True))
        none = ((0, 0),) * self.spec.rank
        return replace(self, size=size, padding=none, padding_mode="zeros")


OPTIONS = ("padding_mode", "bias", "depthwise_layer")


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
    """Return a case with `S = tiles·M + extra`, or of BSConv if there is a variant.

    padding: also "same" or "causal". options: more of the case, or of a BSConv.
    """
    rank, taps = len(kernel), int(np.prod(kernel))
    sizes = {name: options.pop(name) for name in list(options) if name not in OPTIONS}
    spec = ConvSpec(in_channels, out_channels, kernel, groups, tiles * taps + extra)
    if sizes:
        spec = BSConvSpec(in_channels, out_channels, kernel, **sizes)

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
    """A state, an input and a gradient of the output, all in the tested dtype.

    arrays: by the names and in the shapes of a canonical state; of a DO layer `weight` (O, I/g, S),
    `depthwise_weight` (I, M, S) and `bias` (O,). x: (B, I, *spatial). dy: (B, O, *out).
    """

    arrays: dict[str, np.ndarray]
    x: np.ndarray
    dy: np.ndarray


class Results(NamedTuple):
    """A layer's output in inference, and gradients of `sum(output · dy)`, by names of a state."""

    output: np.ndarray
    x: np.ndarray
    arrays: dict[str, np.ndarray]

    @property
    def named(self) -> dict[str, np.ndarray]:
        return {"output": self.output, "x": self.x, **self.arrays}


class Adapter(ModuleType):
    """What a backend's adapter module offers.

    `layer` and `model` are whatever the framework calls so, built and with values.

    package: the backend. types: its names of types, by kind. WORDS: the framework's for `say`.
    DOUBLE, EXACT: the widest dtype that layers compute in, and how exactly. HALF_TYPES: which it
    has. OTHERS: DO layers that compute something else, and what they have of their own; Named: one
    that computes the same; Own: such a convolution; Doubled: such a BSConv-U. NOT_FOLDABLE: what
    may be done to a BSConv-S of 8 channels with batch norms, and why it is then not folded.
    own_call: replaces a layer's forward, in REFUSE_OWN_CALLS, the forms in which that is refused.

    pads(case): whether the framework's layer can pad so; else its input is padded before.
    make(kind, i, o, kernel, rank, **options): a layer of `i` channels to `o`; kind: conv, own,
    patched (of a replaced forward), transposed, norm, relu, do_conv, u, s, doubled, or a class.
    build(case, dtype, kind): the case's layer; with the kind conv, the ordinary one, which is of
    the class ordinary_type(case). take_over(case, conv): the DO layer of it that `from_conv` gives.
    chain(*layers, rank, **options): of what `make` takes, or numbers of earlier ones, by position.
    described(network, dtype, **options), empty(network): what a description says; without values.
    round_trip(layer, new, x, folder): a layer, new or not, with what was saved of another.
    copied(model); walk(model): its layers by path; trainable(model): the number of what is trained.
    forward(model, x): in inference. gradients(model, x, dy, training, composed): Results; composed:
    by the convolution of a padded input with a BSConv's kernel. penalty(model, alpha): the loss of
    orthonormality, and its gradients. descend(model, x, target, alpha, rates): takes a step of
    gradient descent at each rate, of the mean square and that loss.
    composed_kernel(layer): as an array, and its dtype's name. dtypes(layer); is_ordinary(layer,
    form): whether what a BSConv was folded to is made of the framework's own types alone.
    entries(layer): its parameters by name; freeze(parameter), is_trained(parameter).
    drawn_after(call): what the framework draws at random after a call, seeded before it.
    """


def snapshot(package: Any, model: Any) -> State:
    """Return a model's state with arrays of its own, whatever becomes of the model."""
    state = package.export_state(model)
    return replace(state, arrays={name: array.copy() for name, array in state.arrays.items()})


def put(adapter: Any, model: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Give some entries of a model's state other values; return the model."""
    state = snapshot(adapter.package, model)
    adapter.package.load_state(model, replace(state, arrays={**state.arrays, **arrays}))
    return model


def fill(adapter: Any, layer: Any, case: Case, arrays: dict[str, np.ndarray]) -> Any:
    """Give a DO layer of the case, or the ordinary one, its whole state; return the layer."""
    over = "depthwise_weight" in arrays
    spec = case.spec if over else replace(case.spec, depth_multiplier=None)
    adapter.package.load_state(layer, State({"": LayerForm(spec, over, case.bias)}, arrays))
    return layer


def built(
    adapter: Any, case: Case, problem: Problem, dtype: str = "float32"
) -> tuple[Any, np.ndarray]:
    """Return the layer with the problem's state, and the input that it takes."""
    native = adapter.pads(case)
    layer = adapter.build(case if native else case.padded_outside(), dtype)
    if case.kind == "do_conv":
        fill(adapter, layer, case, problem.arrays)
    else:
        put(adapter, layer, problem.arrays)
    return layer, problem.x if native else pad(problem.x, case.padding, case.padding_mode)


def ask(adapter: Any, layer: Any, x: np.ndarray, case: Case, problem: Problem) -> Results:
    """Return a layer's answer to an input that may have been padded before."""
    found = adapter.gradients(layer, x, problem.dy)
    if x.shape == problem.x.shape:
        return found
    return found._replace(x=pad_gradient(found.x, case.size, case.padding, case.padding_mode))


def check(found: Results, expected: Results, allowed: float | dict[str, float]) -> None:
    """Assert that each result is within its allowed difference, and name those that are not."""
    for name, array in expected.named.items():
        bound = allowed if isinstance(allowed, float) else allowed[name]
        assert_close(found.named[name], array, bound, f"result or gradient of {name}")


def say(adapter: Any, text: Any) -> Any:
    """Return a text, or the names in a dict of options, in the framework's words."""
    if isinstance(text, dict):
        words = adapter.WORDS
        return {words.get(name, name): say(adapter, value) for name, value in text.items()}
    return text.format(**adapter.WORDS) if isinstance(text, str) else text


def check_refused(*rows: tuple[Callable[[], Any], type[Exception], str]) -> None:
    """Assert that each call raises its error, with its text; tell of all that do not."""
    wrong = []
    for call, expected, pattern in rows:
        try:
            call()
        except Exception as error:
            if not isinstance(error, expected) or not re.search(pattern, str(error)):
                wrong.append(f"{pattern!r} expected; {type(error).__name__}: {error}")
        else:
            wrong.append(f"{pattern!r} expected; not refused")
    assert not wrong, "\n".join(wrong)


def make_problem(case: Case, dtype: str = "float32") -> Problem:
    """Return the case's problem, the same in every process; bfloat16 values come as float32."""
    rng = np.random.default_rng(list(str(case).encode()))

    def draw(shape: tuple[int, ...], scale: float) -> np.ndarray:
        return rounded(scale * rng.standard_normal(shape), dtype)

    spec = case.spec
    arrays = {"weight": draw(spec.weight_shape, (spec.in_channels_per_group * spec.taps) ** -0.5)}
    if spec.over_parameterized:
        arrays["depthwise_weight"] = draw(spec.depthwise_shape, 0.3)
    if case.bias:
        arrays["bias"] = draw((spec.out_channels,), 0.5)
    x = draw((BATCH, spec.in_channels, *case.size), 1.0)
    return Problem(arrays, x, draw(output_shape(case, x), 1.0))


def output_shape(case: Case, x: np.ndarray) -> tuple[int, ...]:
    spec = getattr(case.spec, "dense", case.spec)
    kernel = np.zeros(spec.kernel_shape, x.dtype)
    return convolve(x, kernel, **case.geometry, groups=spec.groups).shape


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return `array` with every entry representable in `dtype`; float32 arrays for bfloat16."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def solve(case: Case, problem: Problem) -> Results:
    """Return the core's answer, computed in float64."""
    spec, geometry = case.spec, case.geometry | {"groups": case.spec.groups}
    arrays = {name: array.astype(np.float64) for name, array in problem.arrays.items()}
    x, dy = problem.x.astype(np.float64), problem.dy.astype(np.float64)
    weight, depthwise = arrays["weight"], arrays.get("depthwise_weight")
    kernel = compose(weight, depthwise, spec)
    output = convolve(x, kernel, arrays.get("bias"), **geometry)
    by = convolve_gradient(x, kernel, dy, **geometry)
    dweight, ddepthwise = compose_gradient(weight, depthwise, by.kernel, spec)
    found = {"weight": dweight, "depthwise_weight": ddepthwise, "bias": by.bias}
    return Results(output, by.x, {name: found[name] for name in arrays})


def tolerances(
    case: Case, problem: Problem, expected: Results, dtype: str, *, sums_in_half: bool = False
) -> dict[str, float]:
    """Return the relative difference allowed for each result in a half type.

    With its unit roundoff u, a result that has been rounded n times on its way is off by
    at most n·u times the same sum taken over magnitudes, to first order; sums are accumulated in
    float32, which adds nothing to speak of. The composed kernel is rounded once as the product with
    D, once for each of W's tiles added, and once as their sum.

    sums_in_half: the bias's gradient, a mere sum, is accumulated in the half type, so that it is
    rounded once for each term.
    """
    arrays = {name: np.abs(array) for name, array in problem.arrays.items()}
    magnitudes = solve(case, Problem(arrays, np.abs(problem.x), np.abs(problem.dy))).named
    kernel = 1 + case.spec.depth_multiplier // case.spec.taps
    roundings = {
        "output": kernel + 2,  # the convolution and its bias
        "x": kernel + 1,
        "weight": 3,  # the kernel's gradient, its product with D, and the sum of both
        "depthwise_weight": 2,  # the kernel's gradient, and its product with W
        "bias": problem.dy[:, 0].size if sums_in_half else 1,
    }
    return {
        name: roundings[name] * HALF_ROUNDOFF[dtype] * magnitudes[name].max() / np.abs(exact).max()
        for name, exact in expected.named.items()
    }
