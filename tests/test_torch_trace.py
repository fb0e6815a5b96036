"""PyTorch: models that ask about their values are not traced as what they are not."""

from __future__ import annotations

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch_models import images, network  # noqa: E402

from doconv_torch import fold, verify  # noqa: E402


class Block(nn.Module):
    """A convolution and its batch norm, called by a function."""

    def __init__(self, forward, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.function = forward

    def forward(self, x, mask=None):
        return self.function(self, x, mask)


def asks_for_class(self, x, mask):
    y = self.conv(x)
    return self.norm(y) + y if isinstance(y, torch.Tensor) else self.norm(y)


def asks_torch(self, x, mask):
    y = self.conv(x)
    return self.norm(y) + y if torch.is_tensor(y) else self.norm(y)


def helped(self, x, mask):
    return asks_for_class(self, x, mask)


def asks_for_mask(self, x, mask):
    y = self.conv(x)
    return self.norm(y) + y if isinstance(mask, torch.Tensor) else self.norm(y)


@pytest.mark.parametrize("forward", [asks_for_class, asks_torch, helped])
def test_what_asks_for_tensors_is_left(forward):
    model = nn.Sequential(network(lambda: Block(forward))).eval()
    folded, report = fold(model, fuse_batchnorm=True)
    assert [(left.path, left.reason) for left in report.left] == [
        ("0.norm", "layer '0' cannot be traced (its code asks whether a value is a tensor)")
    ]
    assert verify(model, folded, images()) == (0, 0)


def test_an_argument_that_is_given_or_not():
    block = network(lambda: Block(asks_for_mask)).eval()
    _, report = fold(block, fuse_batchnorm=True)
    reason = "the model itself cannot be traced (its code asks whether a value is a tensor)"
    assert [(left.path, left.reason) for left in report.left] == [("norm", reason)]
    _, report = fold(nn.Sequential(block), fuse_batchnorm=True)  # which never gives it
    assert [change.path for change in report.changed] == ["0.norm"]


def concatenates(self, x, mask):
    features = [x, x]
    x = features if isinstance(features, torch.Tensor) else torch.cat(features, 1)
    return self.norm(self.conv(x))


def asks_for_list(self, x, mask):
    if isinstance(x, (list, tuple)):
        x = torch.cat(x, 1)
    return self.norm(self.conv(x))


@pytest.mark.parametrize(("forward", "channels"), [(concatenates, 6), (asks_for_list, 3)])
def test_other_questions_do_not_matter(forward, channels):
    model = network(lambda: Block(forward, channels)).eval()
    folded, report = fold(model, fuse_batchnorm=True)
    assert report.left == ()
    assert type(folded.norm) is nn.Identity
    assert verify(model, folded, images()).relative < 1e-6


def asks_for_either(self, x, mask):
    """Neither yes to both questions nor no to both is right."""
    y = self.conv(x)
    other = isinstance(x, torch.Tensor) and not isinstance(x.shape[0], torch.Tensor)
    return self.norm(y) + y if other else self.norm(y)


def requires_a_tensor(self, x, mask):
    if not isinstance(x, torch.Tensor):
        raise TypeError("x must be a tensor")
    return self.norm(self.conv(x))


def asks_of_many(self, x, mask):
    many = [isinstance(x + n, torch.Tensor) for n in range(9)]
    y = self.conv(x)
    return self.norm(y) + y if all(many) else self.norm(y)


@pytest.mark.parametrize("forward", [asks_for_either, requires_a_tensor, asks_of_many])
def test_every_answer_counts(forward):
    blocks = [network(lambda: Block(forward)) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), *blocks).eval()
    folded, report = fold(model, fuse_batchnorm=True)
    assert [(left.path, left.reason) for left in report.left] == [
        (f"{n}.norm", f"layer '{n}' cannot be traced (its code asks whether a value is a tensor)")
        for n in (2, 3)
    ]
    assert type(folded[1]) is nn.Identity
    assert verify(model, folded, images()).relative < 1e-6


def lists(self, x, mask):
    features = [x] if isinstance(x, torch.Tensor) else x
    return self.norm(self.conv(torch.cat(features, 1)))


def keeps(self, x, mask):
    self.first, self.second = x, x + 1
    return self.norm(self.conv(self.second))


def asks_for_parameters(self, x, mask):
    y = self.conv(x)
    return self.norm(y) + y if isinstance(y, nn.Parameter) else self.norm(y)


@pytest.mark.parametrize("forward", [lists, keeps, asks_for_parameters])
def test_answers_that_make_no_difference(forward):
    blocks = [network(lambda: Block(forward)) for _ in range(6)]  # together they ask too often
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), *blocks).eval()
    x = torch.nn.functional.pad(images(), (4, 4, 4, 4))
    folded, report = fold(model, fuse_batchnorm=True)
    assert report.left == ()
    assert len(report.changed) == 7
    assert verify(model, folded, x).relative < 1e-6
