"""Networks of PyTorch."""

from __future__ import annotations

import torch

import doconv_torch as package

__all__ = ["inference", "made", "package", "training"]


def made(network, **options):
    return package.build(network, **options)


def inference(model, x):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(x)).numpy()


def training(model, x, dy):
    """Return the output in training, and the gradients of `sum(output · dy)`, as a state's."""
    output = model.train()(torch.from_numpy(x))
    output.backward(torch.from_numpy(dy))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return output.detach().numpy(), package.export_state(model).arrays
