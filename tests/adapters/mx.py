"""The contract's cases in MXNet Gluon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import doconv_mx  # before MXNet, which it makes importable

# isort: split
import mxnet as mx
import numpy as np
from contract import Case, Problem, Results
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

LAYERS = (doconv_mx.DOConv1D, doconv_mx.DOConv2D, doconv_mx.DOConv3D)
ORDINARY = (nn.Conv1D, nn.Conv2D, nn.Conv3D)


def pads(case: Case) -> bool:
    """Whether Gluon's layer can pad like the case: with zeros, alike on both sides."""
    return case.symmetric and case.padding_mode == "zeros"


def arguments(case: Case) -> dict[str, Any]:
    """Return the constructor's arguments, the same for both layers."""
    return {
        "in_channels": case.spec.in_channels,
        "channels": case.spec.out_channels,
        "kernel_size": case.spec.kernel_size,
        "strides": case.stride,
        "padding": tuple(before for before, _ in case.padding),
        "dilation": case.dilation,
        "groups": case.spec.groups,
        "use_bias": case.bias,
    }


def ordinary_type(case: Case) -> type:
    return ORDINARY[case.spec.rank - 1]


def empty(case: Case, dtype: str) -> HybridBlock:
    options = {"depth_multiplier": case.spec.depth_multiplier}
    layer = LAYERS[case.spec.rank - 1](**arguments(case), **options)
    layer.cast(dtype)
    layer.initialize()
    return layer


def build(case: Case, problem: Problem, dtype: str) -> HybridBlock:
    layer = empty(case, dtype)
    layer.weight.set_data(problem.weight.reshape(layer.weight.shape))
    if problem.depthwise is not None:
        layer.depthwise_weight.set_data(problem.depthwise)
    if problem.bias is not None:
        layer.bias.set_data(problem.bias)
    return layer


def ordinary(case: Case, kernel: np.ndarray, bias: np.ndarray | None) -> HybridBlock:
    layer = ordinary_type(case)(**arguments(case))
    layer.initialize()
    layer.weight.set_data(kernel)
    if bias is not None:
        layer.bias.set_data(bias)
    return layer


def forward(layer: HybridBlock, x: np.ndarray) -> np.ndarray:
    return call(layer, array(x)).asnumpy()


def gradients(layer: HybridBlock, x: np.ndarray, dy: np.ndarray) -> Results:
    inputs = array(x)
    inputs.attach_grad()
    with autograd.record():
        output = call(layer, inputs)
    output.backward(array(dy))
    d, b = layer.depthwise_weight, layer.bias
    return Results(
        output.asnumpy(),
        inputs.grad.asnumpy(),
        layer.weight.grad().asnumpy().reshape(layer.spec.weight_shape),
        None if d is None else d.grad().asnumpy(),
        None if b is None else b.grad().asnumpy(),
    )


def call(layer: HybridBlock, x: mx.nd.NDArray) -> mx.nd.NDArray:
    """Return the layer's output; in float16, of which MXNet's CPU computes no convolution at all,
    that of the kernel composed by the layer in float16, convolved in float32 and rounded.
    """
    if x.dtype != np.float16:
        return layer(x)
    kernel = layer.composed_kernel() if hasattr(layer, "composed_kernel") else layer.weight.data()
    given = (x, kernel) if layer.bias is None else (x, kernel, layer.bias.data())
    return mx.nd.Convolution(*(a.astype("float32") for a in given), **layer._kwargs).astype(x.dtype)


def composed_kernel(layer: HybridBlock) -> np.ndarray:
    return layer.composed_kernel().asnumpy()


def round_trip(layer: HybridBlock, case: Case, folder: Path) -> HybridBlock:
    file = str(folder / "layer.params")
    layer.save_parameters(file)
    loaded = empty(case, layer.weight.data().asnumpy().dtype.name)
    loaded.load_parameters(file)
    return loaded


def state(layer: HybridBlock) -> dict[str, np.ndarray]:
    return dict(doconv_mx.export_state(layer).arrays)


package = doconv_mx
types = {
    "conv": "Conv2D", "do_conv": "DOConv2D", "norm": "BatchNorm", "own": "Own",
    "transposed": "Conv2DTranspose",
}  # fmt: skip


class Own(nn.Conv2D):
    """A convolution that may compute something else."""


def network(kinds: dict[str, str]) -> HybridBlock:
    made = {
        "conv": lambda: nn.Conv2D(4, 3, in_channels=4),
        "pointwise": lambda: nn.Conv2D(4, 1, in_channels=4),
        "do_conv": lambda: doconv_mx.DOConv2D(4, 4, 3),
        "own": lambda: Own(4, 3, in_channels=4),
        "transposed": lambda: nn.Conv2DTranspose(4, 3, in_channels=4),
        "patched": patched,
        "norm": lambda: nn.BatchNorm(in_channels=4),
        "relu": lambda: nn.Activation("relu"),
    }
    model = nn.HybridSequential()
    for name, kind in kinds.items():
        model.register_child(made[kind](), name)
    model.initialize()
    return model


def patched() -> HybridBlock:
    conv = nn.Conv2D(4, 3, in_channels=4)
    conv.hybrid_forward = conv.hybrid_forward
    return conv


def array(values: np.ndarray) -> mx.nd.NDArray:
    # Not mx.nd.array, which uses names that SciPy has deprecated.
    return mx.nd.from_numpy(np.array(values, order="C"))
