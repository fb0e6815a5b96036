"""BSConv layers, models with them, and networks by name, in PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_models
from contract_bsconv import EPSILON, BSConvCase, Results
from torch import nn

import doconv_torch as package
from adapters.torch import ORDINARY, Own, array, tensor
from adapters.torch import LAYERS as DO_LAYERS
from doconv_core import Left
from doconv_core.kinds.bsconv_model import GROUPED, other_size
from doconv_torch.bsconv import LAYERS
from doconv_torch.layers import ATTRIBUTES

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
STATE_NAMES = {attribute: name for name, attribute in ATTRIBUTES.items() if name != "alpha"}
WORDS = {
    "stride": "stride", "padding": "padding", "eps": "eps", "wrong": "epsilon",
    "norms": "eps, momentum", "d": "d", "sequential": "Sequential", "call": "forward",
    "conv": "torch.nn.Conv2d", "module": "torch.nn.Module", "root": "Network",
}  # fmt: skip
DOUBLE, EXACT, FOUND = "float64", 1e-12, 1e-10
HALF_TYPES = ("float16", "bfloat16")
REFUSE_OWN_CALLS = ("keep", "merge", "dense")


def pads(case: BSConvCase) -> bool:
    return True


def build(case: BSConvCase, dtype: str = "float32") -> nn.Module:
    spec = case.spec
    options: dict[str, Any] = {"with_bn": spec.with_bn}
    if spec.with_bn:
        options["bn_options"] = {"eps": EPSILON}
    if spec.variant == "s":
        options |= {"p": spec.p, "min_mid_channels": spec.min_mid_channels}
    padding = tuple(before for before, _ in case.padding)
    return LAYERS[spec.variant, ORDINARY[spec.rank - 1]](
        spec.in_channels, spec.out_channels, spec.kernel_size, case.stride, padding, case.dilation,
        bias=case.bias, padding_mode=case.padding_mode, dtype=getattr(torch, dtype), **options,
    ).eval()  # fmt: skip


def round_trip(layer: nn.Module, case: BSConvCase, folder: Path) -> nn.Module:
    torch.save(layer.state_dict(), folder / "layer.pt")
    loaded = build(case)
    loaded.load_state_dict(torch.load(folder / "layer.pt", weights_only=True))
    return loaded


def forward(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return array(layer(tensor(x)))


def by_kernel(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the convolution of a padded input with the layer's composed kernel."""
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[layer.rank - 1]
    return convolve(x, layer.composed_kernel(), layer.bias, layer.stride, 0, layer.dilation)


def gradients(layer: nn.Module, x: np.ndarray, dy: np.ndarray, composed: bool = False) -> Results:
    inputs = tensor(x).requires_grad_()
    output = by_kernel(layer, inputs) if composed else layer(inputs)
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


def composed_kernel(layer: nn.Module) -> tuple[np.ndarray, str]:
    kernel = layer.composed_kernel()
    return array(kernel), str(kernel.dtype)


def is_ordinary(layer: nn.Module, form: str) -> bool:
    if form == "dense":
        return type(layer) in ORDINARY
    own = {nn.Sequential, *ORDINARY}
    types = {type(module) for module in layer.modules()}
    if form == "merge":
        return types <= own and parts(layer) == ["pointwise", "depthwise"]
    return types <= own | set(NORMS)


def dtypes(layer: nn.Module) -> set[str]:
    return {str(p.dtype).removeprefix("torch.") for p in layer.parameters()}


def penalty(model: nn.Module, layer: nn.Module, alpha: float) -> tuple[float, Any, Any]:
    """Return the loss, and its gradients of the pointwise weights of one layer of the model."""
    loss = package.orthonormality_loss(model, alpha)
    loss.backward()
    found = [getattr(layer, name).weight.grad for name in ("pointwise1", "pointwise2")]
    return loss.item(), *(None if g is None else array(g.flatten(1)) for g in found)


def _hooked(made: nn.Module) -> None:
    made.pointwise1.register_forward_hook(lambda *_: None)


def _subclassed(made: nn.Module) -> None:
    made.depthwise = Own(6, 6, 3, padding=1, groups=6)


def _strided(made: nn.Module) -> None:
    made.pointwise1 = nn.Conv2d(8, 4, 1, stride=2)


