"""The networks of PyTorch: pytorchcv's, and this package's own."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from importlib import metadata

import numpy as np
import torch
from pytorchcv.model_provider import get_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo_check import SEED, Norm, Outputs, flat
from zoo_networks import Network

import doconv_torch
from doconv_core import Converted

ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DO = (doconv_torch.DOConv1d, doconv_torch.DOConv2d, doconv_torch.DOConv3d)
BSCONVS = (doconv_torch.BSConvU2d, doconv_torch.BSConvS2d)
BLOCKS = "doconv_torch.realize"  # the module of the networks' own blocks, which stay


def versions(network: Network) -> str:
    """Return what the table says about versions."""
    zoo = "" if network.own else f", pytorchcv {metadata.version('pytorchcv')}"
    return f"PyTorch {torch.__version__}{zoo}"


# What pytorchcv leaves as the memory was: zeros, or what was there before.
UNINITIALIZED = ("decoder.weight",)


def build(network: Network, seed: int) -> nn.Module:
    """Return the network with random weights, biases included."""
    _seed(seed)
    if network.own:
        model = doconv_torch.get_model(network.name, input_shape=network.shape, **network.options)
    else:
        model = get_model(network.name, pretrained=False, **network.options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name in UNINITIALIZED:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def settle(model: nn.Module, inputs: Sequence[np.ndarray]) -> None:
    """Give its batch norms the statistics of this batch."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    outputs(model, inputs, True)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def norms(model: nn.Module) -> list[Norm]:
    """Return the variables of its batch norms."""
    return [
        Norm(m.running_mean, m.running_var, m.weight, m.bias)
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]


def read(variable: torch.Tensor) -> np.ndarray:
    """Return a variable's value."""
    return variable.detach().numpy().copy()


def write(variable: torch.Tensor, value: np.ndarray) -> None:
    """Set a variable."""
    with torch.no_grad():
        variable.copy_(torch.from_numpy(value))


def outputs(model: nn.Module, inputs: Sequence[np.ndarray], training: bool) -> Outputs:
    """Return the outputs by their places; what is random begins from the seed each time."""
    _seed(SEED)
    model.train(training)
    with torch.no_grad():
        found = model(*map(torch.from_numpy, inputs))
    model.eval()
    return flat(found, read)


def step(model: nn.Module, inputs: Sequence[np.ndarray], targets: Outputs) -> float:
    """Take a step of gradient descent, its gradient clipped, and return the loss before it."""
    _seed(SEED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    found = flat(model(*map(torch.from_numpy, inputs)), lambda tensor: tensor)
    loss = sum(
        nn.functional.mse_loss(found[place], torch.from_numpy(target))
        for place, target in targets.items()
    )
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return loss.item()


def depthwise(model: nn.Module) -> list[torch.Tensor]:
    """Return every D of the model, each once."""
    layers = (m for m in model.modules() if isinstance(m, DO))
    return [m.depthwise_weight for m in layers if m.depthwise_weight is not None]


def ordinary(model: nn.Module) -> int:
    """Return how many ordinary convolutions of more than one tap it has, each once."""
    return sum(type(m) in ORDINARY and np.prod(m.kernel_size) > 1 for m in model.modules())


def bsconvs(model: nn.Module) -> int:
    """Return how many BSConv layers it has, each once."""
    return sum(isinstance(m, BSCONVS) for m in model.modules())


def parameters(model: nn.Module) -> int:
    """Return the number of its trainable numbers."""
    return sum(p.numel() for p in model.parameters())


def entries(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what it keeps, by names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def traces(model: nn.Module) -> list[str]:
    """Return the types of this package's layers in it that folding is to remove."""
    types = {type(m) for m in model.modules()}
    ours = (t for t in types if t.__module__.startswith("doconv") and t.__module__ != BLOCKS)
    return sorted(t.__qualname__ for t in ours)


def over_parameterize(model: nn.Module) -> Converted:
    """Over-parameterize it."""
    return doconv_torch.over_parameterize(model)


def fold(model: nn.Module, fuse_batchnorm: bool) -> Converted:
    """Fold it."""
    return doconv_torch.fold(model, fuse_batchnorm=fuse_batchnorm)


def release() -> None:
    """Free what is left of models that are gone."""
    gc.collect()


def _seed(seed: int) -> None:
    # Some networks drop paths by Python's or NumPy's random numbers.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
