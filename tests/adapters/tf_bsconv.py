"""The contract's BSConv cases in Keras, on whichever backend Keras runs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from contract_bsconv import EPSILON, BSConvCase, Results

import doconv_tf as package
from adapters.tf import LAYOUTS, ORDINARY, forward, pulled_back, to_canonical
from doconv_tf.bsconv import LAYERS

DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
ZEROS = (keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D)

__all__ = ["build", "forward", "gradients", "is_ordinary", "package", "pads"]


def pads(case: BSConvCase) -> bool:
    """Whether Keras' layer can pad like the case: with zeros alone."""
    return case.padding_mode == "zeros" or not any(map(any, case.padding))


def _same(case: BSConvCase) -> bool:
    totals = [(k - 1) * d for k, d in zip(case.spec.kernel_size, case.dilation, strict=True)]
    halves = tuple((total // 2, total - total // 2) for total in totals)
    return set(case.stride) == {1} and case.padding == halves


def build(case: BSConvCase) -> keras.Layer:
    spec = case.spec
    options: dict[str, Any] = {"with_bn": spec.with_bn}
    if spec.with_bn:
        options["bn_options"] = {"epsilon": EPSILON}
    if spec.variant == "s":
        options |= {"p": spec.p, "min_mid_channels": spec.min_mid_channels}
    if _same(case):
        options["padding"] = "same"
    else:
        options["around"] = tuple(before for before, _ in case.padding)
    layer = LAYERS[spec.variant, ORDINARY[spec.rank - 1]](
        spec.out_channels, spec.kernel_size, case.stride, data_format="channels_last",
        dilation_rate=case.dilation, use_bias=case.bias, **options,
    )  # fmt: skip
    layer.build((None, *case.size, spec.in_channels))
    return layer


def gradients(layer: keras.Layer, x: np.ndarray, dy: np.ndarray) -> Results:
    output, dx, values = pulled_back(layer, x, dy)
    gradients = {id(v): g for v, g in zip(layer.trainable_variables, values, strict=True)}
    found = {}
    for part in layer.layers:
        for variable in part.trainable_variables:
            gradient = gradients[id(variable)]
            if variable.name == "kernel":
                gradient = to_canonical(gradient, LAYOUTS[isinstance(part, DEPTHWISE)])
                gradient = gradient.reshape(*gradient.shape[:2], -1)
            entry = {"kernel": "weight"}.get(variable.name, variable.name)
            found[f"{part.name}.{entry}"] = gradient
    return Results(output, dx, found)


def is_ordinary(layer: keras.Layer, form: str) -> bool:
    parts = getattr(layer, "layers", [layer])
    if len(parts) > 1 and type(layer) is not keras.Sequential:
        return False
    types = [type(part) for part in parts if not isinstance(part, ZEROS)]
    if form == "dense":
        return len(types) == 1 and types[0] in ORDINARY
    if form == "merge":
        names = [part.name for part in parts if not isinstance(part, ZEROS)]
        return set(types) <= {*ORDINARY, *DEPTHWISE} and names == ["pointwise", "depthwise"]
    return set(types) <= {*ORDINARY, *DEPTHWISE, keras.layers.BatchNormalization}
