"""The forms of PyTorch's composition: each gives the core's numbers, and every derivative."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from cases import one_test
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from doconv_core import ConvSpec, compose_gradient, difference  # noqa: E402
from doconv_core import compose as core_compose  # noqa: E402
from doconv_torch import DOConv2d, composed_once, matrix_products  # noqa: E402
from doconv_torch.compose import compose, plain  # noqa: E402

SPECS = [
    ConvSpec(1, 1, (3, 3)),
    ConvSpec(1, 5, (2,)),
    ConvSpec(4, 3, (3, 3)),
    ConvSpec(7, 5, (3, 3)),
    ConvSpec(16, 2, (3, 3)),
    ConvSpec(37, 6, (3,)),
    ConvSpec(33, 4, (1, 5)),
    ConvSpec(18, 4, (5, 5)),
    ConvSpec(5, 3, (3, 3, 3)),
    ConvSpec(9, 5, (3, 3, 3)),
    ConvSpec(71, 9, (3, 3)),  # several parts for the threads, and a rest
    ConvSpec(3, 2, (6, 5)),
    ConvSpec(6, 9, (3, 3), 3),
    ConvSpec(40, 4, (3, 3), 2),
    ConvSpec(11, 22, (3, 3), 11),
    ConvSpec(13, 13, (7,), 13),
    ConvSpec(6, 4, (3, 3), 2, 13),
    ConvSpec(4, 3, (2, 2), 1, 8),
]
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=str)


@pytest.fixture(params=["compiled", "blocks"])
def form(request, monkeypatch):
    """Both fast forms, as they are taken with the compiled one and without it."""
    if request.param == "compiled":
        need_compiled()
    else:
        monkeypatch.setattr(matrix_products, "_composition", None)
    matrix_products._form.cache_clear()
    yield request.param
    matrix_products._form.cache_clear()


def need_compiled():
    if matrix_products._composition is None and not (os.environ.get("CI") or shutil.which("cc")):
        pytest.skip("there is no C compiler")
    assert matrix_products._composition is not None


def parameters(spec, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = spec.parameter_shape, spec.depthwise_shape
    return [torch.from_numpy(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def core_arrays(spec, *tensors):
    """Return W, D and a gradient of the kernel in float64, as the core takes them."""
    weight, depthwise, *gradient = (t.detach().double().numpy() for t in tensors)
    return weight.reshape(spec.weight_shape), depthwise, *gradient


def taken(spec, dtype=torch.float32):
    weight, depthwise = parameters(spec)
    return matrix_products.form(weight.to(dtype), depthwise.to(dtype), spec)


def test_the_compiled_form_is_installed_where_there_is_a_compiler():
    need_compiled()
    assert matrix_products._composition.MOST_TAPS >= matrix_products.COMPILED_TAPS


def test_which_form_is_taken(form):
    fast = form == "compiled"
    for spec in SPECS:
        few = spec.taps <= matrix_products.COMPILED_TAPS
        equal = spec.depth_multiplier == spec.taps
        expected = None
        if equal and fast and few:
            expected = matrix_products.Compiled
        elif equal and spec.groups == 1:
            expected = matrix_products.Blocks
        assert type(taken(spec)) is (expected or type(None)), spec
        assert type(taken(spec, torch.float64)) is not matrix_products.Compiled
        assert taken(spec, torch.bfloat16) is None
    in_pairs = [taken(spec, torch.float64).channels for spec in (SPECS[0], SPECS[2], SPECS[3])]
    assert in_pairs == [1, 2, 1]
    assert taken(ConvSpec(12, 2, (3,)), torch.float64).channels == 6


@one_test
@EVERY_SPEC
@pytest.mark.parametrize("trainable", [(True, True), (True, False), (False, True)])
def test_kernel_and_gradients_are_the_cores(form, spec, trainable):
    weight, depthwise = parameters(spec)
    weight.requires_grad_(trainable[0])
    depthwise.requires_grad_(trainable[1])
    gradient = torch.randn(spec.kernel_shape, generator=torch.Generator().manual_seed(1))
    kernel = compose(weight, depthwise, spec)
    arrays = core_arrays(spec, weight, depthwise, gradient)
    assert difference(kernel.detach().numpy(), core_compose(*arrays[:2], spec)).relative < 1e-6
    # A kernel's gradient that is not contiguous, too.
    strided = gradient.transpose(0, 1).contiguous().transpose(0, 1)
    expected = compose_gradient(*arrays, spec)
    for given in (gradient, strided):
        kernel.backward(given, retain_graph=True)
        for parameter, array in zip((weight, depthwise), expected, strict=True):
            if parameter.requires_grad:
                found = parameter.grad.numpy().reshape(array.shape)
                assert difference(found, array).relative < 1e-6
                parameter.grad = None
            else:
                assert parameter.grad is None


@one_test
@EVERY_SPEC
def test_with_no_d_the_kernel_is_w_bit_for_bit(form, spec):
    weight, depthwise = parameters(spec)
    weight = weight.reshape(spec.weight_shape)
    weight[..., spec.taps :] = 0
    kernel = compose(weight.reshape(spec.parameter_shape), torch.zeros_like(depthwise), spec)
    assert torch.equal(kernel.flatten(2), weight[..., : spec.taps])


@one_test
@EVERY_SPEC
def test_second_derivatives(form, spec):
    weight, depthwise = parameters(spec)
    second = {}
    for name, way, dtype in (("fast", compose, torch.float32), ("plain", plain, torch.float64)):
        w, d = (p.detach().to(dtype).requires_grad_() for p in (weight, depthwise))
        first = torch.autograd.grad(way(w, d, spec).square().sum(), (w, d), create_graph=True)
        second[name] = torch.autograd.grad(sum(g.square().sum() for g in first), (w, d))
    for found, expected in zip(*second.values(), strict=True):
        assert difference(found.numpy(), expected.numpy()).relative < 2e-6


@one_test
@EVERY_SPEC
def test_numerical_derivatives(form, spec):
    inputs = tuple(p.requires_grad_() for p in parameters(spec, "float64"))
    assert torch.autograd.gradcheck(
        lambda w, d: compose(w, d, spec), inputs, check_forward_ad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(lambda w, d: compose(w, d, spec), inputs, fast_mode=True)


@one_test
@EVERY_SPEC
def test_transforms(form, spec):
    weight, depthwise = parameters(spec)
    stacked = torch.stack([depthwise, 2 * depthwise, -depthwise])
    kernels = torch.vmap(lambda d: compose(weight, d, spec))(stacked)
    for kernel, d in zip(kernels, stacked, strict=True):
        assert difference(kernel.numpy(), compose(weight, d, spec).numpy()).relative < 1e-6
    pair = torch.stack([weight, weight + 1], dim=1)
    both = torch.vmap(lambda w, d: compose(w, d, spec), in_dims=(1, 0))(pair, stacked[:2])
    assert torch.allclose(both[1], compose(weight + 1, stacked[1], spec), rtol=1e-5, atol=1e-5)

    tangents = parameters(spec, seed=2)
    _, tangent = torch.func.jvp(
        lambda w, d: compose(w, d, spec), (weight, depthwise), tuple(tangents)
    )
    wide = [p.double() for p in (weight, depthwise, *tangents)]
    _, expected = torch.func.jvp(lambda w, d: plain(w, d, spec), tuple(wide[:2]), tuple(wide[2:]))
    assert difference(tangent.numpy(), expected.numpy()).relative < 1e-6

    gradient = torch.func.grad(lambda d: compose(weight, d, spec).square().sum())
    each = torch.vmap(gradient)(stacked)
    for found, d in zip(each, stacked, strict=True):
        leaf = d.clone().requires_grad_()
        compose(weight, leaf, spec).square().sum().backward()
        assert difference(found.numpy(), leaf.grad.numpy()).relative < 1e-5


@one_test
@EVERY_SPEC
def test_the_same_bits_twice_and_with_any_number_of_threads(form, spec):
    weight, depthwise = (p.requires_grad_() for p in parameters(spec))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            kernel = compose(weight, depthwise, spec)
            gradients = torch.autograd.grad(kernel.square().sum(), (weight, depthwise))
            found.append((kernel, *gradients))
    finally:
        torch.set_num_threads(threads)
    repeated = (
        found if form == "compiled" and type(taken(spec)) is matrix_products.Compiled else found[:2]
    )
    for again in repeated[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@one_test
@EVERY_SPEC
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(spec, dtype):
    weight, depthwise = (p.to(dtype).requires_grad_() for p in parameters(spec))
    kernel = compose(weight, depthwise, spec)
    wide = [p.detach().float().requires_grad_() for p in (weight, depthwise)]
    expected = plain(*wide, spec)
    assert torch.equal(kernel, expected.to(dtype))
    gradient = torch.randn(spec.kernel_shape).to(dtype)
    kernel.backward(gradient)
    expected.backward(gradient.float())
    for found, other in zip((weight, depthwise), wide, strict=True):
        assert found.grad.dtype == dtype
        assert difference(found.grad.float().numpy(), other.grad.numpy()).relative < 0.02


@one_test
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_d_is_not_lost_in_half_precision(dtype):
    spec = ConvSpec(2, 2, (3, 3))
    weight = torch.zeros(spec.kernel_shape, dtype=dtype)
    weight[..., 0, 0] = 1
    depthwise = torch.full(spec.depthwise_shape, 1e-4, dtype=dtype)
    kernel = compose(weight, depthwise, spec)
    assert torch.equal(kernel[..., 0, 1], depthwise[0, 1, 0].expand(2, 2))


def test_what_is_no_plain_tensor_takes_the_plain_formula(form):
    spec = ConvSpec(4, 4, (3, 3))
    weight, depthwise = parameters(spec)
    last = weight.to(memory_format=torch.channels_last)
    assert matrix_products.form(last, depthwise, spec) is None
    assert matrix_products.form(weight, depthwise.transpose(1, 2), spec) is None
    assert matrix_products.form(weight.to("meta"), depthwise.to("meta"), spec) is None
    assert matrix_products.form(weight, nn.Parameter(depthwise), spec) is not None
    assert matrix_products.form(nn.UninitializedParameter(), depthwise, spec) is None


def test_operations_that_are_recorded_take_the_plain_formula(form):
    weight, depthwise = parameters(ConvSpec(4, 4, (3, 3)))
    graph = make_fx(lambda w, d: compose(w, d, ConvSpec(4, 4, (3, 3))))(weight, depthwise)
    twice = (2 * weight, 2 * depthwise)
    found = graph(*twice)  # of these arrays, not of those that were recorded
    assert torch.allclose(found, compose(*twice, ConvSpec(4, 4, (3, 3))), atol=1e-5)


def test_a_layer_in_every_mode(form):
    torch.manual_seed(0)
    layer, x = DOConv2d(6, 4, 3), torch.randn(2, 6, 5, 5)
    nn.init.normal_(layer.depthwise_weight)
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    with composed_once(layer):
        assert torch.equal(layer(x), expected)
    compiled = torch.compile(layer, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-5)


def test_the_compiled_function_refuses_sizes_it_cannot_have():
    need_compiled()
    with pytest.raises(ValueError, match="received 65 taps, 1 and 1 channels, 1 groups and 1"):
        matrix_products._composition.compose(0, 0, 0, 0, 0, 1, 1, 65, 1, 1)
    with pytest.raises(ValueError, match="0 threads"):
        matrix_products._composition.compose(0, 0, 0, 0, 0, 1, 1, 9, 1, 0)
