"""The contract's BSConv cases in MXNet Gluon."""

from __future__ import annotations

from typing import Any

import doconv_mx as package  # before MXNet, which it makes importable

# isort: split
import numpy as np
from contract_bsconv import EPSILON, BSConvCase, Results
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

from adapters.mx import ORDINARY, array
from doconv_mx.bsconv import LAYERS

__all__ = ["build", "forward", "gradients", "is_ordinary", "package", "pads"]


def pads(case: BSConvCase) -> bool:
    alike = all(before == after for before, after in case.padding)
    return alike and case.padding_mode == "zeros"


def build(case: BSConvCase) -> HybridBlock:
    spec = case.spec
    options: dict[str, Any] = {"with_bn": spec.with_bn}
    if spec.with_bn:
        options["bn_options"] = {"epsilon": EPSILON}
    if spec.variant == "s":
        options |= {"p": spec.p, "min_mid_channels": spec.min_mid_channels}
    layer = LAYERS[spec.variant, ORDINARY[spec.rank - 1]](
        spec.in_channels, spec.out_channels, spec.kernel_size, case.stride,
        tuple(before for before, _ in case.padding), case.dilation, use_bias=case.bias, **options,
    )  # fmt: skip
    layer.initialize()
    return layer


def forward(layer: HybridBlock, x: np.ndarray) -> np.ndarray:
    return layer(array(x)).asnumpy()


def gradients(layer: HybridBlock, x: np.ndarray, dy: np.ndarray) -> Results:
    inputs = array(x)
    inputs.attach_grad()
    with autograd.record(train_mode=False):
        output = layer(inputs)
    output.backward(array(dy), train_mode=False)
    found = {}
    for path, part in layer._children.items():
        for name, parameter in part._reg_params.items():
            if parameter.grad_req != "null":
                gradient = parameter.grad().asnumpy()
                if name == "weight":
                    gradient = gradient.reshape(*gradient.shape[:2], -1)
                found[f"{path}.{name}"] = gradient
    return Results(output.asnumpy(), inputs.grad.asnumpy(), found)


def is_ordinary(layer: HybridBlock, form: str) -> bool:
    if form == "dense":
        return type(layer) in ORDINARY
    types: set[type] = set()
    layer.apply(lambda block: types.add(type(block)))
    own = {nn.HybridSequential, *ORDINARY}
    if form == "merge":
        return types <= own and list(layer._children) == ["pointwise", "depthwise"]
    return types <= own | {nn.BatchNorm}
