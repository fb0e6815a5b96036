"""Networks from descriptions, in PyTorch: copied, stored, compiled and exported."""

from __future__ import annotations

import copy
import pickle

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from networks.described import NETWORKS, ONE_WAY, OTHER_WAY, SHAPE, USUAL  # noqa: E402
from torch import nn  # noqa: E402

from doconv_core.networks.nodes import Conv, Network, sequence  # noqa: E402
from doconv_torch import BSConvS2d, BSConvU2d, DOConv2d, build  # noqa: E402

X = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))


def outputs(model):
    with torch.no_grad():
        return model(X)


def built(name):
    torch.manual_seed(1)
    return build(NETWORKS[name]).eval()


@pytest.mark.parametrize("name", USUAL)
def test_copied_pickled_stored_and_exported(name):
    model = built(name)
    expected, other = outputs(model), build(NETWORKS[name]).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(other) == repr(model)
        assert torch.equal(outputs(other), expected)
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), expected)


def check_compiled(name, training):
    torch._dynamo.reset()
    model = built(name).train(training)
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(X), other(X))


@pytest.mark.parametrize("name", ONE_WAY)
def test_compiled_as_one_graph(name):
    check_compiled(name, training=False)


@pytest.mark.parametrize("name", OTHER_WAY)
def test_every_network_compiled_as_one_graph_in_training(name):
    check_compiled(name, training=True)


def test_it_reads_as_described():
    model = build(NETWORKS["residuals"])
    lines = repr(model).splitlines()
    assert lines[:2] == ["Network(", "  residuals"]
    assert "    (1): Residual(" in lines
    assert "      (shortcut): Sequential(" in lines
    assert model.training
    assert isinstance(model[:1], type(model))
    types = {type(module) for module in build(NETWORKS["kinds"]).modules()}
    assert {BSConvS2d, BSConvU2d, DOConv2d, nn.Conv2d, nn.BatchNorm2d} <= types


def test_a_name_that_modules_have_themselves_is_refused():
    with pytest.raises(KeyError, match="attribute 'forward' already exists"):
        build(Network("one", sequence(("forward", Conv(1))), SHAPE))
