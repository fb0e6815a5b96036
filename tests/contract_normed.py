"""What every backend's layers of branches with batch norms must do, and the answer in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
from contract import BATCH, EPSILON, Case, case, output_shape, say

from doconv_core import convolve, pad
from doconv_core.kinds.normed import RULES, SUM_NORM, BranchedSpec, Conv, Mean, Norm

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class NormedCase:
    """A rule, with its options, and a convolution in whose place its layer stands."""

    rule: str
    conv: Case
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.rule}-{self.conv}"


def _of(rule: str, *sizes: Any, rule_options: Any = (), **options: Any) -> NormedCase:
    return NormedCase(rule, case(*sizes, **options), dict(rule_options))


# Of each rule: with a branch that passes its input on, and without; with groups, strides, dilation,
# another padding than that of the kernel's half, and each number of dimensions.
CASES = (
    _of("repvgg", 4, 4, (3, 3), (7, 8), padding=1, bias=False),
    _of("repvgg", 4, 6, (3, 3), (9, 8), stride=2, padding=1, groups=2),
    _of("repvgg", 4, 4, (5,), (12,), padding=4, dilation=2),
    _of("repvgg", 3, 3, (3, 3, 3), (5, 6, 5)),  # no padding: the others see fewer positions
    _of("mobileone", 4, 4, (3, 3), (7, 6), padding=1, groups=4, rule_options={"branches": 3}),
    _of("mobileone", 4, 4, (1, 1), (5, 6), rule_options={"branches": 2}),
    _of("mobileone", 4, 6, (3,), (10,), stride=2, padding=1),
    _of("acnet", 4, 6, (3, 3), (7, 8), padding=1, bias=False),
    _of("acnet", 4, 4, (3, 3, 3), (5, 6, 5), padding=1, groups=2),
    _of("dbb", 4, 6, (3, 3), (7, 8), padding=1, groups=2),
    _of("dbb", 3, 4, (3, 3), (8, 9), stride=2, padding=1),
    _of("dbb", 4, 4, (5,), (10,), padding=2, groups=4, bias=False),
    _of("dbb", 3, 4, (3, 3, 3), (5, 6, 5), padding=1),
    _of("qarepvgg", 4, 4, (3, 3), (7, 8), padding=1, groups=2),
    _of("qarepvgg", 4, 6, (3,), (9,), padding=1, bias=False),
    _of("replknet", 4, 4, (9, 9), (10, 11), padding=4, groups=4),
    _of("replknet", 3, 4, (7, 5), (9, 8), padding=(1, 2), rule_options={"small": 3}),
    _of("unireplknet", 4, 4, (7, 7), (9, 9), padding=3, groups=4),
    _of("unireplknet", 3, 4, (9,), (12,), padding=4, bias=False),
)


def layer_of(adapter: Any, case: NormedCase, dtype: str = "float32") -> Any:
    """Return the case's layer, of which the input may have to be padded before."""
    conv = case.conv
    cls = getattr(adapter.package, say(adapter, f"NormedConv{conv.spec.rank}{{d}}"))
    of_torch = adapter.package.__name__ == "doconv_torch"  # where it weighs the new batch
    norms = {adapter.WORDS["eps"]: EPSILON, "momentum": 0.1 if of_torch else 0.9}
    kind = partial(cls, rule=case.rule, bn_options=norms, **case.options)
    return adapter.build(conv if adapter.pads(conv) else conv.padded_outside(), dtype, kind)


def given(adapter: Any, case: NormedCase, x: np.ndarray) -> np.ndarray:
    """Return the input that the case's layer takes."""
    return x if adapter.pads(case.conv) else pad(x, case.conv.padding)


def make_arrays(case: NormedCase, spec: BranchedSpec) -> Arrays:
    """Return a state of the layer, the same in every process, by names of canonical states."""
    rng, found = np.random.default_rng(list(str(case).encode())), {}
    for number, (name, part) in enumerate(spec.parts.items()):
        if isinstance(part, Norm):
            for entry in ("gamma", "beta", "running_mean"):
                found[f"{name}.{entry}"] = rng.standard_normal(part.channels)
            found[f"{name}.running_var"] = rng.uniform(0.5, 2, part.channels)
            continue
        shape = part.spec.weight_shape
        found[f"{name}.weight"] = rng.standard_normal(shape) * prod(shape[1:]) ** -0.5
        if case.conv.bias and not number:
            found[f"{name}.bias"] = rng.standard_normal(part.out_channels)
    return {name: array.astype(np.float32) for name, array in found.items()}


def make_data(case: NormedCase) -> tuple[np.ndarray, np.ndarray]:
    """Return an input, and a gradient of the output."""
    rng = np.random.default_rng(len(str(case)))
    x = rng.standard_normal((BATCH, case.conv.spec.in_channels, *case.conv.size)).astype("f4")
    return x, rng.standard_normal(output_shape(case.conv, x)).astype("f4")


def forward(spec: BranchedSpec, arrays: Arrays, x: np.ndarray, training: bool) -> np.ndarray:
    """Return what a layer makes of an input, branch by branch, in the arrays' dtype."""
    total: Any = 0
    for pieces in spec.pieces.values():
        y, zero = x, None
        for piece in pieces:
            if isinstance(piece, Norm):
                zero = _normalized(arrays, piece.name, np.zeros_like(y[:1]), False)
                y = _normalized(arrays, piece.name, y, training)
            elif isinstance(piece, Mean):
                channels, taps = y.shape[1], piece.kernel_size
                kernel = np.full((channels, 1, *taps), 1 / prod(taps))
                y = convolve(
                    _around(y, piece.around, zero), kernel, stride=piece.stride, groups=channels
                )
            else:
                y = _convolved(arrays, piece, _around(y, piece.around, zero))
        total = total + y
    return _normalized(arrays, SUM_NORM, total, training) if SUM_NORM in spec.parts else total


def _convolved(arrays: Arrays, piece: Conv, x: np.ndarray) -> np.ndarray:
    kernel = arrays[f"{piece.name}.weight"].reshape(piece.spec.kernel_shape)
    return convolve(
        x, kernel, arrays.get(f"{piece.name}.bias"), stride=piece.stride, padding=piece.padding,
        dilation=piece.dilation, groups=piece.groups,
    )  # fmt: skip


def _normalized(arrays: Arrays, name: str, x: np.ndarray, training: bool) -> np.ndarray:
    gamma, beta, mean, variance = (
        arrays[f"{name}.{entry}"].reshape(-1, *(1,) * (x.ndim - 2))
        for entry in ("gamma", "beta", "running_mean", "running_var")
    )
    if training:
        axes = (0, *range(2, x.ndim))
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(variance + EPSILON) * gamma + beta


def _around(x: np.ndarray, pairs: Any, zero: np.ndarray | None) -> np.ndarray:
    """Return an image with fewer positions, or with more of the value that `zero` has in each."""
    cut = [slice(max(-b, 0), n - max(-a, 0)) for (b, a), n in zip(pairs, x.shape[2:], strict=True)]
    x = x[(..., *cut)]
    if zero is None:
        assert not any(number > 0 for pair in pairs for number in pair)
        return x
    value = zero[(..., *[slice(1)] * len(pairs))]
    return np.pad(x - value, ((0, 0), (0, 0), *pairs)) + value


assert {case.rule for case in CASES} == {*RULES}
