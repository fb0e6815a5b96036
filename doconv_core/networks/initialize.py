"""The arrays that a network starts from: the same in every framework, from one seed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from math import prod

import numpy as np

from doconv_core.maths.spec import ConvSpec, as_integer
from doconv_core.networks.lowering import layers, lowered, parts
from doconv_core.networks.nodes import FAN_OUT, SHORTCUT, BatchNorm, Conv, Network, Residual
from doconv_core.networks.normed import Branches
from doconv_core.networks.shapes import Placed, infer
from doconv_core.state.file import Array, State, entry
from doconv_core.state.layers import LayerForm, LinearSpec, Shape

CLASSIFIER = "classifier"
_CONSTANTS = {
    "gamma": 1, "beta": 0, "running_mean": 0, "running_var": 1, "bias": 0,
    "saliency_bias": 1, "inactive": 0,
}  # fmt: skip


def initialize(network: Network, seed: int = 0, input_shape: Shape | None = None) -> State:
    """Return the state that the network starts to train from, in float32.

    Convolutions are Kaiming uniform for ReLU: between -b and b, `b = sqrt(6 / fan_in)`, where
    `fan_in = I/g · M`. DO-Conv's `W` is the kernel so drawn and `D` is zero, so that the network
    starts as the ordinary one. So does one of branches with batch norms, in inference: the first
    branch's kernel is the one so drawn, and what ends the others has a gamma of zero. Linear
    layers, and a convolution whose own name is "classifier", are Xavier normal: of mean 0 and
    variance `2 / (fan_in + fan_out)`, `fan_out = O/g · M`. Biases are zero, batch norms have gamma
    and running variance 1, beta and running mean 0.
    A network of dynamic group convolutions, whose `start` is `FAN_OUT`, has convolutions of mean 0
    and variance `2 / fan_out`, `fan_out = O · M`, of a head `O/h · M`; linear layers between -b and
    b, `b = 1 / sqrt(fan_in)`; and selectors of variance `2 / fan_in`, whose last biases are 1.

    seed: an integer of at least 0. Each array has random numbers of its own, from the seed and the
    array's name: another layer changes none of the others. Arrays come in the order of the layers,
    and of each layer's shapes. input_shape: `(C, H, W)`; None for the network's own. Raises
    TypeError or ValueError for another seed.
    Source: the networks of BSConv, arXiv 2003.13549; Kaiming, arXiv 1502.01852; Xavier, Glorot and
    Bengio 2010.

    >>> from doconv_core.networks.initialize import initialize
    >>> state = initialize(describe("cifar_resnet20"), seed=1)
    >>> state.arrays["input_bn.gamma"]
    array([1., 1., 1.], dtype=float32)
    """
    seed = as_integer("seed", seed, least=0)
    forms, arrays = layers(network, input_shape), dict[str, Array]()
    for path, form in forms.items():
        made = _arrays(path, form, seed, network.start)
        arrays |= {entry(path, name): made[name] for name in form.shapes}
    for path, placed in infer(lowered(network, input_shape)).items():
        if isinstance(placed.node, Branches):
            first = forms[entry(path, next(iter(placed.node.spec.parts)))]
            for name, value in placed.node.start(_drawn(path, first, seed, network.start)).items():
                like = arrays[entry(path, name)]
                arrays[entry(path, name)] = np.resize(value, like.shape).astype(like.dtype)
    return State(forms, arrays)


def with_new_kernels(state: State, network: Network, seed: int = 0) -> State:
    """Return a state whose branches with batch norms have the kernels that `initialize` draws.

    Of those alone that are new where a layer takes a trained convolution's place. Layers that the
    state lacks are left out.

    >>> from doconv_core.networks.initialize import initialize, with_new_kernels
    >>> network = describe("cifar_resnet20_repvgg")
    >>> found = with_new_kernels(initialize(network, seed=1), network, seed=2).arrays
    >>> name = "stem.conv.pointwise_conv.weight"
    >>> bool((found[name] == initialize(network, seed=2).arrays[name]).all())
    True
    """
    drawn = initialize(network, seed).arrays
    new = {
        entry(path, name): drawn[entry(path, name)]
        for path, placed in infer(lowered(network)).items()
        if isinstance(placed.node, Branches)
        for name in placed.node.new_weights
        if entry(path, name) in state.arrays
    }
    return replace(state, arrays={**state.arrays, **new})


def with_zero_gammas(state: State, network: Network) -> State:
    """Return a network's state in which each residual unit starts as its shortcut.

    Gamma of the unit's last batch norm is zero. Raises ValueError for a network without such a
    unit. Source: arXiv 1706.02677, section 5.1; GluonCV, for units that end in a convolution.

    >>> from doconv_core.networks.initialize import initialize, with_zero_gammas
    >>> network = describe("cifar_resnet20")
    >>> with_zero_gammas(initialize(network), network).arrays["stage1.unit1.bn2.gamma"].max()
    0.0
    """
    placed = infer(network)
    norms = {path: norm for path, each in placed.items() if (norm := _scaling(each)) is not None}
    last = {
        unit: entry(norm, "gamma")
        for unit, each in placed.items()
        if isinstance(each.node, Residual)
        for path, norm in norms.items()
        if _in_body(unit, path)
    }
    if not last:
        raise ValueError(f"{network.name} has no residual unit with a batch norm that scales.")
    zeros = {name: np.zeros_like(state.arrays[name]) for name in last.values()}
    return replace(state, arrays={**state.arrays, **zeros})


def _scaling(placed: Placed) -> str | None:
    """Return the path of the batch norm that a node is, or that a layer of branches begins with."""
    if isinstance(placed.node, BatchNorm) and placed.node.affine:
        return placed.path
    made = parts(placed.path, placed.node, placed.before) if isinstance(placed.node, Conv) else None
    return entry(placed.path, made.spec.trained_norm) if isinstance(made, Branches) else None


def _in_body(unit: str, path: str) -> bool:
    """Return whether a node is in a residual unit, but not in its shortcut."""
    below = path.removeprefix(entry(unit, "")) if unit else path
    return (below != path or not unit) and below.split(".")[0] != SHORTCUT


def _arrays(path: str, form: LayerForm, seed: int, start: str) -> dict[str, Array]:
    arrays = {
        name: np.full(shape, _CONSTANTS[name], np.float32)
        for name, shape in form.shapes.items()
        if name in _CONSTANTS
    }
    if "weight" not in form.shapes:
        return arrays
    weight = _drawn(path, form, seed, start).astype(np.float32)
    for name in form.shapes.keys() & {"squeeze_weight", "saliency_weight"}:
        numbers, shape = _numbers(entry(path, name), seed), form.shapes[name]
        arrays[name] = numbers.normal(0, math.sqrt(2 / shape[-1]), shape).astype(np.float32)
    if form.composed is not None:
        return {**form.composed.start(weight, form.spec), **arrays}
    return {"weight": weight.reshape(form.shapes["weight"]), **arrays}


def _drawn(path: str, form: LayerForm, seed: int, start: str) -> Array:
    """Return the kernel of a convolution, or the weight of a linear layer, in float64."""
    numbers = _numbers(entry(path, "weight"), seed)
    spec = form.spec if form.composed is None else form.composed.conv(form.spec)
    shape = getattr(spec, "kernel_shape", form.shapes["weight"])
    fan_in, fan_out = prod(shape[1:]), shape[0] * prod(shape[2:])
    if start == FAN_OUT:
        if isinstance(spec, LinearSpec):
            return numbers.uniform(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), shape)
        return numbers.normal(0, math.sqrt(2 * getattr(spec, "heads", 1) / fan_out), shape)
    if isinstance(spec, ConvSpec):
        fan_out //= spec.groups
        if path.split(".")[-1] != CLASSIFIER:
            bound = math.sqrt(6 / fan_in)
            return numbers.uniform(-bound, bound, shape)
    return numbers.normal(0, math.sqrt(2 / (fan_in + fan_out)), shape)


def _numbers(name: str, seed: int) -> np.random.RandomState:
    """Return a source of random numbers of the seed and the name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    words = [int.from_bytes(digest[n : n + 4], "little") for n in range(0, len(digest), 4)]
    # RandomState, as NumPy promises that its numbers stay the same in every version.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, *words])))
