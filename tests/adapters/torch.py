"""The contract's cases in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from contract import Case, Problem, Results
from torch import nn

import doconv_torch

LAYERS = (doconv_torch.DOConv1d, doconv_torch.DOConv2d, doconv_torch.DOConv3d)
ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pads(case: Case) -> bool:
    """Whether PyTorch's layer can pad like the case: alike on both sides, or "same"."""
    return case.symmetric or _same(case)


def _same(case: Case) -> bool:
    return set(case.stride) == {1} and case.padding == case.same_padding()


def arguments(case: Case) -> dict[str, Any]:
    """Return the constructor's arguments, the same for both layers."""
    padding: Any = tuple(before for before, _ in case.padding)
    if not case.symmetric:
        padding = "same"
    return {
        "in_channels": case.spec.in_channels,
        "out_channels": case.spec.out_channels,
        "kernel_size": case.spec.kernel_size,
        "stride": case.stride,
        "padding": padding,
        "dilation": case.dilation,
        "groups": case.spec.groups,
        "bias": case.bias,
        "padding_mode": case.padding_mode,
    }


def ordinary_type(case: Case) -> type:
    return ORDINARY[case.spec.rank - 1]


def empty(case: Case, dtype: str) -> nn.Module:
    options = {"depth_multiplier": case.spec.depth_multiplier, "dtype": getattr(torch, dtype)}
    return LAYERS[case.spec.rank - 1](**arguments(case), **options)


def build(case: Case, problem: Problem, dtype: str) -> nn.Module:
    layer = empty(case, dtype)
    with torch.no_grad():
        layer.weight.copy_(tensor(problem.weight).reshape(layer.weight.shape))
        if problem.depthwise is not None:
            layer.depthwise_weight.copy_(tensor(problem.depthwise))
        if problem.bias is not None:
            layer.bias.copy_(tensor(problem.bias))
    return layer


def ordinary(case: Case, kernel: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    layer = ordinary_type(case)(**arguments(case))
    with torch.no_grad():
        layer.weight.copy_(tensor(kernel))
        if bias is not None:
            layer.bias.copy_(tensor(bias))
    return layer


def forward(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return array(layer(tensor(x).to(layer.weight.dtype)))


def gradients(layer: nn.Module, x: np.ndarray, dy: np.ndarray) -> Results:
    inputs = tensor(x).to(layer.weight.dtype).requires_grad_()
    output = layer(inputs)
    output.backward(tensor(dy).to(output.dtype))
    d, b = layer.depthwise_weight, layer.bias
    return Results(
        array(output),
        array(inputs.grad),
        array(layer.weight.grad).reshape(layer.spec.weight_shape),
        None if d is None else array(d.grad),
        None if b is None else array(b.grad),
    )


def composed_kernel(layer: nn.Module) -> np.ndarray:
    return array(layer.composed_kernel())


def round_trip(layer: nn.Module, case: Case, folder: Path) -> nn.Module:
    torch.save(layer.state_dict(), folder / "layer.pt")
    loaded = empty(case, str(layer.weight.dtype).removeprefix("torch."))
    loaded.load_state_dict(torch.load(folder / "layer.pt", weights_only=True))
    return loaded


def state(layer: nn.Module) -> dict[str, np.ndarray]:
    return dict(doconv_torch.export_state(layer).arrays)


package = doconv_torch
types = {
    "conv": "Conv2d", "do_conv": "DOConv2d", "norm": "BatchNorm2d", "own": "Own",
    "transposed": "ConvTranspose2d",
}  # fmt: skip


class Own(nn.Conv2d):
    """A convolution that may compute something else."""


def network(kinds: dict[str, str]) -> nn.Module:
    made = {
        "conv": lambda: nn.Conv2d(4, 4, 3),
        "pointwise": lambda: nn.Conv2d(4, 4, 1),
        "do_conv": lambda: doconv_torch.DOConv2d(4, 4, 3),
        "own": lambda: Own(4, 4, 3),
        "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
        "patched": patched,
        "norm": lambda: nn.BatchNorm2d(4),
        "relu": nn.ReLU,
    }
    model = nn.Sequential()
    for name, kind in kinds.items():
        model.add_module(name, made[kind]())
    return model.eval()


def patched() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = conv.forward
    return conv


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.copy())


def array(values: torch.Tensor) -> np.ndarray:
    values = values.detach()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy().copy()
