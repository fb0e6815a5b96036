"""The contract in PyTorch: layers, chains of them, and networks by description."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contract import Case, Results, snapshot
from equal import as_array as array
from torch import nn

import doconv_torch as package
from doconv_torch.bsconv import BSCONVS

LAYERS = (package.DOConv1d, package.DOConv2d, package.DOConv3d)
ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
WORDS = {
    "stride": "stride", "dilation": "dilation", "out": "out_channels", "padding": "padding",
    "eps": "eps", "wrong": "epsilon", "norms": "eps, momentum", "d": "d",
    "sequential": "Sequential", "call": "forward", "conv": "torch.nn.Conv2d",
    "module": "torch.nn.Module", "root": "Network", "none": "Identity",
}  # fmt: skip
DOUBLE, EXACT = "float64", 1e-12
HALF_TYPES = ("float16", "bfloat16")
REFUSE_OWN_CALLS = ("keep", "merge", "dense")
types = {
    "conv": "Conv2d", "do_conv": "DOConv2d", "norm": "BatchNorm2d", "own": "Own",
    "transposed": "ConvTranspose2d",
}  # fmt: skip
copied, walk = copy.deepcopy, lambda model: dict(model.named_modules())


class Own(nn.Conv2d):
    """A convolution that may compute something else."""


class Doubled(package.BSConvU2d):
    """A BSConv that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class DoubledDO(package.DOConv2d):
    """A DO layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Shifted(package.DOConv2d):
    """A DO layer that computes something else in the convolution itself."""

    def _conv_forward(self, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        return super()._conv_forward(x, weight + 1, bias)


class Named(package.DOConv2d):
    """A DO layer that computes the same."""


OTHERS = {DoubledDO: "forward", Shifted: "forward"}


def pads(case: Case) -> bool:
    """Whether PyTorch's layer can pad like the case: alike on both sides, or "same"."""
    return case.symmetric or (set(case.stride) == {1} and case.padding == case.same_padding())


def make(kind: str, i: int, o: int, kernel: Any, rank: int = 2, **options: Any) -> nn.Module:
    if kind == "norm":
        return NORMS[rank - 1](i).eval()
    if kind == "relu":
        return nn.ReLU()
    if kind == "patched":
        conv = make("conv", i, o, kernel, rank, **options)
        conv.forward = conv.forward
        return conv
    conv = ORDINARY[rank - 1]
    cls = {
        "conv": conv, "do_conv": LAYERS[rank - 1], "own": Own, "doubled": Doubled,
        "transposed": nn.ConvTranspose2d,
    }.get(kind, kind)  # fmt: skip
    cls = BSCONVS.layers[kind, conv] if isinstance(cls, str) else cls
    return cls(i, o, kernel, **options).eval()


def build(case: Case, dtype: str = "float32", kind: str | None = None) -> nn.Module:
    spec, kind = case.spec, kind or case.kind
    padding = tuple(before for before, _ in case.padding) if case.symmetric else "same"
    return make(
        kind, spec.in_channels, spec.out_channels, spec.kernel_size, spec.rank,
        stride=case.stride, padding=padding, dilation=case.dilation, bias=case.bias,
        padding_mode=case.padding_mode, dtype=getattr(torch, dtype),
        **case.options(kind, WORDS["eps"]),
    )  # fmt: skip


def ordinary_type(case: Case) -> type:
    return ORDINARY[case.spec.rank - 1]


def dynamic(case: Any) -> nn.Module:
    spec = case.spec
    sizes = spec.in_channels, spec.out_channels, spec.kernel_size
    return package.DGConv2d(*sizes, **case.geometry, **case.sizes)


def lasso(model: nn.Module, x: np.ndarray, weight: float) -> float:
    model.train()(_in(model, x))
    return package.saliency_lasso(model, weight).item()


def take_over(case: Case, conv: nn.Module) -> nn.Module:
    multiplier = case.spec.depth_multiplier
    return LAYERS[case.spec.rank - 1].from_conv(conv, depth_multiplier=multiplier)


def chain(*layers: Any, rank: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    found: list[nn.Module] = []
    for row in layers:
        found.append(found[row] if isinstance(row, int) else make(*row, rank=rank, **options))
    return nn.Sequential(*found)


def described(network: Any, dtype: str = "float32", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return package.build(network, **options).to(getattr(torch, dtype)).eval()


def empty(network: Any) -> nn.Module:
    with torch.device("meta"):
        return package.build(network)


def round_trip(layer: nn.Module, new: nn.Module, x: Any, folder: Path) -> nn.Module:
    torch.save(layer.state_dict(), file := io.BytesIO())
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


def forward(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return array(model.eval()(_in(model, x)))


def gradients(
    model: nn.Module,
    x: np.ndarray,
    dy: np.ndarray,
    training: bool = False,
    composed: bool = False,
    lasso: float = 0.0,
) -> Results:
    inputs = _in(model, x).requires_grad_()
    output = (_by_kernel if composed else nn.Module.__call__)(model.train(training), inputs)
    if lasso:
        package.saliency_lasso(model, lasso).backward(retain_graph=True)
    output.backward(torch.from_numpy(dy.copy()).to(output.dtype))
    return Results(array(output), array(inputs.grad), _gradients(model))


def _in(model: nn.Module, x: np.ndarray) -> torch.Tensor:
    dtype = next((each.dtype for each in model.parameters()), torch.float32)
    return torch.from_numpy(x.copy()).to(dtype)


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


def descend(
    model: nn.Module, x: np.ndarray, target: np.ndarray, alpha: float, rates: Iterable[float]
) -> None:
    x, target = torch.from_numpy(x), torch.from_numpy(target)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.0)
    for optimizer.param_groups[0]["lr"] in rates:
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean() + package.orthonormality_loss(model, alpha)
        loss.backward()
        optimizer.step()


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
    return types <= {nn.Sequential, *ORDINARY, *NORMS}


def dtypes(layer: nn.Module) -> set[str]:
    return {str(p.dtype).removeprefix("torch.") for p in layer.parameters()}


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def entries(layer: nn.Module) -> dict[str, Any]:
    return dict(layer.named_parameters())


def freeze(parameter: Any) -> None:
    parameter.requires_grad_(False)


def is_trained(parameter: Any) -> bool:
    return parameter.requires_grad


def drawn_after(call: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    call()
    return torch.rand(3)


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
