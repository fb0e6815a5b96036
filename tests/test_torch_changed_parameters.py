"""What users do to W and D after a layer was made: the right kernel, or an error, and no crash."""

from __future__ import annotations

import numpy as np
import pytest
from equal import assert_close
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from doconv_core import ConvSpec, compose  # noqa: E402
from doconv_torch import DOConv2d  # noqa: E402

# The compiled form, that of a channel by itself, matrix products, and S above M.
LAYERS = {
    "compiled": {},
    "depthwise": {"groups": 8},
    "5x5": {"kernel_size": 5, "padding": 2},
    "7x7": {"kernel_size": 7, "padding": 3},
    "groups": {"groups": 2},
    "large S": {"depth_multiplier": 12},
    "many": {"in_channels": 64, "out_channels": 96},
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def made(name):
    torch.manual_seed(0)
    options = {"in_channels": 8, "out_channels": 8, "kernel_size": 3, "padding": 1, **LAYERS[name]}
    layer = DOConv2d(**options)
    nn.init.normal_(layer.depthwise_weight, std=0.3)
    return layer


def kernel_of(layer, groups):
    """Return the core's kernel of the layer's parameters as they are, in float64."""
    weight, depthwise = (
        p.detach().double().numpy() for p in (layer.weight, layer.depthwise_weight)
    )
    outputs, inputs = len(weight), len(depthwise)
    multiplier = depthwise.shape[2]
    spec = ConvSpec(inputs, outputs, layer.kernel_size, groups, multiplier)
    return compose(weight.reshape(spec.weight_shape), depthwise, spec)


def check(layer, tolerance=1e-5):
    """Compare the output, the gradients and the folded layer with the core's kernel."""
    groups, channels = layer.groups, len(layer.depthwise_weight)
    torch.manual_seed(1)
    x = torch.randn(2, channels, 6, 6, dtype=layer.weight.dtype)
    expected = torch.tensor(kernel_of(layer, groups)).to(x.dtype)
    options = layer.stride, layer.padding, layer.dilation, groups
    output = layer(x)
    convolved = nn.functional.conv2d(x, expected, layer.bias, *options)
    assert_close(output, convolved, tolerance)
    plain = layer.weight.new_tensor(kernel_of(layer, groups)).requires_grad_()
    nn.functional.conv2d(x, plain, layer.bias, *options).square().sum().backward()
    output.square().sum().backward()
    # The kernel's gradient, through (E + D), is W's; through W it is D's.
    weight, depthwise = (p.detach().double() for p in (layer.weight, layer.depthwise_weight))
    weight.requires_grad_(), depthwise.requires_grad_()
    composed(weight, depthwise, layer, groups).backward(plain.grad.double())
    assert_close(layer.weight.grad, weight.grad, 10 * tolerance)
    assert_close(layer.depthwise_weight.grad, depthwise.grad, 10 * tolerance)
    assert layer.weight.grad.dtype == layer.weight.dtype
    folded = layer.fold()
    assert folded.weight.shape == expected.shape
    assert (folded.out_channels, folded.in_channels) == (len(expected), channels)
    assert_close(folded(x), output, tolerance)


def composed(weight, depthwise, layer, groups):
    """Return the plain formula: `K = (E + D)·W`, of float64."""
    inputs, taps, multiplier = depthwise.shape
    eye = torch.zeros(taps, multiplier, dtype=torch.float64)
    for s in range(multiplier // taps * taps):
        eye[s % taps, s] = 1
    w = weight.reshape(groups, -1, inputs // groups, multiplier)
    d = (eye + depthwise).reshape(groups, inputs // groups, taps, multiplier)
    kernel = torch.einsum("gois,gims->goim", w, d)
    return kernel.reshape(len(weight), inputs // groups, *layer.kernel_size)


def put(layer, **values):
    for name, value in values.items():
        setattr(layer, name, nn.Parameter(value.detach().clone()))


@each_layer
def test_output_channels_are_pruned(name):
    layer = made(name)
    kept = len(layer.weight) - layer.groups
    if name == "depthwise":
        put(layer, weight=layer.weight[:7])
        with pytest.raises(ValueError, match="received W"):
            layer(torch.randn(1, 8, 6, 6))
        return
    put(layer, weight=layer.weight[:kept], bias=layer.bias[:kept])
    check(layer)


@each_layer
def test_input_channels_are_pruned(name):
    layer = made(name)
    per_group = layer.weight.shape[1]
    if per_group == 1:
        layer = made("compiled")
        per_group = 8
    kept = per_group - 1
    groups = layer.groups
    d = layer.depthwise_weight.unflatten(0, (groups, per_group))[:, :kept].flatten(0, 1)
    put(layer, weight=layer.weight[:, :kept], depthwise_weight=d)
    check(layer)


@each_layer
@pytest.mark.parametrize("change", ["W", "D", "both"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_one_of_the_two_or_both_are_cast(name, change, dtype):
    layer = made(name)
    if change in ("W", "both"):
        put(layer, weight=layer.weight.to(dtype), bias=layer.bias.to(dtype))
    if change in ("D", "both"):
        put(layer, depthwise_weight=layer.depthwise_weight.to(dtype))
    exact = layer.weight.dtype.itemsize >= 4 and layer.depthwise_weight.dtype.itemsize >= 4
    check(layer, 1e-5 if exact else {torch.bfloat16: 4e-2}.get(dtype, 4e-3))


@each_layer
def test_memory_lies_otherwise(name):
    layer = made(name)
    transposed = layer.weight.detach().transpose(0, 1).contiguous().transpose(0, 1)
    layer.weight = nn.Parameter(transposed)
    layer.depthwise_weight = nn.Parameter(layer.depthwise_weight.detach()[:1].expand_as(
        layer.depthwise_weight))  # fmt: skip
    check(layer)


def test_w_and_d_are_of_one_memory():
    layer = made("depthwise")
    shared = torch.randn(8 * 9 * 9)
    layer.weight = nn.Parameter(shared[:72].view(8, 1, 3, 3))
    layer.depthwise_weight = nn.Parameter(shared.view(8, 9, 9))
    check(layer)


@each_layer
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"weight": torch.empty(0)}, ValueError, r"received W \(0,\) and D "),
        ({"depthwise_weight": torch.empty(0)}, ValueError, r"and D \(0,\)"),
        ({"depthwise_weight": torch.empty(3, 9, 9)}, ValueError, r"and D \(3, 9, 9\)"),
    ],
)
def test_what_gives_no_kernel_is_refused(name, values, error, message):
    layer = made(name)
    for key, value in values.items():
        getattr(layer, key).data = value
    x = torch.randn(1, layer.in_channels, 6, 6)
    for call in (lambda: layer(x), layer.composed_kernel, layer.fold):
        with pytest.raises(error, match=message):
            call()
    with torch.no_grad(), pytest.raises(error, match=message):
        layer(x)


@each_layer
def test_one_of_the_two_is_moved(name):
    layer = made(name)
    put(layer, depthwise_weight=layer.depthwise_weight.to("meta"))
    x = torch.randn(1, layer.in_channels, 6, 6)
    for call in (lambda: layer(x), layer.fold):
        with pytest.raises(ValueError, match="received W on cpu and D on meta"):
            call()


@pytest.mark.parametrize("name", ["compiled", "depthwise", "many"])
@pytest.mark.parametrize("size", [6, 40])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.weight, "data", torch.empty(0)),
        lambda layer: setattr(layer.depthwise_weight, "data", torch.empty(0)),
        lambda layer: setattr(layer.weight, "data", layer.weight.data[:7]),
        lambda layer: layer.weight.untyped_storage().resize_(0),
        lambda layer: layer.depthwise_weight.untyped_storage().resize_(0),
    ],
)
def test_what_changes_before_the_backward_pass_is_an_error(name, size, change):
    layer = made(name)
    output = layer(torch.randn(2, layer.in_channels, size, size)).sum()
    change(layer)
    with pytest.raises((RuntimeError, ValueError)):
        output.backward()


