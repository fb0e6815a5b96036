"""What is special to PyTorch: everything a user does with `torch.nn.Conv2d`."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
from cases import one_test, refuses
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from doconv_torch import (  # noqa: E402
    BSConvS2d,
    BSConvU2d,
    DOConv1d,
    DOConv2d,
    DOConv3d,
)

PAIRS = [(DOConv1d, nn.Conv1d), (DOConv2d, nn.Conv2d), (DOConv3d, nn.Conv3d)]
RANKED = pytest.mark.parametrize(("do_conv", "conv"), PAIRS, ids=["1d", "2d", "3d"])
MULTIPLIERS = pytest.mark.parametrize("multiplier", [None, 12, 18, 19])


def trained(multiplier=None, groups=2, **options):
    """Return a layer whose D is not zero, as after training."""
    torch.manual_seed(0)
    layer = DOConv2d(4, 6, 3, padding=1, groups=groups, depth_multiplier=multiplier, **options)
    nn.init.normal_(layer.depthwise_weight, std=0.3)
    return layer


def image(**options):
    return torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(1), **options)


@RANKED
def test_the_signature_is_the_ordinary_one_and_a_keyword(do_conv, conv):
    ours = list(inspect.signature(do_conv).parameters.values())
    theirs = list(inspect.signature(conv).parameters.values())
    assert [(p.name, p.default) for p in ours[:-1]] == [(p.name, p.default) for p in theirs]
    assert (ours[-1].name, ours[-1].kind) == ("depth_multiplier", inspect.Parameter.KEYWORD_ONLY)
    assert issubclass(do_conv, conv)


@pytest.mark.parametrize("cls", [nn.Conv2d, DOConv2d, BSConvU2d, BSConvS2d])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_layer_takes_its_input_by_the_ordinary_layers_name(cls, kernel):
    layer = cls(4, 6, kernel)
    assert torch.equal(layer(input=image()), layer(image()))


@RANKED
def test_a_fresh_layer_is_the_ordinary_one_of_the_same_seed(do_conv, conv):
    layers = []
    for cls in (conv, do_conv):
        torch.manual_seed(0)
        layers.append(cls(4, 6, 3, groups=2))
    x = torch.randn(2, 4, *[5] * (layers[0].weight.ndim - 2))
    assert torch.equal(layers[0](x), layers[1](x))
    assert torch.equal(layers[0].weight, layers[1].weight)


@MULTIPLIERS
def test_w_is_initialised_as_an_ordinary_weight_of_its_shape(multiplier):
    layer = DOConv2d(64, 64, 3, depth_multiplier=multiplier)
    bound = (64 * (multiplier or 9)) ** -0.5
    assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert 0.5 * bound < layer.bias.abs().max() <= bound
    assert not layer.depthwise_weight.any()
    nn.init.ones_(layer.depthwise_weight)
    layer.reset_parameters()
    assert not layer.depthwise_weight.any()


@one_test
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 2)])
def test_every_padding_of_the_ordinary_layer(mode, padding):
    torch.manual_seed(0)
    layer = DOConv2d(4, 6, (3, 5), padding=padding, padding_mode=mode)
    nn.init.normal_(layer.depthwise_weight, std=0.3)
    plain = nn.Conv2d(4, 6, (3, 5), padding=padding, padding_mode=mode)
    plain.load_state_dict({"weight": layer.composed_kernel(), "bias": layer.bias})
    assert torch.equal(layer(image()), plain(image()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_composes_in_the_parameters_dtype_and_casts_once(dtype):
    layer = trained()
    with torch.autocast("cpu", dtype=dtype):
        output = layer(image())
        kernel = layer.composed_kernel()
    assert output.dtype == dtype
    assert kernel.dtype == torch.float32
    assert torch.equal(kernel, layer.composed_kernel())
    output.float().sum().backward()
    assert layer.weight.grad.dtype == layer.depthwise_weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer.fold()(image()), output)


@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
def test_channels_last(input_format):
    layer = trained().to(memory_format=torch.channels_last)
    x = image().to(memory_format=input_format)
    output, folded = layer(x), layer.fold()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(output, trained()(image()), atol=1e-6)
    plain = nn.Conv2d(4, 6, 3, padding=1, groups=2).to(memory_format=torch.channels_last)
    assert torch.equal(DOConv2d.from_conv(plain)(x), plain(x))


def test_copies_and_pickles_are_whole():
    layer = trained(12)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(image()), layer(image()))
        assert other.spec == layer.spec
        assert other.weight is not layer.weight
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(image()), layer(image()))


def test_state_dict_holds_parameters_and_nothing_else():
    assert set(trained().state_dict()) == {"weight", "depthwise_weight", "bias"}


@MULTIPLIERS
@pytest.mark.parametrize("assign", [False, True])
def test_an_ordinary_state_dict_loads_and_resets_d(multiplier, assign):
    layer = nn.Sequential(trained(multiplier))
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2))
    state = plain.state_dict()
    layer.load_state_dict(state, strict=True, assign=assign)
    assert torch.equal(layer(image()), plain(image()))
    assert set(state) == {"0.weight", "0.bias"}
    assert layer[0].depthwise_weight.requires_grad


def test_what_does_not_load_is_named_by_pytorch():
    layer = trained(12)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight"):
        layer.load_state_dict(nn.Conv2d(4, 6, 5, groups=2).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "depthwise_weight"'):
        layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    with pytest.raises(
        RuntimeError, match=r'Unexpected key\(s\) in state_dict: "depthwise_weight"'
    ):
        nn.Conv2d(4, 6, 3, groups=2).load_state_dict(trained().state_dict())


@pytest.mark.parametrize("multiplier", [None, 19])
def test_compile_export_and_trace(multiplier):
    layer, x = trained(multiplier), image()
    expected = layer(x)
    expected.sum().backward()
    gradient = layer.depthwise_weight.grad.clone()
    layer.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    compiled(x).sum().backward()
    assert torch.allclose(layer.depthwise_weight.grad, gradient, rtol=1e-4, atol=1e-5)
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), expected, atol=1e-5)
    assert torch.allclose(torch.jit.trace(layer, x)(x), expected, atol=1e-5)


def test_compile_under_autocast_is_one_graph():
    layer, x = trained(), image()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(compiled(x), layer(x))


@pytest.mark.parametrize("multiplier", [None, 5])
def test_double_backward(multiplier):
    layer = DOConv2d(2, 4, 2, groups=2, dtype=torch.float64, depth_multiplier=multiplier)
    nn.init.normal_(layer.depthwise_weight)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def output(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(output, (x, *values))
    assert torch.autograd.gradgradcheck(output, (x, *values))


@MULTIPLIERS
def test_func_transforms(multiplier):
    layer, x = trained(multiplier), image()
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for n, sample in enumerate(x):
        alone = torch.func.grad(loss)(parameters, sample)
        for name in parameters:
            assert torch.allclose(each[name][n], alone[name], rtol=1e-4, atol=1e-4)
    # An ensemble: the parameters themselves have a batch dimension.
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    losses = torch.func.vmap(loss, in_dims=(0, None))(stacked, x[0])
    assert torch.allclose(losses[0], loss(parameters, x[0]))
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, x[0]), (parameters,), (tangents,))
    whole = torch.func.grad(loss)(parameters, x[0])
    assert torch.allclose(slope, sum(g.sum() for g in whole.values()), rtol=1e-4)


def test_meta_device():
    layer = DOConv2d(4, 6, 3, padding=1, groups=2, depth_multiplier=12, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(2, 4, 7, 8, device="meta")).shape == (2, 6, 7, 8)
    assert layer.fold().weight.is_meta
    filled = layer.to_empty(device="cpu")
    filled.load_state_dict(trained(12).state_dict())
    assert torch.equal(filled(image()), trained(12)(image()))


@RANKED
def test_one_tap_is_the_ordinary_layer(do_conv, conv):
    layer = do_conv(4, 6, 1, groups=2, depth_multiplier=5)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.depthwise_weight is None
    assert layer.composed_kernel() is layer.weight
    plain = conv(4, 6, 1, groups=2)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, *[3] * (layer.weight.ndim - 2))
    assert torch.equal(layer(x), plain(x))
    assert repr(layer).removeprefix("DO") == repr(plain)
    folded = layer.fold()
    assert folded.weight.data_ptr() != layer.weight.data_ptr()


def test_repr_names_the_depth_multiplier():
    assert repr(DOConv2d(4, 6, 3, depth_multiplier=12)) == (
        "DOConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), depth_multiplier=12)"
    )


@MULTIPLIERS
@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_are_contiguous(multiplier, groups):
    layer = trained(multiplier, groups)
    assert layer.composed_kernel().is_contiguous()
    assert layer.fold().weight.is_contiguous()


def test_weight_norm_is_folded_in():
    layer = nn.utils.parametrizations.weight_norm(trained())
    folded = layer.fold()
    assert type(folded) is nn.Conv2d
    assert torch.equal(folded(image()), layer(image()))


@pytest.mark.parametrize("shape", [(4, 7, 8), (0, 4, 7, 8)], ids=["unbatched", "empty"])
def test_inputs_without_a_batch_or_with_none(shape):
    layer = trained()
    x = torch.ones(shape)
    assert torch.equal(layer(x), layer.fold()(x))


@MULTIPLIERS
def test_fold_and_from_conv_keep_what_the_layer_was(multiplier):
    folded = trained(multiplier).eval().fold()
    assert folded.weight.is_leaf
    assert folded.extra_repr() == nn.Conv2d(4, 6, 3, padding=1, groups=2).extra_repr()
    assert set(folded.state_dict()) == {"weight", "bias"}
    layer = DOConv2d.from_conv(folded, depth_multiplier=multiplier)
    assert not folded.training
    assert not layer.training
    assert layer.weight.data_ptr() != folded.weight.data_ptr()
    plain = nn.Conv2d(4, 6, 2, bias=False, padding="same", padding_mode="reflect")
    layer = DOConv2d.from_conv(plain, depth_multiplier=multiplier)
    assert torch.equal(layer(image()), plain(image()))
    assert layer.bias is None


def test_from_conv_refuses_a_weight_that_is_no_parameter():
    pruned = nn.Conv2d(4, 6, 3)
    prune.l1_unstructured(pruned, "weight", 0.5)
    with pytest.raises(TypeError, match="needs a layer whose weight is a parameter"):
        DOConv2d.from_conv(pruned)


test_wrong_arguments_are_refused = refuses(
    lambda given: DOConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **given}),
    ({"in_channels": 0}, ValueError, "in_channels must be at least 1; received in_channels=0"),
    ({"groups": 3}, ValueError, "in_channels must be divisible by groups.*groups=3"),
    ({"padding": -1}, ValueError, "padding must be at least 0; received padding=-1"),
    ({"padding": "full"}, ValueError, "Invalid padding string 'full'"),
    ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of"),
)
