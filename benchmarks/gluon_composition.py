"""Print what composing a kernel takes in MXNet, by each of its forms.

By batches of matrices or by a grouped convolution, and where S = 2M also by W's tiles, which are
summed, and not by adding E to D.

Run: python benchmarks/gluon_composition.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from doconv_core import ConvSpec, compose, difference
from doconv_mx.compose import compose as compose_mx

# isort: split
import mxnet as mx

CHANNELS = (16, 32, 64, 128, 256, 512)


def by_tiles(weight: mx.nd.NDArray, depthwise: mx.nd.NDArray, spec: ConvSpec) -> mx.nd.NDArray:
    """Return the kernel as the sum of W's tiles and of W's product with D."""
    shape = (spec.out_channels, spec.in_channels, 2, spec.taps)
    tiles = weight.reshape(shape).sum(axis=2)
    product = mx.nd.batch_dot(weight.transpose((1, 0, 2)), depthwise, transpose_b=True)
    return (tiles + product.transpose((1, 0, 2))).reshape(spec.kernel_shape)


def milliseconds(function: Callable[[], mx.nd.NDArray], repeats: int = 15) -> float:
    """Return the shortest time of several calls, forward and backward."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        with mx.autograd.record():
            result = function().sum()
        result.backward()
        mx.nd.waitall()
        best = min(best, time.perf_counter() - begin)
    return 1000 * best


def measured(channels: int, tiles: int) -> list[float]:
    """Check each way against the core, and return the time of each; for the tiles if there are two.

    tiles: S in kernel taps.
    """
    spec = ConvSpec(channels, channels, (3, 3), 1, 9 * tiles)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in (spec.weight_shape, spec.depthwise_shape)]
    weight, depthwise = (mx.nd.from_numpy(a.astype(np.float32)) for a in arrays)
    weight = weight.reshape(spec.parameter_shape)
    for array in (weight, depthwise):
        array.attach_grad()
    ways = [
        lambda n=n: compose_mx(mx.nd, weight, depthwise, spec, False, weight.dtype, n)
        for n in (0, channels)
    ]
    if tiles == 2:
        ways.append(lambda: by_tiles(weight, depthwise, spec))
    for way in ways:
        if difference(way().asnumpy(), compose(*arrays, spec)).relative > 1e-5:
            raise SystemExit("the ways do not agree with the core")
    return [milliseconds(way) for way in ways]


def main() -> None:
    """Print a line for each number of channels and each S."""
    print(f"{'channels':>8} {'S':>3} {'batches, ms':>12} {'convolution':>12} {'tiles':>8}")
    for channels in CHANNELS:
        for tiles in (1, 2):
            times = " ".join(f"{t:12.2f}" for t in measured(channels, tiles))
            print(f"{channels:8d} {9 * tiles:3d} {times}", flush=True)


if __name__ == "__main__":
    main()
