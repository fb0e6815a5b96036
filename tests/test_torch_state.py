"""The canonical state of PyTorch modules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

from doconv_core import BatchNormSpec, State, StateError  # noqa: E402
from doconv_torch import DOConv2d, export_state, load_state  # noqa: E402


def network(multiplier=12, bias=True, cls=DOConv2d):
    options = {"depth_multiplier": multiplier} if cls is DOConv2d else {}
    convolution = cls(4, 6, 3, groups=2, bias=bias, **options)
    return nn.Sequential(
        convolution, nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.Linear(150, 3)
    )


def image(**options):
    return torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(1), **options)


class Owner(nn.Module):
    """A module of a type of its own with a parameter, or with a buffer, in its state or not."""

    def __init__(self, persistent=None):
        super().__init__()
        if persistent is None:
            self.scale = nn.Parameter(torch.ones(3))
        else:
            self.register_buffer("mask", torch.ones(3), persistent)


class Counter(nn.Module):
    """A module with a buffer of a batch norm's name, which means something else here."""

    def __init__(self):
        super().__init__()
        self.register_buffer("num_batches_tracked", torch.ones(3))


def pruned(model):
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Owner(), "'1' is a Owner with 'scale'; a canonical state holds convolutions, transposed"),
        (Counter(), "'1' is a Counter with 'num_batches_tracked'; a canonical state holds"),
        (nn.LSTM(3, 4), "'1' is a LSTM with 'weight_ih_l0', .*; a canonical state holds"),
        (nn.LazyConv2d(3, 3), "'1' is a LazyConv2d with 'weight', 'bias'"),
        (parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), "'1' is a ParametrizedConv2d with 'bi"),
        (nn.BatchNorm2d(3, momentum=None), "momentum=None, the average of all batches, has no co"),
        (nn.BatchNorm2d(3, track_running_stats=False), "a batch norm without running statistics"),
        (
            nn.InstanceNorm2d(3, track_running_stats=True),
            "an instance norm with running statistics has no counterpart",
        ),
        (nn.LayerNorm((3, 4)), "a layer norm over several axes has no counterpart"),
        (nn.Embedding(3, 4, max_norm=1.0), "max_norm, which rescales the rows, has no counterpart"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_module_without_a_counterpart_is_named(module, message):
    with pytest.raises(TypeError, match=message):
        export_state(nn.Sequential(nn.Conv2d(1, 1, 1), module))


def test_buffers_outside_the_state_dict_do_not_matter():
    other = network()
    model = network().append(Owner(persistent=False))
    load_state(model, export_state(other))
    assert torch.equal(model[:5](image()), other(image()))


def test_a_batch_norm_brings_its_statistics_and_leaves_its_count():
    model, other = nn.BatchNorm2d(4, 1e-3, 0.25), nn.BatchNorm2d(4, 1e-3, 0.25)
    for _ in range(3):
        model(image())
    state = export_state(model)
    assert state.layers[""].spec == BatchNormSpec(4, 1e-3, 0.25)
    assert list(state.arrays) == ["gamma", "beta", "running_mean", "running_var"]
    load_state(other, state)
    assert torch.equal(other.eval()(image()), model.eval()(image()))
    assert (model.num_batches_tracked, other.num_batches_tracked) == (3, 0)


def test_parameters_over_the_same_memory_must_agree():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = nn.Parameter(first.weight.data)
    model = nn.Sequential(first, second)
    state = export_state(model)
    load_state(model, state)
    arrays = {**state.arrays, "1.weight": state.arrays["1.weight"] + 1}
    with pytest.raises(StateError, match=r"'0.weight' and '1.weight' are one parameter"):
        load_state(model, State(state.layers, arrays))
    np.testing.assert_array_equal(first.weight.detach().numpy(), state.arrays["0.weight"])


ONE, TWO, FOUR = ((1, 1), (1, 1)), ((2, 2), (2, 2)), ((4, 4), (4, 4))
PADDED = [
    (lambda c: [nn.ZeroPad2d((1, 2, 3, 4)), c], ((4, 5), (2, 3))),
    (lambda c: [nn.ConstantPad2d(1, 0.0), c], TWO),
    (lambda c: [nn.ConstantPad2d(1, 0.5), c], ONE),
    (lambda c: [nn.ReflectionPad2d(1), c], ONE),
    (lambda c: [nn.ZeroPad2d(1), nn.Sigmoid(), c], ONE),
    (lambda c: [nn.ZeroPad2d(1), nn.Identity(), nn.Dropout(), nn.ReLU(), c], TWO),
    (lambda c: [nn.Sequential(nn.ZeroPad2d(1)), c], TWO),
    (lambda c: [nn.ZeroPad2d(1), nn.Sequential(nn.ZeroPad2d(2)), c], FOUR),
    (lambda c: [nn.ModuleList([nn.ZeroPad2d(1)]), c], ONE),
    (lambda c: [nn.ZeroPad2d(1), nn.ZeroPad2d(2), nn.Sequential(c)], FOUR),
    (lambda c: [nn.ZeroPad2d(1), c, c], ("(1, 1) or (2, 2)",) * 2),
]


@pytest.mark.parametrize(("layers", "padding"), PADDED)
def test_zeros_before_a_convolution_count_as_its_padding(layers, padding):
    state = export_state(nn.Sequential(*layers(nn.Conv2d(4, 4, 3, padding=1))))
    assert next(iter(state.layers.values())).geometry.padding == padding


def test_zeros_beside_a_convolution_are_no_padding():
    state = export_state(nn.ModuleList([nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3, padding=1)]))
    assert state.layers["1"].geometry.padding == ONE


def test_zeros_before_a_padding_of_another_mode_are_told_apart():
    convolution = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    alone = export_state(convolution).layers[""].geometry
    assert (alone.padding, alone.padding_mode) == (((1, 1), (1, 1)), "reflect")
    padded = export_state(nn.Sequential(nn.ZeroPad2d((1, 0, 0, 0)), convolution)).layers["1"]
    assert padded.geometry.padding == ((1, 1), "(1, 1) after zeros (1, 0)")


def test_zeros_before_a_transposed_convolution_are_so_many_strides_of_output():
    convolution = nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1)
    padded = nn.Sequential(nn.ZeroPad2d(1), convolution)
    state = export_state(padded)
    assert state.layers["1"].geometry.padding == ((-1, -1), (-1, -1))
    cropped = nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1)
    with pytest.raises(StateError, match=r"padding is \(\(-1, -1\), .* in the state, \(\(1, 1\)"):
        load_state(cropped, state, match={"1": ""})


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: network().to("meta"), ValueError, "'0.weight' is on the meta device"),
        (lambda: pruned(network()), TypeError, "'0', a DOConv2d, has .*'weight_orig'.*expected 'w"),
        (lambda: network().append(Owner(persistent=True)), TypeError, "'5' is a Owner with 'mask'"),
        (
            lambda: nn.Sequential(*network()[:4], nn.Linear(150, 3, dtype=torch.complex64)),
            TypeError,
            "'4.weight' is torch.complex64; expected one of torch.float64",
        ),
    ],
)
def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(model, error, message):
    state, model = export_state(network()), model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=r"'[045]"):
        export_state(model)
    with pytest.raises(error, match=message):
        load_state(model, state)
    for name, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value, before[name])
