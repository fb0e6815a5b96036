import numpy as np
import pytest
from cases import one_test, refuses
from described import KINDS, NETWORKS, alone, input_of, state_of, whole

from doconv_core import BatchNormSpec, ConvSpec, Geometry, LayerForm, LinearSpec, fit_state
from doconv_core.kinds.base import recipe
from doconv_core.networks.evaluate import evaluate
from doconv_core.networks.lowering import layers, lowered
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Concat,
    Conv,
    Flatten,
    Linear,
    Network,
    Pool,
    numbered,
    sequence,
)
from doconv_core.networks.shapes import infer


def bsconv(kind, **options):
    return Conv(8, (3, 3), 2, 0, bias=True, kind=kind, **options)


@one_test
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (recipe("bsconvu"), {"pointwise": Conv(8)}),
        (recipe("bsconvu", with_bn=True), {"pointwise": Conv(8), "batch_norm": BatchNorm()}),
        (
            recipe("bsconvs", p=0.5, min_mid_channels=1),
            {"pointwise1": Conv(3, orthonormal=True), "pointwise2": Conv(8)},
        ),
        (
            recipe("bsconvs", with_bn=True),
            {
                "pointwise1": Conv(4, orthonormal=True),
                "batch_norm1": BatchNorm(),
                "pointwise2": Conv(8),
                "batch_norm2": BatchNorm(),
            },
        ),
    ],
)
def test_a_bsconv_becomes_its_parts(kind, parts):
    body = lowered(Network("net", sequence(("conv", bsconv(kind))), (6, 9, 9))).body
    depthwise = Conv(8, (3, 3), 2, 0, groups=0, bias=True)
    assert body == sequence(("conv", sequence(*parts.items(), ("depthwise", depthwise))))


@one_test
@pytest.mark.parametrize("name", NETWORKS)
def test_lowering_keeps_shapes_and_function(name):
    network = NETWORKS[name]
    low = lowered(network)
    assert lowered(low) == low
    assert {p: e[2:] for p, e in infer(network).items()}.items() <= {
        p: e[2:] for p, e in infer(low).items()
    }.items()
    state, x = state_of(network), input_of(network)
    assert np.array_equal(evaluate(low, state, x), evaluate(network, state, x))


def test_the_middle_follows_from_the_channels_that_come():
    network = Network("net", sequence(("conv", bsconv(recipe("bsconvs", 0.5, 1)))), (6, 9, 9))
    low = lowered(network, (20, 9, 9))
    assert low.input_shape == (20, 9, 9)
    assert infer(low)["conv.pointwise1"].after == (10, 9, 9)
    assert layers(network, (20, 9, 9)) == layers(low)


test_what_cannot_be_taken_apart_is_refused = refuses(
    lambda conv: lowered(Network("net", numbered([conv]), (6, 9, 9))),
    (bsconv(recipe("bsconvu"), groups=2), ValueError, "'1' cannot be a BSConv.*received groups=2"),
    (bsconv(recipe("bsconvs"), groups=0), ValueError, "'1' cannot be a BSConv.*received groups=0"),
    (
        bsconv(recipe("bsconvs", p=0.0)),
        ValueError,
        r"p must be above 0 and at most 1; received p=0\.0",
    ),
)


def test_layers_are_the_forms_of_all_that_has_arrays():
    body = sequence(
        ("stem", Conv(8, (5, 3), 2, bias=True, kind=recipe("doconv"))),
        ("bn", BatchNorm(1e-3, 0.2)),
        ("conv", Conv(8, (3, 3), padding=0, kind=recipe("bsconvu", with_bn=True))),
        ("bare", BatchNorm(affine=False)),
        ("flatten", Flatten()),
        ("fc", Linear(2)),
    )
    one, none = (1, 1), ((0, 0), (0, 0))
    assert layers(Network("net", body, (3, 8, 8))) == {
        "stem": LayerForm(
            ConvSpec(3, 8, (5, 3)),
            over_parameterized=True,
            geometry=Geometry((2, 2), one, ((2, 2), (1, 1))),
        ),
        "bn": LayerForm(BatchNormSpec(8, 1e-3, 0.2)),
        "conv.pointwise": LayerForm(
            ConvSpec(8, 8, one), bias=False, geometry=Geometry(one, one, none)
        ),
        "conv.batch_norm": LayerForm(BatchNormSpec(8, 1e-5, 0.1)),
        "conv.depthwise": LayerForm(
            ConvSpec(8, 8, (3, 3), 8), bias=False, geometry=Geometry(one, one, none)
        ),
        "bare": LayerForm(BatchNormSpec(8, 1e-5, 0.1), bias=False, scale=False),
        "fc": LayerForm(LinearSpec(32, 2)),
    }


@one_test
@pytest.mark.parametrize("kind", KINDS)
def test_layers_come_in_the_order_of_the_network_and_take_its_states(kind):
    network = whole(KINDS[kind])
    forms = layers(network)
    assert list(forms) == [path for path in infer(lowered(network)) if path in forms]
    state = state_of(network)
    taken = fit_state(state, forms)
    assert {f"{p}.{n}" for p, arrays in taken.items() for n in arrays} == state.arrays.keys()


def test_sizes_that_give_no_layer_are_refused_by_path():
    with pytest.raises(ValueError, match="'2': in_channels must be divisible by groups"):
        layers(alone("net", Conv(4, (3, 3), groups=4)))


def test_names_and_branches_that_do_not_fit_are_refused_by_path():
    twice = Network("net", sequence(("a", Conv(4)), ("a", Conv(4))), (3, 4, 4))
    with pytest.raises(ValueError, match="the name 'a' must be of one node alone"):
        infer(twice)
    branches = numbered([Conv(4), Conv(4, stride=2)])
    with pytest.raises(ValueError, match=r"'2' cannot join \(4, 7, 6\), \(4, 4, 3\): the sizes"):
        infer(alone("net", Concat(branches)))
    with pytest.raises(ValueError, match="'2' cannot join no branches"):
        infer(alone("net", Concat(numbered([]))))


test_nodes_that_compute_nothing_are_refused = refuses(
    lambda make: make(),
    (
        lambda: recipe("bsconv"),
        ValueError,
        "name must be one of conv, doconv, bsconvu, bsconvs, branches, .*; received 'bsconv'",
    ),
    (
        lambda: Activation("swish"),
        ValueError,
        "name must be one of relu, relu6, .*received 'swish'",
    ),
    (lambda: Pool("min", 2, 2), ValueError, "name must be one of max, average; received 'min'"),
    (lambda: Pool("max", 2, 2, 2), ValueError, "padding must be at most half"),
)
