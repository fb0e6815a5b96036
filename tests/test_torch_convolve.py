"""The convolution that takes less memory: it is exact, and when it is taken."""

from __future__ import annotations

import copy

import pytest
from cases import one_test
from frameworks import need

need("torch")

import torch  # noqa: E402
from test_torch_compose import need_compiled  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from doconv_torch import DOConv1d, DOConv2d, DOConv3d, composed_once  # noqa: E402

TAKEN = "_ConvolutionBackward"
CASES = {
    "strides": (DOConv2d, (4, 6, 32, 33), {"padding": (1, 0), "stride": (2, 1)}),
    "groups": (DOConv2d, (4, 6, 24, 24), {"padding": 1, "groups": 3, "bias": False}),
    "dilation": (DOConv2d, (4, 6, 24, 24), {"dilation": 2}),
    "depthwise": (DOConv2d, (4, 9, 24, 24), {"padding": 1, "groups": 9}),
    "few": (DOConv2d, (1, 6, 8, 8), {}),  # so few positions that the kernel is kept
    "1d": (DOConv1d, (8, 6, 400), {"padding": 1}),
    "3d": (DOConv3d, (4, 6, 12, 12, 12), {"padding": 1}),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _compiled():
    need_compiled()


def built(case):
    """Return a layer, its copy that composes and convolves separately, and an input."""
    torch.manual_seed(0)
    cls, shape, options = case
    layer = cls(shape[1], 9, 3, **options)
    nn.init.normal_(layer.depthwise_weight, std=0.3)
    other = copy.deepcopy(layer)
    other.composed_kernel = lambda: cls.composed_kernel(other)
    return layer, other, torch.randn(shape)


def kind(output):
    return type(output.grad_fn).__name__


@one_test
@EVERY_CASE
@pytest.mark.parametrize("frozen", ["", "x", "weight", "depthwise_weight", "bias", "weight bias"])
def test_values_and_gradients_are_the_same_bit_for_bit(case, frozen):
    *layers, x = built(case)
    inputs, outputs = [], []
    for layer in layers:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name not in frozen.split())
        inputs.append(x.clone().requires_grad_(frozen != "x"))
        outputs.append(layer(inputs[-1]))
    assert kind(outputs[0]) == TAKEN != kind(outputs[1])
    assert torch.equal(*outputs)
    for output in outputs:
        output.backward(torch.ones_like(output).cumsum(-1))
    pairs = [inputs, *zip(*(layer.parameters() for layer in layers), strict=True)]
    for one, other in pairs:
        assert (one.grad is None) == (other.grad is None) == (not one.requires_grad)
        assert one.grad is None or torch.equal(one.grad, other.grad)


@EVERY_CASE
def test_no_kernel_is_kept_where_composing_again_is_cheap(case):
    kept = []
    layer, other, x = built(case)
    for module in (layer, other):
        held = {p.data_ptr() for p in module.parameters()} | {x.data_ptr()}
        found = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, found=found, held=held: found.append(t.data_ptr() not in held) or t,
            lambda t: t,
        ):
            module(x).sum().backward()
        kept.append(sum(found))
    assert kept == [int(case is CASES["few"]), 1]


@EVERY_CASE
def test_second_derivatives(case):
    *layers, x = built(case)
    found = []
    for layer in layers:
        inputs = (x.clone().requires_grad_(), layer.weight, layer.depthwise_weight)
        output = layer(inputs[0]).square().sum()
        first = torch.autograd.grad(output, inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@EVERY_CASE
def test_a_change_before_the_backward_pass_is_noticed(case):
    layer, _, x = built(case)
    output = layer(x).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_checkpointing_and_other_places_for_what_is_kept():
    layer, other, x = built(CASES["strides"])
    expected = torch.autograd.grad(other(x).square().sum(), list(other.parameters()))
    recomputed = checkpoint(layer, x, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        elsewhere = layer(x)
    for output in (recomputed, elsewhere):
        found = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_ordinary_way_is_taken_where_it_is_needed():
    layer, _, x = built(CASES["strides"])
    assert kind(layer(x)) == TAKEN
    assert kind(layer(x[0])) != TAKEN  # no batch
    with composed_once(layer):
        assert kind(layer(x)) != TAKEN
    with torch.autocast("cpu"):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer(x).grad_fn is None
    for options in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        assert kind(DOConv2d(6, 9, 3, **options)(x)) != TAKEN
    assert kind(layer.to(memory_format=torch.channels_last)(x)) != TAKEN
    with pytest.raises(RuntimeError, match="expected input"):
        layer(x[:, :5])


def test_transforms_of_functions():
    layer, other, x = built(CASES["strides"])
    each = torch.vmap(layer)(torch.stack([x, 2 * x]))
    assert torch.allclose(each[1], other(2 * x), atol=1e-4)
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    assert torch.allclose(tangent, other(x) - other(0 * x), atol=1e-4)
    parameters = dict(layer.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(parameters)
    expected = torch.autograd.grad(other(x).sum(), list(other.parameters()))
    for one, two in zip(found.values(), expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-3)


def test_a_method_of_ones_own_is_called():
    class Doubled(DOConv2d):
        def composed_kernel(self):
            return 2 * super().composed_kernel()

    class Shifted(DOConv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight, bias) + 1

    _, other, x = built(CASES["strides"])
    for cls, expected in ((Doubled, 2 * other(x)), (Shifted, other(x) + 1)):
        layer = cls(6, 9, 3, padding=(1, 0), stride=(2, 1))
        layer.load_state_dict(other.state_dict())
        if cls is Doubled:
            nn.init.zeros_(layer.bias)
            expected = 2 * (other(x) - other.bias[:, None, None])
        assert torch.allclose(layer(x), expected, atol=1e-4)
