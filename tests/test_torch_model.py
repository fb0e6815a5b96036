"""PyTorch: over-parameterizing whole models changes nothing but what it says."""

from __future__ import annotations

import copy
import pickle

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
import torch.ao.nn.qat  # noqa: E402
from torch import nn  # noqa: E402
from torch_models import REPLACED, Network, Residual, images, network, output, trained  # noqa: E402

from doconv_core.models.report import TIED  # noqa: E402
from doconv_torch import DOConv1d, DOConv2d, DOConv3d, fold, over_parameterize  # noqa: E402


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
    original = network().eval().to(dtype)
    model, _ = over_parameterize(original)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(output(model, images(dtype=dtype)), output(original, images(dtype=dtype)))


def test_names_order_and_everything_else_is_kept():
    original = network()
    original.stem[0].weight.requires_grad_(False)
    original.stages[0].conv1.note = ["a user's own"]
    original.stages[0].eval()
    output(original).sum().backward()
    model, _ = over_parameterize(original)
    names = [name for name in model.state_dict() if not name.endswith("depthwise_weight")]
    assert names == list(original.state_dict())
    assert list(dict(model.named_modules())) == list(dict(original.named_modules()))
    stem = [name for name in model.state_dict() if name.startswith("stem.0.")]
    assert stem == ["stem.0.weight", "stem.0.bias", "stem.0.depthwise_weight"]
    assert model.stages[0].conv1.note == ["a user's own"]
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
    seen.clear()
    fold(model, inplace=True)
    assert torch.equal(output(model), expected)
    assert seen[:4] == ["pre", "pre kw", "Conv2d", "always"]
    seen.clear()
    for handle in handles:
        handle.remove()
    output(model).sum().backward()
    assert seen == []


def test_copies_pickles_and_state_dicts():
    model = trained(over_parameterize(network().eval())[0])
    expected = output(model)
    assert torch.equal(output(copy.deepcopy(model)), expected)
    assert torch.equal(output(pickle.loads(pickle.dumps(model))), expected)
    other = over_parameterize(Network().eval())[0]
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other), expected)


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
