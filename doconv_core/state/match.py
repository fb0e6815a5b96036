"""Fitting a state to a model: which layer takes whose arrays, or why they cannot be taken."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from doconv_core.models.report import listed, place
from doconv_core.state.agreement import (
    Sides,
    Values,
    check_epsilon,
    check_geometry,
    fit_arrays,
    metadata_of,
    window,
)
from doconv_core.state.file import Array, State, StateError, entry, no_state
from doconv_core.state.layers import CHANNELS_FIRST, HELD, OWN, UNRECORDED, LayerForm

Match: TypeAlias = "str | Mapping[str, str]"
IGNORABLE = ("geometry", "flattening")

_SIDES = Sides(
    theirs="the state",
    ours="the model",
    layer="the model's layer",
    rebuild=". Build the model's layer with {}",
    ignore=". Build the model with the state's, or, if something that cannot be seen here makes up "
    "for it (such as padding in a model's own code), load with ignore='geometry'",
)
T = TypeVar("T", bound=Hashable)
_LARGEST = {name: float(np.finfo(name).max) for name in ("float16", "float32", "float64")}
_LARGEST["bfloat16"] = (2 - 2**-7) * 2.0**127
_LARGEST |= {"int32": 2.0**31 - 1, "int64": 2.0**53}  # of what counts, whole in float64, too


def fit_state(
    state: State,
    layers: Mapping[str, LayerForm],
    *,
    match: Match = "path",
    ignore: str | Iterable[str] = (),
    framework: str | None = None,
    network: str | None = None,
    stacklevel: int = 3,
) -> dict[str, dict[str, Array]]:
    """Return the arrays that each of a model's `layers` is to receive, by path and then name.

    match: "path" pairs layers of the same path; "order" the first with the first, the second with
    the second and so on; a mapping says for each path of the state the model's path. ignore: what
    need not agree, of "geometry", a convolution's stride, dilation and padding, and "flattening",
    the order of a flattened image's features. framework, network: the model's, as in
    `State.origin`; an error says of which networks the two are.

    An ordinary convolution's entry fits an over-parameterized layer: its kernel is taken over and
    `depthwise_weight` is zero, so that the layer computes what was stored. A norm's `gamma` of ones
    and `beta` of zeros come and go as needed. Everything is checked before anything is returned:
    raises StateError for a layer that one side lacks, or that differs, and with "order" shows both
    sides; TypeError and ValueError for other arguments. Warns where a batch norm's momentum
    differs, as that concerns training only.

    >>> form, weight = LayerForm(LinearSpec(3, 2), bias=False), np.zeros((2, 3))
    >>> state = State({"fc": form}, {"fc.weight": weight})
    >>> fit_state(state, {"head": form}, match="order")["head"]["weight"].shape
    (2, 3)
    """
    if not isinstance(state, State):
        raise no_state(state)
    ignored = _as_ignored(ignore)
    same_framework = framework is not None and state.origin.get("framework") == framework
    try:
        fitted, momenta = _fit(state, layers, match, ignored, same_framework)
    except StateError as error:
        raise StateError(f"{_whose(state.origin.get('network'), network)}{error}") from error
    if momenta:
        warnings.warn(_of_momenta(momenta), UserWarning, stacklevel=stacklevel)
    return {path: fitted[path] for path in layers}


def _whose(theirs: str | None, ours: str | None) -> str:
    """Return how an error begins, by the names of the state's network and of the model's."""
    if theirs == ours:
        return ""
    if ours is None:
        return f"the state is one of {theirs!r}: "
    return f"the state is not one of {ours!r}{f', but of {theirs!r}' if theirs else ''}: "


def _fit(
    state: State,
    layers: Mapping[str, LayerForm],
    match: Match,
    ignored: set[str],
    same_framework: bool,
) -> tuple[dict[str, dict[str, Array]], list[str]]:
    """Return the arrays by the model's paths, and which batch norms' momenta differ."""
    momenta: list[str] = []
    fitted = {}
    ordered = match == "order"
    for row, (path, own_path) in enumerate(_pairs(state.layers, layers, match)):
        try:
            if path is None or own_path is None:
                raise StateError(_one_side_ends(path, own_path))
            found, wanted = state.layers[path], layers[own_path]
            label = repr(path) if path == own_path else f"{path!r}, the model's {own_path!r},"
            fitted[own_path] = _fit_layer(path, label, state, wanted)
            if "geometry" not in ignored:
                check_geometry(f"layer {label}", metadata_of(found), metadata_of(wanted), _SIDES)
            if "flattening" not in ignored:
                _check_flattening(label, found, wanted, same_framework)
        except StateError as error:
            if not ordered:
                raise
            raise StateError(f"{error}\n{_side_by_side(state.layers, layers, row)}") from None
        if found.kind == "batch_norm" and not math.isclose(
            found.spec.momentum, wanted.spec.momentum, abs_tol=1e-6
        ):
            momenta.append(f"{own_path!r} ({found.spec.momentum:g}, here {wanted.spec.momentum:g})")
    return fitted, momenta


def _as_ignored(ignore: str | Iterable[str]) -> set[str]:
    if not isinstance(ignore, Iterable):
        raise TypeError(
            f"ignore must be a name, or several, of {listed(IGNORABLE)}; received "
            f"ignore={ignore!r}."
        )
    ignored = {ignore} if isinstance(ignore, str) else set(ignore)
    if not ignored <= set(IGNORABLE):
        raise ValueError(f"ignore must be of {listed(IGNORABLE)}; received ignore={ignore!r}.")
    return ignored


def _of_momenta(momenta: list[str]) -> str:
    more = f" and {len(momenta) - 3} more" if len(momenta) > 3 else ""
    return (
        "the weight of the new batch in a batch norm's running statistics differs: "
        f"{', '.join(momenta[:3])}{more}. What the model computes in evaluation is the same, but "
        "its training goes on with other statistics; build its layers with the state's."
    )


def pairs(
    theirs: Sequence[T], ours: Sequence[T], match: str | Mapping[T, T]
) -> list[tuple[T | None, T | None]]:
    """Return which layer of one side is which of the other, None where one side has none.

    theirs, ours: what tells a layer, in order: the path, or more. match: "order" for the first and
    the first and so on; a mapping, perhaps empty, for what has another path on the other side.
    """
    if isinstance(match, str):
        return list(zip_longest(theirs, ours))
    renamed = {path: match.get(path, path) for path in theirs}
    there, taken = set(ours), set(renamed.values())
    both = [(path, own if own in there else None) for path, own in renamed.items()]
    return [*both, *((None, path) for path in ours if path not in taken)]


def _pairs(
    theirs: Mapping[str, LayerForm], ours: Mapping[str, LayerForm], match: Match
) -> list[tuple[str | None, str | None]]:
    """Return (state path, model path) of every layer; by order, None where one side has run out."""
    if match == "order":
        return pairs([*theirs], [*ours], match)
    if match != "path" and not isinstance(match, Mapping):
        raise ValueError(
            f"match must be 'path', 'order', or a mapping from the state's paths to the model's; "
            f"received match={match!r}."
        )
    renamed = {} if isinstance(match, str) else match
    for path in renamed:
        if path not in theirs:
            raise StateError(_absent(path, "the state", theirs, "match names it"))
    targets = Counter(renamed.get(path, path) for path in theirs)
    twice = [path for path, count in targets.items() if count > 1]
    if twice:
        raise StateError(f"match gives {listed(twice)} to more than one layer of the state.")
    found = pairs([*theirs], [*ours], renamed)
    state = "the state" if match == "path" else "the state with its paths renamed"
    for first, own in sorted(found, key=lambda pair: pair[0] is not None):
        if first is None and own is not None:
            raise StateError(_absent(own, state, targets, "the model has it"))
        if first is not None and own is None:
            missing = renamed.get(first, first)
            raise StateError(_absent(missing, "the model", ours, "the state has it"))
    return found


def _absent(path: str, where: str, there: Collection[str], but: str) -> str:
    close = get_close_matches(path, there, 1)
    known = listed(list(there)[:10]) + (", …" if len(there) > 10 else "")
    hint = f"the closest is {close[0]!r}" if close else f"it has {known or 'no layers'}"
    return f"layer {path!r} is not in {where}, though {but}; {hint}."


def _one_side_ends(path: str | None, own_path: str | None) -> str:
    if own_path is None:
        return f"layer {path!r} of the state has no counterpart: the model has fewer layers."
    return f"layer {own_path!r} of the model has no counterpart: the state has fewer layers."


def _side_by_side(
    theirs: Mapping[str, LayerForm], ours: Mapping[str, LayerForm], marked: int
) -> str:
    """Return both sides' layers around the row `marked`, to read."""
    columns = [
        [f"{path or '(root)'}: {_described(form)}" for path, form in layers.items()]
        for layers in (theirs, ours)
    ]
    before, rows, after = window(list(zip_longest(*columns, fillvalue="-")), marked)
    width = max(len(text) for text in [*(left for left, _ in rows), "the state"])
    lines = [f"    {'the state':{width}}  the model"]
    lines += [f"    … {before} before"] * bool(before)
    lines += [
        f"  {'>' if row == marked else ' '} {left:{width}}  {right}"
        for row, (left, right) in enumerate(rows, before)
    ]
    return "\n".join([*lines, *[f"    … {after} more"] * bool(after)])


