"""PyTorch: over-parameterizing and folding whole models changes nothing but what it says."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
import torch.ao.nn.qat  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402
from torch_models import REPLACED, Network, Residual, images, network, output, trained  # noqa: E402

import doconv_torch.former_parameters  # noqa: E402
from doconv_core import NotFoldable  # noqa: E402
from doconv_core.models.report import TIED  # noqa: E402
from doconv_torch import DOConv1d, DOConv2d, DOConv3d, fold, over_parameterize, verify  # noqa: E402


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_the_same_bit_for_bit(training, memory_format):
    original = network().train(training).to(memory_format=memory_format)
    untouched = copy.deepcopy(original)
    model, report = over_parameterize(original, inplace=training)
    assert [change.path for change in report.changed] == REPLACED
    for x in (images(), images().to(memory_format=torch.channels_last)):
        expected, found = output(untouched, x), output(model, x)
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
    for name, buffer in untouched.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert {m.training for m in model.modules()} == {training}


@pytest.mark.parametrize("channels", [(1, 6, 1), (6, 6, 6), (6, 12, 6), (6, 1, 1), (4, 6, 2)])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("larger", [False, True])
def test_every_rank_and_grouping_keeps_bits_and_output_format(larger, rank, channels):
    conv, do_conv = [(nn.Conv1d, DOConv1d), (nn.Conv2d, DOConv2d), (nn.Conv3d, DOConv3d)][rank - 1]
    plain = conv(channels[0], channels[1], 3, padding=1, groups=channels[2])
    x = torch.randn(2, channels[0], *[5] * rank)
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(rank, torch.contiguous_format)
    for memory_format in (torch.contiguous_format, last):
        plain = plain.to(memory_format=memory_format)
        model, _ = over_parameterize(plain, depth_multiplier=3**rank + 2 if larger else None)
        assert type(model) is do_conv
        assert fold(model).model.weight.stride() == plain.weight.stride()
        for inputs in (x, x.to(memory_format=last)):
            assert torch.equal(model(inputs), plain(inputs))
            assert model(inputs).stride() == plain(inputs).stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_kept(dtype):
    original, x = network().eval().to(dtype), images(dtype=dtype)
    model, _ = over_parameterize(original)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(output(model, x), output(original, x))
    folded, _ = fold(trained(model))
    assert torch.equal(folded.stem[0].weight, model.stem[0].composed_kernel())
    assert torch.equal(output(folded, x), output(model, x))
    fused, report = fold(model, fuse_batchnorm=True)
    assert len(report.changed) == len(REPLACED) + 5
    assert {p.dtype for p in fused.parameters()} == {dtype}
    steps = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 1e-14}
    assert verify(model, fused, x).relative < steps[dtype]


def test_names_gradients_modes_and_what_is_frozen_are_kept():
    original = network()
    original.stem[0].weight.requires_grad_(False)
    original.stages[0].eval()
    output(original).sum().backward()
    model, _ = over_parameterize(original)
    names = [name for name in model.state_dict() if not name.endswith("depthwise_weight")]
    assert names == list(original.state_dict())
    assert list(dict(model.named_modules())) == list(dict(original.named_modules()))
    stem = [name for name in model.state_dict() if name.startswith("stem.0.")]
    assert stem == ["stem.0.weight", "stem.0.bias", "stem.0.depthwise_weight"]
    assert {m.training for m in model.stages[0].modules()} == {False}
    assert not model.stem[0].depthwise_weight.requires_grad
    assert model.stem[0].bias.requires_grad
    assert model.stages[0].conv1.depthwise_weight.requires_grad
    gradient = original.stages[0].conv1.weight.grad
    over_parameterize(original, inplace=True)
    assert original.stages[0].conv1.weight.grad is gradient


class Shared(nn.Module):
    """One convolution under two names, in a shared block, and in a list that PyTorch ignores."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.conv
        self.blocks = nn.Sequential(self.conv, nn.ReLU(), self.conv)
        self.private = [self.conv]

    def forward(self, x):
        return self.private[0](self.blocks(self.again(self.conv(x))))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shared_layer_stays_one_wherever_it_is_kept(inplace):
    original = network(Shared)
    expected, conv = output(original), original.conv
    model, report = over_parameterize(original, inplace=inplace)
    assert [change.path for change in report.changed] == ["conv"]
    assert type(model.conv) is DOConv2d
    assert model.conv is model.again is model.blocks[0] is model.blocks[2] is model.private[0]
    assert (model.conv is conv) == inplace
    assert torch.equal(output(model), expected)


def test_a_weight_of_several_groupings_is_left():
    plain, grouped, strided = (
        nn.Conv2d(3 * g, 6, 3, s, 1, groups=g) for g, s in [(1, 1), (2, 1), (1, 2)]
    )
    grouped.weight = strided.weight = plain.weight
    model = nn.ModuleList([plain, nn.Conv2d(6, 3, 3), grouped, strided])
    _, report = over_parameterize(model)
    assert [(left.path, left.reason) for left in report.left] == [(p, TIED) for p in "023"]


