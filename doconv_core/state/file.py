"""Canonical state: a model's arrays in the order of the mathematics, in memory and on disk.

A layer at path `conv1` has the entries `conv1.weight`, `(O, I/g, S)`; `conv1.depthwise_weight`,
`(I, M, S)`, where it is over-parameterized; and `conv1.bias`, `(O,)`, where it has one. The other
kinds and their entries are in `doconv_core.state.layers`. A layer whose features are a flattened
image has them in the order channels first, then positions, whatever the framework.
On disk a state is one safetensors file, its header in readable JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from doconv_core.atomic import check_suffix, replacing
from doconv_core.kinds.dgc import DGConvSpec
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.numeric import Array as Array
from doconv_core.maths.spec import ConvSpec
from doconv_core.state.layers import KINDS, UNRECORDED, LayerForm, LinearSpec, composed_kind

FORMAT, VERSION = "doconv", 2
_DTYPES = (np.float16, np.float32, np.float64)
_FIELDS_1 = ("kind", "spec", "over_parameterized", "bias")
_FIELDS_2 = (*_FIELDS_1, "scale", "geometry", "flattening")
_FIELDS = {"1": _FIELDS_1, "2": _FIELDS_2}


class StateError(ValueError):
    """A state that is damaged, foreign or not this model's: the entry, found and expected.

    >>> State({"fc": LayerForm(LinearSpec(3, 2), bias=False)}, {})
    Traceback (most recent call last):
        ...
    doconv_core.state.file.StateError: entry 'fc.weight' is missing; expected shape (2, 3).
    """


def entry(path: str, name: str) -> str:
    """Return the name of a layer's array in a state; the root layer's path is empty."""
    return f"{path}.{name}" if path else name


@dataclass(frozen=True)
class State:
    """The layers of a model and their arrays, checked against each other.

    layers: the form of each, by path, in the model's order. arrays: float16, float32 or float64, by
    `entry` name. origin: who wrote it, such as `{"framework": "torch", "version": "2.6"}`, and
    as `"network"` the name of one that `describe` knows; empty where that is not known.
    Raises StateError for an entry that is missing, of another shape or dtype, or not a layer's, and
    for a number of dropped channels that is none.

    >>> form = LayerForm(LinearSpec(3, 2), bias=False)
    >>> State({"fc": form}, {"fc.weight": np.zeros((2, 3))}).layers["fc"].shapes
    {'weight': (2, 3)}
    """

    layers: Mapping[str, LayerForm]
    arrays: Mapping[str, Array]
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that each layer has its entries, and that there are no others."""
        if not all(isinstance(text, str) for item in self.origin.items() for text in item):
            raise StateError(f"origin must be of texts; found {dict(self.origin)!r}.")
        expected = shapes_of(self.layers)
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
        for path, form in self.layers.items():
            if isinstance(form.spec, DGConvSpec):
                try:
                    form.spec.check_inactive(self.arrays[entry(path, "inactive")])
                except ValueError as error:
                    raise StateError(f"layer {path!r} {error}") from None


def origin_of(framework: str, version: str, network: str | None) -> dict[str, str]:
    """Return a state's origin. network: a name that `describe` knows; None for another model."""
    return {"framework": framework, "version": version, **({"network": network} if network else {})}


