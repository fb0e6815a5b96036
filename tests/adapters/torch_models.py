"""The contract's whole models in PyTorch."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_contract import Again, Layer, Net
from torch import nn

import doconv_torch as package
from adapters.torch import LAYERS, ORDINARY, Own, types

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

__all__ = ["package", "types"]
types = types | {"own_norm": "OwnNorm", "doubled": "Doubled", "named": "Named"}
exact = True


class OwnNorm(nn.BatchNorm2d):
    """A batch norm that may compute something else."""


class Doubled(package.DOConv2d):
    """A layer that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(package.DOConv2d):
    """A layer that computes the same."""


class Model(nn.Module):
    """A model of a description."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net
        for name, each in net.layers.items():
            made = self.get_submodule(each.of) if isinstance(each, Again) else _made(each)
            self.add_module(name, made)
            if isinstance(each, Layer) and each.tied:
                made.weight = self.get_submodule(each.tied).weight

    def forward(self, x):
        return self.net.run(lambda name, *given: self._modules[name](*given), x)


def _made(each: Any) -> nn.Module:
    if isinstance(each, dict):
        chain = nn.Sequential()
        for name, part in each.items():
            chain.add_module(name, _made(part))
        return chain
    rank, options = each.rank - 1, dict(each.options)
    if each.kind in ("norm", "own_norm", "patched_norm"):
        options = {"eps": options.pop("epsilon", 1e-5), **options}
        layer = (OwnNorm if each.kind == "own_norm" else NORMS[rank])(each.to, **options)
        return patched(layer) if each.kind == "patched_norm" else layer
    if each.kind in ("relu", "dropout", "flatten", "linear"):
        return {
            "relu": nn.ReLU, "dropout": lambda: nn.Dropout(0.3), "flatten": nn.Flatten,
            "linear": lambda: nn.Linear(each.of, each.to, each.bias),
        }[each.kind]()  # fmt: skip
    cls = {
        "conv": ORDINARY[rank], "do_conv": LAYERS[rank], "transposed": TRANSPOSED[rank], "own": Own,
        "patched": ORDINARY[rank], "doubled": Doubled, "named": Named, "do_patched": LAYERS[rank],
    }[each.kind]  # fmt: skip
    if each.multiplier:
        options["depth_multiplier"] = each.multiplier
    made = cls(
        each.of, each.to, each.kernel_size, each.stride, each.padding, groups=each.groups,
        bias=each.bias, **options,
    )  # fmt: skip
    return patched(made) if "patched" in each.kind else made


def patched(layer: nn.Module) -> nn.Module:
    layer.forward = layer.forward
    return layer


def build(net: Net, mode: str = "", dtype: str = "float32") -> nn.Module:
    torch.manual_seed(0)
    return _valued(Model(net)).to(getattr(torch, dtype))


def layer(each: Layer, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    return _valued(_made(each))


def _valued(model: nn.Module) -> nn.Module:
    for name, values in model.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(values, 0.5, 2)
        elif values.is_floating_point() and ("running" in name or values.ndim == 1):
            nn.init.normal_(values, 0.5, 0.5)
    return model.eval()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules())


def outputs(model: nn.Module, x: np.ndarray, training: bool = False) -> list[np.ndarray]:
    torch.manual_seed(3)
    modes = [m.training for m in model.modules()]
    model.train(training)
    with torch.no_grad():
        found = model(array(x).to(next(model.parameters()).dtype))
    for each, mode in zip(model.modules(), modes, strict=True):
        each.training = mode
    found = found if isinstance(found, tuple) else (found,)
    return [(each.float() if each.dtype.itemsize < 4 else each).numpy() for each in found]


def values(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().clone().numpy() for name, value in identities(model).items()}


def identities(model: nn.Module) -> dict[str, Any]:
    state = model.state_dict(keep_vars=True).items()
    return {name: value for name, value in state if not name.endswith("batches_tracked")}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("depthwise_weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model: nn.Module, x: np.ndarray) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = model.train()(array(x))
    sum(
        each.square().sum() for each in (found if isinstance(found, tuple) else (found,))
    ).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def save(model: nn.Module, folder: Path) -> bytes:
    torch.save(model, folder / "model.pt")
    return (folder / "model.pt").read_bytes() + pickle.dumps(model)


def load(model: nn.Module, folder: Path) -> None:
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=False).state_dict())


def array(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values))


class Returning(nn.Module):
    """A model that returns what a function does."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


returning = Returning
