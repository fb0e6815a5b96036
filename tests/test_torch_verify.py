"""PyTorch: `verify` compares two models' outputs and leaves both as they were."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Any

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch_models import images, network, trained  # noqa: E402

from doconv_core import Difference  # noqa: E402
from doconv_torch import fold, over_parameterize, verify  # noqa: E402


def models():
    model = trained(over_parameterize(network())[0]).eval()
    return model, fold(model)[0]


def test_modes_are_restored_one_by_one_after_errors_too():
    model, other = network().train(), network().train()
    model.stages[0].eval()
    other.head.eval()
    modes = [[m.training for m in each.modules()] for each in (model, other)]
    statistics = [each.stem[1].running_mean.clone() for each in (model, other)]
    assert verify(model, other, images()).absolute == 0
    assert verify(model, model, images()).absolute == 0
    with pytest.raises(RuntimeError, match="channels"):
        verify(model, other, images()[:, :2])
    for each, before, mean in zip((model, other), modes, statistics, strict=True):
        assert [m.training for m in each.modules()] == before
        assert torch.equal(each.stem[1].running_mean, mean)


class Overridden(nn.Module):
    """A model whose `train` does more than to set the mode."""

    calls = 0

    def train(self, mode=True):
        self.calls += 1
        return super().train(mode)

    def forward(self, x):
        return x * (2 if self.training else 1)


def test_train_and_eval_are_not_called():
    model = Overridden()
    assert verify(model, nn.Identity(), images()).absolute == 0
    assert model.calls == 0
    assert model.training


class Returning(nn.Module):
    """A model that returns what it was made with, of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments, **options):
        return self.function(*arguments, **options)


@dataclass
class Output:
    logits: Any
    hidden: Any = None


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "structure",
    [
        lambda x: Output(x, (x,)),
        lambda x: Pair(x, 2.5),
        lambda x: collections.OrderedDict(a=x.numpy()),
        lambda x: [x.bfloat16(), x.half(), x.double(), x > 0, x.long()],
        lambda x: x.to_sparse(),
    ],
)
def test_nested_outputs(structure):
    x = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    a, b = Returning(structure), Returning(lambda x: structure(x + (x == 4)))
    assert verify(a, a, x) == Difference(0.0, 0.0)
    assert verify(a, b, x) == Difference(1.0, 0.25)


def test_inputs_by_position_and_by_name():
    x, y = images(), 2 * images()
    model, swapped = Returning(lambda x, y: x - y), Returning(lambda x, y: y - x)
    assert verify(model, swapped, (x, y)) == verify(model, swapped, {"x": x, "y": y})


def test_both_models_see_the_same_random_numbers_and_none_is_used_up():
    noisy, state = Returning(lambda x: x + torch.randn_like(x)), torch.get_rng_state()
    assert verify(noisy, noisy, images()).absolute == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_are_neither_needed_nor_made():
    model, _ = models()
    x = images().requires_grad_()
    assert verify(model, model, x).absolute == 0
    assert x.grad is None
    assert torch.is_grad_enabled()


def test_exported_programs():
    model, _ = models()
    exported = torch.export.export(model, (images(),)).module()
    assert verify(model, exported, images()).relative < 1e-6
