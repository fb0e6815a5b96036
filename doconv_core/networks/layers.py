"""What a state of a network has: the form of every layer with arrays."""

from __future__ import annotations

from doconv_core.kinds.base import composed_by
from doconv_core.maths.geometry import Geometry, symmetric
from doconv_core.networks.lowering import conv_spec, lowered
from doconv_core.networks.nodes import BatchNorm, Conv, Linear, Network
from doconv_core.networks.shapes import Placed, Shape, infer, padding
from doconv_core.state.file import Array, State
from doconv_core.state.layers import BatchNormSpec, LayerForm, LinearSpec
from doconv_core.state.match import fit_state


def layers(network: Network, input_shape: Shape | None = None) -> dict[str, LayerForm]:
    """Return the form of every layer of the network that has arrays, by path, in order.

    It is what a state of the network holds, in whatever framework: a BSConv's parts are layers of
    their own. input_shape: `(C, H, W)`; None for the network's own. Raises ValueError, by path,
    for a network of which there are no such layers.
    """
    placed = infer(lowered(network, input_shape)).values()
    forms = ((each.path, _form(each)) for each in placed)
    return {path: form for path, form in forms if form is not None}


def fitted(
    network: Network, state: State, input_shape: Shape | None = None, *, stacklevel: int = 2
) -> dict[str, dict[str, Array]]:
    """Return the arrays of every layer of the network, by path and name, taken from a state.

    As `doconv_core.fit_state` takes them: a state of ordinary convolutions fits DO-Conv's too.
    Raises StateError, with the network's name and the layer's, for another network's state.
    """
    forms = layers(network, input_shape)
    return fit_state(state, forms, network=network.name, stacklevel=stacklevel + 1)


def _form(placed: Placed) -> LayerForm | None:
    path, node, before, _ = placed
    try:
        if isinstance(node, Conv):
            return _convolution(node, before)
        if isinstance(node, BatchNorm):
            spec = BatchNormSpec(before[0], node.epsilon, node.momentum)
            return LayerForm(spec, bias=node.affine, scale=node.affine)
        if isinstance(node, Linear):
            return LayerForm(LinearSpec(before[0], node.features), bias=node.bias)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from error
    return None


def _convolution(conv: Conv, before: Shape) -> LayerForm:
    spec = conv_spec(conv, before)
    stride = (conv.stride,) * spec.rank
    geometry = Geometry(stride, (1,) * spec.rank, symmetric(padding(conv)))
    kind = composed_by(conv.kind, spec)
    if kind is None:
        return LayerForm(spec, bias=conv.bias, geometry=geometry)
    return LayerForm(kind.spec(spec), kind.name, conv.bias, geometry=geometry)
