"""Networks from descriptions, in PyTorch: copied, stored, compiled and exported."""

from __future__ import annotations

import copy
import pickle

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from networks.described import NETWORKS, SHAPE  # noqa: E402
from torch import nn  # noqa: E402

from doconv_core import orthonormality  # noqa: E402
from doconv_core.networks.nodes import Conv, Kind, Network, sequence  # noqa: E402
from doconv_torch import (  # noqa: E402
    BSConvS2d,
    BSConvU2d,
    DOConv2d,
    build,
    fold,
    get_model,
    orthonormality_loss,
    verify,
)

X = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))


def outputs(model):
    with torch.no_grad():
        return model(X)


@pytest.fixture(params=NETWORKS)
def model(request):
    torch.manual_seed(1)
    return build(NETWORKS[request.param]).eval()


def test_copied_and_pickled(model):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(other) == repr(model)
        assert torch.equal(outputs(other), outputs(model))


def test_a_state_dict_goes_into_another(model):
    (name,) = [name for name in NETWORKS if name == model.network_name]
    other = build(NETWORKS[name]).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other), outputs(model))


@pytest.mark.parametrize("training", [False, True])
def test_compiled_as_one_graph(model, training):
    torch._dynamo.reset()
    expected = copy.deepcopy(model).train(training)(X)
    compiled = torch.compile(model.train(training), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)


def test_exported(model):
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(program.module()(X), outputs(model))


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


@pytest.mark.parametrize("family", ["mobilenetv2", "mobilenetv3_small"])
def test_the_linear_pointwise_weights_of_mobilenets_are_to_be_orthonormal(family):
    model = get_model(f"cifar_{family}_w1d2_bsconvs_p1d6", num_classes=5)
    weights = [
        p.detach() for path, p in model.named_parameters() if path.endswith("project.conv.weight")
    ]
    assert len(weights) > 10
    expected = 0.1 * sum(orthonormality(weight.flatten(1).numpy()) for weight in weights)
    assert orthonormality_loss(model).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="has no weight to make orthonormal"):
        orthonormality_loss(get_model(f"cifar_{family}_w1d2"))


def test_the_first_pointwise_weights_of_bsconvs_are_to_be_orthonormal():
    model = get_model("cifar_resnet20_bsconvs_p1d4", num_classes=5)
    layers = [module for module in model.modules() if isinstance(module, BSConvS2d)]
    assert {layer.spec.p for layer in layers} == {0.25}
    weights = [layer.pointwise1.weight.detach().flatten(1).numpy() for layer in layers]
    expected = 0.1 * sum(map(orthonormality, weights))
    assert orthonormality_loss(model).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["keep", "merge", "dense"])
def test_a_network_of_bsconvs_folds_to_each_form(form):
    model = get_model("cifar_wrn16_1_bsconvu", num_classes=5, input_shape=(3, 16, 16)).eval()
    folded, report = fold(model, form=form)
    assert report.forms == {"bsconv": form}
    assert len(report.choices) == 13  # the stem, and twelve in units
    assert verify(folded, model, torch.rand(2, 3, 16, 16)).relative < 1e-5
    assert not any(isinstance(module, BSConvU2d) for module in folded.modules())


@pytest.mark.parametrize("name", ["bsconvu", "bsconvs"])
def test_a_bsconv_with_groups_is_refused_by_its_path(name):
    network = Network("one", sequence(("sole", Conv(6, (3, 3), groups=3, kind=Kind(name)))), SHAPE)
    with pytest.raises(ValueError, match=r"'sole' cannot be a BSConv, .* received groups=3"):
        build(network)
