"""Canonical state: a model's arrays in the order of the mathematics, in memory and on disk.

A layer at path `conv1` has the entries `conv1.weight`, `(O, I/g, S)`; `conv1.depthwise_weight`,
`(I, M, S)`, where it is over-parameterized; and `conv1.bias`, `(O,)`, where it has one. A linear
layer's weight is `(out, in)`, its inputs in the order of the framework that it comes from: behind a
flattening of more than one position, channels-first and channels-last networks differ in that.
On disk a state is one safetensors file, its header in readable JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from doconv_core.compose import from_kernel
from doconv_core.files import replacing
from doconv_core.spec import ConvSpec, as_integer

Array = NDArray[Any]

FORMAT, VERSION = "doconv", 1
_DTYPES = (np.float16, np.float32, np.float64)


class StateError(ValueError):
    """A state that is damaged, foreign or not this model's: the entry, found and expected."""


@dataclass(frozen=True)
class LinearSpec:
    """The sizes of a linear (dense) layer. Its weight is `(out_features, in_features)`."""

    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        """Validate both sizes."""
        as_integer("in_features", self.in_features)
        as_integer("out_features", self.out_features)


@dataclass(frozen=True)
class LayerForm:
    """What one layer of a model is, as far as its state is concerned.

    spec: its sizes. over_parameterized: whether it has `depthwise_weight`; False for one tap and
    for linear layers, whatever was asked for. bias: whether it has `bias`. Raises TypeError for
    other types.
    """

    spec: ConvSpec | LinearSpec
    over_parameterized: bool = False
    bias: bool = True

    def __post_init__(self) -> None:
        """Check the types; a layer that cannot have a D is not over-parameterized."""
        if not isinstance(self.spec, (ConvSpec, LinearSpec)):
            raise TypeError(f"spec must be a ConvSpec or LinearSpec; received {self.spec!r}.")
        for name in ("over_parameterized", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; received {getattr(self, name)!r}.")
        can = isinstance(self.spec, ConvSpec) and self.spec.over_parameterized
        object.__setattr__(self, "over_parameterized", self.over_parameterized and can)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of the layer's entries, by its name within the layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(self.spec, LinearSpec):
            shapes["weight"] = (self.spec.out_features, self.spec.in_features)
            outputs = self.spec.out_features
        else:
            shapes["weight"] = self.spec.weight_shape
            outputs = self.spec.out_channels
            if self.over_parameterized and self.spec.depthwise_shape is not None:
                shapes["depthwise_weight"] = self.spec.depthwise_shape
        if self.bias:
            shapes["bias"] = (outputs,)
        return shapes


def entry(path: str, name: str) -> str:
    """Return the name of a layer's array in a state; the root layer's path is empty."""
    return f"{path}.{name}" if path else name


@dataclass(frozen=True)
class State:
    """The layers of a model and their arrays, checked against each other.

    layers: the form of each, by path. arrays: float16, float32 or float64, by `entry` name.
    Raises StateError for an entry that is missing, of another shape or dtype, or not a layer's.
    """

    layers: Mapping[str, LayerForm]
    arrays: Mapping[str, Array]

    def __post_init__(self) -> None:
        """Check that each layer has its entries, and that there are no others."""
        expected = {
            entry(path, name): shape
            for path, form in self.layers.items()
            for name, shape in form.shapes.items()
        }
        for name, shape in expected.items():
            if name not in self.arrays:
                raise StateError(f"entry {name!r} is missing; expected shape {shape}.")
            array = self.arrays[name]
            if not isinstance(array, np.ndarray):
                raise StateError(f"entry {name!r} must be an array; found {type(array).__name__}.")
            if array.dtype not in _DTYPES:
                raise StateError(
                    f"entry {name!r} must be float16, float32 or float64; found {array.dtype}."
                )
            if array.shape != shape:
                raise StateError(f"entry {name!r} has shape {array.shape}; expected {shape}.")
        for name in self.arrays:
            if name not in expected:
                raise StateError(f"entry {name!r} belongs to no layer of the state.")


def unsupported_layer(path: str, layer: object, names: Iterable[str]) -> TypeError:
    """Return the error for a layer of a kind that a state cannot hold. names: of what it owns."""
    return TypeError(
        f"layer {path!r} is a {type(layer).__name__} with {_listed(names)}; a canonical state "
        "holds convolutions, DO-Conv layers and linear (dense) layers."
    )


def check_owned(path: str, layer: object, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise TypeError unless a layer owns just what a state would hold of it, by these names."""
    found, expected = list(found), list(expected)
    if set(found) != set(expected):
        raise TypeError(
            f"layer {path!r}, a {type(layer).__name__}, has {_listed(found)}; expected "
            f"{_listed(expected)}. What computes one of them (weight norm, pruning) must be made "
            "permanent first."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def fit_state(state: State, layers: Mapping[str, LayerForm]) -> dict[str, dict[str, Array]]:
    """Return the arrays that each of a model's `layers` is to receive, by path and then name.

    An ordinary convolution's entry fits an over-parameterized layer: its kernel is taken over and
    `depthwise_weight` is zero, so that the layer computes what was stored. Everything is checked
    before anything is returned: raises StateError for a layer that one side lacks, or that differs,
    TypeError for what is no State.
    """
    if not isinstance(state, State):
        raise TypeError(f"state must be a State; received {type(state).__name__}.")
    for path in layers:
        if path not in state.layers:
            raise StateError(_absent(path, "the state", state.layers, "the model has it"))
    for path in state.layers:
        if path not in layers:
            raise StateError(_absent(path, "the model", layers, "the state has it"))
    return {path: _fit_layer(path, state, form) for path, form in layers.items()}


def _absent(path: str, where: str, there: Mapping[str, LayerForm], but: str) -> str:
    close = get_close_matches(path, there, 1)
    hint = f"the closest is {close[0]!r}" if close else f"it has {_listed(there) or 'no layers'}"
    return f"layer {path!r} is not in {where}, though {but}; {hint}."


def _fit_layer(path: str, state: State, wanted: LayerForm) -> dict[str, Array]:
    found = state.layers[path]
    arrays = {name: state.arrays[entry(path, name)] for name in found.shapes}
    if found.bias != wanted.bias:
        raise StateError(
            f"entry {entry(path, 'bias')!r} is {'there' if found.bias else 'missing'}; expected a "
            f"layer {'with' if wanted.bias else 'without'} bias."
        )
    spec = wanted.spec
    if isinstance(spec, LinearSpec) or isinstance(found.spec, LinearSpec):
        if found.spec != spec:
            raise _differs(path, found.spec, spec)
        return arrays
    ordinary = not found.over_parameterized
    if found.over_parameterized and not wanted.over_parameterized:
        raise StateError(
            f"entry {entry(path, 'depthwise_weight')!r} is for an over-parameterized layer; "
            "expected an ordinary one. Fold the model before exporting its state."
        )
    same = ConvSpec(spec.in_channels, spec.out_channels, spec.kernel_size, spec.groups)
    if found.spec != (same if ordinary else spec):
        raise _differs(path, found.spec, spec)
    if ordinary and wanted.over_parameterized:
        kernel = arrays["weight"].reshape(spec.kernel_shape)
        weight, depthwise = from_kernel(kernel, spec)
        assert depthwise is not None  # as the layer wanted is over-parameterized
        arrays |= {"weight": weight, "depthwise_weight": depthwise}
    return arrays


def _differs(path: str, found: ConvSpec | LinearSpec, wanted: ConvSpec | LinearSpec) -> StateError:
    return StateError(f"entry {entry(path, 'weight')!r} is of {found}; expected {wanted}.")


def write_state(state: State, path: str | os.PathLike[str]) -> None:
    """Write `state` to `path` as one safetensors file, atomically."""
    layers = {name: _as_json(form) for name, form in state.layers.items()}
    header = {"format": FORMAT, "version": str(VERSION), "layers": json.dumps(layers)}
    # safetensors writes an array's memory as it lies, so a transposed view must be copied first.
    arrays = {name: np.ascontiguousarray(array) for name, array in state.arrays.items()}
    with replacing(path) as temporary:
        # Not save_file, which leaves a file that only its owner can read.
        temporary.write_bytes(save(arrays, metadata=header))


def read_state(path: str | os.PathLike[str]) -> State:
    """Return the state stored at `path`.

    Raises StateError for a file that is truncated, not a safetensors file, not one of this package,
    of a newer version, or inconsistent in itself; FileNotFoundError where there is none.
    """
    file = os.fspath(path)
    if os.path.isdir(file):
        raise IsADirectoryError(f"{file} is a folder; name a state file.")
    try:
        with safe_open(file, framework="np") as stored:
            layers = _read_header(file, stored.metadata() or {})
            names = list(stored.keys())
            for name in names:  # a type that NumPy lacks cannot even be asked for
                dtype = stored.get_slice(name).get_dtype()
                if dtype not in ("F16", "F32", "F64"):
                    raise StateError(
                        f"{file}: entry {name!r} is {dtype}; expected F16, F32 or F64."
                    )
            arrays = {name: stored.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise StateError(f"{file} is not a whole safetensors file: {error}.") from error
    try:
        return State(layers, arrays)
    except StateError as error:
        raise StateError(f"{file}: {error}") from error


def _read_header(file: str, header: Mapping[str, str]) -> dict[str, LayerForm]:
    """Return the layers that a file's header describes; StateError says what is wrong with it."""
    if header.get("format") != FORMAT:
        raise StateError(
            f"{file} is a safetensors file, but no doconv state: its header's format is "
            f"{header.get('format')!r}; expected {FORMAT!r}."
        )
    if header.get("version") != str(VERSION):
        raise StateError(
            f"{file} has format version {header.get('version')}; this doconv reads {VERSION}."
        )
    try:
        layers = json.loads(header.get("layers", ""))
    except (ValueError, RecursionError) as error:
        raise StateError(f"{file}: the header's layers are no JSON: {error}.") from error
    if not isinstance(layers, dict):
        raise StateError(f"{file}: the header's layers must be a JSON object; found {layers!r}.")
    forms = {}
    for path, described in layers.items():
        try:
            forms[path] = _from_json(described)
        except (TypeError, ValueError) as error:
            raise StateError(f"{file}: the header's layer {path!r}: {error}") from error
    return forms


def _as_json(form: LayerForm) -> dict[str, Any]:
    kind = "linear" if isinstance(form.spec, LinearSpec) else "convolution"
    return {
        "kind": kind,
        "spec": dataclasses.asdict(form.spec),
        "over_parameterized": form.over_parameterized,
        "bias": form.bias,
    }


def _from_json(described: Any) -> LayerForm:
    fields = {"kind", "spec", "over_parameterized", "bias"}
    if not isinstance(described, dict) or described.keys() != fields:
        raise TypeError(f"expected an object of {', '.join(sorted(fields))}; found {described!r}.")
    kinds = {"linear": LinearSpec, "convolution": ConvSpec}
    kind = kinds.get(str(described["kind"]))
    if kind is None:
        raise ValueError(f"kind must be linear or convolution; found {described['kind']!r}.")
    sizes = described["spec"]
    expected = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(sizes, dict) or sizes.keys() != expected:
        raise TypeError(f"spec must have {', '.join(sorted(expected))}; found {sizes!r}.")
    return LayerForm(kind(**sizes), described["over_parameterized"], described["bias"])
