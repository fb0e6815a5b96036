"""Print what composing a kernel takes in MXNet where S = 2M, by W's tiles or by adding E to D.

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

CHANNELS = (64, 256, 512)


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


def main() -> None:
    """Check both ways against the core, and print a line for each number of channels."""
    print(f"{'channels':>8} {'tiles, ms':>10} {'E + D, ms':>10}")
    for channels in CHANNELS:
        spec = ConvSpec(channels, channels, (3, 3), 1, 18)
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(s) for s in (spec.weight_shape, spec.depthwise_shape)]
        weight, depthwise = (mx.nd.from_numpy(a.astype(np.float32)) for a in arrays)
        for array in (weight, depthwise):
            array.attach_grad()
        ways = (
            lambda w=weight, d=depthwise, s=spec: by_tiles(w, d, s),
            lambda w=weight, d=depthwise, s=spec: compose_mx(mx.nd, w, d, s, False, w.dtype),
        )
        for way in ways:
            if difference(way().asnumpy(), compose(*arrays, spec)).relative > 1e-5:
                raise SystemExit("the two ways do not agree with the core")
        times = [milliseconds(way) for way in ways]
        print(f"{channels:8d} {times[0]:10.1f} {times[1]:10.1f}", flush=True)


if __name__ == "__main__":
    main()
