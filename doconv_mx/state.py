"""Canonical state of a Gluon model, by block path."""

from __future__ import annotations

from collections.abc import Iterable

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, Parameter

from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.networks.names import known_name
from doconv_core.state.file import State, entry, origin_of
from doconv_core.state.layers import LayerForm, suspect_flattening
from doconv_core.state.match import Assignment, Match, check_assignments, fit_state
from doconv_mx.layers import check_axes, form_of, layout_of
from doconv_mx.parameter import native

FRAMEWORK = "mxnet"


def export_state(model: Block) -> State:
    """Return a copy of the model's weights as a canonical state, in their dtype.

    Paths are those of `save_parameters`, without the parameter's name, and their order is that in
    which blocks were added to theirs. Of several contexts the first is read. Raises TypeError for a
    block without a counterpart in a state or with other parameters, by its path; ValueError for one
    that has no values yet.
    """
    blocks = _layers(model)
    layers = _forms(blocks)
    arrays = {}
    for path, block in blocks.items():
        for name, shape in layers[path].shapes.items():
            array = getattr(block, name).list_data()[0].asnumpy()
            if name == "weight":
                array = to_canonical(array, layout_of(block))
            arrays[entry(path, name)] = array.reshape(shape)
    network = known_name(getattr(model, "network_name", None))
    return State(layers, arrays, origin_of(FRAMEWORK, mx.__version__, network))


def load_state(
    model: Block, state: State, *, match: Match = "path", ignore: str | Iterable[str] = ()
) -> None:
    """Copy a canonical state into the model, in the model's dtype and on all of its contexts.

    match: "path", "order", or a mapping from the state's paths to the model's. ignore: "geometry"
    or "flattening", or both, for what need not agree; see `doconv_core.fit_state`.
    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's; TypeError and ValueError as `export_state` does. Warns where
    a batch norm's momentum differs.
    """
    blocks = _layers(model)
    network = known_name(getattr(model, "network_name", None))
    options = {"match": match, "ignore": ignore, "framework": FRAMEWORK, "network": network}
    fitted = fit_state(state, _forms(blocks), **options)
    assignments = []
    for path, arrays in fitted.items():
        for name, array in arrays.items():
            parameter = getattr(blocks[path], name)
            if name == "weight":
                array = _as_kept(array, parameter, layout_of(blocks[path]))
            dtype = np.dtype(parameter.dtype).name
            assignments.append(Assignment(entry(path, name), parameter, dtype, array))
    check_assignments(assignments)
    with autograd.pause():
        for _, parameter, dtype, array, _ in assignments:
            # Not the NumPy array itself: what has run on a CPU may lie in memory in an order of
            # oneDNN's, over which MXNet copies no other memory.
            values = mx.nd.from_numpy(np.array(array, dtype, order="C"))
            parameter.set_data(native(values))


def _layers(model: Block) -> dict[str, Block]:
    """Return the blocks that own parameters, by path; one that occurs twice by its first."""
    if not isinstance(model, Block):
        raise TypeError(f"model must be a Gluon Block; received {type(model).__qualname__}.")
    found: dict[str, Block] = {}

    def visit(path: str, block: Block) -> None:
        if block in found.values():
            return
        if block.params.keys() or block._reg_params:
            found[path] = block
        for name, child in block._children.items():
            visit(entry(path, name), child)

    visit("", model)
    check_axes(model)
    return found


def _forms(blocks: dict[str, Block]) -> dict[str, LayerForm]:
    forms = {path: form_of(path, block) for path, block in blocks.items()}
    channels_last = any(layout_of(block) in ("O*I", "I*O") for block in blocks.values())
    return suspect_flattening(forms, forms if channels_last else ())


def _as_kept(weight: np.ndarray, parameter: Parameter, layout: str) -> np.ndarray:
    """Return a canonical weight in the parameter's shape and layout."""
    if layout in ("O*I", "I*O"):
        body = parameter.shape[1:-1]
        weight = from_canonical(weight.reshape(*weight.shape[:2], *body), layout)
    return weight.reshape(parameter.shape)
