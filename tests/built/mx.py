"""Networks of Gluon."""

from __future__ import annotations

from math import prod

# Before MXNet, which it makes importable.
import doconv_mx as package

# isort: split
import mxnet as mx
from mxnet import autograd
from mxnet.gluon import nn

__all__ = ["empty", "gradients", "inference", "made", "package", "trainable", "training"]


def made(network, **options):
    model = package.build(network, **options)
    model.initialize()
    return model


def empty(network):
    """Return the network without values."""
    return package.build(network)


def trainable(model):
    """Return the number of what is trained."""
    parameters = model.collect_params().values()
    return sum(prod(p.shape) for p in parameters if p.grad_req != "null")


def inference(model, x):
    return model(mx.nd.from_numpy(x.copy())).asnumpy()


def training(model, x, dy):
    return gradients(model, x, dy, training=True)


def gradients(model, x, dy, *, training):
    """Return the output, and the gradients of `sum(output · dy)`, as a state's."""
    _use_statistics(model, not training)
    with autograd.record():
        output = model(mx.nd.from_numpy(x.copy()))
    output.backward(mx.nd.from_numpy(dy.copy()))
    _use_statistics(model, False)
    for parameter in model.collect_params().values():
        if parameter.grad_req != "null":
            parameter.set_data(parameter.grad())
    return output.asnumpy(), package.export_state(model).arrays


def _use_statistics(model, use):
    """Let batch norms compute as in inference, or not, also where gradients are recorded.

    Instead of `record(train_mode=False)`, in which MXNet's max pooling has no right gradient.
    """

    def tell(block):
        if isinstance(block, nn.BatchNorm):
            block._kwargs["use_global_stats"] = use

    model.apply(tell)
