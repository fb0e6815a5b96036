"""Canonical state of a Gluon model: its convolutions and dense layers, by block path."""

from __future__ import annotations

import numpy as np
from mxnet.gluon import Block, Parameter, nn

from doconv_core.layout import from_canonical, to_canonical
from doconv_core.state import (
    LayerForm,
    LinearSpec,
    State,
    check_owned,
    entry,
    fit_state,
    unsupported_layer,
)
from doconv_mx.do_conv import _DOConv
from doconv_mx.ordinary import contexts, is_channels_last, spec_of

CONVOLUTIONS = (nn.Conv1D, nn.Conv2D, nn.Conv3D)


def export_state(model: Block) -> State:
    """Return a copy of the model's weights as a canonical state, in their dtype.

    Paths are those of `save_parameters`, without the parameter's name. Of several contexts the
    first is read. Raises TypeError for a block of another kind or with other parameters, by its
    path; ValueError for one that has no values yet.
    """
    blocks = _layers(model)
    layers = {path: _form(path, block) for path, block in blocks.items()}
    arrays = {}
    for path, block in blocks.items():
        for name, shape in layers[path].shapes.items():
            array = getattr(block, name).list_data()[0].asnumpy()
            if name == "weight":
                array = to_canonical(array, _layout(block))
            arrays[entry(path, name)] = array.reshape(shape)
    return State(layers, arrays)


def load_state(model: Block, state: State) -> None:
    """Copy a canonical state into the model, in the model's dtype and on all of its contexts.

    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's; TypeError and ValueError as `export_state` does.
    """
    blocks = _layers(model)
    arrays = fit_state(state, {path: _form(path, block) for path, block in blocks.items()})
    for path, block in blocks.items():
        for name, array in arrays[path].items():
            parameter = getattr(block, name)
            if name == "weight":
                array = _as_kept(array, parameter, _layout(block))
            parameter.set_data(array)


def _layers(model: Block) -> dict[str, Block]:
    """Return the blocks that own parameters, by path; one that occurs twice by its first."""
    found: dict[str, Block] = {}

    def visit(path: str, block: Block) -> None:
        if block in found.values():
            return
        if block.params.keys() or block._reg_params:
            found[path] = block
        for name, child in block._children.items():
            visit(entry(path, name), child)

    visit("", model)
    return found


def _own(block: Block) -> list[str]:
    """Return the names of the block's own parameters, whether they are its attributes or not."""
    attributes = set(block._reg_params.values())
    others = (name for name, p in block.params.items() if p not in attributes)
    return [*block._reg_params, *(name.removeprefix(block.params.prefix) for name in others)]


def _form(path: str, block: Block) -> LayerForm:
    bias = getattr(block, "bias", None) is not None
    supported = isinstance(block, _DOConv) or type(block) in (*CONVOLUTIONS, nn.Dense)
    if not supported:
        raise unsupported_layer(path, block, _own(block))
    contexts(block, f"the state of layer {path!r}")
    if isinstance(block, _DOConv):
        form = LayerForm(block.spec, block.depthwise_weight is not None, bias)
    elif type(block) is nn.Dense:
        out_features, in_features = block.weight.shape
        form = LayerForm(LinearSpec(in_features, out_features), bias=bias)
    else:
        form = LayerForm(spec_of(block), bias=bias)
    check_owned(path, block, _own(block), form.shapes)
    return form


def _layout(block: Block) -> str:
    return "O*I" if not isinstance(block, nn.Dense) and is_channels_last(block) else "OI*"


def _as_kept(weight: np.ndarray, parameter: Parameter, layout: str) -> np.ndarray:
    """Return a canonical weight in the parameter's shape and layout."""
    if layout == "O*I":
        body = parameter.shape[1:-1]
        weight = from_canonical(weight.reshape(*weight.shape[:2], *body), layout)
    return weight.reshape(parameter.shape)
