"""The core's evaluation of a description, against PyTorch's of the same network built by hand."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from contract_networks import trained
from described import KINDS, input_of, state_of, whole
from frameworks import need
from networks.described import NETWORKS

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from doconv_core import difference  # noqa: E402
from doconv_core.networks.evaluate import evaluate, gradients  # noqa: E402
from doconv_core.networks.initialize import initialize  # noqa: E402
from doconv_core.networks.lowering import layers  # noqa: E402
from doconv_torch import DOConv2d, build, export_state, load_state  # noqa: E402

TORCH_NAMES = {"gamma": "weight", "beta": "bias"}


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def conv(kind, i, o, size, stride=1, bias=False):
    """A convolution of the kind, with half its size as padding."""
    around = tuple(k // 2 for k in size)
    if kind in ("conv", "doconv"):
        layer = nn.Conv2d if kind == "conv" else DOConv2d
        return layer(i, o, size, stride, around, bias=bias)
    norm = kind.endswith("_bn")
    depthwise = nn.Conv2d(o, o, size, stride, around, groups=o, bias=bias)
    if kind.startswith("bsconvu"):
        first = {"pointwise": nn.Conv2d(i, o, 1, bias=False)}
        first |= {"batch_norm": nn.BatchNorm2d(o)} if norm else {}
        return named(**first, depthwise=depthwise)
    mid = min(i, max(2, -(-i // 2)))
    first = {"pointwise1": nn.Conv2d(i, mid, 1, bias=False)}
    first |= {"batch_norm1": nn.BatchNorm2d(mid)} if norm else {}
    first |= {"pointwise2": nn.Conv2d(mid, o, 1, bias=False)}
    first |= {"batch_norm2": nn.BatchNorm2d(o)} if norm else {}
    return named(**first, depthwise=depthwise)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x):
        factors = torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        # Not F.hardsigmoid, whose gradient PyTorch computes with a sixth rounded to float32.
        return x * (nn.functional.relu6(self.expand(factors) + 3) / 6)


class Unit(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv1 = conv(kind, 6, 8, (3, 3), 2)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = conv(kind, 8, 8, (3, 3), bias=True)
        self.se = SqueezeExcite()
        self.shortcut = named(conv=nn.Conv2d(6, 8, 1, 2, bias=False), bn=nn.BatchNorm2d(8))

    def forward(self, x):
        body = self.se(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return body + self.shortcut(x)


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, groups=2, bias=False)

    def forward(self, x):
        return x + nn.functional.relu6(self.conv(x))


class Branches(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.wide = named(conv=conv(kind, 8, 4, (3, 3)), bn=nn.BatchNorm2d(4, 1e-3, 0.2))
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x):
        return torch.cat([self.wide(x), self.deep(x), self.pool(x)], 1)


def by_hand(kind):
    return named(
        bn=nn.BatchNorm2d(3, affine=False),
        stem=conv(kind, 3, 6, (5, 3)),
        pool=nn.MaxPool2d(3, 2, 1),
        unit=Unit(kind),
        again=Again(),
        branches=Branches(kind),
        act=nn.Hardswish(),
        last=nn.AvgPool2d(2, 2),
        flatten=nn.Flatten(),
        fc=nn.Linear(40, 5),
    ).double()


def torch_gradients(model):
    """The model's gradients by the names of a state."""
    found = dict(model.named_parameters())
    for path, form in export_state(model).layers.items():
        for name, shape in form.shapes.items():
            parameter = found.get(f"{path}.{TORCH_NAMES.get(name, name)}")
            if parameter is not None and not name.startswith("running"):
                yield f"{path}.{name}", parameter.grad.numpy().reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_outputs_and_gradients_are_those_of_the_model(kind):
    network, model = whole(KINDS[kind]), by_hand(kind)
    exported = export_state(model)
    assert exported.layers == layers(network)
    assert list(exported.layers) == list(layers(network))
    load_state(model, initialize(network, 1))
    x = input_of(network, dtype=np.float64)
    expected = model.eval()(torch.from_numpy(x)).detach().numpy()
    assert difference(evaluate(network, export_state(model), x), expected).relative < 1e-12
    for training in (False, True):
        load_state(model, state_of(network))
        check(network, model, state_of(network), training)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_of_other_tests_are_computed_alike(name):
    network, model = NETWORKS[name], build(NETWORKS[name]).double()
    given = trained(network)
    state = replace(given, arrays={n: a.astype(np.float64) for n, a in given.arrays.items()})
    for training in (False, True):
        load_state(model, state)
        # PyTorch computes the gradient of hard sigmoid with a sixth rounded to float32.
        check(network, model, state, training, 1e-8)


def check(network, model, state, training, close=1e-10):
    """Assert that the core evaluates the network as the model is computed, and its gradients."""
    x = input_of(network)
    given = torch.from_numpy(x).requires_grad_()
    model.zero_grad()
    output = model.train(training)(given)
    dy = np.random.default_rng(2).normal(size=output.shape)
    output.backward(torch.from_numpy(dy))
    found = evaluate(network, state, x, training=training)
    assert difference(found, output.detach().numpy()).relative < 1e-12, training
    ours = gradients(network, state, x, dy, training=training)
    assert difference(ours.x, given.grad.numpy()).relative < close, training
    theirs = dict(torch_gradients(model))
    assert list(ours.parameters) == list(theirs)
    scale = max(np.abs(gradient).max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert np.abs(ours.parameters[name] - gradient).max() < close * scale, (name, training)
