"""Kinds whose kernel is a formula, in what only PyTorch has."""

import copy

import pytest
import torch
from cases import tail_but
from torch import nn

from doconv_core import NotFoldable
from doconv_torch import fold, over_parameterize

RULES = (
    {"kind": "branches", "branches": "orepa"}, {"kind": "branches", "branches": "ecb"},
    {"kind": "branches", "branches": "acnet"}, {"kind": "expand", "ratio": 3},
    {"kind": "expand", "expand_inputs": False},
)  # fmt: skip


def trained(plain, **options):
    """Return a model with layers of the kind, all of whose parameters were moved."""
    model, _ = over_parameterize(plain, **options)
    for n, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(n)
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_symbolic_trace_computes_the_same_and_is_not_folded(options):
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 6, (3, 5)))
    model, x = trained(plain, **options), torch.rand(2, 4, 9, 9)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(NotFoldable, match=f"of a layer of kind '{options['kind']}' that became"):
        fold(traced)


@pytest.mark.parametrize("options", tail_but(RULES, *RULES[::3]), ids=str)
def test_they_are_compiled_and_exported_whole(options):
    model, x = trained(nn.Sequential(nn.Conv2d(4, 4, 3)), **options), torch.rand(2, 4, 9, 9)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(model, (x,), strict=True).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize(
    ("conv", "order"),
    [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)],
    ids=("2d", "3d"),
)
def test_they_take_other_orders_in_memory(conv, order, options):
    model = trained(nn.Sequential(conv(4, 4, 3)), **options)
    x = torch.rand(1, 4, *model[0].kernel_size)
    expected = model(x).detach()
    torch.testing.assert_close(model.to(memory_format=order)(x), expected)
    assert fold(model)[0][0].weight.is_contiguous(memory_format=order)


def two_ways(options, dtype=torch.float32):
    """Return a layer, and its copy that composes and convolves separately."""
    plain = nn.Conv2d(4, 4, 3, groups=2, padding=1, stride=(2, 1), dtype=dtype)
    layer = trained(nn.Sequential(plain), **options)[0]
    other = copy.deepcopy(layer)
    other.composed_kernel = lambda: type(layer).composed_kernel(other)
    return layer, other


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("size", [6, 40])
def test_what_a_composition_needs_is_not_kept(options, size):
    layer, other = two_ways(options)
    x, kept = torch.rand(2, 4, size, size, requires_grad=True), []
    outputs, found = [], []
    for way in (layer, other):
        held = {p.data_ptr() for p in way.parameters()} | {x.data_ptr()}
        more = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, more=more, held=held: more.append(t.data_ptr() not in held) or t, lambda t: t
        ):
            outputs.append(way(x))
        kept.append(sum(more))
        inputs = (x, *way.parameters())
        found.append(torch.autograd.grad(outputs[-1].square().sum(), inputs))
    assert torch.equal(*outputs)
    assert kept == [0 if size == 40 else kept[1], max(kept[1], 1)]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * two.abs().max().item())


@pytest.mark.parametrize("options", RULES, ids=str)
def test_gradients_are_differentiable_and_those_of_what_is_trained_alone(options):
    layer, other = two_ways(options, torch.float64)
    x = torch.rand(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    for without in ("", "weight", "scale_kxk", "bias"):
        found = []
        for way in (layer, other):
            trainable = []
            for name, parameter in way.named_parameters():
                if name != without:
                    trainable.append(parameter)
                parameter.requires_grad_(name != without)
            output = way(x).square().sum()
            first = torch.autograd.grad(output, (x, *trainable), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, *trainable))
            found.append((*first, *second))
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("options", RULES, ids=str)
def test_transforms_of_functions_and_other_ways_to_compute(options):
    layer, other = two_ways(options)
    x = torch.rand(2, 4, 40, 40)
    expected = other(x)
    torch.testing.assert_close(torch.vmap(layer)(torch.stack([x, x]))[1], expected)
    _, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, expected - other(0 * x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu"):
        assert layer(x).dtype == torch.bfloat16
    output = layer(x).sum()
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
    with pytest.raises(RuntimeError, match="expected input"):
        layer(x[:, :3])
