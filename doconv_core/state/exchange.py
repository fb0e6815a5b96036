"""Between a model and a state: what `export_state` and `load_state` do, whatever the framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from doconv_core.maths.layout import (
    from_canonical,
    from_channels_first,
    to_canonical,
    to_channels_first,
)
from doconv_core.state.file import Array, State, StateError, entry, origin_of
from doconv_core.state.layers import LayerForm, Shape
from doconv_core.state.match import Assignment, Match, check_assignments, fit_state


class Kept(NamedTuple):
    """An entry as a model keeps it.

    parameter: what holds it, which has a shape. dtype: the parameter's, by name. layout: the
    layer's weight's, a word of `doconv_core.maths.layout`. positions: the size of the image that
    the layer's features are, flattened channels last; else None. memory: as in `Assignment`.
    """

    parameter: Any
    dtype: str
    layout: str = "OI"
    positions: Shape | None = None
    memory: Hashable = None


class Holder(ABC):
    """A model as the holder of a state's arrays.

    framework, version: what it is made with, as in `State.origin`. network: its name, if it is one
    that `describe` knows. layers: the form of each layer that holds something, by path, in order.
    dropped: how many channels those drop that were folded to do so, by path.
    """

    framework: str
    version: str
    network: str | None
    layers: Mapping[str, LayerForm]
    dropped: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def kept(self, path: str, name: str) -> Kept:
        """Return where and how the model keeps a layer's entry."""

    @abstractmethod
    def get(self, parameter: Any) -> Array:
        """Return a parameter's values, of which a copy is made."""

    @abstractmethod
    def put(self, assignment: Assignment) -> None:
        """Change the model."""


def dropped_by(layers: Mapping[str, Any]) -> dict[str, int]:
    """Return how many channels folded layers drop, of these by path, as a `Holder` says it."""
    numbers = {path: getattr(layer, "dropped", None) for path, layer in layers.items()}
    return {path: number for path, number in numbers.items() if number is not None}


def export_from(holder: Holder) -> State:
    """Return a copy of what the model holds, as a state."""
    arrays = {
        entry(path, name): _exported(holder, path, name)
        for path, form in holder.layers.items()
        for name in form.shapes
    }
    origin = origin_of(holder.framework, holder.version, holder.network)
    return State(holder.layers, arrays, origin)


def load_into(
    holder: Holder, state: State, *, match: Match, ignore: str | Iterable[str], stacklevel: int = 4
) -> None:
    """Copy a state into the model. match, ignore: see `fit_state`.

    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's; warns where a batch norm's momentum differs. stacklevel: of
    that warning, counted from `fit_state`; such that it points to the caller's caller.
    """
    fitted = fit_state(
        state,
        holder.layers,
        match=match,
        ignore=ignore,
        framework=holder.framework,
        network=holder.network,
        stacklevel=stacklevel,
    )
    assignments = [
        _assignment(holder, path, name, array)
        for path, arrays in fitted.items()
        for name, array in arrays.items()
    ]
    check_assignments(assignments)
    for path, dropped in holder.dropped.items():
        given = fitted[path]["inactive"]
        if given != dropped:
            raise StateError(
                f"layer {path!r} was folded to drop {dropped} channels; received a state in which "
                f"it drops {given:g}: load it into the model that is to be folded, and fold that."
            )
    for assignment in assignments:
        holder.put(assignment)


def _exported(holder: Holder, path: str, name: str) -> Array:
    """Return a copy of a layer's entry, canonical."""
    kept, form = holder.kept(path, name), holder.layers[path]
    array, positions = holder.get(kept.parameter), _positions(form, name, kept)
    if name == "weight":
        array = to_canonical(array, kept.layout)
    array = array.reshape(form.shapes[name])
    return (array if positions is None else to_channels_first(array, positions)).copy()


def _assignment(holder: Holder, path: str, name: str, array: Array) -> Assignment:
    """Return what gives a layer's entry this canonical array."""
    kept, form = holder.kept(path, name), holder.layers[path]
    positions = _positions(form, name, kept)
    if positions is not None:
        array = from_channels_first(array, positions)
    if name == "weight":
        array = _as_kept(form, array, kept.layout)
    array = array.reshape(tuple(kept.parameter.shape))
    return Assignment(entry(path, name), kept.parameter, kept.dtype, array, kept.memory)


def _positions(form: LayerForm, name: str, kept: Kept) -> Shape | None:
    """Return the size of the image that an entry's last axis is, flattened, to be reordered."""
    return None if form.kind == "linear" and name == "bias" else kept.positions


def _as_kept(form: LayerForm, weight: Array, layout: str) -> Array:
    """Return a canonical weight with its spatial axes, in this layout."""
    sizes, composed = form.spec, form.composed
    shape = getattr(sizes, "kernel_shape", weight.shape)
    if composed is not None:
        shape, sizes = composed.parameter_shape(sizes), composed.conv(sizes)
    return from_canonical(weight.reshape(shape), layout, getattr(sizes, "groups", 1))
