"""What every backend's BSConv layers must do, as `contract.py` says it of DO layers.

A backend joins through a module `adapters/<its name>_bsconv.py`, as `adapter_of` describes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from frameworks import need

from doconv_core import BSConvSpec, State, convolve, convolve_gradient

BATCH = 3
EPSILON = 1e-3
FORMS = ("keep", "merge", "dense")
ARGUMENT = "form"  # of every `fold` that asks for one of them


@dataclass(frozen=True)
class BSConvCase:
    """One layer and one input size. padding: a pair (before, after) for each dimension."""

    spec: BSConvSpec
    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    bias: bool = True

    def __str__(self) -> str:
        s = self.spec
        return "-".join(
            [
                f"{s.variant}{s.in_channels}to{s.out_channels}",
                "x".join(map(str, s.kernel_size)),
                f"s{'x'.join(map(str, self.stride))}",
                f"d{'x'.join(map(str, self.dilation))}",
                f"p{'x'.join('+'.join(map(str, pair)) for pair in self.padding)}",
                self.padding_mode,
                *(["bn"] if s.with_bn else []),
                *([] if self.bias else ["nobias"]),
                *([f"mid{s.mid_channels}"] if s.variant == "s" else []),
            ]
        )

    @property
    def geometry(self) -> dict[str, Any]:
        """The arguments of the core's depthwise or dense convolution, without groups."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": self.padding_mode,
        }

    def padded_outside(self) -> BSConvCase:
        """Return the case of the same layer without padding, on the input padded beforehand.

        That is the same where there are no zeros around what batch norms shift: all else that is
        before the depthwise convolution treats each position alike.
        """
        assert self.padding_mode != "zeros" or not self.spec.with_bn
        size = tuple(n + sum(pair) for n, pair in zip(self.size, self.padding, strict=True))
        none = ((0, 0),) * self.spec.rank
        return replace(self, size=size, padding=none, padding_mode="zeros")

    @property
    def dense(self) -> bool:
        """Whether the layer folds to one dense convolution."""
        padded = any(map(any, self.padding)) and self.padding_mode == "zeros"
        return not (self.spec.with_bn and padded)


def bsconv_case(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    padding_mode: str = "zeros",
    bias: bool = True,
    **sizes: Any,
) -> BSConvCase:
    rank = len(kernel)
    return BSConvCase(
        BSConvSpec(in_channels, out_channels, kernel, **sizes),
        size, (stride,) * rank, ((padding, padding),) * rank, (dilation,) * rank, padding_mode,
        bias,
    )  # fmt: skip


def _with_variants(case: BSConvCase) -> list[BSConvCase]:
    return [
        replace(case, spec=replace(case.spec, variant=variant, p=0.5, with_bn=with_bn))
        for variant in "us"
        for with_bn in (False, True)
    ]


CASES = [
    variant
    for case in (
        bsconv_case(6, 5, (3,), (9,), padding=1),
        bsconv_case(5, 8, (4,), (10,), stride=2, bias=False),
        bsconv_case(6, 5, (3, 3), (7, 8), padding=1),
        bsconv_case(10, 7, (3, 3), (8, 9), stride=2, padding=1, bias=False),
        bsconv_case(6, 8, (5, 3), (9, 8), padding=2, dilation=2),
        bsconv_case(6, 8, (2, 2), (6, 7)),
        bsconv_case(6, 6, (1, 1), (5, 5)),
        bsconv_case(6, 5, (3, 3), (6, 7), padding=2, padding_mode="reflect"),
        bsconv_case(6, 5, (3, 3), (6, 7), padding=1, padding_mode="circular", bias=False),
        bsconv_case(6, 5, (3, 3), (6, 7), padding=1, padding_mode="replicate", stride=2),
        bsconv_case(6, 4, (3, 3, 3), (5, 6, 5), padding=1),
        bsconv_case(5, 4, (2, 3, 2), (5, 6, 5), stride=2, bias=False),
    )
    for variant in _with_variants(case)
] + [
    bsconv_case(3, 8, (3, 3), (7, 7), padding=1, variant="s"),  # all 3 channels are kept
    bsconv_case(16, 3, (3, 3), (6, 6), padding=1, variant="s", p=1 / 6, min_mid_channels=1),
    bsconv_case(1, 4, (3, 3), (6, 6), padding=1),
]


class Problem(NamedTuple):
    """A state, an input and a gradient of the output, in float32.

    arrays: by the names and in the shapes of a canonical state: `pointwise.weight` `(O, I, 1)`,
    `depthwise.weight` `(O, 1, M)`. x: (B, I, *spatial). dy: (B, O, *out).
    """

    arrays: dict[str, np.ndarray]
    x: np.ndarray
    dy: np.ndarray


class Results(NamedTuple):
    """A layer's output in inference mode, and gradients of `sum(output · dy)`, by state names."""

    output: np.ndarray
    x: np.ndarray
    arrays: dict[str, np.ndarray]


