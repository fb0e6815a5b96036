"""Networks of PyTorch."""

from __future__ import annotations

import torch

import doconv_torch as package

__all__ = ["empty", "gradients", "inference", "made", "package", "trainable", "training"]


def made(network, **options):
    return package.build(network, **options)


def empty(network):
    """Return the network without values."""
    with torch.device("meta"):
        return package.build(network)


def trainable(model):
    """Return the number of what is trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def inference(model, x):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(x)).numpy()


def training(model, x, dy):
    return gradients(model, x, dy, training=True)


def gradients(model, x, dy, *, training):
    """Return the output, and the gradients of `sum(output · dy)`, as a state's."""
    output = model.train(training)(torch.from_numpy(x))
    model.zero_grad()
    output.backward(torch.from_numpy(dy))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return output.detach().numpy(), package.export_state(model).arrays
