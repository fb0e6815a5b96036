"""BSConv layers, models with them, and networks by name, in PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contract_bsconv import BSConvCase, Results, options_of, snapshot
from torch import nn

import doconv_torch as package
from adapters.torch import LAYERS as DO_LAYERS
from adapters.torch import ORDINARY, Own, array, tensor
from doconv_torch.bsconv import BSCONVS

WORDS = {
    "stride": "stride", "padding": "padding", "eps": "eps", "wrong": "epsilon",
    "norms": "eps, momentum", "d": "d", "sequential": "Sequential", "call": "forward",
    "conv": "torch.nn.Conv2d", "module": "torch.nn.Module", "root": "Network", "none": "Identity",
}  # fmt: skip
DOUBLE, EXACT = "float64", 1e-12
HALF_TYPES = ("float16", "bfloat16")
REFUSE_OWN_CALLS = ("keep", "merge", "dense")
copied, walk = copy.deepcopy, lambda model: dict(model.named_modules())


def pads(case: BSConvCase) -> bool:
    return True


class Doubled(package.BSConvU2d):
    """A BSConv that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def make(kind: str, i: int, o: int, kernel: Any, rank: int = 2, **options: Any) -> nn.Module:
    conv, do_conv = ORDINARY[rank - 1], DO_LAYERS[rank - 1]
    made = {"conv": conv, "do_conv": do_conv, "own": Own, "doubled": Doubled}
    return (made.get(kind) or BSCONVS.layers[kind, conv])(i, o, kernel, **options).eval()


def build(case: BSConvCase, dtype: str = "float32") -> nn.Module:
    options = options_of(case, WORDS["eps"]) | {"padding_mode": case.padding_mode}
    spec, padding = case.spec, tuple(before for before, _ in case.padding)
    return make(
        spec.variant, spec.in_channels, spec.out_channels, spec.kernel_size, spec.rank,
        stride=case.stride, padding=padding, dilation=case.dilation, bias=case.bias,
        dtype=getattr(torch, dtype), **options,
    )  # fmt: skip


def chain(*layers: Any, rank: int = 2) -> nn.Module:
    torch.manual_seed(0)
    found: list[nn.Module] = []
    for row in layers:
        found.append(found[row] if isinstance(row, int) else make(*row, rank=rank))
    return nn.Sequential(*found)


def described(network: Any, dtype: str = "float32", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return package.build(network, **options).to(getattr(torch, dtype)).eval()


def empty(network: Any) -> nn.Module:
    with torch.device("meta"):
        return package.build(network)


def round_trip(layer: nn.Module, new: nn.Module, x: Any, folder: Path) -> nn.Module:
    torch.save(layer.state_dict(), folder / "layer.pt")
    new.load_state_dict(torch.load(folder / "layer.pt", weights_only=True))
    return new


def forward(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return array(model.eval()(tensor(x)))


def gradients(
    model: nn.Module,
    x: np.ndarray,
    dy: np.ndarray,
    training: bool = False,
    composed: bool = False,
) -> Results:
    inputs = tensor(x).requires_grad_()
    output = (_by_kernel if composed else nn.Module.__call__)(model.train(training), inputs)
    output.backward(tensor(dy))
    return Results(array(output), array(inputs.grad), _gradients(model))


def _by_kernel(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[layer.rank - 1]
    return convolve(x, layer.composed_kernel(), layer.bias, layer.stride, 0, layer.dilation)


def penalty(model: nn.Module, alpha: float = 0.1) -> tuple[float, dict[str, np.ndarray]]:
    loss = package.orthonormality_loss(model, alpha)
    loss.backward()
    return loss.item(), _gradients(model)


def _gradients(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the gradients of the parameters, by their names in a state."""
    state = snapshot(package, model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    found = snapshot(package, model).arrays
    package.load_state(model, state)
    model.zero_grad()
    return found


def composed_kernel(layer: nn.Module) -> tuple[np.ndarray, str]:
    kernel = layer.composed_kernel()
    return array(kernel), str(kernel.dtype)


def is_ordinary(layer: nn.Module, form: str) -> bool:
    if form == "dense":
        return type(layer) in ORDINARY
    types = {type(module) for module in layer.modules()}
    if form == "merge":
        parts = list(layer._modules)
        return types <= {nn.Sequential, *ORDINARY} and parts == ["pointwise", "depthwise"]
    return types <= {nn.Sequential, *ORDINARY, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}


def dtypes(layer: nn.Module) -> set[str]:
    return {str(p.dtype).removeprefix("torch.") for p in layer.parameters()}


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _other(name: str, *arguments: Any, **options: Any) -> Any:
    return lambda made: setattr(made, name, nn.Conv2d(*arguments, **options))


def own_call(made: nn.Module) -> None:
    made.forward = made.forward


NOT_FOLDABLE = [
    (
        lambda made: made.pointwise1.register_forward_hook(lambda *_: None),
        "its pointwise1 has hooks, which would see other values; remove them first",
    ),
    (
        lambda made: setattr(made, "depthwise", Own(6, 6, 3, groups=6)),
        "its depthwise cannot be folded: it is a Own; expected a torch.nn.Conv2d",
    ),
    (
        lambda made: made.add_module("more", nn.ReLU()),
        "its parts are pointwise1, batch_norm1, .*, more; expected pointwise1",
    ),
    (_other("pointwise1", 8, 4, 1, stride=2), "pointwise1 is no pointwise convolution of stride 1"),
    (_other("pointwise1", 8, 4, 3), "its pointwise1 is no pointwise convolution of stride 1"),
    (own_call, "has a forward of its own"),
    (lambda made: made.train(), "batch_norm1 cannot be folded: in training mode; call mod"),
    (lambda made: made.depthwise.register_forward_hook(print), "its depthwise has hooks"),
]
