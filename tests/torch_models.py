"""Small PyTorch models with what real ones have: branches, sharing, batch norm, every rank."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn

import doconv_torch.composed
import doconv_torch.kernel_cache
from doconv_torch import DOConv2d


class Residual(nn.Module):
    """Two convolutions with batch norm, the input added; and a layer by its side."""

    def __init__(self, channels=8, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, (1, 5), padding="same", dilation=(1, 2))
        self.bn2 = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.drop(self.bn2(self.conv2(y))))


class Network(nn.Module):
    """Stem, stages in a list and in a dict, and a head; 3×12×12 images to 5 logits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)
        )
        self.stages = nn.ModuleList([Residual(), Residual(groups=8)])
        self.head = nn.ModuleDict({"squeeze": nn.Conv2d(8, 5, 1), "mix": nn.Conv2d(5, 5, 3)})

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head["mix"](self.head["squeeze"](x)).mean((2, 3))


def network(cls=Network, **options):
    """Return the model with weights and batch-norm statistics as after training."""
    torch.manual_seed(0)
    model = cls(**options)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for values in (module.running_mean, module.weight, module.bias):
                if values is not None:
                    nn.init.normal_(values, 0.5)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def images(count=2, **options):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1), **options)


def trained(model):
    """Give every D of the model values as after training; return the model."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("depthwise_weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def output(model, x=None):
    """Return the model's output, with the same random numbers each time."""
    torch.manual_seed(3)
    return model(images() if x is None else x)


# What `network()` has that can be over-parameterized.
REPLACED = [
    "stem.0", "stages.0.conv1", "stages.0.conv2", "stages.1.conv1", "stages.1.conv2", "head.mix",
]  # fmt: skip


def kinds(model):
    return {path: type(module).__name__ for path, module in model.named_modules()}


def layer(multiplier=None, groups=2, **options):
    """Return a layer that can be called on its own output."""
    options = {"dtype": torch.float64, **options}
    torch.manual_seed(0)
    made = DOConv2d(4, 4, 3, padding=1, groups=groups, depth_multiplier=multiplier, **options)
    nn.init.normal_(made.depthwise_weight, std=0.3)
    return made


def batch(seed=1, **options):
    options = {"dtype": torch.float64, **options}
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed), **options)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def compositions():
    """Count how often a layer composes its kernel for a forward pass."""
    calls = []
    places = (doconv_torch.kernel_cache, "compose"), (doconv_torch.composed, "convolve")
    with ExitStack() as stack:
        for module, name in places:
            original = getattr(module, name)

            def counted(*arguments, original=original):
                calls.append(arguments)
                return original(*arguments)

            stack.enter_context(patch.object(module, name, counted))
        yield calls
