"""Networks of dynamic group convolutions as their source's implementation saves them, as states."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.dynamic import INACTIVE, SQUEEZE, shape_of
from doconv_core.files.entries import CheckpointError, groups_of
from doconv_core.files.layers import BATCH_NORM, CONVOLUTION, DYNAMIC, LINEAR, Layer
from doconv_core.kinds.dgc import DGConvSpec
from doconv_core.maths.numeric import Array
from doconv_core.maths.spec import ConvSpec
from doconv_core.state.file import State, entry
from doconv_core.state.layers import BatchNormSpec, LayerForm, LinearSpec

EPSILON, MOMENTUM = 1e-5, 0.1  # of PyTorch's batch norms, as the source makes them
ROLES = {"gamma": "weight", "beta": "bias"}


def state_of(
    checkpoint: Checkpoint, layers: Sequence[Layer], squeeze_rate: int, gate_factor: float
) -> State:
    """Return the network's layers, in their order, canonical; without those of other kinds.

    squeeze_rate, gate_factor: which the file does not tell. Raises CheckpointError where they
    cannot be the network's.
    """
    forms: dict[str, LayerForm] = {}
    arrays: dict[str, Array] = {}
    features = 0
    for layer in layers:
        is_heads = layer.kind == DYNAMIC
        if is_heads:
            spec: Any = _heads_spec(checkpoint, layer, squeeze_rate, gate_factor)
        else:
            spec = _spec(checkpoint, layer, features)
        features = getattr(spec, "features", 0)
        if spec is None:
            continue
        has = layer.entries
        forms[layer.path] = form = LayerForm(spec, bias="bias" in has, scale="weight" in has)
        for name, shape in form.shapes.items():
            role = ROLES.get(name, name)
            array = checkpoint.heads(layer, name) if is_heads else checkpoint.read(has[role])
            array = array if array.dtype.kind == "f" else array.astype(np.float32)
            if array.size != prod(shape):
                raise CheckpointError(
                    f"{checkpoint.path}: layer {layer.name!r} has {role!r} of shape {array.shape}; "
                    f"expected {shape}."
                )
            arrays[entry(layer.path, name)] = array.reshape(shape)
    return State(forms, arrays)


def _heads_spec(
    checkpoint: Checkpoint, layer: Layer, squeeze_rate: int, gate_factor: float
) -> DGConvSpec:
    where = f"{checkpoint.path}: layer {layer.name!r}"
    outputs, channels, *size = layer.kernel_shape or ()
    entries = {role: checkpoint.entries[name] for role, name in layer.entries.items()}
    heads, squeezed, _ = shape_of(SQUEEZE, entries)
    try:
        spec = DGConvSpec(channels, outputs, tuple(size), heads, squeeze_rate, gate_factor)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if spec.squeezed != squeezed:
        raise CheckpointError(
            f"{where} squeezes {channels} channels into {squeezed} features, but squeeze_rate="
            f"{squeeze_rate} into {spec.squeezed}; give the network's."
        )
    try:
        spec.check_inactive(checkpoint.heads(layer, INACTIVE))
    except ValueError as error:
        raise CheckpointError(f"{where} {error}") from error
    return spec


def _spec(checkpoint: Checkpoint, layer: Layer, features: int) -> Any:
    """Return the sizes of another layer, None for one that such a network has not.

    features: of the batch norm before it, which tells the groups of a convolution; else 0.
    """
    outputs, inputs, *size = layer.kernel_shape or (0, 0)
    if layer.kind == BATCH_NORM:
        mean = checkpoint.entries[layer.entries["running_mean"]]
        return BatchNormSpec(mean.size, EPSILON, MOMENTUM)
    if layer.kind == LINEAR:
        return LinearSpec(inputs, outputs)
    if layer.kind == CONVOLUTION and not layer.over_parameterized:
        groups = max(groups_of(features, outputs, inputs), 1)
        return ConvSpec(inputs * groups, outputs, tuple(size), groups)
    return None
