"""Canonical state of a Gluon model, by block path."""

from __future__ import annotations

from collections.abc import Iterable

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import Block, Parameter

from doconv_core.models.received import no_model
from doconv_core.networks.names import known_name
from doconv_core.state.exchange import Holder, Kept, dropped_by, export_from, load_into
from doconv_core.state.file import Array, State
from doconv_core.state.layers import suspect_flattening
from doconv_core.state.match import Assignment, Match
from doconv_mx.layers import check_axes, form_of, layout_of
from doconv_mx.parameter import native
from doconv_mx.tree import own_parameters, walk

LAST = ("O*I", "I*O")  # layouts of kernels with their channels last


def export_state(model: Block) -> State:
    """Return a copy of the model's weights as a canonical state, in their dtype.

    Paths are those of `save_parameters`, without the parameter's name, and their order is that in
    which blocks were added to theirs. Of several contexts the first is read. Raises TypeError for a
    block without a counterpart in a state or with other parameters, by its path; ValueError for one
    that has no values yet.

    >>> net = mx.gluon.nn.Conv2D(8, 3, in_channels=3)
    >>> net.initialize()
    >>> {name: array.shape for name, array in export_state(net).arrays.items()}
    {'weight': (8, 3, 9), 'bias': (8,)}
    """
    return export_from(_Blocks(model))


def load_state(
    model: Block, state: State, *, match: Match = "path", ignore: str | Iterable[str] = ()
) -> None:
    """Copy a canonical state into the model, in the model's dtype and on all of its contexts.

    match: "path", "order", or a mapping from the state's paths to the model's. ignore: "geometry"
    or "flattening", or both, for what need not agree; see `doconv_core.fit_state`.
    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's; TypeError and ValueError as `export_state` does. Warns where
    a batch norm's momentum differs.

    >>> net, trained = (mx.gluon.nn.Dense(2, in_units=3) for _ in range(2))
    >>> net.initialize(), trained.initialize()
    (None, None)
    >>> load_state(net, export_state(trained))
    >>> bool((net.weight.data() == trained.weight.data()).asnumpy().all())
    True
    """
    load_into(_Blocks(model), state, match=match, ignore=ignore)


class _Blocks(Holder):
    """The blocks of a model that own parameters. Raises as `export_state` says."""

    framework, version = "mxnet", mx.__version__

    def __init__(self, model: Block) -> None:
        if not isinstance(model, Block):
            raise no_model("mxnet.gluon.Block", model)
        self.network = known_name(getattr(model, "network_name", None))
        check_axes(model)
        self._blocks = {path: block for path, block in walk(model) if own_parameters(block)}
        self.dropped = dropped_by(self._blocks)
        forms = {path: form_of(path, block) for path, block in self._blocks.items()}
        last = any(layout_of(block) in LAST for block in self._blocks.values())
        self.layers = suspect_flattening(forms, forms if last else ())

    def kept(self, path: str, name: str) -> Kept:
        """Return the parameter that is an entry, and its layout."""
        block = self._blocks[path]
        parameter = getattr(block, name)
        return Kept(parameter, np.dtype(parameter.dtype).name, layout_of(block))

    def get(self, parameter: Parameter) -> Array:
        """Return a parameter's values in the first context as an array."""
        array: Array = parameter.list_data()[0].asnumpy()
        return array

    def put(self, assignment: Assignment) -> None:
        """Copy an array to where its entry is, in every context."""
        _, parameter, dtype, array, _ = assignment
        with autograd.pause():
            # Not the NumPy array itself: what has run on a CPU may lie in memory in an order of
            # oneDNN's, over which MXNet copies no other memory.
            values = mx.nd.from_numpy(np.array(array, dtype, order="C"))
            parameter.set_data(native(values))
