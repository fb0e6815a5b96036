"""What networks cost: the published tables, counts by hand, and what DO-Conv adds in training."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import tally
from cases import one_test, refuses

from doconv_core import ConvSpec, Cost, LayerCost, count, layer_cost
from doconv_core.kinds.base import recipe
from doconv_core.networks.families import FAMILIES
from doconv_core.networks.lowering import lowered
from doconv_core.networks.names import LISTED, describe, list_models
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Conv,
    DynamicHeads,
    GlobalPool,
    Linear,
    Network,
    Pool,
    sequence,
)
from doconv_core.networks.shapes import infer

TABLES = Path(__file__).parents[1] / "docs" / "data" / "bsconv_cifar100.csv"
COSTS = ("parameters", "flops", "macs", "training_parameters", "composition_macs")
with TABLES.open(encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))


def alone(layer):
    """Return the network of one convolution of 4 channels, at 8×8 positions."""
    return Network("net", sequence(("conv", layer)), (4, 8, 8))


def test_the_tables_are_all_there():
    assert Counter(row["table"] for row in ROWS) == {"ResNets": 15, "WRN-28": 21, "WRN-40": 18}
    assert len({row["model"] for row in ROWS}) == 54


@one_test
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_a_published_row(row):
    found = count(row["model"], (3, 32, 32), 100)
    assert f"{found.parameters / 1e6:.2f}" == row["parameters_millions"]
    assert f"{found.flops / 1e6:.2f}" == row["flops_millions"]
    assert row["model"] in list_models()


UNITS = {
    "resnet10": [1] * 4, "resnet18": [2] * 4, "resnet26": [3] * 4, "resnet34": [3, 4, 6, 3],
    "resnet68": [3, 4, 23, 3], "resnet102": [3, 8, 36, 3],
    "cifar_resnet20": [3] * 3, "cifar_resnet56": [9] * 3, "cifar_resnet110": [18] * 3,
    "cifar_resnet302": [50] * 3, "cifar_resnet602": [100] * 3,
}  # fmt: skip
WIDTHS = {"w1": (1, 1), "w3d4": (3, 4), "w1d2": (1, 2), "w1d4": (1, 4), "w7d20": (7, 20),
          "w2": (2, 1), "w5d3": (5, 3), "w1d3": (1, 3)}  # fmt: skip


def by_hand():
    """Yield names with what `tally` counts of them, for 100 classes of CIFAR, 1000 of ImageNet."""
    for name, units in UNITS.items():
        cifar = name.startswith("cifar_")
        classes = 100 if cifar else 1000
        yield name, tally.residual(units, classes, cifar=cifar)
        pre = name.replace("resnet", "preresnet")
        yield pre, tally.residual(units, classes, cifar=cifar, pre=True)
    for depth, units in {16: 2, 28: 4, 40: 6}.items():
        for factor in (1, 5, 12):
            wide = tally.residual([units] * 3, 100, cifar=True, pre=True, factor=factor)
            yield f"cifar_wrn{depth}_{factor}", wide
    for width, (above, below) in WIDTHS.items():
        size = {"above": above, "below": below}
        for cifar, prefix, classes in ((True, "cifar_", 100), (False, "", 1000)):
            v1 = f"{prefix}mobilenetv1_{width}"
            yield v1, tally.mobilenetv1(classes, cifar=cifar, **size)
            yield f"{v1}_bsconvu", tally.mobilenetv1(classes, cifar=cifar, bsconvu=True, **size)
            v2 = tally.mobilenetv2(classes, cifar=cifar, **size)
            yield f"{prefix}mobilenetv2_{width}", v2
            yield f"{prefix}mobilenetv2_{width}_bsconvs_p1d6", v2
            for kind in ("small", "large"):
                v3 = tally.mobilenetv3(kind, classes, cifar=cifar, **size)
                yield f"{prefix}mobilenetv3_{kind}_{width}", v3
                yield f"{prefix}mobilenetv3_{kind}_{width}_bsconvs_p1d6", v3


@one_test
@pytest.mark.parametrize(("name", "expected"), by_hand(), ids=str)
def test_counts_by_hand(name, expected):
    found = count(name, None, None)
    assert found.parameters == found.training_parameters == expected.parameters
    assert found.macs == expected.macs
    assert found.flops == expected.flops
    assert found.composition_macs == 0


@one_test
@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        # as published with these networks, in whole numbers
        ("resnet50_v1b", 25_557_032, 4_089_184_256),
        ("resnet18_v1b", 11_689_512, 1_814_073_344),
        ("resnext50_32x4d", 25_028_904, 4_230_479_872),
        # from the layers' sizes: 1->16->16->10 channels on 14, 7 and 4 rows; 28 -> 26 -> 24 rows;
        # 28 -> 24 -> 12 -> 8 -> 4 rows
        (
            "tutorial_pt",
            (9 + 1) * 16 + (144 + 1) * 16 + (144 + 1) * 10,
            144 * 14**2 + 2304 * 7**2 + 1440 * 4**2,
        ),
        (
            "tutorial_tf",
            10 * 32 + 289 * 8 + (8 * 24**2 + 1) * 128 + 129 * 10,
            288 * 26**2 + 2304 * 24**2 + 8 * 24**2 * 128 + 1280,
        ),
        (
            "tutorial_gluon",
            26 * 20 + 501 * 50 + 801 * 500 + 501 * 10,
            500 * 24**2 + 25000 * 8**2 + 800 * 500 + 5000,
        ),
    ],
)
def test_known_counts(name, parameters, macs):
    found = count(name, None, None)
    assert (found.parameters, found.macs) == (parameters, macs)


def test_a_plain_network_is_a_resnet_without_its_three_projections():
    projections = sum(a * b + 2 * b for a, b in ((64, 128), (128, 256), (256, 512)))
    plain, resnet = (count(name, None, None) for name in ("plain18", "resnet18_v1"))
    assert plain.parameters == resnet.parameters - projections
    outputs = {128: 28, 256: 14, 512: 7}
    macs = sum(b // 2 * b * side**2 for b, side in outputs.items())
    assert plain.macs == resnet.macs - macs
    assert plain.flops == resnet.flops - macs - sum(2 * b * n**2 for b, n in outputs.items())


def by_the_rule(network):
    """Return a network's costs, as `count` defines them, from its nodes and its images' shapes."""
    found = dict.fromkeys(COSTS, 0)
    for _, node, before, after in infer(lowered(network)).values():
        parameters = more = macs = flops = 0
        if isinstance(node, Conv | Linear):
            groups = (node.groups or before[0]) if isinstance(node, Conv) else 1
            taps = prod(node.kernel_size) if isinstance(node, Conv) else 1
            weight, bias = after[0] * before[0] // groups * taps, after[0] * node.bias
            parameters, macs = weight + bias, weight * prod(after[1:])
            flops = macs + bias * prod(after[1:])
            if taps > 1 and node.kind.name == "doconv":
                more = before[0] * taps**2
                found["composition_macs"] += more * after[0] // groups
        elif isinstance(node, DynamicHeads):
            shapes = {**node.spec(before).shapes, "inactive": (0,)}
            parameters = sum(map(prod, shapes.values()))
            macs = flops = prod(shapes["weight"]) * prod(after[1:])
        elif isinstance(node, BatchNorm):
            parameters, flops = 2 * before[0] * node.affine, 2 * prod(before)
        elif isinstance(node, Pool | GlobalPool):
            flops = prod(before)
        elif node == Activation("relu"):
            flops = prod(after)
        row = (parameters, flops, macs, parameters + more)
        for what, value in zip(COSTS, row, strict=False):
            found[what] += value
    return found


def check_cost(name):
    found = count(name, None, None)
    assert {what: getattr(found, what) for what in COSTS} == by_the_rule(describe(name))
    assert len({row.path for row in found.layers}) == len(found.layers)
    assert found.output_shape == found.layers[-1].after
    assert found.macs > 0


@one_test
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.usual[0])
def test_a_network_costs_what_its_nodes_and_shapes_give(family):
    for suffix in (*LISTED[family.variants], "_doconv"):
        check_cost(family.usual[0] + suffix)


@pytest.mark.exhaustive
@one_test
@pytest.mark.parametrize("name", list_models())
def test_every_network_costs_what_its_nodes_and_shapes_give(name):
    check_cost(name)


def check_doconv(name):
    plain, found = (count(n, None, None) for n in (name.removesuffix("_doconv"), name))
    same = ("parameters", "flops", "macs")
    assert [getattr(found, what) for what in same] == [getattr(plain, what) for what in same]
    more = composed = 0
    for at in infer(describe(name.removesuffix("_doconv"))).values():
        if isinstance(at.node, Conv) and prod(at.node.kernel_size) > 1:
            taps, inputs = prod(at.node.kernel_size), at.before[0]
            more += inputs * taps**2
            composed += inputs * taps**2 * at.after[0] // (at.node.groups or inputs)
    assert found.training_parameters == plain.parameters + more
    assert found.composition_macs == composed
    kinds = {row.path: row.kind for row in found.layers}
    assert all(
        kinds[row.path] == ("doconv" if prod(row.kernel_size) > 1 else "conv")
        for row in plain.layers
        if row.kind == "conv"
    )


@one_test
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.usual[0])
def test_doconv_costs_more_in_training_alone(family):
    check_doconv(f"{family.usual[0]}_doconv")


@pytest.mark.exhaustive
@one_test
@pytest.mark.parametrize("name", [n for n in list_models("*_doconv") if "602" not in n])
def test_doconv_of_every_network_costs_more_in_training_alone(name):
    check_doconv(name)


def test_the_rows_of_bsconv():
    rows = {row.path: row for row in count("cifar_resnet20_bsconvs_p1d4").layers}
    conv = "stage3.unit1.conv1"
    parts = ("pointwise1", "batch_norm1", "pointwise2", "batch_norm2", "depthwise")
    assert [path for path in rows if path.startswith(conv)] == [f"{conv}.{part}" for part in parts]
    found = [rows[f"{conv}.{part}"].parameters for part in parts]
    assert found == [32 * 8, 16, 8 * 64, 128, 9 * 64]
    assert rows[f"{conv}.pointwise2"].after == (64, 16, 16)
    assert rows[f"{conv}.depthwise"].after == (64, 8, 8)
    assert rows[f"{conv}.depthwise"].kernel_size == (3, 3)
    rows = {row.path: row.parameters for row in count("cifar_resnet20_bsconvu").layers}
    assert rows["stem.conv.pointwise"] == 3 * 16
    assert rows["stem.conv.depthwise"] == 9 * 16
    assert "stem.conv.batch_norm" not in rows


@one_test
@pytest.mark.parametrize("kind", ["bsconvu", "bsconvs"])
def test_a_bsconv_of_one_tap_is_an_ordinary_convolution(kind):
    network = alone(Conv(6, bias=True, kind=recipe(kind)))
    (row,) = count(network, (4, 5, 5)).layers
    assert (row.path, row.kind) == ("conv", "conv")
    assert (row.parameters, row.macs, row.flops) == (4 * 6 + 6, 4 * 6 * 25, 4 * 6 * 25 + 6 * 25)


def test_a_description_has_its_own_classes():
    network = describe("cifar_resnet20", num_classes=7, in_channels=5)
    found = count(network, None)
    assert found.input_shape == (5, 32, 32)
    assert found.output_shape == (7,)
    assert found == count("cifar_resnet20", (5, 32, 32), 7)


def test_what_does_not_change_with_the_size():
    small, large = count("resnet18", (3, 64, 64), 10), count("resnet18", (3, 96, 128), 10)
    assert small.parameters == large.parameters
    assert small.macs < large.macs
    assert large.layers[0].before == (3, 96, 128)
    assert count("resnet18", (3, 1, 1), 10).input_shape == (3, 1, 1)  # with its channels first


test_what_cannot_be_counted = refuses(
    lambda given: count(*given),
    (("cifar_resnet21", (3, 32, 32), 10), ValueError, "the nearest are 'cifar_resnet20'"),
    (("cifar_resnet20", (32, 32), 10), ValueError, "channels, rows and columns.*received input_"),
    (("cifar_resnet20", "3x32x32", 10), ValueError, "input_shape='3x32x32'"),
    (
        ("resnet50_v1b", (224, 224, 3)),
        ValueError,
        r"channels last, as Keras.*: write \(3, 224, 224",
    ),
    (("tutorial_tf", (28, 28, 1)), ValueError, r"channels last, as Keras.*: write \(1, 28, 28\)"),
    (("cifar_resnet20", (3, 32, 0), 10), ValueError, r"input_shape\[2\] must be at least 1"),
    (("cifar_resnet20", (3, 32, 32.0), 10), TypeError, r"input_shape\[2\] must be an integer"),
    (("cifar_resnet20", (3, 32, 32), 0), ValueError, "num_classes must be at least 1"),
    (("tutorial_tf", (1, 4, 9), 10), ValueError, "input is too small"),
    (("tutorial_tf", (1, 4, 9), "x"), TypeError, "num_classes must be an integer"),
    ((3, (3, 32, 32), 10), TypeError, "name must be a string; received 3"),
    ((alone(Conv(4, groups=3)), (4, 8, 8), 10), ValueError, "in_channels must be divisible by gr"),
)


def test_a_network_of_one_layer_costs_what_the_layer_does():
    # 3×3, 4 → 6 in 2 groups with biases, at 8×8 positions; by hand from the definitions.
    layer = Conv(6, (3, 3), bias=True, groups=2, kind=recipe("doconv"))
    (row,) = count(alone(layer), None).layers
    assert (row.parameters, row.macs) == (6 * 2 * 9 + 6, 6 * 2 * 9 * 64)
    assert (row.training_parameters, row.composition_macs) == (114 + 4 * 9 * 9, 4 * 9 * 9 * 3)
    cost = layer_cost(ConvSpec(4, 6, (3, 3), 2), 64)
    assert cost == LayerCost(
        ordinary=Cost(114, 6912), kernel_composed=Cost(438, 6912 + 972),
        feature_composed=Cost(438, 4 * 9 * 9 * 64 + 6912), folded=Cost(114, 6912),
    )  # fmt: skip


def test_kinds_are_counted_in_the_places_of_a_networks_convolutions():
    plain = count("cifar_resnet20")
    assert count("cifar_resnet20", kind="orepa") == replace(
        count("cifar_resnet20_orepa"), name="cifar_resnet20"
    )
    found = count("cifar_resnet20", kind="repvgg")
    assert (found.parameters, found.macs) == (plain.parameters, plain.macs)
    stem = next(layer for layer in found.layers if layer.kind == "repvgg")
    # 3 to 16 channels: a 1x1 kernel with its norm more than the convolution and its own.
    assert stem.training_parameters == 16 * 3 * 9 + 16 * 3 + 2 * 16
    assert stem.branch_macs == 16 * 3 * 32 * 32
    by_path = {layer.path: layer for layer in found.layers}
    unit = by_path["stage1.unit1.conv1"]  # 16 to 16: an identity's norm, too
    assert unit.training_parameters == 16 * 16 * 10 + 2 * 2 * 16
    strided = by_path["stage2.unit1.conv1"]  # 16 to 32: none
    assert strided.training_parameters == 16 * 32 * 10 + 2 * 32
    kernel = 16 * 32 * 9
    block = {e.path: e for e in count("cifar_resnet20", kind="dbb").layers}["stage2.unit1.conv1"]
    # 1x1; 1x1 within the inputs before the stride, and 3x3; 1x1 before the average's stride.
    own = 16 * 32 * 256 + 16 * 16 * 1024 + kernel * 256 + 16 * 32 * 1024
    assert block.branch_macs == own