def _widened(made: nn.Module) -> None:
    made.pointwise1 = nn.Conv2d(8, 4, 3)


def own_call(made: nn.Module) -> None:
    made.forward = made.forward


# What may be done to a BSConv-S with batch norms, 8 channels to 6, and why it is then not folded.
NOT_FOLDABLE = [
    (_hooked, "its pointwise1 has hooks, which would see other values; remove them first"),
    (_subclassed, "its depthwise cannot be folded: it is a Own; expected a torch.nn.Conv2d"),
    (
        lambda made: made.add_module("more", nn.ReLU()),
        "its parts are pointwise1, batch_norm1, .*, more; expected pointwise1",
    ),
    (_strided, "its pointwise1 is no pointwise convolution of stride 1"),
    (_widened, "its pointwise1 is no pointwise convolution of stride 1"),
    (own_call, "has a forward of its own"),
    (lambda made: made.train(), "batch_norm1 cannot be folded: in training mode; call mod"),
    (lambda made: made.depthwise.register_forward_hook(print), "its depthwise has hooks"),
]


# Whole models.

REPLACED = ["stem.0", "stages.0.conv1", "head.mix"]
LEFT = (
    Left("stages.0.conv2", "Conv2d", other_size((1, 5))),
    Left("stages.1.conv1", "Conv2d", GROUPED),
    Left("stages.1.conv2", "Conv2d", other_size((1, 5))),
    Left("head.squeeze", "Conv2d", other_size((1, 1))),
)
IMAGES = (2, 3, 12, 12)
LAST = "head.mix"


class Doubled(package.BSConvU2d):
    """A BSConv that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def make(kind: str, i: int, o: int, kernel: int, rank: int = 2, **options: Any) -> nn.Module:
    """Return a layer that takes `i` channels and gives `o`."""
    made = {
        "conv": ORDINARY[rank - 1], "do_conv": DO_LAYERS[rank - 1], "own": Own, "doubled": Doubled,
        "u": LAYERS["u", ORDINARY[rank - 1]], "s": LAYERS["s", ORDINARY[rank - 1]],
    }  # fmt: skip
    return made[kind](i, o, kernel, **options)


built = make  # PyTorch's layers have values from the beginning


def dense() -> nn.Module:
    return nn.Linear(2, 2)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def chain(*layers: Any, rank: int = 2) -> nn.Module:
    """Return a model of layers, each as `make` takes it, or the number of an earlier one."""
    torch.manual_seed(0)
    found: list[nn.Module] = []
    for row in layers:
        found.append(found[row] if isinstance(row, int) else make(*row, rank=rank))
    return nn.Sequential(*found).eval()


def network() -> nn.Module:
    return torch_models.network().eval().double()


def converted(variant: str = "u", **options: Any) -> nn.Module:
    torch.manual_seed(4)
    model = package.to_bsconv(network(), variant, **options).model
    for module in model.modules():
        if isinstance(module, NORMS) and options.get("with_bn"):
            nn.init.uniform_(module.running_mean, 0.5, 2)
    return model


def at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def kinds(model: nn.Module) -> dict[str, str]:
    return torch_models.kinds(model)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def parts(layer: nn.Module) -> list[str]:
    return list(layer._modules)


def is_bare(model: nn.Module) -> bool:
    """Whether nothing of this package is left in the model."""
    return not any(type(module).__module__.startswith("doconv") for module in model.modules())


# Networks by name.


def described(network: Any, **options: Any) -> nn.Module:
    return package.build(network, **options)


def empty(network: Any) -> nn.Module:
    """Return the network without values."""
    with torch.device("meta"):
        return package.build(network)


def trainable(model: nn.Module) -> int:
    """Return the number of what is trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def inference(model: nn.Module, x: np.ndarray) -> np.ndarray:
    return forward(model.eval(), x)


def network_gradients(
    model: nn.Module, x: np.ndarray, dy: np.ndarray, *, training: bool
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the output, and the gradients of `sum(output · dy)`, as a state's."""
    output = model.train(training)(torch.from_numpy(x))
    model.zero_grad()
    output.backward(torch.from_numpy(dy))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return array(output), dict(package.export_state(model).arrays)
