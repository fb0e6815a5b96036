"""Canonical state of a Keras model: its convolutions and dense layers, by layer names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from doconv_core.layout import from_canonical, to_canonical
from doconv_core.spec import ConvSpec
from doconv_core.state import LayerForm, LinearSpec, State, entry, fit_state
from doconv_tf.over_parameterized import OverParameterized

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
ORDINARY = (*CONVOLUTIONS, keras.layers.DepthwiseConv2D, keras.layers.Dense)


def export_state(model: keras.Layer) -> State:
    """Return a copy of the model's weights as a canonical state, in their dtype.

    bfloat16, which NumPy lacks, becomes float32; no bit is lost. A path is the names of the layers
    from the model's own down, joined by dots. Raises TypeError for a layer of another kind or with
    other weights, ValueError for one that is not built or shares its path, by its path.
    """
    layers = _layers(model)
    forms = {path: _form(path, layer) for path, layer in layers.items()}
    arrays = {
        entry(path, name): _to_array(variable, layer, forms[path], name)
        for path, layer in layers.items()
        for name, variable in _variables(layer).items()
    }
    return State(forms, arrays)


def load_state(model: keras.Layer, state: State) -> None:
    """Copy a canonical state into the model, in the model's dtype.

    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's; TypeError and ValueError as `export_state` does.
    """
    layers = _layers(model)
    forms = {path: _form(path, layer) for path, layer in layers.items()}
    arrays = fit_state(state, forms)
    for path, layer in layers.items():
        for name, variable in _variables(layer).items():
            array = _from_array(arrays[path][name], layer, forms[path], name)
            variable.assign(ops.cast(array, variable.dtype))


def _layers(model: keras.Layer) -> dict[str, keras.Layer]:
    """Return the layers that own weights, by path; one that is reached twice, by its first."""
    found: dict[str, keras.Layer] = {}
    seen: set[int] = set()
    for path, layer in _walk("", model):
        if not layer.built and (not path or isinstance(layer, (OverParameterized, *ORDINARY))):
            name = path or layer.name
            raise ValueError(f"layer {name!r} is not built; call the model, or its build(), first.")
        if id(layer) in seen or not _own_weights(layer):
            continue
        seen.add(id(layer))
        if path in found:
            raise ValueError(
                f"two layers have the path {path!r}: {found[path]} and {layer}. Give them names "
                "that differ."
            )
        found[path] = layer
    return found


def _walk(path: str, layer: keras.Layer) -> Iterator[tuple[str, keras.Layer]]:
    yield path, layer
    for child in _children(layer):
        yield from _walk(entry(path, child.name), child)


def _children(layer: keras.Layer) -> list[keras.Layer]:
    return layer._flatten_layers(include_self=False, recursive=False)


def _own_weights(layer: keras.Layer) -> list[Any]:
    inherited = {id(weight) for child in _children(layer) for weight in child.weights}
    return [weight for weight in layer.weights if id(weight) not in inherited]


def _form(path: str, layer: keras.Layer) -> LayerForm:
    bias = getattr(layer, "bias", None) is not None
    plain = layer.quantization_mode is None and not getattr(layer, "lora_enabled", False)
    if isinstance(layer, OverParameterized):
        form = LayerForm(layer.spec, layer.depthwise_kernel is not None, bias)
    elif plain and type(layer) in CONVOLUTIONS:
        in_channels = layer.kernel.shape[-2] * layer.groups
        sizes = (in_channels, layer.filters, layer.kernel_size, layer.groups)
        form = LayerForm(ConvSpec(*sizes), bias=bias)
    elif plain and type(layer) is keras.layers.DepthwiseConv2D:
        channels, each = layer.kernel.shape[-2:]
        sizes = (channels, channels * each, layer.kernel_size, channels)
        form = LayerForm(ConvSpec(*sizes), bias=bias)
    elif plain and type(layer) is keras.layers.Dense:
        form = LayerForm(LinearSpec(*layer.kernel.shape), bias=bias)
    else:
        raise TypeError(
            f"layer {path or layer.name!r} is a {type(layer).__name__}"
            f"{'' if plain else ' with LoRA or quantized'}; a canonical state holds convolutions, "
            "DO-Conv layers and dense layers."
        )
    own, expected = _own_weights(layer), list(_variables(layer).values())
    if {id(weight) for weight in own} != {id(variable) for variable in expected}:
        raise TypeError(
            f"layer {path or layer.name!r}, a {type(layer).__name__}, has {_names(own)}; expected "
            f"{_names(expected)}."
        )
    return form


def _names(variables: list[Any]) -> str:
    return ", ".join(repr(variable.name) for variable in variables)


def _variables(layer: keras.Layer) -> dict[str, Any]:
    over_parameterized = isinstance(layer, OverParameterized)
    variables = {
        "weight": layer._kernel if over_parameterized else layer.kernel,
        "depthwise_weight": layer.depthwise_kernel if over_parameterized else None,
        "bias": layer.bias,
    }
    return {name: variable for name, variable in variables.items() if variable is not None}


def _layout(layer: keras.Layer) -> str:
    return "*CN" if isinstance(layer, keras.layers.DepthwiseConv2D) else "*IO"


def _to_array(variable: Any, layer: keras.Layer, form: LayerForm, name: str) -> np.ndarray:
    array = ops.convert_to_numpy(variable)
    if keras.backend.standardize_dtype(variable.dtype) == "bfloat16":
        array = array.astype(np.float32)
    if name == "weight" and isinstance(form.spec, LinearSpec):
        array = array.T
    elif name == "weight":
        array = to_canonical(array, _layout(layer))
    return array.reshape(form.shapes[name]).copy()


def _from_array(array: np.ndarray, layer: keras.Layer, form: LayerForm, name: str) -> np.ndarray:
    if name != "weight":
        return array
    if isinstance(form.spec, LinearSpec):
        return array.T
    spec = form.spec
    return from_canonical(array.reshape(spec.parameter_shape), _layout(layer), spec.groups)
