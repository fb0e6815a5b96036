"""PyTorch: folding whole models gives ordinary ones back, with nothing of this package in them."""

from __future__ import annotations

import copy
import pickle

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402
from torch_models import images, network, output, trained  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402
from doconv_torch import DOConv2d, fold, over_parameterize  # noqa: E402

MULTIPLIERS = pytest.mark.parametrize("multiplier", [None, 20])


def trained_network(multiplier=None):
    return trained(over_parameterize(network().eval(), depth_multiplier=multiplier)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_have_the_composed_kernel(dtype):
    model = trained_network().to(dtype)
    folded, _ = fold(model)
    assert torch.equal(folded.stem[0].weight, model.stem[0].composed_kernel())
    assert torch.equal(output(folded, images(dtype=dtype)), output(model, images(dtype=dtype)))


def test_under_autocast_nothing_is_rounded():
    model = trained_network()
    expected, _ = fold(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        folded, _ = fold(model)
        assert torch.equal(output(folded), output(model))
    assert torch.equal(folded.stem[0].weight, expected.stem[0].weight)


@pytest.mark.parametrize("wrap", [torch.inference_mode, torch.no_grad])
def test_a_model_folded_without_gradients_can_be_trained(wrap):
    model = trained_network()
    model.head["mix"].requires_grad_(False)
    model.stem[0].weight.requires_grad_(False)
    with wrap():
        folded, _ = fold(model)
    assert folded.stem[0].weight.requires_grad  # D was trained
    assert not folded.head["mix"].weight.requires_grad
    output(folded).sum().backward()
    assert folded.stem[0].weight.grad is not None


def test_in_place_an_optimizer_goes_on_with_w():
    model = trained_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output(model).sum().backward()
    weight = model.stem[0].weight
    fold(model, inplace=True)
    assert model.stem[0].weight is weight
    assert weight.grad is None
    before = weight.clone()
    output(model).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_weights_tied_by_the_user_alone_come_apart():
    """Two D's give two kernels, whatever W is."""
    model = nn.Sequential(DOConv2d(3, 3, 3), DOConv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3))
    for other in model[1:]:
        other.weight = model[0].weight
    expected = trained(model)(images())
    folded, _ = fold(model)
    assert torch.equal(folded(images()), expected)
    assert folded[0].weight is not folded[1].weight
    assert torch.equal(folded[2].weight, model[2].weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: prune.l1_unstructured(DOConv2d(3, 3, 3), "weight", 0.5),
            r"layer '1': a hook computes DOConv2d\.weight before each call .*prune\.remove",
        ),
        (
            lambda: prune.l1_unstructured(DOConv2d(3, 3, 3), "bias", 0.5),
            r"layer '1': a hook computes DOConv2d\.bias before each call",
        ),
        (
            lambda: torch.jit.trace(DOConv2d(3, 3, 3), images()),
            r"layer '1' is a DOConv2d that was compiled to TorchScript; fold the model first",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused_before_anything_is_changed(make, message):
    model = nn.Sequential(DOConv2d(3, 3, 3), make())
    with pytest.raises(NotFoldable, match=message):
        fold(model, inplace=True)
    assert type(model[0]) is DOConv2d
    with pytest.raises(NotFoldable, match="the model itself"):
        fold(model[1])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations_are_folded_in(norm, training, inplace):
    model = nn.Sequential(norm(trained(DOConv2d(3, 4, 3))), nn.ReLU())
    model(images())
    state = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).eval()(images())
    model.train(training)
    folded, _ = fold(model, inplace=inplace)
    assert type(folded[0]) is nn.Conv2d
    assert folded[0].training == training
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert not list(folded[0].children())
    assert torch.equal(folded(images()), expected)
    assert folded[0].weight.requires_grad
    if not inplace:
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert b"Parametrized" not in pickle.dumps(folded)


def test_hooks_stay_and_see_an_ordinary_layer():
    model, seen = trained_network(), []
    model.stem[0].register_forward_hook(lambda m, x, y: seen.append(type(m)))
    handle = model.stem[0].register_forward_hook(lambda m, x, y: -y)
    expected = output(model)
    copied, _ = fold(model)
    fold(model, inplace=True)
    seen.clear()
    assert torch.equal(output(copied), expected)
    assert torch.equal(output(model), expected)
    assert seen == [nn.Conv2d, nn.Conv2d]
    handle.remove()
    assert not torch.equal(output(model), expected)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: nn.BatchNorm2d(3), "BatchNorm2d"),
        (lambda: nn.Dropout(0.5), "Dropout"),
        (lambda: nn.RReLU(), "RReLU"),
        (lambda: nn.LSTM(3, 3, num_layers=2, dropout=0.1), "LSTM"),
    ],
)
def test_training_mode_is_warned_of_where_it_would_mislead(layer, name):
    model = nn.Sequential(DOConv2d(3, 3, 3), layer())
    message = rf"the model is in training mode, where layer '1' \({name}\) depend on the batch or"
    with pytest.warns(UserWarning, match=message) as caught:
        fold(model)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=rf"where the model itself \({name}\) depend on the batch"):
        fold(layer())
    fold(model.eval())
    fold(nn.Sequential(DOConv2d(3, 3, 3), nn.Dropout(0.0), nn.ReLU()))


@MULTIPLIERS
@pytest.mark.parametrize("inplace", [False, True])
def test_attributes_of_parameters_are_kept(multiplier, inplace):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    for parameter in model.parameters():
        parameter.options = {"decay": False}
    first = [p.options for p in model.parameters()]
    model, _ = over_parameterize(model, depth_multiplier=multiplier, inplace=inplace)
    folded, _ = fold(model, inplace=inplace)
    for options, parameter in zip(first, folded.parameters(), strict=True):
        assert parameter.options == {"decay": False}
        assert (parameter.options is options) == inplace