def test_weights_that_share_memory_alone_are_tied_too():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    _, report = over_parameterize(model, inplace=True)
    assert [change.path for change in report.changed] == ["2"]
    assert {left.reason for left in report.left} == {TIED}
    over_parameterize(model[0], inplace=True)
    expected, weight = trained(model)(images()), model[1].weight.clone()
    fold(model, inplace=True)
    assert torch.equal(model(images()), expected)
    assert torch.equal(model[1].weight, weight)


def test_hooks_survive_and_can_be_removed():
    model, seen = network().eval(), []
    conv = model.stages[0].conv1
    handles = [
        conv.register_forward_pre_hook(lambda m, args: seen.append("pre")),
        conv.register_forward_pre_hook(lambda m, a, k: seen.append("pre kw"), with_kwargs=True),
        conv.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__)),
        conv.register_forward_hook(lambda m, args, out: 2 * out),
        conv.register_forward_hook(lambda m, args, out: seen.append("always"), always_call=True),
        conv.register_full_backward_hook(lambda m, gin, gout: seen.append("backward")),
        conv.register_full_backward_pre_hook(lambda m, gout: seen.append("backward pre")),
        conv.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append("state")),
        conv.register_load_state_dict_post_hook(lambda m, keys: seen.append("loaded")),
        conv.weight.register_hook(lambda gradient: seen.append("weight")),
    ]
    expected = output(model)
    seen.clear()
    over_parameterize(model, inplace=True)
    result = output(model)
    assert torch.equal(result, expected)
    result.sum().backward()
    model.load_state_dict(model.state_dict())
    order = ["pre", "pre kw", "DOConv2d", "always", "backward pre", "weight", "backward"]
    assert sorted(seen) == sorted([*order, "state", "loaded"])
    expected = output(trained(model))
    copied, _ = fold(model)
    fold(model, inplace=True)
    for folded in (copied, model):
        seen.clear()
        assert torch.equal(output(folded), expected)
        assert seen[:4] == ["pre", "pre kw", "Conv2d", "always"]
    seen.clear()
    for handle in handles:
        handle.remove()
    output(model).sum().backward()
    assert seen == []
    assert not torch.equal(output(model), expected), "nor is it doubled"


def test_copies_pickles_and_state_dicts():
    model = trained_network()
    expected = output(model)
    assert torch.equal(output(copy.deepcopy(model)), expected)
    assert torch.equal(output(pickle.loads(pickle.dumps(model))), expected)
    other = over_parameterize(Network().eval())[0]
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), expected)


def trained_network():
    return trained(over_parameterize(network().eval())[0])


def test_nothing_random_happens():
    model = network()
    before = torch.get_rng_state()
    fold(over_parameterize(model)[0].eval(), fuse_batchnorm=True)
    assert torch.equal(torch.get_rng_state(), before)


class Aliased(Residual):
    """A block that reaches its convolution by a name that PyTorch does not know of, too."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "alias", self.conv1)

    def forward(self, x):
        return super().forward(x) + self.alias(x)


def test_a_layer_that_is_reached_behind_pytorchs_back():
    model, x = network(Aliased).eval(), torch.randn(2, 8, 6, 6)
    expected = output(model, x)
    over_parameterize(model, inplace=True)
    assert model.alias is model.conv1
    assert torch.equal(output(model, x), expected)


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


@pytest.mark.parametrize(("inplace", "multiplier"), [(False, 20), (True, None)])
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


@pytest.mark.parametrize("call", ["to_bsconv", "fold"])
def test_every_call_in_place_warns_of_optimizers_made_before(call):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    over_parameterize(model, where="1", depth_multiplier=12, inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    getattr(doconv_torch, call)(model, inplace=True)
    made_before = rf"made before {call}\(inplace=True\), and does not have '[01]\.\w*\.?weight'"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.randn(1, 3, 6, 6)).sum().backward()
            optimizer.step()
    assert [bool(re.search(made_before, str(each.message))) for each in caught] == [True]


@pytest.mark.parametrize("multiplier", [None, 12])
@pytest.mark.parametrize("given", ["nothing", "group", "another"])
def test_an_optimizer_made_before_is_warned_of_if_it_goes_on_without_the_new(multiplier, given):
    model = network()
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3)]
    over_parameterize(model, depth_multiplier=multiplier, inplace=True)
    new = [p for name, p in model.named_parameters() if name.endswith("depthwise_weight")]
    if given == "group":
        optimizers[0].add_param_group({"params": new})
    if given == "another":
        optimizers.append(torch.optim.Adam(new))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            output(model).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
    texts = [str(each.message) for each in caught]
    missed = [text for text in texts if "does not have 'stem.0.depthwise_weight'" in text]
    assert len(missed) == (given == "nothing")
    asked = {id(each.new()) for each in doconv_torch.former_parameters._watched}
    assert asked.isdisjoint(map(id, new)), "it is no more asked about"
