"""Which layers of a Gluon model are over-parameterized, and which are left."""

from __future__ import annotations

import pytest
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DOConv2D, over_parameterize  # noqa: E402

# isort: split
from gluon_models import (  # noqa: E402
    CONVOLUTIONS,
    INPLACE,
    built,
    chain,
    moved,
    outputs,
    same,
    square,
)
from mxnet import gluon  # noqa: E402
from mxnet.gluon import nn  # noqa: E402
from mxnet.gluon.contrib.cnn import DeformableConvolution  # noqa: E402

from doconv_core.models.report import (  # noqa: E402
    ALREADY,
    NOT_PLAIN,
    NOT_SELECTED,
    ONE_TAP,
    REPLACED,
    SUBCLASS,
    TIED,
    TRANSPOSED,
)
from doconv_mx.ordinary import OTHER  # noqa: E402


@pytest.mark.parametrize("where", ["0", "1.1", ["1.1"], lambda path, layer: path == "1.1"])
def test_any_path_of_a_layer_selects_it(where):
    layer = square()
    model = built(chain(layer, chain(nn.Activation("relu"), layer)))
    assert [c.path for c in over_parameterize(model, where=where).report.changed] == ["0"]


class Standardised(nn.Conv2D):
    """A convolution that computes something else."""


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (square, "0"),
        (lambda params: square(params, nn.Conv2DTranspose), None),
        (lambda params: square(params, Standardised), None),
    ],
    ids=["not selected", "transposed", "subclass"],
)
def test_a_weight_that_stays_as_it_is_elsewhere_is_left(make, where):
    first = square()
    model = built(chain(first, make(first.params)))
    target, report = over_parameterize(model, where=where)
    assert {left.path: left.reason for left in report.left}["0"] == TIED
    assert type(target[0]) is nn.Conv2D
    assert target[0].weight is target[1].weight


class Gamma(gluon.Parameter):
    """A parameter of another kind."""


def with_own_forward():
    layer = square()
    layer.hybrid_forward = lambda F, x, weight, bias: 2 * F.relu(x)
    return layer


def with_own_parameter():
    layer = nn.Conv2D(4, 3, in_channels=4, prefix="own_")
    layer.weight.__class__ = Gamma
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Conv2D(4, 1), ONE_TAP),
        (lambda: Standardised(4, 3), SUBCLASS),
        (lambda: nn.Conv2DTranspose(4, 3), TRANSPOSED),
        (lambda: DeformableConvolution(4, 3, in_channels=4), OTHER),
        (lambda: DOConv2D(4, 4, 3), ALREADY),
        (with_own_forward, REPLACED),
        (with_own_parameter, NOT_PLAIN),
    ],
    ids=["one tap", "subclass", "transposed", "deformable", "DO-Conv", "forward", "parameter"],
)
def test_what_is_no_ordinary_convolution_is_left_and_reported(layer, reason):
    model = built(chain(square(), layer()))
    before = outputs(model)
    kind = type(model[1])
    target, report = over_parameterize(model)
    assert type(target[1]) is kind
    assert report.left == (("1", kind.__name__, reason),)
    assert [c.path for c in report.changed] == ["0"]
    assert same(outputs(target), before)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, CONVOLUTIONS),
        ("body.*", ["body.0"]),
        (["conv?", "he*"], ["conv1", "head"]),
        (nn.Conv2D, CONVOLUTIONS),
        (lambda path, layer: layer._kwargs["num_group"] > 1, ["conv1"]),
    ],
)
def test_where_selects(where, expected):
    report = over_parameterize(built(), where=where).report
    assert [c.path for c in report.changed] == expected
    left = {left.path for left in report.left if left.reason == NOT_SELECTED}
    assert left == set(CONVOLUTIONS) - set(expected)


def test_where_that_selects_nothing_warns():
    model = built()
    with pytest.warns(UserWarning, match=r"where matches no convolution: 'bdy\.\*'.*'body.0'") as w:
        target, report = over_parameterize(model, where="bdy.*")
    assert w[0].filename == __file__
    assert not report.changed
    assert same(outputs(target), outputs(model))
    with pytest.warns(UserWarning, match="the model has no convolution that could be replaced"):
        over_parameterize(nn.Dense(3))


@INPLACE
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth_multiplier": 8}, ValueError, r"layer 'conv1': depth_multiplier must be at least"),
        ({"depth_multiplier": 9.5}, TypeError, "depth_multiplier must be an integer"),
        ({"where": 3}, TypeError, "where must be None, a glob pattern or several"),
    ],
)
def test_errors_come_before_anything_is_changed(inplace, arguments, error, message):
    model = built()
    with pytest.raises(error, match=message):
        over_parameterize(model, **arguments, inplace=inplace)
    assert type(model.conv1) is type(model.head) is nn.Conv2D
    assert over_parameterize(model, where="body.0", depth_multiplier=8).report.changed


def test_twice_is_the_same_as_once():
    first = moved(over_parameterize(built(), where="conv1").model)
    with pytest.warns(UserWarning, match="where matches no convolution: 'conv1'"):
        second, report = over_parameterize(first, where="conv1")
    assert not report.changed
    assert report.left[0] == ("conv1", "DOConv2D", ALREADY)
    assert same(outputs(second), outputs(first))
    third, report = over_parameterize(first)
    assert [c.path for c in report.changed] == CONVOLUTIONS[1:]
    assert same(outputs(third), outputs(first))


def test_a_model_that_is_a_layer_itself_is_named_so():
    with pytest.raises(ValueError, match=r"^the model itself: depth_multiplier must be at least"):
        over_parameterize(nn.Conv2D(4, 3), depth_multiplier=8)
