"""PyTorch: branches become one convolution, whatever the classes are called; or stay, and why."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from doconv_core import Change, Left  # noqa: E402
from doconv_core.maths.linear import COSTLIER, SHIFTED, SIZES, TWICE  # noqa: E402
from doconv_core.models.merge import APART, USED  # noqa: E402
from doconv_core.models.report import HOOKED, NOT_FINITE, READ, SEVERAL, SHARED  # noqa: E402
from doconv_torch import fold, over_parameterize, verify  # noqa: E402
from doconv_torch.branches import BYPASSED, CHANGED, LOPSIDED, TRAINING, UNLIKE, UNSAVED  # noqa: E402

CLOSE = 1e-5


def pair(inputs, outputs, size, stride=1, groups=1, **options):
    options = {"padding": size // 2, "bias": False, **options}
    conv = nn.Conv2d(inputs, outputs, size, stride, groups=groups, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Twig(nn.Module):
    """As RepVGG's and MobileOne's blocks: convolutions, each with a batch norm, and one alone."""

    def __init__(self, inputs, outputs, stride=1, groups=1, sizes=(3, 1), after=nn.ReLU):
        super().__init__()
        self.many = nn.ModuleList(pair(inputs, outputs, k, stride, groups) for k in sizes)
        self.skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.drop, self.after = nn.Dropout(0.1), after()

    def forward(self, x):
        out = 0
        for each in self.many:
            out += each(x)
        out = self.drop(out)
        if self.skip is not None:
            out += self.skip(x)
        return self.after(out)


class Asymmetric(nn.Module):
    """As ACNet's."""

    def __init__(self, width):
        super().__init__()
        self.square = pair(width, width, 3)
        self.flat = nn.Sequential(
            nn.Conv2d(width, width, (1, 3), padding=(0, 1)), nn.BatchNorm2d(width)
        )
        self.tall = nn.Conv2d(width, width, (3, 1), padding="same")

    def forward(self, x):
        return self.square(x) + self.flat(x) + self.tall(x)


class Diverse(nn.Module):
    """As DBB's, without biases between: 3x3, 1x1, 1x1 then 3x3, 1x1 then an average."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = pair(width, width, 3), pair(width, width, 1)
        self.c = nn.Sequential(nn.Conv2d(width, 8, 1, bias=False), *pair(8, width, 3))
        self.d = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x) + functional.avg_pool2d(self.d(x), 3, 1, 1)


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.by = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x):
        return x * self.by


class Mixer(nn.Module):
    """As FastViT's RepMixer."""

    def __init__(self, width):
        super().__init__()
        self.mixed = Twig(width, width, groups=width, after=nn.Identity)
        self.norm, self.gain = nn.BatchNorm2d(width), Gain(width)

    def forward(self, x):
        return x + self.gain(self.mixed(x) - self.norm(x))


class Gated(nn.Module):
    """As EfficientViM's: a parameter of its own, of which each branch takes a part."""

    def __init__(self, width):
        super().__init__()
        self.deep = pair(width, width, 3, groups=width)
        self.flat = nn.Conv2d(width, width, 1)
        self.gates = nn.Parameter(torch.randn(2, width))

    def forward(self, x):
        gates = torch.sigmoid(self.gates).view(2, -1, 1, 1)
        x = x + gates[0] * (self.deep(x) - x)
        return gates[1] * torch.relu(self.flat(x)) - x


class Ghost(nn.Module):
    """As RepGhost's: branches behind something that is used again."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU())
        self.cheap = pair(width, width, 3, groups=width)
        self.none = nn.ModuleList([nn.Sequential()])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width)])

    def forward(self, x):
        first = self.first(x)
        cheap = self.cheap(first)
        for each, norm in zip(self.none, self.norms, strict=True):
            cheap = cheap + norm(each(first))
        return torch.cat([first, cheap], 1)


class Own(nn.Module):
    """Convolutions of its own parameters."""

    def __init__(self, width):
        super().__init__()
        self.large = nn.Parameter(torch.randn(width, width, 3, 3))
        self.small = nn.Parameter(torch.randn(width, width, 1, 1))
        self.shift = nn.Parameter(torch.randn(width))

    def forward(self, x):
        large = functional.conv2d(x, self.large, self.shift, padding=1)
        return torch.relu(large + functional.conv2d(x, self.small) / 2)


class Named(nn.Module):
    """A forward pass that is given, of parts that are given by name."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = [run]

    def forward(self, x):
        return self.run[0](self, x)


