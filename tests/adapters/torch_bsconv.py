"""The contract's BSConv cases in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from contract_bsconv import EPSILON, BSConvCase, Results
from torch import nn

import doconv_torch as package
from adapters.torch import array, tensor
from doconv_torch.bsconv import LAYERS
from doconv_torch.layers import ATTRIBUTES

ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
STATE_NAMES = {attribute: name for name, attribute in ATTRIBUTES.items() if name != "alpha"}

__all__ = ["build", "forward", "gradients", "is_ordinary", "package", "pads"]


def pads(case: BSConvCase) -> bool:
    return True


def build(case: BSConvCase) -> nn.Module:
    spec = case.spec
    options: dict[str, Any] = {"with_bn": spec.with_bn}
    if spec.with_bn:
        options["bn_options"] = {"eps": EPSILON}
    if spec.variant == "s":
        options |= {"p": spec.p, "min_mid_channels": spec.min_mid_channels}
    padding = tuple(before for before, _ in case.padding)
    return LAYERS[spec.variant, ORDINARY[spec.rank - 1]](
        spec.in_channels, spec.out_channels, spec.kernel_size, case.stride, padding, case.dilation,
        bias=case.bias, padding_mode=case.padding_mode, **options,
    ).eval()  # fmt: skip


def forward(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return array(layer(tensor(x)))


def gradients(layer: nn.Module, x: np.ndarray, dy: np.ndarray) -> Results:
    inputs = tensor(x).requires_grad_()
    output = layer(inputs)
    output.backward(tensor(dy))
    found = {}
    for path, part in layer.named_children():
        for name, parameter in part.named_parameters():
            gradient = array(parameter.grad)
            if isinstance(part, ORDINARY):
                shape = (*gradient.shape[:2], -1) if name == "weight" else (-1,)
                found[f"{path}.{name}"] = gradient.reshape(shape)
            else:
                found[f"{path}.{STATE_NAMES[name]}"] = gradient
    return Results(array(output), array(inputs.grad), found)


def is_ordinary(layer: nn.Module, form: str) -> bool:
    if form == "dense":
        return type(layer) in ORDINARY
    own = {nn.Sequential, *ORDINARY}
    norms = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
    types = {type(module) for module in layer.modules()}
    if form == "merge":
        return types <= own and list(layer._modules) == ["pointwise", "depthwise"]
    return types <= own | norms