def adapter_of(backend: str) -> Any:
    """Return the backend's adapter; one that is missing is an error, not a framework less.

    A module that speaks NumPy arrays, channels first, and names entries as a canonical state does.
    `layer` and `model` are whatever the framework calls so, `size` is an input's without channels.

    WORDS: the framework's for `say`. DOUBLE, EXACT: the widest dtype that layers compute in, and
    how exactly. HALF_TYPES: which it has. NOT_FOLDABLE: what may be done to a BSConv-S of 8
    channels with batch norms, and why it is then not folded. own_call: replaces a layer's forward,
    in REFUSE_OWN_CALLS, the forms in which that is refused.
    pads(case): whether the framework's layer can pad so; else its input is padded before.
    build(case, dtype): the case's layer, with any weights, whose batch norms have EPSILON.
    make(kind, i, o, kernel, rank, **options): a layer of `i` channels to `o`, with values.
    chain(*layers, rank): a model of what `make` takes, or of numbers of earlier ones, by position.
    described(network, dtype, **options), empty(network): what a description says; without values.
    round_trip(layer, new, x, folder): a layer, new or not, with what was saved of another.
    copied(model); walk(model): its layers by path; trainable(model): the number of what is trained.
    forward(model, x): in inference. gradients(model, x, dy, training, composed): Results; composed:
    by the convolution of a padded input with the composed kernel. penalty(model, alpha): the loss
    of orthonormality, and its gradients. composed_kernel(layer): as an array, and its dtype's name.
    dtypes(layer); is_ordinary(layer, form): whether it is made of the framework's own types alone.
    """
    need(backend)
    return importlib.import_module(f"adapters.{backend}_bsconv")


def options_of(case: BSConvCase, epsilon: str) -> dict[str, Any]:
    """Return what a layer takes beside an ordinary one's arguments; epsilon: a batch norm's."""
    options: dict[str, Any] = {"with_bn": case.spec.with_bn}
    if case.spec.with_bn:
        options["bn_options"] = {epsilon: EPSILON}
    if case.spec.variant == "s":
        options |= {"p": case.spec.p, "min_mid_channels": case.spec.min_mid_channels}
    return options


def snapshot(package: Any, model: Any) -> State:
    """Return a model's state with arrays of its own, whatever becomes of the model."""
    state = package.export_state(model)
    return replace(state, arrays={name: array.copy() for name, array in state.arrays.items()})


def put(adapter: Any, model: Any, arrays: dict[str, np.ndarray]) -> None:
    """Give some entries of a model's state other values."""
    state = snapshot(adapter.package, model)
    adapter.package.load_state(model, replace(state, arrays={**state.arrays, **arrays}))


def in_form(form: str) -> dict[str, str]:
    """Return the argument of every `fold` that asks for this form of BSConv layers."""
    return {ARGUMENT: form}


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


def make_problem(case: BSConvCase) -> Problem:
    """Return the case's problem, the same in every process."""
    rng = np.random.default_rng(list(str(case).encode()))
    spec, arrays, shapes = case.spec, {}, iter(case.spec.pointwise_shapes)
    for name in spec.names:
        if name == "depthwise":
            arrays[f"{name}.weight"] = rng.standard_normal((spec.out_channels, 1, spec.taps))
            if case.bias:
                arrays[f"{name}.bias"] = rng.standard_normal(spec.out_channels)
        elif name.startswith("pointwise"):
            channels, before = next(shapes)
            weight = rng.standard_normal((channels, before, 1)) * before**-0.5
            arrays[f"{name}.weight"] = weight
        else:
            for entry in ("gamma", "beta", "running_mean"):
                arrays[f"{name}.{entry}"] = rng.standard_normal(channels)
            arrays[f"{name}.running_var"] = rng.uniform(0.5, 2, channels)
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    x = rng.standard_normal((BATCH, spec.in_channels, *case.size)).astype(np.float32)
    kernel = np.zeros(spec.dense.kernel_shape, np.float32)
    shape = convolve(x, kernel, **case.geometry).shape
    return Problem(arrays, x, rng.standard_normal(shape).astype(np.float32))


def solve(case: BSConvCase, problem: Problem) -> Results:
    """Return the core's answer, computed in float64."""
    arrays = {name: array.astype(np.float64) for name, array in problem.arrays.items()}
    inputs, x = [], problem.x.astype(np.float64)
    for name in case.spec.names:
        inputs.append(x)
        if name.startswith("batch_norm"):
            normalized, entries = _normalized(name, arrays, x)
            x = normalized * entries["gamma"] + entries["beta"]
        else:
            kernel, geometry = _convolution(case, name, arrays)
            x = convolve(x, kernel, arrays.get(f"{name}.bias"), **geometry)
    dy, found = problem.dy.astype(np.float64), {}
    for name, given in zip(reversed(case.spec.names), reversed(inputs), strict=True):
        if name.startswith("batch_norm"):
            normalized, entries = _normalized(name, arrays, given)
            axes = (0, *range(2, given.ndim))
            found[f"{name}.gamma"] = (dy * normalized).sum(axes)
            found[f"{name}.beta"] = dy.sum(axes)
            dy = dy * entries["gamma"] / entries["root"]
        else:
            kernel, geometry = _convolution(case, name, arrays)
            gradients = convolve_gradient(given, kernel, dy, **geometry)
            shape = arrays[f"{name}.weight"].shape
            found[f"{name}.weight"] = gradients.kernel.reshape(shape)
            if f"{name}.bias" in arrays:
                found[f"{name}.bias"] = gradients.bias
            dy = gradients.x
    return Results(x, dy, found)


def _convolution(
    case: BSConvCase, name: str, arrays: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, Any]]:
    weight, spec = arrays[f"{name}.weight"], case.spec
    if name == "depthwise":
        kernel = weight.reshape(*weight.shape[:2], *spec.kernel_size)
        return kernel, case.geometry | {"groups": spec.out_channels}
    return weight.reshape(*weight.shape[:2], *(1,) * spec.rank), {}


def _normalized(
    name: str, arrays: dict[str, np.ndarray], x: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    entries = {
        entry: arrays[f"{name}.{entry}"].reshape(-1, *(1,) * (x.ndim - 2))
        for entry in ("gamma", "beta", "running_mean", "running_var")
    }
    root = np.sqrt(entries["running_var"] + EPSILON)
    return (x - entries["running_mean"]) / root, entries | {"root": root}
