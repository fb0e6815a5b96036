"""Between a model and a state: what `export_state` and `load_state` do, whatever the framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from doconv_core.state.file import Array, State, entry, origin_of
from doconv_core.state.layers import LayerForm
from doconv_core.state.match import Assignment, Match, check_assignments, fit_state


class Holder(ABC):
    """A model as the holder of a state's arrays.

    framework, version: what it is made with, as in `State.origin`. network: its name, if it is one
    that `describe` knows. layers: the form of each layer that holds something, by path, in order.
    """

    framework: str
    version: str
    network: str | None
    layers: Mapping[str, LayerForm]

    @abstractmethod
    def get(self, path: str, name: str) -> Array:
        """Return a copy of a layer's entry, canonical; its shape need not be the form's yet."""

    @abstractmethod
    def assignment(self, path: str, name: str, array: Array) -> Assignment:
        """Return what gives a layer's entry this canonical array, and change nothing."""

    @abstractmethod
    def put(self, assignment: Assignment) -> None:
        """Change the model."""


def export_from(holder: Holder) -> State:
    """Return a copy of what the model holds, as a state."""
    arrays = {
        entry(path, name): holder.get(path, name).reshape(shape)
        for path, form in holder.layers.items()
        for name, shape in form.shapes.items()
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
        holder.assignment(path, name, array)
        for path, arrays in fitted.items()
        for name, array in arrays.items()
    ]
    check_assignments(assignments)
    for assignment in assignments:
        holder.put(assignment)