def shapes_of(layers: Mapping[str, LayerForm]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each entry of a state with these layers, in their order."""
    return {entry(path, n): s for path, form in layers.items() for n, s in form.shapes.items()}


def no_state(value: Any, hint: str = "") -> TypeError:
    """Return the error for what is given as a state and is none."""
    if not isinstance(value, (str, os.PathLike)):
        return TypeError(f"state must be a State; received {type(value).__name__}.")
    hint = hint or "read_state(path) reads one from a file"
    return TypeError(f"state must be a State; received the path {os.fspath(value)!r}: {hint}.")


def write_state(state: State, path: str | os.PathLike[str]) -> None:
    """Write `state` to `path` as one safetensors file, atomically.

    Raises TypeError for what is no state, ValueError for a suffix of `path` that says another
    format, FileNotFoundError for a folder that is not there.

    >>> form = LayerForm(LinearSpec(3, 2), bias=False)
    >>> write_state(State({"fc": form}, {"fc.weight": np.zeros((2, 3))}), "state.safetensors")
    >>> list(read_state("state.safetensors").arrays)
    ['fc.weight']
    """
    if not isinstance(state, State):
        raise no_state(state, "write_state(state, path) takes the state first")
    advice = ", and let doconv convert make a file of the other format of it"
    check_suffix(path, "safetensors", (".safetensors",), advice)
    layers = {name: _as_json(form) for name, form in state.layers.items()}
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "origin": json.dumps(dict(state.origin)),
        "layers": json.dumps(layers),
    }
    # safetensors writes an array's memory as it lies, so a transposed view must be copied first.
    arrays = {name: np.asarray(array, order="C") for name, array in state.arrays.items()}
    with replacing(path) as temporary:
        # Not save_file, which leaves a file that only its owner can read.
        temporary.write_bytes(_in_order(save(arrays, metadata=header), header))


def _in_order(stored: bytes, metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file with its metadata in their order; they come in one of chance."""
    begin = 8 + int.from_bytes(stored[:8], "little")
    told = {**json.loads(stored[8:begin]), "__metadata__": metadata}
    return b"".join((header_of(told), memoryview(stored)[begin:]))


def header_of(told: Mapping[str, Any]) -> bytes:
    """Return what a safetensors file begins with: the length of a JSON text, and that text."""
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_state(path: str | os.PathLike[str]) -> State:
    """Return the state stored at `path`, in this format version or an older one.

    Raises StateError for a file that is truncated, not a safetensors file, not one of this package,
    of a newer version, or inconsistent in itself; FileNotFoundError where there is none.

    >>> write_state(State({}, {}, {"framework": "torch"}), "state.safetensors")
    >>> read_state("state.safetensors").origin
    {'framework': 'torch'}
    """
    file = os.fspath(path)
    if os.path.isdir(file):
        raise IsADirectoryError(f"{file} is a folder; name a state file.")
    try:
        with safe_open(file, framework="np") as stored:
            layers, origin = read_header(file, stored.metadata() or {})
            names = list(stored.keys())
            for name in names:  # a type that NumPy lacks cannot even be asked for
                dtype = stored.get_slice(name).get_dtype()
                if dtype not in ("F16", "F32", "F64"):
                    raise StateError(
                        f"{file}: entry {name!r} is {dtype}; expected F16, F32 or F64."
                    )
            place = {name: n for n, name in enumerate(shapes_of(layers))}
            names.sort(key=lambda name: place.get(name, len(place)))
            arrays = {name: stored.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise StateError(f"{file} is not a whole safetensors file: {error}.") from error
    try:
        return State(layers, arrays, origin)
    except StateError as error:
        raise StateError(f"{file}: {error}") from error


def read_header(
    file: str, header: Mapping[str, str]
) -> tuple[dict[str, LayerForm], dict[str, str]]:
    """Return the layers and the origin that the header of a state's file describes.

    file: its name, for messages. header: the file's metadata, as safetensors gives it. Raises
    StateError, which says what is wrong, for one of another format, or inconsistent in itself.
    """
    if header.get("format") != FORMAT:
        raise StateError(
            f"{file} is a safetensors file, but no doconv state: its header's format is "
            f"{header.get('format')!r}; expected {FORMAT!r}."
        )
    version = header.get("version")
    if version not in _FIELDS:
        raise StateError(
            f"{file} has format version {version}; this doconv reads {' and '.join(_FIELDS)}."
        )
    layers = _read_object(file, "layers", header.get("layers", ""))
    origin = {} if version == "1" else _read_object(file, "origin", header.get("origin", ""))
    forms = {}
    for path, described in layers.items():
        try:
            forms[path] = _from_json(described, _FIELDS[version])
        except (TypeError, ValueError) as error:
            raise StateError(f"{file}: the header's layer {path!r}: {error}") from error
    return forms, origin


def _read_object(file: str, name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{file}: the header's {name} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise StateError(f"{file}: the header's {name} must be a JSON object; found {value!r}.")
    return value


def _as_json(form: LayerForm) -> dict[str, Any]:
    described = {name: getattr(form, name) for name in _FIELDS_2}
    geometry = form.geometry and dataclasses.asdict(form.geometry)
    return {**described, "spec": dataclasses.asdict(form.spec), "geometry": geometry}


def _from_json(described: Any, fields: tuple[str, ...]) -> LayerForm:
    described = dict(_fields_of("it", described, fields))
    name = described.pop("kind")
    cls = KINDS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; found {name!r}.")
    composed = described["over_parameterized"]
    if isinstance(composed, str) and cls is ConvSpec:
        kind = composed_kind(composed)
        cls = cls if kind is None else kind.spec_type
    spec = _made("spec", described.pop("spec"), cls)
    if fields is _FIELDS_1:
        flattening = UNRECORDED if cls is LinearSpec else None
        return LayerForm(spec, flattening=flattening, **described)
    geometry = described.pop("geometry")
    if geometry is not None:
        geometry = _made("geometry", geometry, Geometry)
    return LayerForm(spec, geometry=geometry, **described)


def _made(name: str, value: Any, cls: type[Any]) -> Any:
    return cls(**_fields_of(name, value, tuple(f.name for f in dataclasses.fields(cls))))


def _fields_of(name: str, value: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(fields):
        raise TypeError(
            f"{name} must be an object of {', '.join(sorted(fields))}; found {value!r}."
        )
    return value
