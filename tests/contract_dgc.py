"""What every backend's dynamic group convolutions must do, as `contract.py` has it of DO layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from contract import BATCH, Problem, Results

from doconv_core.kinds.dgc import LASSO, DGConvSpec, HeadsPass, dynamic_heads
from doconv_core.networks.nodes import Activation, BatchNorm

WEIGHT = 1000 * LASSO  # of the lasso in the tests, so that it is seen


class DynamicCase(NamedTuple):
    """A layer, an input size, and the share of the training that is done."""

    spec: DGConvSpec
    size: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    progress: float = 0.0

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def sizes(self) -> dict[str, Any]:
        names = ("heads", "squeeze_rate", "gate_factor")
        return {name: getattr(self.spec, name) for name in names}

    def __str__(self) -> str:
        s, kernel = self.spec, "x".join(map(str, self.spec.kernel_size))
        return f"{s.in_channels}to{s.out_channels}-k{kernel}-h{s.heads}-at{self.progress}"


# Kernels for each image where O·M is below h·H·W, else maps for each head.
CASES = (
    DynamicCase(DGConvSpec(16, 8, (1, 1)), (7, 6), progress=1.0),
    DynamicCase(DGConvSpec(96, 12, (1, 1), 4, 8, 0.45), (5, 6), stride=2, progress=0.6),
    DynamicCase(DGConvSpec(24, 12, (3, 3), 3), (8, 9), 2, (1, 1), progress=0.4),
    DynamicCase(DGConvSpec(16, 6, (3, 2), 2), (9, 8), 1, (2, 1), 2, progress=0.3),
    DynamicCase(DGConvSpec(16, 64, (3, 3)), (6, 5), 2, (1, 1), progress=0.75),
    DynamicCase(DGConvSpec(16, 64, (3, 3), 4, 16, 0.5), (5, 5), 1, (2, 2), 2, progress=0.05),
)


class DynamicResults(NamedTuple):
    """The core's answer in training: the results with the lasso in the loss, and what is chosen."""

    results: Results
    heads: HeadsPass
    running_mean: np.ndarray


def make_problem(case: DynamicCase) -> Problem:
    """Return the case's problem, the same in every process."""
    rng, spec = np.random.default_rng(list(str(case).encode())), case.spec
    channels = spec.in_channels
    arrays = {
        name: rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5 * 2
        for name, shape in {**spec.shapes, "gamma": (channels,), "beta": (channels,)}.items()
    }
    arrays["saliency_bias"] = 1 + 0.5 * rng.standard_normal(spec.shapes["saliency_bias"])
    arrays["inactive"] = np.zeros(())
    arrays["running_mean"] = rng.standard_normal(channels)
    arrays["running_var"] = rng.uniform(0.5, 2, channels)
    named = {
        f"{'heads' if name in spec.shapes else 'norm'}.{name}": array.astype(np.float32)
        for name, array in arrays.items()
    }
    x = rng.standard_normal((BATCH, channels, *case.size)).astype(np.float32)
    shape = solve(case, Problem(named, x, np.zeros(())), 0).heads.output.shape
    return Problem(named, x, rng.standard_normal(shape).astype(np.float32))


def solve(
    case: DynamicCase, problem: Problem, inactive: int, training: bool = True
) -> DynamicResults:
    """Return the core's answer, computed in float64."""
    arrays: dict[str, dict[str, np.ndarray]] = {"norm": {}, "heads": {}}
    for path, array in problem.arrays.items():
        owner, name = path.split(".")
        arrays[owner][name] = array.astype(np.float64)
    arrays["heads"]["inactive"] = np.array(inactive, float)
    x, of_norm = problem.x.astype(np.float64), dict[str, np.ndarray]()
    norm = BatchNorm().step(x, arrays["norm"], of_norm, training)
    relu = Activation("relu").step(norm.output, {}, {}, training)
    heads = dynamic_heads(relu.output, arrays["heads"], case.spec, **case.geometry)
    dz, of_heads = heads.back(np.broadcast_to(problem.dy, heads.output.shape), WEIGHT)
    dx = norm.back(relu.back(dz))
    named = {f"norm.{name}": array for name, array in of_norm.items()}
    named |= {f"heads.{name}": array for name, array in of_heads.items()}
    mean = 0.9 * arrays["norm"]["running_mean"] + 0.1 * x.mean((0, 2, 3))
    return DynamicResults(Results(heads.output, dx, named), heads, mean)


def gap(found: HeadsPass) -> float:
    """Return how near a head came to another choice: its least gap, to its largest saliency."""
    kept = np.where(found.active, found.saliency, np.inf).min(-1)
    dropped = np.where(found.active, -np.inf, found.saliency).max(-1)
    return float(((kept - dropped) / found.saliency.max(-1)).min())
