"""The toy kind in the core: a kernel whose output channels are scaled, `K[o] = scale[o] · W[o]`."""

from __future__ import annotations

import numpy as np

from doconv_core.kinds.base import ONE_TAP, ComposedKind, register


class ScaledKind(ComposedKind):
    name = "scaled"
    words = ("scaled",)
    names = ("weight", "scale")
    constants = {"scale": 1.0}  # noqa: RUF012  # read only

    def obstacle(self, conv):
        return ONE_TAP if conv.taps == 1 else None

    def spec(self, conv, **options):
        return conv

    def entries(self, spec):
        return {"weight": spec.weight_shape, "scale": (spec.out_channels,)}

    def compose(self, entries, spec):
        kernel = entries["weight"] * entries["scale"][:, None, None]
        return kernel.reshape(spec.kernel_shape)

    def gradient(self, entries, kernel_gradient, spec):
        by_kernel = kernel_gradient.reshape(spec.weight_shape)
        return {
            "weight": by_kernel * entries["scale"][:, None, None],
            "scale": (by_kernel * entries["weight"]).sum((1, 2)),
        }

    def start(self, kernel, spec):
        weight = kernel.reshape(spec.weight_shape)
        return {"weight": weight, "scale": np.ones(spec.out_channels, kernel.dtype)}


SCALED = register(ScaledKind())
