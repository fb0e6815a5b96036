"""Networks of Gluon."""

from __future__ import annotations

# Before MXNet, which it makes importable.
import doconv_mx as package

# isort: split
import mxnet as mx
from mxnet import autograd

__all__ = ["inference", "made", "package", "training"]


def made(network, **options):
    model = package.build(network, **options)
    model.initialize()
    return model


def inference(model, x):
    return model(mx.nd.from_numpy(x.copy())).asnumpy()


def training(model, x, dy):
    """Return the output in training, and the gradients of `sum(output · dy)`, as a state's."""
    with autograd.record():
        output = model(mx.nd.from_numpy(x.copy()))
    output.backward(mx.nd.from_numpy(dy.copy()))
    for parameter in model.collect_params().values():
        if parameter.grad_req != "null":
            parameter.set_data(parameter.grad())
    return output.asnumpy(), package.export_state(model).arrays
