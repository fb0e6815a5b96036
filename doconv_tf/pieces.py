"""What one call in a graph is: linear in its only input, a sum, or anything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from doconv_core.maths.geometry import SAME, Geometry, Pad, same, settled, symmetric
from doconv_core.maths.layout import to_canonical
from doconv_core.maths.linear import UNIT, NotOne, Scale, Taps, then
from doconv_core.models.merge import Node, Step, atom
from doconv_core.models.view import Leave
from doconv_tf.batchnorm import as_array, norm_obstacle, passes_on, scale_and_offset
from doconv_tf.graph import Seen, calls_in_order
from doconv_tf.ordinary import (
    CONVS,
    ORDINARY,
    SEPARABLE_CONVS,
    is_replaced,
    obstacle,
    pads,
)
from doconv_tf.private import follows_graph, graph_of, is_operation

UNSIZED = "its padding depends on the size of its input, which the graph leaves open"
ROUNDED = "what is between computes in another dtype, and so rounds"
POOLED = "an average pooling that pads leaves the padding out of its means"

_layers = keras.layers
POOLS = (_layers.AveragePooling1D, _layers.AveragePooling2D, _layers.AveragePooling3D)
ZERO_PADS = (_layers.ZeroPadding1D, _layers.ZeroPadding2D, _layers.ZeroPadding3D)
LINEAR = keras.activations.linear
_SUMS: dict[type, str] = {_layers.Add: "+", _layers.Subtract: "-", _layers.Average: "mean"}
_OPERATIONS = {
    "Add": "+", "Subtract": "-", "Multiply": "*", "Divide": "/", "TrueDivide": "/",
    "Negative": "neg",
}  # fmt: skip


class Reader:
    """Reads the calls of a graph as steps, whose keys are the ids of the results' tensors.

    known: models inside that are linear, by their `id`. data_format: of the layers that are looked
    at. sized: whether the graph takes inputs of no other size than it tells.
    """

    def __init__(
        self, known: Mapping[int, Node], seen: Seen, data_format: str, *, sized: bool
    ) -> None:
        self._known, self._seen, self._sized = known, seen, sized
        self._last = data_format == "channels_last"
        self._format = data_format

    def steps(self, function: keras.Function) -> list[Step]:
        """Return the steps of a graph."""
        calls = [node for node in calls_in_order(function) if node.input_tensors]
        return [step for node in calls for step in self._read(node)]

    def _read(self, node: Any) -> list[Step]:
        """Return what a call is, mostly one step."""
        inputs = tuple(map(id, node.input_tensors))
        keys = [id(tensor) for tensor in node.outputs]
        plain = [Step(key, inputs) for key in keys]
        floats = (keras.backend.is_float_dtype(tensor.dtype) for tensor in node.input_tensors)
        if len(keys) != 1 or not all(floats):
            return plain
        if len(inputs) > 1:
            return self._sum(node, keys[0], inputs) or plain
        try:
            linear = self._linear(node)
        except Leave as reason:
            return [Step(keys[0], inputs, reason=str(reason))]
        return plain if linear is None else [Step(keys[0], inputs, linear)]

    def _sum(self, node: Any, key: int, inputs: tuple[int, ...]) -> list[Step]:
        """Return the steps of a sum or mean of values of one shape; none of anything else."""
        word = _word(node.operation)
        shapes = {tensor.shape for tensor in (*node.input_tensors, *node.outputs)}
        if word not in ("+", "-", "mean") or len(shapes) != 1:
            return []
        signs = (1, -1 if word == "-" else 1, *(1,) * (len(inputs) - 2))
        if word != "mean":
            return [Step(key, inputs, None, signs)]
        total = (key, "sum")
        scale = Scale(UNIT.factor / len(inputs))
        return [Step(total, inputs, None, signs), Step(key, (total,), atom(scale))]

    def _linear(self, node: Any) -> Node | None:
        """Return what a call of one tensor is, if it is linear; raises Leave."""
        called, (tensor,) = node.operation, node.input_tensors
        if node.outputs[0].dtype != tensor.dtype and not getattr(called, "weights", ()):
            raise Leave(ROUNDED)
        if graph_of(called) is not None:
            return self._known.get(id(called)) if follows_graph(called) else None
        if not isinstance(called, keras.Layer):
            scale = self._arithmetic(node)
            return None if scale is None else atom(scale)
        return self._layer(called, tensor)

    def _layer(self, layer: Any, tensor: Any) -> Node | None:
        """Return what a layer is, given this tensor; None for what is not linear."""
        kind, rank = type(layer), len(tensor.shape)
        if is_replaced(layer) or getattr(layer, "data_format", self._format) != self._format:
            return None
        if kind in ORDINARY:
            return self._convolution(layer, tensor)
        if isinstance(layer, _layers.BatchNormalization):
            whole = norm_obstacle(layer) is None and layer.axis % rank == self._axis(rank)
            return atom(Scale(*scale_and_offset(layer))) if whole else None
        if passes_on(layer, self._seen):
            return atom(UNIT)
        if kind in POOLS:
            return atom(self._pool(layer, tensor))
        if kind in ZERO_PADS:
            own = (layer.padding,) if kind is ZERO_PADS[0] else layer.padding
            ones = (1,) * len(own)
            return atom(self._alike(np.ones((1, 1, *ones)), ones, own, tensor))
        if kind is _layers.Rescaling:
            factor, offset = (self._by_channel(x, rank) for x in (layer.scale, layer.offset))
            if factor is not None and offset is not None:
                return atom(Scale(factor, offset if offset.any() else None))
        return None

    def _axis(self, rank: int) -> int:
        """Return the axis of the channels."""
        return rank - 1 if self._last else 1

    def _taps(
        self, kernel: Any, bias: Any, stride: Any, dilation: Any, padding: Any, tensor: Any,
        groups: int,
    ) -> Taps:  # fmt: skip
        """Return a convolution of this tensor; raises Leave where it is not known how it pads."""
        size = kernel.shape[2:]
        shape = tensor.shape[1:-1] if self._last else tensor.shape[2:]
        sizes = shape if self._sized else (None,) * len(size)
        found: tuple[Pad, ...] = settled(padding, size, stride, dilation, sizes)
        if SAME in found:
            raise Leave(UNSIZED)
        geometry = Geometry(tuple(stride), tuple(dilation), found)
        return Taps(kernel, bias, geometry, groups)

    def _alike(self, kernel: Any, stride: Any, padding: Any, tensor: Any) -> Taps:
        """Return what does this to each channel."""
        taps = self._taps(kernel, None, stride, (1,) * len(stride), padding, tensor, 1)
        return replace(taps, alike=True)

    def _convolution(self, layer: Any, tensor: Any) -> Node | None:
        """Return what a convolution without an activation is."""
        if obstacle(layer) is not None or layer.activation not in (None, LINEAR):
            return None
        if len(tensor.shape) != layer.rank + 2:  # of several images each
            return None
        separable, dense = isinstance(layer, SEPARABLE_CONVS), isinstance(layer, CONVS)
        kernel = _wide(layer.depthwise_kernel if separable else layer.kernel)
        groups = layer.groups if dense else kernel.shape[-2]
        bias = None if layer.bias is None else _wide(layer.bias)
        where = layer.strides, layer.dilation_rate, pads(layer), tensor
        canonical = to_canonical(kernel, "*IO" if dense else "*CN")
        first = self._taps(canonical, None if separable else bias, *where, groups)
        if not separable:
            return atom(first)
        ones = (1,) * len(first.size)
        pointwise = to_canonical(_wide(layer.pointwise_kernel), "*IO")
        second = Taps(pointwise, bias, Geometry(ones, ones, symmetric([0] * len(ones))))
        try:
            both = then(first, second)
        except NotOne:  # as it would be too large
            return None
        return Node(None, None, both, macs=first.macs + second.macs, convolutions=1)

    def _pool(self, pool: Any, tensor: Any) -> Taps:
        """Return what an average pooling is, where it pads nothing."""
        size, ones = pool.pool_size, (1,) * len(pool.pool_size)
        own = (
            same(size, pool.strides, ones) if pool.padding == "same" else symmetric([0] * len(size))
        )
        kernel = np.full((1, 1, *size), 1 / np.prod(size))
        taps = self._alike(kernel, pool.strides, own, tensor)
        if taps.is_padded:
            raise Leave(POOLED)
        return taps

    def _arithmetic(self, node: Any) -> Scale | None:
        """Return an operation of a value and a constant, in either order, as a scale."""
        word, (tensor,) = _word(node.operation), node.input_tensors
        if node.outputs[0].shape != tensor.shape or node.arguments.kwargs:
            return None
        if word == "neg":
            return Scale(-UNIT.factor)
        if word not in ("+", "-", "*", "/") or len(node.arguments.args) != 2:
            return None
        a, b = node.arguments.args
        ahead = a is tensor
        constant = self._by_channel(b if ahead else a, len(tensor.shape))
        if constant is None or (word == "/" and not (ahead and constant.all())):
            return None
        if word in ("*", "/"):
            return Scale(constant if word == "*" else 1 / constant)
        offset = -constant if word == "-" and ahead else constant
        factor = -UNIT.factor if word == "-" and not ahead else UNIT.factor
        return Scale(factor, offset if offset.any() else None)

    def _by_channel(self, value: Any, rank: int) -> Any:
        """Return a number, or what has an entry for each channel; None for anything else."""
        if isinstance(value, (bool, keras.Variable, keras.KerasTensor)):
            return None
        if not isinstance(value, (int, float, list, tuple, np.ndarray, np.generic)):
            if not ops.is_tensor(value):
                return None
            value = as_array(value)
        array = np.asarray(value)
        if array.dtype.kind not in "iuf" or array.ndim > rank:
            return None
        array = array.astype(np.float64)
        if array.size == 1:
            return array.reshape(())
        others = [n for axis, n in enumerate(array.shape, rank - array.ndim)
                  if axis != self._axis(rank)]  # fmt: skip
        return array.reshape(-1) if all(n == 1 for n in others) else None


def _word(operation: Any) -> str:
    """Return what an operation or layer does with its inputs, as a sign; "" for anything else."""
    if isinstance(operation, keras.Layer):
        return "" if is_replaced(operation) else _SUMS.get(type(operation), "")
    name = type(operation).__name__
    return _OPERATIONS.get(name, "") if is_operation(operation, (name,)) else ""


def _wide(variable: Any) -> Any:
    return as_array(variable).astype(np.float64)