def _described(form: LayerForm) -> str:
    kind = form.over_parameterized or form.kind.replace("_", " ")
    kind = "DO-Conv" if kind is True else kind
    if not form.shapes:
        return kind
    (_, shape), *others = form.shapes.items()
    return f"{kind} {shape}" + (f" + {', '.join(name for name, _ in others)}" if others else "")


def _check_flattening(
    label: str, found: LayerForm, wanted: LayerForm, same_framework: bool
) -> None:
    theirs, ours = found.flattening, wanted.flattening
    known = (None, CHANNELS_FIRST)
    agree = (theirs in known and ours in known) or (theirs, ours) == (UNRECORDED, None)
    if agree or (theirs == ours == OWN and same_framework):
        return
    words = {OWN: "the framework's own", UNRECORDED: "not recorded"}
    first, second = (words.get(str(order), "channels first") for order in (theirs, ours))
    raise StateError(
        f"layer {label} may have the features of a flattened image, in an order that cannot be "
        f"told: it is {first} in the state, {second} in the model. If both are the same, load with "
        "ignore='flattening', and compare outputs."
    )


def _fit_layer(path: str, label: str, state: State, wanted: LayerForm) -> dict[str, Array]:
    """Return the arrays for one layer; StateError where kind, sizes, epsilon or bias differ."""
    found = state.layers[path]
    if found.kind != wanted.kind:
        raise StateError(f"layer {label} is of {found.spec}; expected {wanted.spec}.")
    check = _check_norm if "norm" in wanted.kind else _check_weight
    check(path, label, found, wanted)
    theirs = {}
    for name, shape in found.shapes.items():
        source = entry(path, name)
        array = state.arrays[source]
        theirs[name] = Values(shape, array.dtype.name, partial(np.asarray, array), (source,))
    fitted = fit_arrays(theirs, wanted.shapes, _SIDES, wanted.composed, wanted.spec)
    return {name: values.read() for name, values in fitted.items()}


