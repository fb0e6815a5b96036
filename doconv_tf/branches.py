"""A Keras model's graphs, told call by call, and made simpler where branches are one convolution.

A graph keeps its tensors: the one that branches gave is what their convolution gives then, so that
what takes it, another model's graph too, holds on.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import keras
import numpy as np
from keras import ops

from doconv_core.maths.geometry import causal, same, settled, symmetric
from doconv_core.maths.layout import from_canonical
from doconv_core.maths.linear import Taps
from doconv_core.maths.numeric import difference, largest
from doconv_core.models.merge import APART, Merge, Node, Part, Step
from doconv_core.models.report import NOT_FINITE, READ, SEVERAL, SHARED, Change
from doconv_tf.batchnorm import READ as HELD_BY_FUNCTION
from doconv_tf.batchnorm import REGULARIZED, TRAINING
from doconv_tf.former_variables import alive
from doconv_tf.graph import Graph, calls_in_order, variables_read
from doconv_tf.ordinary import (
    CONVS,
    DEPTHWISE_CONVS,
    ORDINARY,
    below,
    first_occurrences,
    name_scopes,
    policy_of,
)
from doconv_tf.pieces import ZERO_PADS, Reader
from doconv_tf.private import (
    attributes_of,
    children,
    follows_graph,
    graph_of,
    map_anew,
    nodes_of,
    own_variables,
    put_result,
)
from doconv_tf.trial import applied, computed

UNLIKE = "its layers are of several dtypes"
HELD = "a model has one of its layers as an attribute, too"
IN_OTHERS = "another model has the same calls of its layers"
STRIDED = "Keras has no convolution of several strides and dilations at once"
EXACT = {"float64": 1e-9, "float32": 1e-5}  # of the largest output


def parts(model: keras.Layer) -> list[GraphPart]:
    """Return the functional and sequential models, those inside others before them."""
    seen = _Seen(model)
    return [GraphPart(path, layer, seen) for path, layer in _inside_first("", model, set())]


def _inside_first(path: str, layer: Any, met: set[int]) -> list[tuple[str, Any]]:
    """Return the layers that a graph alone calls, with their first paths."""
    met.add(id(layer))
    found = []
    for child in children(layer):
        if id(child) not in met:
            found += _inside_first(below(path, child), child, met)
    graph = graph_of(layer) is not None and follows_graph(layer)
    return [*found, (path, layer)] if graph else found


class _Seen:
    """What is seen of a model, as it was before anything was merged."""

    def __init__(self, model: keras.Layer) -> None:
        layers = [layer for _, layer in first_occurrences(model)]
        self.flow, self.read = Graph(model).flow(), variables_read(model)
        self.owners = Counter(id(v) for layer in layers for v in own_variables(layer))
        self.functions = [*filter(None, map(graph_of, layers))]
        self.held = {id(each) for layer in layers if graph_of(layer) is not None
                     for function in {layer, graph_of(layer)}
                     for each in attributes_of(function)}  # fmt: skip
        formats = [layer.data_format for layer in layers if isinstance(layer, ORDINARY)]
        self.data_format = formats[0] if formats else "channels_last"

    @cached_property
    def of_others(self) -> set[int]:
        """The ids of the calls that models beside this one have in their graphs, too."""
        own = {id(node) for function in self.functions for node in nodes_of(function)}
        found = own & self._calls_beside()
        if found:
            gc.collect()  # those that nobody has any more
            found = own & self._calls_beside()
        return found

    def _calls_beside(self) -> set[int]:
        own = {id(function) for function in self.functions}
        others = [each for each in alive(keras.Function) if id(each) not in own]
        whole = [each for each in others if "_nodes_by_depth" in vars(each)]
        return {id(node) for each in whole for node in nodes_of(each)}


class GraphPart(Part):
    """A model that is a graph."""

    def __init__(self, path: str, model: Any, seen: _Seen) -> None:
        self.path, self.layer, self.kind, self._seen = path, model, type(model).__name__, seen
        self._function: Any = graph_of(model)
        calls = calls_in_order(self._function)
        self._calls = {id(tensor): call for call in calls for tensor in call.outputs}
        self._tensors = {id(tensor): tensor for call in calls for tensor in call.outputs}
        self._told: dict[Any, Step] = {}
        self._names = _Names(set())
        # A Sequential takes images of other sizes than that of its Input, too.
        self._sized = isinstance(model, keras.Function)

    def steps(self, known: Mapping[int, Node]) -> tuple[list[Step], Any]:
        """Return the steps of the graph, and the result that it returns."""
        reader = Reader(known, self._seen.flow, self._seen.data_format, sized=self._sized)
        steps = reader.steps(self._function)
        self._told = {step.key: step for step in steps}
        ends = [id(tensor) for tensor in self._function.outputs]
        if len(ends) == len(self._function.inputs) == 1:
            return steps, ends[0]
        return [*steps, Step("outputs", tuple(ends))], None

    def obstacle(self, merge: Merge) -> str | None:
        """Return why steps cannot become one convolution in this model; None where they can."""
        keys = [merge.key, *(t.key for t in merge.terms if t.node is None)]
        if not all(key in self._tensors for key in keys):  # a part of a mean
            return APART
        for node in merge.nodes:
            reason = self._obstacle(node) or self._unequal(node)
            if reason is not None:
                return reason
        return None

    def _obstacle(self, node: Node) -> str | None:
        if node.source not in self._tensors:
            return APART
        flow, taps, layers = self._seen.flow, _taps(node), self._layers(node)
        variables = {id(v): layer for layer in layers for v in own_variables(layer)}
        weighted = {id(layer): layer for layer in variables.values()}
        if any(layer.activity_regularizer for layer in layers):
            return REGULARIZED
        for key in weighted:
            if key in flow.unseen:
                return flow.unseen[key]
        if any(flow.times[key] > 1 for key in weighted):
            return SEVERAL
        if any(self._seen.owners[key] > 1 for key in variables):
            return SHARED
        if not flow.read.isdisjoint(map(id, layers)):
            return HELD_BY_FUNCTION
        if not self._seen.read.isdisjoint(variables):
            return READ
        if not self._seen.held.isdisjoint(weighted):
            return HELD
        if any(weighted[key].trainable for key in flow.training & weighted.keys()):
            return TRAINING
        if not self._seen.of_others.isdisjoint(map(id, self._calls_of(node))):
            return IN_OTHERS
        results = {self._tensors[key].dtype for _, key in node.ends}
        kinds = {(each.variable_dtype, each.compute_dtype) for each in weighted.values()}
        if len(kinds) != 1 or {dtype for _, dtype in kinds} != results:
            return UNLIKE
        if max(taps.geometry.stride) > 1 and max(_dilation(taps)) > 1:
            return STRIDED
        with np.errstate(all="ignore"):
            rounded = [ops.cast(each, next(iter(kinds))[0]) for each in _values(taps)]
        return None if all(bool(ops.all(ops.isfinite(r))) for r in rounded) else NOT_FINITE

    def _unequal(self, node: Node) -> str | None:
        """Return how far the convolution is from the steps on random values; None where equal.

        In float64, or float32 where the backend or device has no such layers in that.
        """
        widest = keras.backend.result_type("float64")  # of which Keras makes float32 on some
        for dtype, allowed in [*EXACT.items()][widest != "float64" :]:
            try:
                apart = largest(self._difference(node, dtype, more) for more in (2, 3))
            except Exception as error:  # whatever a backend raises for its layers
                told = str(error).partition("\n")[0]
                reason = f"tried on random values, it raised {type(error).__name__}: {told}"
                continue
            if apart <= allowed:
                return None
            return f"tried on random values, it differs by {apart:.1g}"
        return reason

    def _difference(self, node: Node, dtype: str, more: int) -> float:
        """Return the difference, relative to the largest output. more: strides of the image."""
        taps, begin = _taps(node), self._tensors[node.source]
        where = zip(self._sizes(node), taps.extent, taps.geometry.stride, strict=True)
        shape = [2, *(_like(n, e + more * s, s) for n, e, s in where)]
        shape.insert(len(shape) if self._last else 1, taps.channels[0])
        x = np.random.default_rng(more).normal(size=shape)
        found, expected = applied(self._layers_for(node, dtype), x, dtype), 0.0
        for sign, key in node.ends:
            steps = computed(self._tensors[key], begin, x, self._seen.flow, dtype)
            expected = expected + sign * steps
        return difference(found, expected).relative

    @property
    def _last(self) -> bool:
        return self._seen.data_format == "channels_last"

    def _calls_of(self, node: Node) -> list[Any]:
        """Return the calls that steps are."""
        return [self._calls[key] for key in self._calls if key in node.steps]

    def _layers(self, node: Node) -> list[Any]:
        """Return the layers that steps call, and those inside them."""
        called = [call.operation for call in self._calls_of(node)]
        layers = [each for each in called if isinstance(each, keras.Layer)]
        return [inner for each in layers for _, inner in first_occurrences(each)]

    def _main(self, node: Node) -> Any:
        """Return the largest layer that steps call."""
        told = {key: self._told[key].node for key in self._calls if key in node.steps}
        sizes = {key: -1 if each is None else each.best for key, each in told.items()}
        return self._calls[max(sizes, key=lambda key: sizes[key])].operation

    def _sizes(self, node: Node) -> tuple[int | None, ...]:
        """Return the sizes of what steps take, where the graph takes no other."""
        shape = self._tensors[node.source].shape
        sizes = shape[1:-1] if self._last else shape[2:]
        return sizes if self._sized else (None,) * len(sizes)

    def _class(self, node: Node) -> Any:
        """Return the type of the convolution that steps become."""
        taps, rank = _taps(node), len(_taps(node).size)
        depthwise = any(isinstance(layer, DEPTHWISE_CONVS) for layer in self._layers(node))
        alike = taps.groups == taps.channels[0] and len(set(taps.geometry.stride)) == 1
        fits = depthwise and alike and rank <= len(DEPTHWISE_CONVS)
        return (DEPTHWISE_CONVS if fits else CONVS)[rank - 1]

    def _padding(self, node: Node) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return a padding in Keras' words, and the zeros that are to be put around before it.

        What is cropped is what no window reaches.
        """
        taps = _taps(node)
        stride, dilation = taps.geometry.stride, _dilation(taps)
        where = taps.size, stride, dilation, self._sizes(node)
        words = {
            "valid": symmetric([0] * len(taps.size)), "same": same(taps.size, stride, dilation),
        }  # fmt: skip
        if self._class(node) is CONVS[0]:
            words["causal"] = causal(taps.size, dilation)
        for word, pads in words.items():
            if settled(pads, *where) == settled(taps.pads, *where):
                return word, ()
        around = tuple((before, max(after, 0)) for before, after in taps.pads)
        return "valid", around if taps.is_padded else ()

    def _layers_for(self, node: Node, dtype: Any = None) -> list[Any]:
        """Return the convolution that steps are, behind a padding with zeros where it needs one.

        dtype: None for that of the steps' layers.
        """
        taps, cls, main, layers = _taps(node), self._class(node), self._main(node), []
        (word, around), rank = self._padding(node), len(taps.size)
        weighted = [layer for layer in self._layers(node) if own_variables(layer)]
        policy = dtype or policy_of(weighted[0])
        data_format, outputs = self._seen.data_format, taps.channels[1]
        if around:
            pads = [layer.name for layer in self._layers(node) if type(layer) in ZERO_PADS]
            layers.append(
                ZERO_PADS[rank - 1](
                    around[0] if rank == 1 else around, data_format=data_format, dtype=policy,
                    name=self._names.free(pads[0] if pads else f"{main.name}_pad"),
                )
            )  # fmt: skip
        dense = cls in CONVS
        own = (
            {"filters": outputs, "groups": taps.groups, "kernel_initializer": "zeros"}
            if dense
            else {"depth_multiplier": outputs // taps.groups, "depthwise_initializer": "zeros"}
        )
        conv = cls(
            kernel_size=taps.size, strides=taps.geometry.stride, padding=word,
            dilation_rate=_dilation(taps), use_bias=taps.bias is not None, data_format=data_format,
            dtype=policy, trainable=any(layer.trainable_variables for layer in weighted),
            name=self._names.free(main.name), **own,
        )  # fmt: skip
        sizes = (None,) * rank
        with name_scopes(main):
            conv.build((None, *sizes, taps.channels[0]) if self._last else
                       (None, taps.channels[0], *sizes))  # fmt: skip
        kernel = from_canonical(taps.kernel, "*IO" if dense else "*CN", taps.groups)
        for variable, value in zip(conv.weights, (kernel, *_values(taps)[1:]), strict=True):
            variable.assign(value)
        return [*layers, conv]

    def replace(self, merges: Sequence[Merge]) -> list[Change]:
        """Let the graph compute these convolutions in place of their steps."""
        gone = {key for merge in merges for node in merge.nodes for key in (merge.key, *node.steps)}
        kept = {call.operation.name for key, call in self._calls.items() if key not in gone}
        self._names = _Names(kept)
        changes = [change for merge in merges for change in self._replaced(merge)]
        if merges:
            map_anew(self.layer)
        return changes

    def _replaced(self, merge: Merge) -> list[Change]:
        end, changes = self._calls[merge.key].operation.name, []
        by_sign: dict[int, list[Any]] = {1: [], -1: []}
        for term in merge.terms:
            value = self._tensors[term.key if term.node is None else term.node.source]
            if term.node is not None:
                layers = self._layers_for(term.node)
                for layer in layers:
                    value = layer(value)
                changes.append(self._change(layers, term.node))
            by_sign[term.sign].append(value)
        total, *others = by_sign[1]
        if others:
            total = keras.layers.Add(name=self._names.free(end))([total, *others])
        for value in by_sign[-1]:
            total = keras.layers.Subtract(name=self._names.free(end))([total, value])
        put_result(self._tensors[merge.key], total)
        return changes

    def _change(self, layers: Sequence[Any], node: Node) -> Change:
        of = ", ".join(dict.fromkeys(call.operation.name for call in self._calls_of(node)))
        made = " and ".join(type(layer).__name__ for layer in layers)
        return Change(below(self.path, layers[-1]), self.kind, f"{made} of {of}")


class _Names:
    """Names of which each is given once. taken: those that are given already."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = taken

    def free(self, name: str) -> str:
        """Return the name, or one like it that is not taken, and take it."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _taps(node: Node) -> Taps:
    assert isinstance(node.piece, Taps)  # as that is what steps are merged to
    return node.piece


def _values(taps: Taps) -> list[Any]:
    """Return the kernel, and the bias if there is one."""
    return [taps.kernel, *([] if taps.bias is None else [np.array(taps.bias)])]


def _dilation(taps: Taps) -> tuple[int, ...]:
    return taps.geometry.for_kernel(taps.size).dilation


def _like(size: int | None, least: int, stride: int) -> int:
    """Return a size for which a padding in words is that of this one, which is not much less."""
    return least if size is None else least + (size - least) % stride
