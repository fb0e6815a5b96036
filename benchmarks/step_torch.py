"""What `training_step.py` measures in PyTorch. Run by it, in a process of its own."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorchcv import model_provider
from step_cases import TUTORIAL, LayerCase, ModelCase
from step_measure import Row, figure, measure
from torch import Tensor, nn

from doconv_torch import (
    DOConv1d,
    DOConv2d,
    DOConv3d,
    composed_once,
    fold,
    get_model,
    over_parameterize,
    verify,
)

NAME = "PyTorch"
CONVS = {1: (nn.Conv1d, DOConv1d), 2: (nn.Conv2d, DOConv2d), 3: (nn.Conv3d, DOConv3d)}
NETWORKS = {
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "MobileNetV2": "mobilenetv2_w1",
    "ResNet-152": "resnet152",
}
LARGEST = "ResNet-152"


def version() -> str:
    """Return the framework's version."""
    return f"PyTorch {torch.__version__}"


def network(name: str, size: int) -> nn.Module:
    """Return an ordinary network for images of this size."""
    if name == TUTORIAL:
        shape = (3, size, size)
        return get_model(name, num_classes=1000, in_channels=3, input_shape=shape)
    model = model_provider.get_model(NETWORKS[name])
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def formula(weight: Tensor, depthwise: Tensor, groups: int) -> Tensor:
    """Return the kernel by the plain formula: the identity added to D, and one einsum."""
    taps = depthwise.shape[1]
    w = weight.view(groups, -1, weight.shape[1], taps)
    d = (depthwise + torch.eye(taps)).view(groups, -1, taps, taps)
    return torch.einsum("gims,gois->goim", d, w).reshape(weight.shape)


def by_formula(model: nn.Module) -> nn.Module:
    """Return the model with the plain formula in its DO layers."""
    for layer in model.modules():
        if isinstance(layer, (DOConv1d, DOConv2d, DOConv3d)):
            layer.composed_kernel = _formula_of(layer)
    return model


def _formula_of(layer: Any) -> Callable[[], Tensor]:
    return lambda: formula(layer.weight, layer.depthwise_weight, layer.groups)


def moved(model: nn.Module) -> nn.Module:
    """Return the model with a D that is not zero, as after some training."""
    for name, value in model.named_parameters():
        if name.endswith("depthwise_weight"):
            nn.init.normal_(value, std=0.02)
    return model


def layers(cases: Iterable[LayerCase], patience: float) -> Iterable[Row]:
    """Yield a row for each layer: forward and backward, the input's gradient too."""
    for case in cases:
        plain, ours = (_layer(cls, case) for cls in CONVS[case.rank])
        yardstick = by_formula(copy.deepcopy(moved(ours)))
        x = torch.randn(case.batch, case.in_channels, *(case.size,) * case.rank, requires_grad=True)
        gradient = torch.randn_like(plain(x))
        ways = {
            name: _layer_step(layer, x, gradient)
            for name, layer in (("plain", plain), ("formula", yardstick), ("ours", ours))
        }
        yield measure(NAME, "layer", case.name, ways, patience)


def _layer(cls: type[nn.Module], case: LayerCase) -> nn.Module:
    torch.manual_seed(0)
    return cls(
        case.in_channels, case.out_channels, case.kernel, padding=case.kernel // 2,
        groups=case.groups, bias=False,
    )  # fmt: skip


def _layer_step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(gradient)

    return step


def models(cases: Iterable[ModelCase], patience: float) -> Iterable[Row]:
    """Yield a row for each network: a training step with SGD and momentum."""
    for case in cases:
        plain = network(case.network, case.size)
        ours = moved(over_parameterize(plain)[0])
        named = {"plain": plain, "formula": by_formula(copy.deepcopy(ours)), "ours": ours}
        ways = {name: _model_step(model, case) for name, model in named.items()}
        yield measure(NAME, "training step", case.name, ways, patience)


def _model_step(model: nn.Module, case: ModelCase) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4, momentum=0.9)
    x = torch.randn(case.batch, 3, case.size, case.size)
    labels = torch.randint(1000, (case.batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def compositions(kernels: Iterable[tuple[int, int]], patience: float) -> Iterable[Row]:
    """Yield a row for each kernel: composing it, forward and backward, and its floor.

    The floor is the time to stream W, the kernel and their gradients once each: to read two of
    them and write the two others.
    """
    for channels_in, channels_out in kernels:
        ours = moved(DOConv2d(channels_in, channels_out, 3, bias=False))
        yardstick = by_formula(copy.deepcopy(ours))
        gradient = torch.randn_like(ours.weight)
        kernel = torch.empty_like(gradient)
        weight, weight_gradient = torch.randn_like(gradient), torch.empty_like(gradient)

        def stream(pairs: Any = ((kernel, weight), (weight_gradient, gradient))) -> None:
            for to, source in pairs:
                to.copy_(source)

        ways = {
            "formula": _composition(yardstick, gradient),
            "ours": _composition(ours, gradient),
            "floor": stream,
        }
        name = f"3×3, {channels_in}→{channels_out}"
        yield measure(NAME, "composition alone", name, ways, patience)


def _composition(layer: Any, gradient: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer.zero_grad()
        layer.composed_kernel().backward(gradient)

    return step


def inference(case: ModelCase, patience: float) -> Iterable[Row]:
    """Yield rows for the folded network, and for the unfolded one evaluated."""
    plain = network(case.network, case.size).eval()
    ours = moved(over_parameterize(plain)[0])
    folded, _ = fold(ours)
    x = torch.randn(case.batch, 3, case.size, case.size)

    def without_gradient(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                model(x)

        return call

    with composed_once(ours):
        ways = {"plain": plain, "folded": folded, "unfolded, composed_once": ours}
        calls = {name: without_gradient(model) for name, model in ways.items()}
        yield measure(NAME, "inference", case.name, calls, patience)


def memory(case: ModelCase) -> Row:
    """Return the largest number of bytes that tensors hold in a training step."""
    plain = network(case.network, case.size)
    bytes_of = {}
    named = {"plain": lambda: plain, "formula": lambda: by_formula(over_parameterize(plain)[0]),
             "ours": lambda: over_parameterize(plain)[0]}  # fmt: skip
    for name, make in named.items():
        step = _model_step(make(), case)
        step()
        gc.collect()
        bytes_of[name] = peak(step)
    return figure(NAME, "peak memory of a step", case.name, **bytes_of)


def peak(function: Callable[[], Any]) -> int:
    """Return how many bytes more than before PyTorch's tensors hold, at most, while it runs."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def tools() -> Iterable[Row]:
    """Yield what the whole-model tools take on the largest network: seconds, and bytes."""
    plain = network(LARGEST, 224)
    size = sum(value.nbytes for value in plain.state_dict().values())
    model, _ = over_parameterize(plain)
    begin = time.perf_counter()
    over_parameterize(plain)
    middle = time.perf_counter()
    folded, _ = fold(model.eval())
    end = time.perf_counter()
    assert verify(folded, model, torch.rand(1, 3, 64, 64)).absolute == 0
    yield figure(NAME, "over_parameterize, seconds", LARGEST, ours=middle - begin)
    yield figure(NAME, "fold, seconds", LARGEST, ours=end - middle)
    bytes_of = {"model": size, "over_parameterize": peak(lambda: over_parameterize(plain)),
                "fold": peak(lambda: fold(model))}  # fmt: skip
    yield figure(NAME, "tools, bytes", LARGEST, **bytes_of)
