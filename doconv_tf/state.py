"""Canonical state of a Keras model, by layer names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import keras
import numpy as np
from keras import ops

from doconv_core.kinds.base import Array
from doconv_core.models.received import no_model
from doconv_core.networks.names import known_name
from doconv_core.state.exchange import Holder, Kept, dropped_by, export_from, load_into
from doconv_core.state.file import State, entry
from doconv_core.state.layers import suspect_flattening
from doconv_core.state.match import Assignment, Match
from doconv_tf.graph import ordered_children
from doconv_tf.layers import Part, own_weights, parts_of, reader_of, surroundings


def export_state(model: keras.Layer) -> State:
    """Return a copy of the model's weights as a canonical state, in their dtype.

    bfloat16, which NumPy lacks, becomes float32; no bit is lost. A path is the names of the layers
    from the model's own down, joined by dots. The order is that in which layers were added or
    assigned; in a functional model that in which data meets them, one branch after the other.
    Raises TypeError for a layer without a counterpart in a state or with other weights, ValueError
    for one that is not built or shares its path, by its path.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")])
    >>> {name: array.shape for name, array in export_state(model).arrays.items()}
    {'head.weight': (2, 4), 'head.bias': (2,)}
    """
    return export_from(_Layers(model))


def load_state(
    model: keras.Layer, state: State, *, match: Match = "path", ignore: str | Iterable[str] = ()
) -> None:
    """Copy a canonical state into the model, in the model's dtype.

    match: "path", "order", or a mapping from the state's paths to the model's. ignore: "geometry"
    or "flattening", or both, for what need not agree; see `doconv_core.fit_state`.
    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's; TypeError and ValueError as `export_state` does. Warns where
    a batch norm's momentum differs.

    >>> model, other = (keras.Sequential([keras.layers.Dense(2)]) for _ in range(2))
    >>> for each in (model, other):
    ...     each.build((None, 4))
    >>> load_state(other, export_state(model), match="order")
    >>> bool(ops.all(model.layers[0].kernel == other.layers[0].kernel))
    True
    """
    load_into(_Layers(model), state, match=match, ignore=ignore)


class _Layers(Holder):
    """The layers of a model that own weights. Errors are those of `export_state`."""

    framework, version = "keras", keras.__version__

    def __init__(self, model: keras.Layer) -> None:
        layers = _layers(model)
        self._parts, self.dropped = _parts(model, layers), dropped_by(layers)
        self.network = known_name(model.name)
        self.layers = {path: part.form for path, part in self._parts.items()}

    def kept(self, path: str, name: str) -> Kept:
        """Return the variable that is an entry, and the order of its axes and features."""
        part = self._parts[path]
        variable = part.variables[name]
        dtype = keras.backend.standardize_dtype(variable.dtype)
        return Kept(variable, dtype, part.layout, part.positions)

    def get(self, parameter: keras.Variable) -> Array:
        """Return a variable's values as an array; bfloat16 as float32."""
        array: Array = ops.convert_to_numpy(parameter)
        unknown = array.dtype.name in ("bfloat16", "int32")  # to NumPy, and to states
        return array.astype(np.float32) if unknown else array

    def put(self, assignment: Assignment) -> None:
        """Assign an array to its variable."""
        assignment.parameter.assign(ops.cast(assignment.array, assignment.dtype))


def _parts(model: keras.Layer, layers: dict[str, keras.Layer]) -> dict[str, Part]:
    around = surroundings(model)
    parts, unseen = {}, set()
    for path, layer in layers.items():
        for below, part in parts_of(path, layer, around).items():
            place = entry(path, below) if below else path
            parts[place] = part
            if not around.graph.calls(layer):
                unseen.add(place)
    forms = suspect_flattening({path: part.form for path, part in parts.items()}, unseen)
    return {path: part._replace(form=forms[path]) for path, part in parts.items()}


def _layers(model: keras.Layer) -> dict[str, keras.Layer]:
    """Return the layers that own weights, by path; one that is reached twice, by its first."""
    if not isinstance(model, keras.Layer):
        raise no_model("keras.Layer", model)
    found: dict[str, keras.Layer] = {}
    seen: set[int] = set()
    for path, layer in _walk("", model):
        if not layer.built and (not path or reader_of(layer) is not None):
            name = path or layer.name
            raise ValueError(f"layer {name!r} is not built; call the model, or its build(), first.")
        if id(layer) in seen or not own_weights(layer):
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
    for child in ordered_children(layer):
        yield from _walk(entry(path, child.name), child)