def ready(*layers):
    """Return the layers as a network in evaluation mode, its batch norms as after training."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_()
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 2)
    return model


def image(channels=4, size=9):
    return torch.randn(2, channels, size, size + 1, generator=torch.Generator().manual_seed(1))


def convolutions(model):
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


def merged(model, channels=4, **options):
    """Return the folded model and its report; check that it computes the same."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded, report = fold(model, merge_branches=True, **options)
    for size in (9, 10):
        assert verify(model, folded, image(channels, size)).relative < CLOSE
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    return folded, report


def left(model, channels=4):
    """Return the reasons why a model's branches stay; check that it is as it was."""
    folded, report = fold(model, merge_branches=True)
    assert report.changed == ()
    assert verify(model, folded, image(channels)).absolute == 0
    assert str(folded) == str(model)
    return {entry.reason for entry in report.left}


FAMILIES = {
    "twig": (Twig(4, 4), 1),
    "strided": (Twig(4, 6, 2), 1),
    "groups": (Twig(4, 4, groups=2, sizes=(3, 3, 1)), 1),
    "depthwise, large": (Twig(4, 4, groups=4, sizes=(7, 5, 3)), 1),
    "no activation": (Twig(4, 4, after=nn.Identity), 1),
    "asymmetric": (Asymmetric(4), 1),
    "diverse": (Diverse(4), 1),
    "mixer": (Mixer(4), 1),
    "gated": (Gated(4), 2),
    "ghost": (Ghost(4), 2),
    "own parameters": (Own(4), 1),
    "some of a sum": (
        Named(
            lambda self, x: self.a(x) - torch.relu(x) - self.b(x),
            a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1),
        ), 1,
    ),
    "an identity twice": (
        Named(
            lambda self, x: self.c(torch.relu(self.c(self.a(x)) + self.b(x))),
            a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1), c=nn.Identity(),
        ), 1,
    ),
    "a nested model": (
        Named(lambda self, x: x - self.a(x), a=nn.Sequential(*pair(4, 4, 3), nn.Conv2d(4, 4, 1))), 1
    ),
    "expanded": (
        nn.Sequential(nn.Conv2d(4, 16, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1),
                      nn.Conv2d(16, 4, 1)), 1,
    ),
    "reflected": (
        Named(
            lambda self, x: self.a(x) + self.b(x),
            a=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            b=nn.Conv2d(4, 4, 1),
        ), 1,
    ),
    "dilated": (
        Named(
            lambda self, x: self.a(x) + self.b(x),
            a=nn.Conv2d(4, 4, 7, padding=3, groups=4),
            b=pair(4, 4, 3, groups=4, dilation=3, padding=3),
        ), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_families_become_one_convolution(case):
    block, expected = FAMILIES[case]
    model = ready(nn.Conv2d(4, 4, 3), copy.deepcopy(block), nn.ReLU())
    folded, report = merged(model)
    assert convolutions(folded) == expected + 1
    assert report.changed
    assert type(folded) is nn.Sequential
    assert len(folded) == 3
    for change in report.changed:
        assert isinstance(folded.get_submodule(change.path), nn.Conv2d)
    again, second = fold(folded, merge_branches=True)
    assert second.changed == ()
    assert again.state_dict().keys() == folded.state_dict().keys()


def test_what_a_block_becomes():
    model = ready(Twig(4, 4), Mixer(4), Ghost(4))
    folded, report = merged(model)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert str(folded[0]) == str(nn.Sequential(OrderedDict(many_0=conv, after=nn.ReLU())))
    assert str(folded[1]) == str(nn.Conv2d(4, 4, 3, padding=1, groups=4))
    assert [*dict(folded[2].named_children())] == ["first", "cheap"]
    assert report.changed == (
        Change("0.many_0", "Twig", "Conv2d of many.0, many.1, drop, skip"),
        Change("1", "Mixer", "Conv2d of mixed, norm, gain"),
        Change("2.cheap", "Ghost", "Conv2d of cheap, none.0, norms.0"),
    )
    assert "  Mixer -> Conv2d of mixed, norm, gain (1)\n    1" in str(report)


def test_a_row_keeps_its_places():
    model = ready(
        nn.Conv2d(4, 8, 1, bias=False), nn.Identity(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()
    )
    folded, report = merged(model)
    assert [type(layer) for layer in folded] == [nn.Identity, nn.Identity, nn.Conv2d, nn.ReLU]
    assert [change.path for change in report.changed] == ["2"]


def test_a_merged_model_is_copied_saved_and_exported():
    model = ready(Twig(4, 8, 2), Ghost(8))
    folded, _ = merged(model)
    x, file = image(), io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    with torch.inference_mode():
        expected = folded(x)
        others = {
            "copied": copy.deepcopy(folded),
            "pickled": torch.load(file, weights_only=False),
            "scripted": torch.jit.script(folded),
            "exported": torch.export.export(folded, (x,)).module(),
        }
        for name, other in others.items():
            assert torch.equal(other(x), expected), name
        assert others["copied"].state_dict().keys() == folded.state_dict().keys()
        assert "doconv" not in repr([type(module) for module in folded.modules()])


def test_over_parameterized_and_with_batch_norms():
    model = ready(*pair(4, 4, 3), Twig(4, 4), Twig(4, 8, 2), nn.Conv2d(8, 8, 1))
    trained, _ = over_parameterize(model)
    for parameter in trained.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    folded, report = merged(trained, fuse_batchnorm=True)
    assert convolutions(folded) == 4
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert [change.path for change in report.changed] == ["0", "1", "2.many_0", "3.many_0"]


def test_in_place():
    model = ready(Twig(4, 4), Ghost(4))
    expected, blocks, seen = model(image()), [*model], []
    model[0].register_forward_hook(lambda module, given, output: seen.append(module))
    folded, _ = fold(model, merge_branches=True, inplace=True)
    assert folded is model
    assert [*model] == blocks
    assert torch.allclose(model(image()), expected, atol=1e-5)
    assert seen == [blocks[0]]


def test_a_model_that_holds_the_branches_itself():
    model = ready(Twig(4, 4))[0]
    folded, report = merged(model)
    assert convolutions(folded) == 1
    assert [change.path for change in report.changed] == ["many_0"]
    assert convolutions(merged(ready(Mixer(4))[0])[0]) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_types_are_kept(dtype):
    model = ready(Twig(4, 4)).to(dtype)
    conv = fold(model, merge_branches=True).model[0].many_0
    assert conv.weight.dtype == conv.bias.dtype == dtype
    exact = fold(copy.deepcopy(model).double(), merge_branches=True).model[0].many_0
    assert torch.equal(conv.weight, exact.weight.to(dtype))


def test_whether_it_is_trained_is_kept():
    frozen = ready(Twig(4, 4)).requires_grad_(False)
    assert not fold(frozen, merge_branches=True).model[0].many_0.weight.requires_grad
    assert fold(ready(Twig(4, 4)), merge_branches=True).model[0].many_0.weight.requires_grad


def test_random_numbers_are_not_drawn():
    model, state = ready(Twig(4, 4)), torch.get_rng_state()
    fold(model, merge_branches=True)
    assert torch.equal(torch.get_rng_state(), state)


def two(run, a=None, b=None, **parts):
    """Return branches that a function runs, behind an activation."""
    a, b = a or nn.Conv2d(4, 4, 3, padding=1), b or nn.Conv2d(4, 4, 1)
    return ready(nn.ReLU(), Named(run, a=a, b=b, **parts))


def both(self, x):
    return self.a(x) + self.b(x)


def test_branches_that_give_zeros():
    model = two(both, nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    folded, _ = merged(model)
    assert convolutions(folded) == 1


def with_hook():
    model = two(both)
    model[1].a.register_forward_hook(lambda module, given, output: None)
    return model


def tied():
    model = two(both, b=nn.Conv2d(4, 4, 3, padding=1))
    model[1].b.weight = model[1].a.weight
    return model


def infinite():
    model = two(both)
    with torch.no_grad():
        model[1].a.weight.fill_(3e38)
        model[1].b.weight.fill_(3e38)
    return model


def called_elsewhere():
    inner = Named(lambda self, x: torch.cat([both(self, x), x], 1), a=nn.Conv2d(4, 4, 3, padding=1),
                  b=nn.Conv2d(4, 4, 1), c=nn.ReLU())  # fmt: skip
    return ready(Named(lambda self, x: self.inner(x) + self.inner.c(x).mean(), inner=inner))


class Unsaved(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.register_buffer("mask", torch.rand(10), persistent=False)

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x)) * self.mask


def change(self, x):
    a = self.a(x)
    x.mul_(2)
    return a + self.b(x)


def add_to(self, x):
    x += self.a(x)
    return x


REFUSED = {
    "bias inside": (ready(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)), SHIFTED),
    "batch norm inside": (ready(*pair(4, 4, 1), *pair(4, 4, 3)), SHIFTED),
    "padded twice": (ready(*pair(4, 4, 3), *pair(4, 4, 3)), TWICE),
    "residual": (
        two(lambda self, x: x + self.b(torch.relu(self.a(x)))), APART
    ),
    "branch used": (
        two(lambda self, x: (lambda a: torch.cat([a + self.b(x), a], 1))(self.a(x))), USED
    ),
    "sizes": (
        two(lambda self, x: self.a(x) + self.b(x),
            a=nn.Conv2d(4, 4, (1, 9)), b=nn.Conv2d(4, 4, (1, 10))), SIZES
    ),
    "costlier": (two(both, a=nn.Conv2d(4, 4, 7, padding=3, groups=4)), COSTLIER),
    "hooked": (with_hook(), HOOKED),
    "shared": (tied(), SHARED),
    "not finite": (infinite(), NOT_FINITE),
    "called twice": (two(lambda self, x: both(self, x) + self.a(torch.relu(x))), SEVERAL),
    "read": (two(lambda self, x: both(self, x) * self.a.weight.sum()), READ),
    "changed": (two(change), CHANGED),
    "dtypes": (two(both, b=nn.Conv2d(4, 4, 1).double()), UNLIKE),
    "even": (
        two(both, a=nn.Conv2d(4, 4, 2, padding="same"), b=nn.Conv2d(4, 4, 1)), LOPSIDED
    ),
    "called elsewhere": (called_elsewhere(), BYPASSED),
    "not saved": (ready(Unsaved()), UNSAVED),
    "a tensor made": (
        two(lambda self, x: torch.relu(both(self, x)) * torch.ones(1, 4, 1, 1)), UNSAVED
    ),
    "own parameter read": (
        two(lambda self, x: self.c(x) * self.c.shift.sum(), c=Own(4)), READ
    ),
}  # fmt: skip
CANNOT_RUN = {"sizes", "dtypes", "not finite"}


@pytest.mark.parametrize("case", REFUSED)
def test_branches_that_stay(case):
    model, reason = REFUSED[case]
    folded, report = fold(model, merge_branches=True)
    assert reason in {entry.reason for entry in report.left}
    assert report.changed == ()
    assert str(folded) == str(model)
    if case not in CANNOT_RUN:
        assert verify(model, folded, image()).absolute == 0


def test_training_mode_stays():
    model = ready(Twig(4, 4)).train()
    with pytest.warns(UserWarning, match="training mode"):
        _, report = fold(model, merge_branches=True)
    assert report.changed == ()
    model = ready(Named(both, a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))).train()
    _, report = fold(model, merge_branches=True)
    assert report.left == (Left("0", "Named", TRAINING),)


def add_to_view(self, x):
    y = x[:, :]
    y += self.a(x)
    y += self.b(x)
    return x


@pytest.mark.parametrize("run", [add_to, add_to_view])
def test_what_is_changed_in_place_by_adding_stays(run):
    model = two(run)
    folded, report = fold(model, merge_branches=True)
    assert report.changed == ()
    assert verify(model, folded, image()).absolute == 0


def test_a_part_that_cannot_be_traced_hides_nothing():
    def branching(self, x):
        return self.inner(x) if x.sum() > 0 else x

    model = ready(Named(branching, inner=Twig(4, 4)))
    folded, report = merged(model)
    assert [change.path for change in report.changed] == ["0.inner.many_0"]
    assert convolutions(folded) == 1


def test_without_it_branches_stay():
    model = ready(Twig(4, 4))
    folded, report = fold(model)
    assert report.changed == ()
    assert str(folded) == str(model)
