"""PyTorch: folding whole models gives ordinary ones back, with nothing of this package in them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402
from torch_models import Network, images, network, output, trained  # noqa: E402

from doconv_core import Change, Converted, NotFoldable  # noqa: E402
from doconv_torch import DOConv1d, DOConv2d, DOConv3d, fold, over_parameterize  # noqa: E402

MULTIPLIERS = pytest.mark.parametrize("multiplier", [None, 20])


def trained_network(multiplier=None):
    return trained(over_parameterize(network().eval(), depth_multiplier=multiplier)[0])


def kinds(model):
    return {path: type(module) for path, module in model.named_modules()}


@MULTIPLIERS
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_folded_model_computes_the_same(multiplier, inplace, memory_format):
    model = trained_network(multiplier).to(memory_format=memory_format)
    expected, before = output(model), copy.deepcopy(model.state_dict())
    result = fold(model, inplace=inplace)
    assert type(result) is Converted
    folded, report = result
    assert torch.equal(output(folded), expected)
    assert (folded is model) == inplace
    assert report.action == "folded"
    assert report.changed[0] == Change("stem.0", "DOConv2d", "Conv2d")
    assert len(report.changed) == 6
    assert report.left == ()
    assert report.parameters_before == sum(v.numel() for n, v in before.items() if "num" not in n
                                           and "running" not in n)  # fmt: skip
    assert report.parameters_after == sum(p.numel() for p in folded.parameters())
    if not inplace:
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@MULTIPLIERS
def test_it_is_the_original_architecture_again(multiplier):
    original = network().eval()
    folded, _ = fold(trained_network(multiplier))
    assert kinds(folded) == kinds(original)
    assert list(folded.state_dict()) == list(original.state_dict())
    assert repr(folded) == repr(original)
    for module, other in zip(folded.modules(), original.modules(), strict=True):
        assert vars(module).keys() == vars(other).keys()
        assert list(module._parameters) == list(other._parameters)
    original.load_state_dict(folded.state_dict())
    assert torch.equal(output(original), output(folded))


@MULTIPLIERS
@pytest.mark.parametrize("fuse_batchnorm", [False, True])
def test_nothing_of_this_package_is_left_in_its_file(multiplier, fuse_batchnorm):
    folded, _ = fold(trained_network(multiplier), fuse_batchnorm=fuse_batchnorm)
    buffer = io.BytesIO()
    torch.save(folded, buffer)
    for data in (buffer.getvalue(), pickle.dumps(folded)):
        assert b"doconv" not in data.lower()
        assert b"depthwise" not in data
    buffer.seek(0)
    assert torch.equal(output(torch.load(buffer, weights_only=False)), output(folded))


def test_an_untrained_round_trip_is_the_same_bit_for_bit():
    original = network().eval()
    folded, _ = fold(over_parameterize(original)[0])
    for name, value in original.state_dict().items():
        assert torch.equal(folded.state_dict()[name], value), name


def test_folding_twice_is_the_same_as_once():
    once, _ = fold(trained_network(), fuse_batchnorm=True)
    before = copy.deepcopy(once.state_dict())
    again, report = fold(once, fuse_batchnorm=True)
    assert report.changed == report.left == ()
    assert str(report) == "folded 0 layers, left 0; parameters: 1,819 before, 1,819 after"
    assert kinds(again) == kinds(once)
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("do_conv", "conv"), [(DOConv1d, nn.Conv1d), (DOConv2d, nn.Conv2d), (DOConv3d, nn.Conv3d)]
)
def test_the_root_itself_and_every_rank(do_conv, conv):
    layer = trained(do_conv(4, 6, 3, groups=2, padding="same", padding_mode="circular"))
    x = torch.randn(2, 4, *[5] * layer.spec.rank)
    expected = layer(x)
    folded, report = fold(layer, inplace=True)
    assert folded is layer
    assert type(folded) is conv
    assert report.changed[0].path == ""
    assert torch.equal(folded(x), expected)


def test_one_tap_layers_are_folded_too():
    model = nn.Sequential(DOConv2d(3, 4, 1))
    folded, report = fold(model)
    assert type(folded[0]) is nn.Conv2d
    assert "depthwise_weight" not in folded[0]._parameters
    assert len(report.changed) == 1
    assert torch.equal(folded(images()), model(images()))


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


class Doubled(DOConv2d):
    """A layer that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Named(DOConv2d):
    """A layer that computes the same."""

    def __init__(self, *arguments, name="a", **options):
        super().__init__(*arguments, **options)
        self.name = name


def replaced_forward():
    layer = DOConv2d(3, 3, 3)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Doubled(3, 3, 3), r"layer '1': .*Doubled has a forward of its own"),
        (replaced_forward, r"layer '1': .*DOConv2d has a forward of its own"),
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


def test_a_subclass_that_computes_the_same_is_folded():
    model = nn.Sequential(trained(Named(3, 4, 3, name="b")))
    folded, report = fold(model)
    assert type(folded[0]) is nn.Conv2d
    assert folded[0].name == "b"
    assert report.changed == (Change("0", "Named", "Conv2d"),)
    assert torch.equal(folded(images()), model(images()))


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


def test_training_goes_on_after_folding_and_over_parameterizing_again():
    model = network()
    for _ in range(2):
        over_parameterize(model, inplace=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        output(model).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = output(model.eval())
        fold(model, inplace=True)
        assert torch.equal(output(model), expected)
        model.train()
    assert list(model.state_dict()) == list(Network().state_dict())


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; received Tensor"):
        fold(torch.zeros(1))


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
