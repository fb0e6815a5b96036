"""The descriptions under GluonCV's names are GluonCV's networks: the same layers and parameters."""

from __future__ import annotations

import json
from collections import Counter
from math import prod

import pytest
from frameworks import need

need("mx")

from doconv_mx import import_gluoncv  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402

from doconv_core import count  # noqa: E402
from doconv_core.networks.families import FAMILIES  # noqa: E402
from doconv_core.networks.names import describe  # noqa: E402
from doconv_core.networks.nodes import (  # noqa: E402
    BatchNorm,
    Conv,
    GlobalPool,
    Linear,
    Pool,
    Residual,
)
from doconv_core.networks.shapes import infer  # noqa: E402

NAMES = [
    name
    for family in FAMILIES
    for name in family.usual
    if family.usual[0] in ("resnet18_v1", "mobilenet1.0")
]
SHAPE = (1, 3, 224, 224)


def sizes(parameters):
    return [p.shape for p in parameters]


def described(name):
    """The shapes of all arrays of a network, by its description, as MXNet keeps them."""
    shapes = []
    for at in infer(describe(name)).values():
        node, inputs, outputs = at.node, at.before[0], at.after[0]
        if isinstance(node, Conv):
            shapes.append((outputs, inputs // (node.groups or inputs), *node.kernel_size))
        elif isinstance(node, Linear):
            shapes.append((outputs, inputs))
        elif isinstance(node, BatchNorm):  # MXNet's has scale and shift also where it trains none
            shapes += [(inputs,)] * 4
        if isinstance(node, (Conv, Linear)) and node.bias:
            shapes.append((outputs,))
    return shapes


def number(shapes):
    return sum(prod(shape) for shape in shapes)


def test_all_of_the_readmes_table_are_here():
    expected = {f"resnet{n}_{v}" for n in (18, 34, 50, 101, 152) for v in ("v1", "v1b", "v2")}
    expected |= {"resnext50_32x4d", "mobilenet1.0", "mobilenetv2_1.0", "mobilenetv3_large"}
    assert expected <= set(NAMES)
    assert len(NAMES) == 28


@pytest.mark.parametrize("name", NAMES)
def test_the_same_parameters_layers_and_activations(name):
    network = import_gluoncv().model_zoo.get_model(name, pretrained=False)
    network.infer_shape(mx.nd.zeros(SHAPE))
    check_parameters(name, network)
    symbol = network(mx.sym.var("data"))
    check_layers(name, symbol)
    check_activations(name, symbol)


def check_parameters(name, network):
    parameters = list(network.collect_params().values())
    trained = [p for p in parameters if p.grad_req != "null"]
    assert number(sizes(trained)) == count(name, None, None).parameters
    assert number(sizes(parameters)) == number(described(name))
    assert Counter(sizes(parameters)) == Counter(described(name))


def operations(symbol, name):
    """The attributes of each operation of this name in a symbol."""
    nodes = json.loads(symbol.tojson())["nodes"]
    return [node.get("attrs", {}) for node in nodes if node["op"] == name]


def pair(text):
    return tuple(int(n) for n in text.strip("()").split(",") if n.strip())


def outputs(symbol, name):
    """The shapes that each operation of this name in a symbol puts out."""
    inner = symbol.get_internals()
    _, shapes, _ = inner.infer_shape(data=SHAPE)
    known = dict(zip(inner.list_outputs(), shapes, strict=True))
    nodes = json.loads(symbol.tojson())["nodes"]
    return [known[f"{node['name']}_output"][1:] for node in nodes if node["op"] == name]


def check_layers(name, symbol):
    placed = list(infer(describe(name)).values())

    convolutions = Counter(
        (outputs, pair(at["kernel"]), pair(at["stride"]), pair(at["pad"]), int(at["num_group"]),
         at["no_bias"] == "True")
        for outputs, at in zip(
            outputs(symbol, "Convolution"), operations(symbol, "Convolution"), strict=True
        )
    )  # fmt: skip
    assert convolutions == Counter(
        (at.after, node.kernel_size, (node.stride,) * 2, node.pads, node.groups or at.before[0],
         not node.bias)
        for at in placed if isinstance(node := at.node, Conv)
    )  # fmt: skip

    pools = Counter(
        ("global", "avg") if at["global_pool"] == "True"
        else (pair(at["kernel"]), pair(at["stride"]), pair(at["pad"]), at["pool_type"])
        for at in operations(symbol, "Pooling")
    )  # fmt: skip
    assert pools == Counter(
        ("global", "avg") if isinstance(node, GlobalPool)
        else ((node.size,) * 2, (node.stride,) * 2, (node.padding,) * 2, node.name)
        for at in placed if isinstance(node := at.node, (Pool, GlobalPool))
    )  # fmt: skip

    sums = [op for op in ("elemwise_add", "_Plus", "broadcast_add") for _ in operations(symbol, op)]
    assert len(sums) == sum(isinstance(at.node, Residual) for at in placed)
    norms = operations(symbol, "BatchNorm")
    assert {(float(at["eps"]), float(at["momentum"])) for at in norms} == {(1e-5, 0.9)}
    nodes = [at.node for at in placed if isinstance(at.node, BatchNorm)]
    assert {(node.epsilon, round(1 - node.momentum, 9)) for node in nodes} == {(1e-5, 0.9)}


def check_activations(name, symbol):
    kinds = Counter(row.kind for row in count(name, None, None).layers)
    clipped = kinds["relu6"] + kinds["hard_swish"] + kinds["hard_sigmoid"]
    assert len(operations(symbol, "Activation")) == kinds["relu"]
    assert len(operations(symbol, "clip")) == clipped
    assert len(operations(symbol, "_plus_scalar")) == kinds["hard_swish"] + kinds["hard_sigmoid"]
    assert [float(at["p"]) for at in operations(symbol, "Dropout")] == [0.2] * kinds["dropout"]
