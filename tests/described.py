"""Small networks that the tests of descriptions share: together they have every kind of node."""

from __future__ import annotations

import numpy as np

from doconv_core import State
from doconv_core.kinds.base import Recipe, recipe
from doconv_core.networks.initialize import initialize
from doconv_core.networks.nodes import (
    ACTIVATIONS,
    Activation,
    BatchNorm,
    Concat,
    Conv,
    Dropout,
    Flatten,
    GlobalPool,
    Linear,
    Network,
    Node,
    Pool,
    Residual,
    Scale,
    Sequence,
    numbered,
    sequence,
)

KINDS = {
    "conv": recipe(),
    "doconv": recipe("doconv"),
    "bsconvu": recipe("bsconvu"),
    "bsconvu_bn": recipe("bsconvu", with_bn=True),
    "bsconvs": recipe("bsconvs", p=0.5, min_mid_channels=2),
    "bsconvs_bn": recipe("bsconvs", p=0.5, min_mid_channels=2, with_bn=True),
}


def alone(name: str, *nodes: Node) -> Network:
    """A convolution first, so that the way back goes through what comes after it."""
    return Network(name, numbered([Conv(6, (3, 3)), *nodes]), (3, 7, 6))


def squeeze_excite(channels: int) -> Scale:
    return Scale(
        sequence(
            ("pool", GlobalPool()),
            ("reduce", Conv(2, bias=True)),
            ("activation1", Activation("relu")),
            ("expand", Conv(channels, bias=True)),
            ("activation2", Activation("hard_sigmoid")),
        )
    )


def unit(kind: Recipe, stride: int = 2) -> Residual:
    body = sequence(
        ("conv1", Conv(8, (3, 3), stride, kind=kind)),
        ("bn1", BatchNorm()),
        ("activation", Activation("relu")),
        ("conv2", Conv(8, (3, 3), kind=kind, bias=True)),
        ("se", squeeze_excite(8)),
    )
    shortcut = sequence(("conv", Conv(8, stride=stride)), ("bn", BatchNorm()))
    return Residual(body, shortcut)


def whole(kind: Recipe) -> Network:
    """A whole network, with everything but dropout."""
    body = sequence(
        ("bn", BatchNorm(affine=False)),
        ("stem", Conv(6, (5, 3), kind=kind)),
        ("pool", Pool("max", 3, 2, 1)),
        ("unit", unit(kind)),
        ("again", Residual(sequence(("conv", Conv(8, groups=2)), ("act", Activation("relu6"))))),
        ("branches", Concat(sequence(
            ("wide", sequence(("conv", Conv(4, (3, 3), kind=kind)), ("bn", BatchNorm(1e-3, 0.2)))),
            ("deep", Conv(8, (3, 3), groups=0)),
            ("pool", Pool("average", 3, 1, 1)),
        ))),
        ("act", Activation("hard_swish")),
        ("last", Pool("average", 2, 2)),
        ("flatten", Flatten()),
        ("fc", Linear(5)),
    )  # fmt: skip
    return Network(f"whole_{kind.name}", body, (3, 13, 12))


NETWORKS = {
    **{f"conv_{name}": alone(name, Conv(4, (3, 3), 2, kind=kind)) for name, kind in KINDS.items()},
    "conv_grouped": alone("grouped", Conv(4, (3, 2), padding=1, groups=2, bias=True)),
    "conv_grouped_doconv": alone("grouped_do", Conv(4, (3, 2), groups=2, kind=KINDS["doconv"])),
    "conv_depthwise": alone("depthwise", Conv(12, (5, 5), groups=0)),
    "conv_depthwise_doconv": alone("depth_do", Conv(6, (3, 3), groups=0, kind=KINDS["doconv"])),
    "conv_one_tap": alone("one_tap", Conv(4, kind=KINDS["bsconvs"]), Conv(4, kind=KINDS["doconv"])),
    "batch_norm": alone("batch_norm", BatchNorm()),
    "batch_norm_bare": alone("batch_norm_bare", BatchNorm(1e-2, affine=False)),
    "batch_norm_vector": alone("batch_norm_vector", Flatten(), BatchNorm()),
    **{name: alone(name, Activation(name)) for name in ACTIVATIONS},
    "max_pool": alone("max_pool", Pool("max", 2, 2)),
    "max_pool_padded": alone("max_pool_padded", Pool("max", 3, 2, 1)),
    "average_pool": alone("average_pool", Pool("average", 3, 2)),
    "average_pool_padded": alone("average_pool_padded", Pool("average", 2, 1, 1)),
    "global_pool": alone("global_pool", GlobalPool()),
    "linear": alone("linear", Flatten(), Dropout(0), Linear(3), Linear(2, bias=False)),
    "sequence": alone("sequence", Sequence(), numbered([Conv(3), Conv(2)])),
    "residual": alone("residual", Residual(numbered([Conv(6, (3, 3)), Activation("relu")]))),
    "shortcut": alone("shortcut", unit(KINDS["conv"])),
    "scale": alone("scale", squeeze_excite(6)),
    "concat": alone("concat", Concat(numbered([Conv(2), Sequence(), Pool("max", 3, 1, 1)]))),
    **{f"whole_{name}": whole(kind) for name, kind in KINDS.items()},
}


def state_of(network: Network, seed: int = 0, dtype: type = np.float64) -> State:
    """A state with nothing left at its first value, as after some training."""
    state, random = initialize(network, seed), np.random.default_rng(seed)
    arrays = {
        name: (array + random.uniform(0.1, 0.4, array.shape)).astype(dtype)
        for name, array in state.arrays.items()
    }
    return State(state.layers, arrays)


def input_of(network: Network, batch: int = 3, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(batch, *network.input_shape)).astype(dtype)
