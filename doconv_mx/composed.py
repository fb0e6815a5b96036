"""Layers that compose the kernel they convolve with, whatever their kind; and how models get them.

A kind's layers subclass `ComposedConv` and the ordinary layers that they stand in for. What they
add is the composition, in the operators that arrays and symbols share.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import mxnet as mx
import numpy as np
from mxnet.gluon import Parameter, nn
from mxnet.ndarray import NDArray

from doconv_core.kinds.base import ComposedKind, Shape
from doconv_core.maths.batchnorm import NOT_FINITE, NotFoldable
from doconv_core.maths.spec import ConvSpec, check_divisible
from doconv_core.models import composed
from doconv_core.models.composed import PLAIN, READ_IN_FORWARD
from doconv_core.models.report import own_method
from doconv_core.models.view import Folding, ModelView, Site
from doconv_mx import reads, symbols
from doconv_mx.arguments import StandIn
from doconv_mx.ordinary import (
    channels_per_group,
    check_ordinary,
    contexts,
    filled,
    is_channels_last,
    outline,
    spec_of,
)
from doconv_mx.parameter import Entry, initializer
from doconv_mx.private import Conv, has_values, make_convolution, settings, shared, tie, waiting
from doconv_mx.surgery import compose_layers, fold_layers
from doconv_mx.tree import is_replaced

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on


Ordinary = TypeVar("Ordinary", bound=Conv)


class ComposedConv(StandIn, Conv, Generic[Ordinary]):
    """What the layers of every composed kind and rank share.

    Parameters: the kind's entries, `weight` in the ordinary kernel's shape where it has its size,
    in the layer's layout, and None for an entry that a layer of these sizes lacks; `bias`.
    """

    kind: ComposedKind
    ordinary: type[Ordinary]
    made: tuple[str, ...] = ("_outline",)  # attributes that an ordinary layer lacks

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the kind's options; None for its own defaults."""
        return dict.fromkeys(cls.kind.options)

    def _make(self, given: SimpleNamespace, own: dict[str, Any]) -> None:
        """Create the layer's parameters, after everything has been validated."""
        channels, groups = given.channels, given.groups
        check_divisible("in_channels", given.in_channels, groups)
        check_divisible("channels", channels, groups)
        # Where the input channels are to be inferred, a number that suits the groups stands for
        # them, so that everything else is validated here and now.
        conv = ConvSpec(given.in_channels or groups, channels, given.kernel_size, groups)
        options = {name: value for name, value in own.items() if value is not None}
        spec = self.kind.spec(conv, **options)
        operator = {
            "kernel": given.kernel_size, "stride": given.strides, "dilate": given.dilation,
            "pad": given.padding, "num_filter": channels, "num_group": groups,
            "no_bias": not given.use_bias, "layout": given.layout,
        }  # fmt: skip
        make_convolution(self, given.scope, given.in_channels, operator)
        self._outline: Any = spec
        with self.name_scope():
            if given.activation is not None:
                self.act = nn.Activation(given.activation, prefix=f"{given.activation}_")
            shapes = self.shapes(given.in_channels)
            self._refuse_an_ordinary_weight()
            self.weight = self._entry("weight", shapes["weight"], given.weight_initializer)
            if given.use_bias:
                bias = {"shape": (channels,), "init": given.bias_initializer}
                self.bias = self.params.get("bias", allow_deferred_init=True, **bias)
            for name in self.kind.names[1:]:
                start = initializer(self.kind.constants[name])
                entry = self._entry(name, shapes[name], start) if name in shapes else None
                setattr(self, name, entry)

    def entries(self) -> dict[str, Parameter]:
        """Return what the kernel is composed of, by name."""
        found = {name: getattr(self, name) for name in self.kind.names}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any = None, **others: Any) -> Any:
        """Return the convolution of `x`, in the layer's layout, with the composed kernel."""
        entries = {"weight": weight, **others}
        if not self.inferred_in_channels() and self.composes():
            entries = self.tied(F, x, entries)
        return super().hybrid_forward(F, x, self.compose(F, entries), bias)

    @abstractmethod
    def compose(self, F: Any, entries: Mapping[str, Any]) -> Any:
        """Return the kernel of these entries, as arrays or symbols, in the layer's layout.

        No shape may name the input channels: in a network that has seen no data they are unknown.
        """

    def tied(self, F: Any, x: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries as they are, their shapes tied to that of `x` in the symbolic graph.

        A hybridized network that meets its first batch infers every shape from one graph. Few
        operators but elementwise ones pass a shape back to their inputs. So `weight` gets one whose
        other input has the right shape, and a value that is never used.
        """
        last, (channels, *body) = is_channels_last(self), self.shapes(0)["weight"]
        rest = body[:-1] if last else body[1:]
        size, channel = 1, settings(self)["layout"].find("C")
        for length in rest:
            size *= length
        end = tuple(None if axis == channel else 1 for axis in range(self.rank + 2))
        like = F.slice(x.as_nd_ndarray(), begin=(0,) * len(end), end=end)
        like = F.reshape(like, shape=(settings(self)["num_group"], -1))
        like = F.slice_axis(like, axis=0, begin=0, end=1)
        # (1, I/g) -> (I/g, size) -> weight's shape: MXNet is slow at broadcasting inner axes.
        like = F.broadcast_axis(F.reshape(like, shape=(-1, 1)), axis=1, size=size)
        like = F.broadcast_axis(F.reshape(like, shape=(1, -1)), axis=0, size=channels)
        like = F.reshape(like, shape=(0, *rest, -1) if last else (0, -1, *rest))
        return {**entries, "weight": tie(F, entries["weight"].as_nd_ndarray(), like)}

    def as_weight(self, kernel: NDArray) -> NDArray:
        """Return what `weight` is for an ordinary kernel; an array of another shape as it is."""
        return kernel

    def start(self, kernel: NDArray) -> dict[str, NDArray]:
        """Return the entries with which the layer has this kernel."""
        constants = {
            name: mx.nd.full(p.shape, self.kind.constants[name], dtype=p.dtype)
            for name, p in self.entries().items()
            if name in self.kind.constants
        }
        return {"weight": self.as_weight(kernel), **constants}

    def composed_kernel(self, ctx: mx.Context | None = None) -> NDArray:
        """Return the kernel that the layer convolves with: `(O, I/g, *kernel_size)`, or
        `(O, *kernel_size, I/g)` in a channels-last layout.

        ctx: which of the layer's contexts, as in `Parameter.data`. The kernel is in the parameters'
        dtype, and differentiable while autograd records. Raises ValueError for a layer that has no
        values yet.
        """
        with reads.by(self):
            contexts(self, f"{type(self).__name__}.composed_kernel")
            return self.compose(mx.nd, {name: p.data(ctx) for name, p in self.entries().items()})

    def fold(self) -> Ordinary:
        """Return a new ordinary convolution with the same function.

        It keeps contexts, dtype, names, learning-rate and weight-decay multipliers, activation and
        hybridization. Its weight is trainable where one of what it is composed of is. Hooks are not
        carried over.
        Raises NotFoldable for a subclass that computes something else, and for a kernel that is not
        finite; ValueError for a layer that has no values yet.
        """
        check_foldable(self)
        ctx = contexts(self, f"{type(self).__name__}.fold")
        kernels = [self.composed_kernel(c) for c in ctx]
        check_finite(self, kernels[0])
        requests = [parameter.grad_req for parameter in self.entries().values()]
        trainable = next((r for r in requests if r != "null"), "null")
        folded: Ordinary = filled(self.ordinary, self, {}, kernels, trainable)
        return folded

    @classmethod
    def from_conv(cls, conv: Ordinary, **options: Any) -> Self:
        """Return a new layer with the function of a trained ordinary convolution.

        conv: an `ordinary` layer of Gluon's own, exactly; its parameters are copied. options: the
        kind's. Raises TypeError for any other layer: a subclass may compute something else. Raises
        ValueError for a layer that has no values yet.
        """
        check_ordinary(cls, conv)
        contexts(conv, f"{cls.__name__}.from_conv")
        spec, weight = cls.kind.spec(spec_of(conv), **options), conv.weight
        given = {name: getattr(spec, name) for name in cls.kind.options}
        values = weight.list_data(), weight.grad_req
        made: Self = filled(cls, conv, given, *values, cls.as_weight)
        return made

    def infer_shape(self, x: Any, *_: Any) -> None:
        """Take the number of input channels from the shape of `x`."""
        in_channels = x.shape[settings(self)["layout"].find("C")]
        check_divisible("in_channels", in_channels, settings(self)["num_group"])
        shapes = self.shapes(in_channels)
        for name, parameter in self.entries().items():
            parameter.shape = shapes[name]

    def __repr__(self) -> str:
        """Return the ordinary layer's description, with all input channels and the options."""
        arguments = super().__repr__().split(", kernel_size=", 1)[1]
        if self.composes():
            options = (f", {name}={getattr(self._outline, name)}" for name in self.kind.options)
            arguments = f"{arguments[:-1]}{''.join(options)})"
        mapping = f"{self.inferred_in_channels() or None} -> {self._channels}"
        return f"{type(self).__name__}({mapping}, kernel_size={arguments}"

    def composes(self) -> bool:
        """Return whether there is something to compose; else `weight` itself is the kernel."""
        return self.kind.obstacle(self.kind.conv(self._outline)) is None

    def inferred_in_channels(self) -> int:
        """Return the number of input channels, 0 where it is unknown."""
        return channels_per_group(self) * int(settings(self)["num_group"])

    def shapes(self, in_channels: int) -> dict[str, Shape]:
        """Return the shapes of the entries' parameters; with 0, those axes are 0 that depend on it.

        in_channels: 0 where they are unknown.
        """
        groups = settings(self)["num_group"]
        numbers = [in_channels] if in_channels else [groups, 2 * groups]
        several = [self._known_shapes(number) for number in numbers]
        return {
            name: tuple(
                sizes[0] if len(set(sizes)) == 1 else 0
                for sizes in zip(*(shapes[name] for shapes in several), strict=True)
            )
            for name in several[0]
        }

    def _known_shapes(self, in_channels: int) -> dict[str, Shape]:
        spec = replace(self._outline, in_channels=in_channels)
        channels, *body = self.kind.parameter_shape(spec)
        if is_channels_last(self):
            body = [*body[1:], body[0]]
        return {**self.kind.entries(spec), "weight": (channels, *body)}

    def _refuse_an_ordinary_weight(self) -> None:
        """Raise TypeError where `params` shares a weight that would be loaded without the rest."""
        given = shared(self, "weight")
        if self.composes() and not isinstance(given, Entry | None):
            raise TypeError(
                f"params must be those of another {type(self).__name__}; received "
                f"{given.name!r} of an ordinary layer, whose weight is trained and loaded alone. "
                f"Use {type(self).__name__}.from_conv(conv), which copies them."
            )

    def _entry(self, name: str, shape: Shape, init: Any) -> Parameter:
        """Return the parameter that `params` shares with the layer, or else a new one."""
        full = f"{self.params.prefix}{name}"
        if shared(self, name) is None:
            options = {"shape": shape, "init": init, "allow_deferred_init": True}
            self.params.update({full: Entry(full, self, **options)})
        return self.params.get(name, shape=shape, init=init)


class ComposedLayers(composed.ComposedLayers):
    """A composed kind's layers in Gluon. A layer is converted where it stands, by its class.

    operators: those of MXNet that take its entries in a graph that composes a kernel, by which it
    is known.
    """

    shareable = True
    operators: frozenset[str] = frozenset()

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return the sizes that the layer will have."""
        spec = self.kind.spec(outline(layer), **options)
        if symbols.node_of(layer) is not None and not channels_per_group(layer):
            self.check_symbol(spec)
        return spec

    def check_symbol(self, spec: Any) -> None:
        """Raise ValueError where a layer of a symbol whose shapes are not known cannot be."""
        raise ValueError(
            "in a symbol whose shapes are not known yet nothing is composed. Initialize the model "
            "and run it once."
        )

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make ordinary layers these, where they stand; those of one weight share the entries."""
        groups, nodes = _by_weight(chosen)
        for layers, spec in groups:
            compose_layers(layers, self.types, spec)
        symbols.compose_nodes(nodes, self.types)

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return the ordinary layer's name.

        Raises NotFoldable for what computes something else, for a layer whose entries are read
        otherwise, for a kernel that is not finite, and for a layer that shares `weight` with one
        that does not share the rest; ValueError for one of which some parameters have values and
        others have none.
        """
        layer = site.layer
        check_foldable(layer)
        if layer.composes() and view.other_use(layer):
            raise NotFoldable(READ_IN_FORWARD)
        own = list(layer.entries().values())
        if any(has_values(p) or (waiting(p) and waiting(p)[3] is not None) for p in own):
            ctx = contexts(layer, f"{type(layer).__name__}.fold")
            check_finite(layer, layer.composed_kernel(ctx[0]))
        # Else it has never had values, and is folded as it is: all but weight will be constant.
        rest = list(map(id, own[1:]))
        for other in view.holders(layer) if rest else ():
            if not self.owns(other) or list(map(id, other.entries().values()))[1:] != rest:
                raise NotFoldable(
                    f"it shares W, {own[0].name!r}, with a layer that does not share "
                    f"{own[1].name!r}: folded, they would have different kernels of one name."
                )
        return Folding(layer.ordinary.__name__, None)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Make the layers ordinary ones, where they stand; those of one weight share the kernel."""
        groups, nodes = _by_weight(planned)
        for layers, _ in groups:
            fold_layers(layers)
        symbols.fold_nodes([node for node, _ in nodes])


def _by_weight(
    chosen: Sequence[tuple[Site, Any]],
) -> tuple[list[tuple[list[Any], Any]], list[tuple[Any, Any]]]:
    """Return the layers that share each weight, and the nodes of symbols, with what is of them."""
    groups: dict[int, tuple[list[Any], Any]] = {}
    nodes = []
    for site, what in chosen:
        node = symbols.node_of(site.layer)
        if node is None:
            groups.setdefault(id(site.layer.weight), ([], what))[0].append(site.layer)
        else:
            nodes.append((node, what))
    return list(groups.values()), nodes


def check_foldable(layer: ComposedConv[Any]) -> None:
    """Raise NotFoldable for a layer that may compute something else than the plain one."""
    cls, plain = type(layer), _base_of(type(layer))
    methods = ("__call__", "forward", "hybrid_forward")
    if is_replaced(layer) or any(getattr(cls, m) is not getattr(plain, m) for m in methods):
        raise NotFoldable(own_method(cls, "forward", PLAIN))


def check_finite(layer: ComposedConv[Any], kernel: Any) -> None:
    """Raise NotFoldable where a kernel that is composed has an entry that is not finite."""
    if layer.composes() and not np.isfinite(kernel.asnumpy()).all():
        raise NotFoldable(NOT_FINITE)


def _base_of(cls: type[ComposedConv[Any]]) -> type[ComposedConv[Any]]:
    """Return what the layers of a kind have in common: the class that names the kind."""
    return next(c for c in cls.__mro__ if "kind" in vars(c))
