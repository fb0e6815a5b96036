"""Names of networks: which there are, what they stand for, and how a wrong one is refused."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import pytest
from cases import one_test, refuses
from hypothesis import given
from hypothesis import strategies as st

from doconv_core import count
from doconv_core.kinds.base import recipe
from doconv_core.kinds.bsconv import mid_channels
from doconv_core.networks import mobilenets, resnets
from doconv_core.networks.names import describe, known_name, list_models
from doconv_core.networks.nodes import BatchNorm, Conv
from doconv_core.networks.shapes import infer

NAMES = list_models()


def convolutions(name, **options):
    """The convolutions of a network, by path, with their places."""
    placed = infer(describe(name, **options))
    return {path: at for path, at in placed.items() if isinstance(at.node, Conv)}


@one_test
@pytest.mark.parametrize("name", NAMES)
def test_every_listed_name_gives_a_network_for_its_data(name):
    network = describe(name)
    digits, cifar = name.startswith("tutorial"), name.startswith("cifar_")
    expected = (1, 28, 28) if digits else (3, 32, 32) if cifar else (3, 224, 224)
    classes = 10 if digits else 100 if cifar else 1000
    assert (network.name, network.input_shape) == (name, expected)
    assert infer(network)[""].after == (classes,)
    other = describe(name, num_classes=7, in_channels=2)
    assert other.input_shape == (2, *expected[1:])
    assert infer(other)[""].after == (7,)


def test_the_list():
    assert len(set(NAMES)) == len(NAMES)
    assert list_models("cifar_resnet*") == [
        f"cifar_resnet{depth}{suffix}"
        for suffix in ("", "_bsconvu", "_bsconvs_p1d4", "_doconv")
        for depth in (20, 56, 110, 302, 602)
    ]
    assert list_models("mobilenetv1*") == [
        f"mobilenetv1_{width}{suffix}"
        for suffix in ("", "_bsconvu", "_doconv")
        for width in ("w1", "w3d4", "w1d2", "w1d4")
    ]
    assert list_models("cifar_wrn28_?_bsconvu") == [
        f"cifar_wrn28_{k}_bsconvu" for k in (1, 2, 3, 4, 8)
    ]
    assert list_models("resnet*_v?b") == [f"resnet{n}_v1b" for n in (18, 34, 50, 101, 152)]
    assert list_models("no*") == []
    assert list_models("Plain18") == []


@one_test
@pytest.mark.parametrize(
    "name",
    [
        "resnet10", "preresnet102_bsconvu", "cifar_resnet602_bsconvs_p1d8", "cifar_wrn16_7",
        "cifar_wrn40_10_bsconvs_p3d16", "cifar_resnet20_bsconvs_p1d1", "resnet34_bsconvs_p2d3",
        "mobilenetv1_w2", "cifar_mobilenetv1_w3d7_bsconvu", "mobilenetv2_w7d5_bsconvs_p1d6",
        "cifar_mobilenetv3_small_w7d20", "mobilenetv3_large_w1d16_bsconvs_p1d6",
        "mobilenet1.0", "mobilenetv2_0.75_doconv", "mobilenetv3_small", "resnext50_32x4d_doconv",
        "plain18_doconv", "tutorial_pt_doconv", "cifar_mobilenetv2_w1_bsconvs_p1d6_doconv",
        "cifar_wrn28_10_bsconvu",
    ],
)  # fmt: skip
def test_names_that_there_are(name):
    assert describe(name).name == name


@one_test
@pytest.mark.parametrize(
    ("name", "reason", "nearest"),
    [
        ("cifar_resnet21", "depth of a cifar_resnet is 20, 56, 110, 302 or 602", "cifar_resnet20"),
        ("resnet20", "depth of a resnet is 10, 18, 26, 34, 68 or 102", "resnet10"),
        ("resnet50", "depth of a resnet is 10, 18, 26, 34, 68 or 102", "resnet50_v1b"),
        ("ResNet-50-v1b", "no family has such names", "'resnet50_v1b', "),
        ("cifar_preresnet18", "depth of a cifar_preresnet is 20, 56, 110", "cifar_preresnet110"),
        ("cifar_wrn29_1", "depth of a cifar_wrn is 16, 28 or 40", "cifar_wrn28_1"),
        ("cifar_wrn28_0", "factor K of a cifar_wrnN_K is at least 1", "cifar_wrn28_10"),
        ("cifar_resnet20_bsconvs_p0d4", "p of BSConv-S is X/Y in pXdY, above 0 and at most 1",
         "cifar_resnet20_bsconvs_p1d4"),
        ("cifar_resnet20_bsconvs_p5d4", "above 0 and at most 1", "cifar_resnet20_bsconvs_p1d4"),
        ("cifar_resnet20_bsconvs_p1d0", "above 0 and at most 1", "cifar_resnet20_bsconvs_p1d4"),
        ("mobilenetv1_w0", "width of a mobilenetv1 is wX or wXdY.*at least 1/32", "mobilenetv1_w1"),
        ("mobilenetv1_w1d0", "at least 1/32", "mobilenetv1_w1d4"),
        ("mobilenetv1_w1d33", "at least 1/32", "mobilenetv1_w1d2"),
        ("cifar_mobilenetv2_w1d17", "at least 1/16", "cifar_mobilenetv2_w1"),
        ("mobilenetv3_small_w1d5", "at least 1/4", "mobilenetv3_small_w1"),
        ("mobilenetv3_large_w1d17", "at least 1/16", "mobilenetv3_large_w1"),
        ("mobilenetv1_w1_bsconvs_p1d4", "mobilenetv1_w1 has no BSConv variant but _bsconvu",
         "mobilenetv1_w1_bsconvu"),
        ("mobilenetv2_w1_bsconvu", "mobilenetv2_w1 has no BSConv variant but _bsconvs_p1d6",
         "mobilenetv2_w1"),
        ("mobilenetv2_w1_bsconvs_p1d4", "no BSConv variant but _bsconvs_p1d6",
         "mobilenetv2_w1_bsconvs_p1d6"),
        ("mobilenetv3_small_w1_bsconvs_p2d12", "but _bsconvs_p1d6",
         "mobilenetv3_small_w1_bsconvs_p1d6"),
        ("resnet18_v1_bsconvu", "resnet18_v1 has no BSConv variant;", "resnet18_v1"),
        ("cifar_resnet20_bsconvu_doconv", "within a BSConv are not over-parameterized",
         "cifar_resnet20_bsconvu"),
        ("cifar_resnet20_bsconvs", "no family has such names", "cifar_resnet20_bsconvu"),
        ("cifar_resnet020", "no family has such names", "cifar_resnet20"),
        ("resnext50", "no family has such names", "'resnext50_32x4d'"),
        ("resnet50_v3", "no family has such names", "resnet50_v1"),
        ("plain18_doconv_doconv", "no family has such names", "plain18_doconv"),
        ("Cifar_ResNet20", "no family has such names", "cifar_resnet20"),
        ("cifar_resnet20 ", "no family has such names", "cifar_resnet20"),
        ("cifar_resnet20_", "no family has such names", "cifar_resnet20"),
        ("cifar_resnet２０", "no family has such names", "cifar_resnet20"),
        ("mobilenetv1_w99999999999", "no family has such names", "mobilenetv1_w1"),
        ("", "no family has such names", "tutorial_"),
        ("_doconv", "no family has such names", "doconv"),
    ],
)  # fmt: skip
def test_names_that_there_are_not(name, reason, nearest):
    with pytest.raises(ValueError, match=reason) as caught:
        describe(name)
    before, _, after = str(caught.value).partition("the nearest are ")
    assert before.startswith(f"{name!r} is no network: ")
    assert nearest in after


@one_test
@pytest.mark.parametrize("version", mobilenets.LEAST)
def test_the_least_widths_leave_a_channel_and_no_more(version):
    least, build = mobilenets.LEAST[version], f"mobilenet{version}"
    name = f"{build}_w{least.numerator}d{least.denominator}"
    assert min(at.after[0] for at in infer(describe(name)).values()) == 1
    with pytest.raises(ValueError, match=f"at least {least}"):
        describe(f"{build}_w{least.numerator}d{least.denominator + 1}")


@given(st.integers(1, 200), st.integers(1, 400), st.sampled_from(["1", "2", "3_small", "3_large"]))
def test_any_width_gives_a_network_or_is_refused(above, below, version):
    least, table = mobilenets.LEAST[f"v{version}"], mobilenets.TABLES.get(f"v{version}")
    stem = mobilenets.V1_STEM if table is None else table.stem
    name = f"cifar_mobilenetv{version}_w{above}d{below}"
    if Fraction(above, below) < least:
        with pytest.raises(ValueError, match="at least"):
            describe(name)
        return
    placed = infer(describe(name))
    assert all(at.after[0] >= 1 for at in placed.values())
    assert placed["stem.conv"].after[0] == stem * above // below


@given(st.integers(0, 40), st.integers(0, 40))
def test_any_share_gives_a_network_or_is_refused(above, below):
    name = f"cifar_resnet20_bsconvs_p{above}d{below}"
    if not 0 < above <= below:
        with pytest.raises(ValueError, match="at most 1"):
            describe(name)
        return
    kinds = {at.node.kind for at in convolutions(name).values()} - {recipe()}
    assert kinds == {recipe("bsconvs", p=above / below, with_bn=True)}


@given(st.text(max_size=30))
def test_any_text_is_refused_in_one_way(text):
    if text in NAMES:
        return
    with pytest.raises(ValueError, match=r"is no network: .*the nearest are"):
        describe(text)


@one_test
@pytest.mark.parametrize("name", [None, 3, b"plain18", ["plain18"]])
def test_what_is_no_name(name):
    with pytest.raises(TypeError, match="name must be a string; received"):
        describe(name)


test_wrong_numbers = refuses(
    lambda options: describe("plain18", **options),
    ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
    ({"num_classes": 10.0}, TypeError, "num_classes must be an integer"),
    ({"num_classes": True}, TypeError, "num_classes must be an integer"),
    ({"in_channels": 0}, ValueError, "in_channels must be at least 1"),
    ({"in_channels": "3"}, TypeError, "in_channels must be an integer"),
)


@one_test
@pytest.mark.parametrize("pattern", [None, 3, b"*"])
def test_what_is_no_pattern(pattern):
    with pytest.raises(TypeError, match="pattern must be a string; received"):
        list_models(pattern)


def test_names_are_told_from_others():
    for name in ("resnet18_v1", "cifar_resnet20_bsconvu", "cifar_mobilenetv2_w3d7"):
        assert known_name(name) == describe(name).name == name
    for other in ("functional_1", "cifar_resnet21", "mobilenetv2_w0", "", None, 3):
        assert known_name(other) is None


def test_paths_can_be_read():
    paths = infer(describe("cifar_resnet20"))
    for path in (
        "input_bn", "stem.conv", "stem.bn", "stem.relu", "stage1.unit1.conv1", "stage1.relu1",
        "stage1.unit3.bn2", "stage2.unit1.shortcut.conv", "stage2.unit1.shortcut.bn", "classifier",
    ):  # fmt: skip
        assert path in paths
    assert "stage1.unit1.shortcut" not in paths
    assert "stage2.unit1.residual.shortcut.conv" in infer(describe("cifar_wrn28_1"))
    assert "stage3.unit1.squeeze_excite.conv1" in infer(describe("mobilenetv3_large_w1"))


@one_test
@pytest.mark.parametrize("name", list_models("*_bsconvu") + list_models("*_bsconvs_p1d4"))
def test_which_convolutions_are_blueprint_separable(name):
    ordinary = convolutions(name.partition("_bsconv")[0])
    kind = recipe("bsconvu") if name.endswith("u") else recipe("bsconvs", p=0.25, with_bn=True)
    for path, at in convolutions(name).items():
        size = at.node.kernel_size
        is_stem_of_mobilenet = "mobilenet" in name and path == "stem.conv"
        replaced = size in {(3, 3), (5, 5)} and not is_stem_of_mobilenet
        assert at.node.kind == (kind if replaced else recipe()), path
        if "mobilenet" not in name:  # whose two convolutions become one
            assert at.after == ordinary[path].after
    assert any(at.node.kind == kind for at in convolutions(name).values())


@one_test
@pytest.mark.parametrize("name", list_models("*_bsconvs_p1d6"))
def test_mobilenets_as_bsconv_differ_in_the_loss_alone(name):
    plain, found = convolutions(name.removesuffix("_bsconvs_p1d6")), convolutions(name)
    assert list(plain) == list(found)
    for path, at in found.items():
        linear = path.endswith(".project.conv")
        assert at.node.orthonormal == linear
        assert not plain[path].node.orthonormal
        assert (at.before, at.after) == (plain[path].before, plain[path].after)
        assert not linear or at.node.kernel_size == (1, 1)
    assert count(name, None).layers == count(name.removesuffix("_bsconvs_p1d6"), None).layers


@one_test
@pytest.mark.parametrize("name", list_models("*_doconv"))
def test_doconv_takes_every_convolution_of_more_than_one_tap(name):
    for at in convolutions(name).values():
        expected = "doconv" if prod(at.node.kernel_size) > 1 else "conv"
        assert at.node.kind.name == expected


def test_the_input_of_gluons_v2_is_normalized_alone():
    placed = infer(describe("resnet18_v2"))
    norms = {path: at.node for path, at in placed.items() if isinstance(at.node, BatchNorm)}
    assert [path for path, node in norms.items() if not node.affine] == ["input_bn"]
    row = count("resnet18_v2", None, None).layers[0]
    assert (row.path, row.parameters, row.flops) == ("input_bn", 0, 2 * 3 * 224**2)


def test_depths_count_layers():
    """A network's N is its stem, two or three convolutions a unit, and the classifier."""
    for depth, units in {**resnets.UNITS, **resnets.CIFAR_UNITS}.items():
        assert depth == 2 * sum(units) + 2
    for depth, units in resnets.WIDE_UNITS.items():
        assert depth == 2 * sum(units) + 4  # with the projections of its three stages, less one


@one_test
@pytest.mark.parametrize(
    ("channels", "p", "least", "expected"),
    [(64, 0.25, 4, 16), (16, 0.25, 4, 4), (12, 0.25, 4, 4), (3, 0.25, 4, 3), (65, 0.25, 4, 17),
     (64, 0.01, 1, 1), (64, 1.0, 4, 64), (2, 0.5, 4, 2), (10, 0.25, 1, 3), (10, 0.25, 4, 4),
     (7, 1, 4, 7)],
)  # fmt: skip
def test_channels_between_pointwise_convolutions(channels, p, least, expected):
    assert recipe("bsconvs", p, least).mid_channels(channels) == expected
    assert mid_channels(channels, p, least) == expected
