"""The comparison's problem in PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from compare_problem import (
    CONVOLUTIONS,
    LEARNING_RATE,
    LINEAR,
    MOMENTUM,
    WEIGHT_DECAY,
    Answer,
    Problem,
)

from doconv_torch import DOConv2d, export_state, load_state

# isort: split
import torch
from torch import nn
from torch.nn import functional as F


def network() -> nn.Sequential:
    """Return the problem's network: `(B, 1, 28, 28)` images to `(B, 10)` logits."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, spec, stride, padding in CONVOLUTIONS:
        layers[name] = DOConv2d(
            spec.in_channels, spec.out_channels, spec.kernel_size, stride, padding,
            groups=spec.groups, depth_multiplier=spec.depth_multiplier,
        )  # fmt: skip
        layers[f"{name}_tanh"] = nn.Tanh()
    layers["flatten"] = nn.Flatten()
    layers["linear"] = nn.Linear(LINEAR.in_features, LINEAR.out_features)
    return nn.Sequential(layers)


def fold(model: nn.Sequential) -> nn.Sequential:
    """Return the network with ordinary convolutions."""
    return nn.Sequential(
        OrderedDict(
            (name, layer.fold() if isinstance(layer, DOConv2d) else layer)
            for name, layer in model.named_children()
        )
    )


def run(problem: Problem, ticks: Any = None) -> Answer:
    """Return PyTorch's answer. `ticks` is iterated over, one step of training for each."""
    model = network()
    load_state(model, problem.state)
    images, labels = torch.from_numpy(problem.images), torch.from_numpy(problem.labels)
    test_images = torch.from_numpy(problem.test_images)
    with torch.no_grad():
        output = model(test_images).numpy()
        folded_output = fold(model)(test_images).numpy()
    x = images[0].clone().requires_grad_()
    F.cross_entropy(model(x), labels[0]).backward()
    forms = problem.state.layers
    gradients = {
        name: p.grad.numpy().reshape(_shape(forms, name)).copy()
        for name, p in model.named_parameters()
    }
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    losses = []
    for step in ticks or range(len(images)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[step]), labels[step])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Answer(
        output,
        folded_output,
        x.grad.numpy(),
        gradients,
        np.array(losses),
        dict(export_state(fold(model)).arrays),
        dict(export_state(model).arrays),
    )


def _shape(forms: Any, name: str) -> tuple[int, ...]:
    path, _, entry = name.rpartition(".")
    return forms[path].shapes[entry]