def _check_weight(path: str, label: str, found: LayerForm, wanted: LayerForm) -> None:
    spec, kind = wanted.spec, found.composed
    if found.bias != wanted.bias:
        raise StateError(
            f"entry {entry(path, 'bias')!r} is {'there' if found.bias else 'missing'}; expected a "
            f"layer {'with' if wanted.bias else 'without'} bias."
        )
    other = wanted.composed
    if kind is not None and kind is not other:
        raise StateError(
            f"entry {entry(path, [*kind.entries(found.spec)][-1])!r} is for an over-parameterized "
            f"layer; expected an ordinary one{f', or one of kind {other.name!r}' if other else ''}."
            " Fold the model before exporting its state."
        )
    expected = spec if other is None or kind is not None else other.conv(spec)
    if found.spec != expected:
        named = entry(path, next(iter(found.shapes)))
        raise StateError(f"entry {named!r} is of {found.spec}; expected {spec}.")


def _check_norm(path: str, label: str, found: LayerForm, wanted: LayerForm) -> None:
    theirs, ours = found.spec, wanted.spec
    sizes = [(s.features, getattr(s, "groups", None)) for s in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise StateError(f"layer {label} is of {theirs}; expected {ours}.")
    check_epsilon(f"layer {label}", metadata_of(found), metadata_of(wanted), _SIDES)


class Assignment(NamedTuple):
    """An array on its way into a model.

    name: of its entry in the model. parameter: what is to hold it. dtype: the parameter's, by name.
    array: in the parameter's layout. memory: where its values lie, where two parameter objects may
    share them; else None.
    """

    name: str
    parameter: Any
    dtype: str
    array: Array
    memory: Hashable = None


def check_assignments(assignments: Iterable[Assignment]) -> None:
    """Raise StateError for what a model's parameters cannot hold.

    That is a number too large for their dtype, and different arrays for one that layers share.
    """
    first: dict[Hashable, tuple[str, Array]] = {}
    for name, parameter, dtype, array, memory in assignments:
        largest = _LARGEST[dtype]
        finite = np.abs(array[np.isfinite(array)])
        if finite.size and finite.max() > largest:
            raise StateError(
                f"entry {name!r} has {finite.max():g}, which the model's {dtype} cannot hold."
            )
        other, expected = first.setdefault(memory or id(parameter), (name, array))
        if not np.array_equal(array, expected, equal_nan=True):
            raise StateError(
                f"{other!r} and {name!r} are one parameter in the model, but differ in the state."
            )


def check_owned(path: str, layer: object, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise TypeError unless a layer owns just what a state would hold of it, by these names."""
    found, expected = list(found), list(expected)
    if set(found) != set(expected):
        raise TypeError(
            f"{place(path)}, a {type(layer).__name__}, has {listed(found)}; expected "
            f"{listed(expected)}. What computes one of them (weight norm, pruning) must be made "
            "permanent first."
        )


def unsupported_layer(
    path: str, layer: object, names: Iterable[str], reason: str | None = None
) -> TypeError:
    """Return the error for a layer that has no counterpart in a state.

    names: of what it owns. reason: why, where its kind would have one.
    """
    return TypeError(
        f"{place(path)} is a {type(layer).__name__} with {listed(names)}; "
        + (f"{reason}." if reason else f"a canonical state holds {HELD}.")
    )
