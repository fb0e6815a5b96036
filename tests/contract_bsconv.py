"""What every backend's BSConv layers must do, as `contract.py` says it of DO layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from contract import (
    BATCH,
    EPSILON,
    Case,
    Problem,
    Results,
    case,
    check_refused,
    output_shape,
    put,
    say,
    snapshot,
)
from frameworks import adapter_of

from doconv_core import convolve, convolve_gradient

# Tests of BSConv take these from here.
__all__ = ["adapter_of", "check_refused", "put", "say", "snapshot"]

FORMS = ("keep", "merge", "dense")
ARGUMENT = "form"  # of every `fold` that asks for one of them
bsconv_case = partial(case, variant="u")


def in_form(form: str) -> dict[str, str]:
    """Return the argument of every `fold` that asks for this form of BSConv layers."""
    return {ARGUMENT: form}


def _with_variants(case: Case) -> list[Case]:
    return [
        replace(case, spec=replace(case.spec, variant=variant, p=0.5, with_bn=with_bn))
        for variant in "us"
        for with_bn in (False, True)
    ]


SIZES = (
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
CASES = [variant for case in SIZES for variant in _with_variants(case)] + [
    bsconv_case(3, 8, (3, 3), (7, 7), padding=1, variant="s"),  # all 3 channels are kept
    bsconv_case(16, 3, (3, 3), (6, 6), padding=1, variant="s", p=1 / 6, min_mid_channels=1),
    bsconv_case(1, 4, (3, 3), (6, 6), padding=1),
]
# In the usual run each size is of both variants, with batch norms in one: in turn, U or S.
TAIL = [
    variant
    for number, case in enumerate(SIZES)
    for variant in _with_variants(case)
    if variant.spec.with_bn != (variant.spec.variant == "us"[number % 2])
]


def make_problem(case: Case) -> Problem:
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
    return Problem(arrays, x, rng.standard_normal(output_shape(case, x)).astype(np.float32))


def solve(case: Case, problem: Problem) -> Results:
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
    case: Case, name: str, arrays: dict[str, np.ndarray]
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
