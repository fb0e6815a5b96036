"""Kinds whose kernel is a formula, in what only PyTorch has."""

import pytest
import torch
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


@pytest.mark.parametrize("options", RULES, ids=str)
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