@pytest.mark.parametrize("name", ["compiled", "5x5", "large S"])
@pytest.mark.parametrize("geometry", [{"stride": 2}, {"padding": 1}, {"dilation": [2, 1]}])
def test_geometry_is_assigned(name, geometry):
    layer = made(name)
    for attribute, value in geometry.items():
        setattr(layer, attribute, value)
    check(layer)


def test_groups_that_are_not_those_of_the_kernel_are_what_pytorch_makes_of_them():
    layer = made("compiled")
    layer.groups = 2
    for training in (True, False):
        with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match="groups=2"):
            layer(torch.randn(1, 8, 6, 6))


@pytest.mark.parametrize("name", ["compiled", "large S"])
@pytest.mark.parametrize("missing", ["weight", "depthwise_weight"])
def test_one_of_the_two_is_none(name, missing):
    layer, x = made(name), torch.randn(1, 8, 6, 6)
    setattr(layer, missing, None)
    if (name, missing) == ("compiled", "depthwise_weight"):  # then W is the kernel
        assert torch.equal(layer(x), layer.fold()(x))
        return
    with pytest.raises(TypeError, match=r"must be tensors; received W of type .*NoneType"):
        layer(x)


def test_memory_that_was_freed_is_told():
    layer = made("compiled")
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"received \(8, 8, 3, 3\) .* with 0 in memory"):
        layer(torch.randn(1, 8, 6, 6))


def test_numbers_stay_right_after_an_error():
    layer, x = made("compiled"), np.float32(1)
    before = layer.weight.detach().clone()
    layer.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="received W"):
        layer(torch.full((1, 8, 6, 6), float(x)))
    layer.weight.data = before
    check(layer)
