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
from torch_models import REPLACED, Network, Residual, images, kinds, network, output, trained  # noqa: E402

from doconv_core import Change, Converted, Left  # noqa: E402
from doconv_core.models.report import TIED  # noqa: E402
from doconv_torch import DOConv1d, DOConv2d, DOConv3d, fold, over_parameterize  # noqa: E402


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_outputs_are_the_same_bit_for_bit(training, inplace, memory_format):
    original = network().train(training).to(memory_format=memory_format)
    untouched = copy.deepcopy(original)
    model, report = over_parameterize(original, inplace=inplace)
    assert (model is original) == inplace
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


@pytest.mark.parametrize("multiplier", [12, 18, 20])
def test_a_larger_depth_multiplier(multiplier):
    original = network().eval()
    model, report = over_parameterize(original, depth_multiplier=multiplier)
    assert model.stem[0].spec.depth_multiplier == multiplier
    assert model.stem[0].weight.shape == (8, 3, multiplier)
    assert torch.equal(output(model), output(original))
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


def test_the_report_tells_what_was_done():
    original = network()
    result = over_parameterize(original, where=["stages.*", "head.*"])
    assert type(result) is Converted
    model, report = result
    assert report.action == "over-parameterized"
    assert report.changed[0] == Change("stages.0.conv1", "Conv2d", "DOConv2d")
    assert report.left == (
        Left("stem.0", "Conv2d", "not selected by where"),
        Left("head.squeeze", "Conv2d", "one tap, nothing to over-parameterize"),
    )
    assert report.parameters_before == sum(p.numel() for p in original.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert str(report).splitlines()[:3] == [
        "over-parameterized 5 layers, left 2; parameters: 1,883 before, 3,984 after (+111.58%)",
        "  Conv2d -> DOConv2d (5)",
        "    stages.0.conv1, stages.0.conv2, stages.1.conv1, stages.1.conv2, head.mix",
    ]


def test_without_inplace_the_original_is_untouched():
    original = network()
    before, types = copy.deepcopy(original.state_dict()), kinds(original)
    trained(over_parameterize(original)[0])
    assert kinds(original) == types
    assert original.state_dict().keys() == before.keys()
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[name])


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


def test_an_optimizer_goes_on_with_w_and_is_given_d():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = {id(p) for p in model.parameters()}
    over_parameterize(model, inplace=True)
    new = [p for p in model.parameters() if id(p) not in before]
    assert len(new) == len(REPLACED)
    assert before <= {id(p) for p in model.parameters()}
    optimizer.add_param_group({"params": new})
    weight, depthwise = model.stem[0].weight.clone(), model.stem[0].depthwise_weight.clone()
    for _ in range(2):
        optimizer.zero_grad()
        output(model).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.stem[0].weight, weight)
    assert not torch.equal(model.stem[0].depthwise_weight, depthwise)


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


@pytest.mark.parametrize("pattern", ["conv", "again", "blocks.2"])
def test_a_shared_layer_is_selected_by_any_of_its_paths(pattern):
    _, report = over_parameterize(network(Shared), where=pattern)
    assert [change.path for change in report.changed] == ["conv"]


def tied(groups=1):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Conv2d(6, 3, 3, padding=1),
        nn.Conv2d(3 * groups, 6, 3, padding=1, groups=groups) if groups > 1 else nn.Identity(),
    )
    other = nn.Conv2d(3, 6, 3, stride=2, padding=1)
    other.weight = model[0].weight
    return model.append(other)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("multiplier", [None, 12])
def test_tied_weights_stay_tied_through_training_and_folding(inplace, multiplier):
    original = tied()
    expected = original(images())
    model, report = over_parameterize(original, depth_multiplier=multiplier, inplace=inplace)
    assert len(report.changed) == 3
    assert model[0].weight is model[3].weight
    assert model[0].depthwise_weight is model[3].depthwise_weight
    assert model[1].weight is not model[0].weight
    torch.testing.assert_close(model(images()), expected)
    expected = trained(model)(images())
    for folded in (fold(model)[0], fold(model, inplace=True)[0]):
        assert folded[0].weight is folded[3].weight
        assert torch.equal(folded(images()), expected)


def test_what_is_tied_to_something_else_is_left():
    transposed = nn.ConvTranspose2d(6, 3, 3, padding=1)
    autoencoder = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), transposed)
    transposed.weight = autoencoder[0].weight
    with_transposed, report = over_parameterize(autoencoder)
    assert report.left[0] == Left("0", "Conv2d", TIED)
    assert with_transposed[0].weight is with_transposed[1].weight
    _, report = over_parameterize(tied(), where=["0", "1"])
    assert [left.path for left in report.left if left.reason == TIED] == ["0"]
    other_groups = tied(2)
    other_groups[2].weight = other_groups[0].weight
    _, report = over_parameterize(other_groups)
    assert [left.path for left in report.left] == ["0", "2", "3"]


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


def test_again_changes_nothing():
    model, _ = over_parameterize(network())
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        again, report = over_parameterize(model)
    assert {left.reason for left in report.left} == {
        "over-parameterized already", "one tap, nothing to over-parameterize",
    }  # fmt: skip
    assert torch.equal(output(again), output(model))


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
