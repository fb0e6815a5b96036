"""Layers that compose the kernel they convolve with, whatever their kind; and how models get them.

A kind's layers subclass `ComposedConv` and the ordinary layers that they stand in for. What they
add is the composition, in PyTorch's operations, and where it pays a way of their own to convolve.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, parametrize

from doconv_core.kinds.base import ComposedKind
from doconv_core.maths.batchnorm import NOT_FINITE, NotFoldable
from doconv_core.maths.spec import ConvSpec, as_tuple
from doconv_core.models import composed
from doconv_core.models.composed import PLAIN, READ_IN_FORWARD
from doconv_core.models.report import own_method
from doconv_core.models.view import Folding, Leave, ModelView, Site
from doconv_torch.arguments import StandIn, as_places
from doconv_torch.convolve import Form, convolve
from doconv_torch.ordinary import (
    GATHER,
    Owners,
    is_bound,
    is_plain,
    is_sharded,
    memory,
    owners,
    spec_of,
)

BOUND = "its weight has hooks, or a class of its own, for its present shape: S = M would keep it"


Ordinary = TypeVar("Ordinary", bound=_ConvNd)


class ComposedConv(StandIn, _ConvNd, Generic[Ordinary]):
    """What the layers of every composed kind and rank share.

    Each rank names the ordinary layer it stands in for. Parameters: the kind's entries, `weight` in
    the ordinary kernel's shape where it has its size, and None for an entry that a layer of these
    sizes lacks; `bias`.
    """

    kind: ComposedKind
    ordinary: type[Ordinary]
    rank: int
    spec: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        rank = self.rank
        kernel_size = as_tuple("kernel_size", kernel_size, rank)
        conv = ConvSpec(in_channels, out_channels, kernel_size, groups)
        spec = self.kind.spec(conv, **options)
        as_places(rank, stride, padding, dilation)
        # The ordinary layer's arguments: what stands behind `_ConvNd` among the bases takes them.
        arguments: tuple[Any, ...] = (
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        super().__init__(*arguments)
        self.spec = spec
        shape = self.kind.parameter_shape(spec)
        if shape != conv.kernel_shape:
            self.weight = nn.Parameter(self.weight.new_empty(shape))
            self.reset_parameters()
        shapes = self.kind.entries(spec)
        for name in self.kind.names[1:]:
            value = None
            if name in shapes:
                constant = self.kind.constants[name]
                value = nn.Parameter(self.weight.new_full(shapes[name], constant))
            self.register_parameter(name, value)

    def reset_parameters(self) -> None:
        """Initialise the weight and the bias as the ordinary layer does, the rest as it starts."""
        super().reset_parameters()
        for name in self.kind.names[1:]:
            if self._parameters.get(name) is not None:
                nn.init.constant_(getattr(self, name), self.kind.constants[name])

    def entries(self) -> dict[str, Tensor]:
        """Return what the kernel is composed of, by name."""
        found = {name: getattr(self, name) for name in self.kind.names}
        return {name: value for name, value in found.items() if value is not None}

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input`, `(B, I, *spatial)`, with the composed kernel."""
        # Asked first, so that no compiler follows the rest. What is parametrized is computed once.
        own = torch.compiler.is_compiling() or self._modules
        form = None if own else self.form(input)
        if form is not None and _computes_as_told(self):
            return convolve(self, input, form)
        return self._conv_forward(input, self.composed_kernel(), self.bias)

    def form(self, input: Tensor) -> Form | None:
        """Return the form for `convolve`, which needs less memory; None where it does not suit."""
        return None

    @abstractmethod
    def composed_kernel(self) -> Tensor:
        """Return the kernel that the layer convolves with, `(O, I/g, *kernel_size)`."""

    @classmethod
    def start(cls, kernel: Tensor, spec: Any) -> dict[str, Tensor]:
        """Return the entries of a layer that takes the place of one with this kernel."""
        shapes = cls.kind.entries(spec)
        constants = {
            name: kernel.new_full(shapes[name], value)
            for name, value in cls.kind.constants.items()
            if name in shapes
        }
        return {"weight": kernel, **constants}

    def fold(self) -> Ordinary:
        """Return a new ordinary convolution with the same function.

        It keeps device, dtype, mode and memory format. Its weight is trainable where one of what it
        is composed of is. Parametrizations are folded in as in evaluation mode. Hooks are not
        carried over.
        Raises NotFoldable for a layer that computes something else, for one whose parameters a
        hook computes (weight norm of the old kind, pruning), and for a kernel that is not finite.
        """
        check_foldable(self)
        with _in_evaluation(self), torch.enable_grad():
            entries = self.entries()
            trainable = any(p.requires_grad for p in entries.values())
            kernel = self.composed_kernel().detach()
            _check_finite(entries, kernel)
            if len(entries) == 1 or type(self).composed_kernel is not _base(self).composed_kernel:
                kernel = kernel.clone()  # else it is a new tensor, of nobody's
            folded: Ordinary = filled(self.ordinary, self, {}, weight=(kernel, trainable))
        return folded.train(self.training)

    @classmethod
    def from_conv(cls, conv: Ordinary, **options: Any) -> Any:
        """Return a new layer with the function of a trained ordinary convolution.

        conv: an `ordinary` layer of PyTorch's own, exactly; its parameters are copied. options: the
        kind's. Raises TypeError for any other layer: a subclass may compute something else.
        """
        check_ordinary(cls, conv)
        spec = cls.kind.spec(spec_of(conv), **options)
        weight, trainable = conv.weight.detach().clone(), conv.weight.requires_grad
        entries = cls.start(weight, spec)
        given = {name: getattr(spec, name) for name in cls.kind.options}
        return filled(cls, conv, given, **{name: (e, trainable) for name, e in entries.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as every module does; an ordinary layer's weight is taken over."""
        weight = state_dict.get(f"{prefix}weight")
        shape = self.kind.conv(self.spec).kernel_shape
        ordinary = isinstance(weight, Tensor) and tuple(weight.shape) == shape
        own = [name for name, value in self._parameters.items() if value is not None]
        marks = [f"{prefix}{name}" for name in self.kind.names[1:] if name in own]
        if marks and ordinary and not any(name in state_dict for name in marks):
            assert weight is not None  # as it has the kernel's shape
            found = self.start(weight, self.spec)
            state_dict = {**state_dict, **{f"{prefix}{name}": e for name, e in found.items()}}
        super()._load_from_state_dict(state_dict, prefix, *args)


class ComposedLayers(composed.ComposedLayers):
    """A composed kind's layers in PyTorch. A layer is converted where it stands, by its class."""

    shareable = True

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return the sizes that the layer will have."""
        spec = self.kind.spec(spec_of(layer), **options)
        if self.kind.parameter_shape(spec) != tuple(layer.weight.shape) and is_bound(layer.weight):
            raise Leave(BOUND)
        return spec

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make ordinary layers these, where they stand; tied ones have tied entries."""
        made: dict[int, tuple[dict[str, nn.Parameter], Tensor]] = {}
        for site, spec in chosen:
            layer, cls = site.layer, self.types[type(site.layer)]
            kernel = layer.weight
            if id(kernel) not in made:  # the kernel is kept, so that no other gets its identity
                made[id(kernel)] = _started(cls, kernel, spec), kernel
            layer.__class__ = cls
            layer.spec = spec
            for name in self.kind.names:
                layer.register_parameter(name, made[id(kernel)][0].get(name))

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return the ordinary layer's name.

        Raises NotFoldable for what computes something else, for a layer whose weight is read
        otherwise, and for a kernel that is not finite.
        """
        layer = site.layer
        check_foldable(layer)
        if len(self.kind.entries(layer.spec)) > 1 and view.other_use(layer):
            raise NotFoldable(READ_IN_FORWARD)
        with _in_evaluation(layer), torch.no_grad():  # now, before anything is changed
            _check_finite(layer.entries(), layer.composed_kernel())
        return Folding(site.layer.ordinary.__name__, None)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Make the layers ordinary ones, where they stand; tied ones have a tied weight."""
        held, weights = owners(view.model), dict[Any, tuple[Any, ...]]()
        for site, _ in planned:
            _fold(site.layer, held, weights)

    def given_up(self, view: ModelView) -> list[Tensor]:
        """Return every entry but `weight` that no folded layer has."""
        return [
            users[0][2]
            for users in owners(view.model).values()
            if is_plain(users[0][2])
            and all(self.owns(m) and name in self.kind.names[1:] for m, name, _ in users)
        ]


def _started(
    cls: type[ComposedConv[Any]], kernel: nn.Parameter, spec: Any
) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer with this kernel, which itself is W where it can be."""
    found: dict[str, nn.Parameter] = {}
    detached = kernel.detach()
    for name, value in cls.start(detached, spec).items():
        if value is detached:
            found[name] = kernel
            continue
        found[name] = nn.Parameter(value, kernel.requires_grad)
        if name == "weight":
            vars(found[name]).update(vars(kernel))
    return found


def _fold(layer: Any, held: Owners, weights: dict[Any, tuple[Any, ...]]) -> None:
    """Make a layer an ordinary one.

    held: what `owners` says of the model. weights: of entries, the weight that they became, which
    tied layers share.
    """
    folded = layer.fold()
    weight, bias = folded.weight, layer._parameters.get("bias", folded.bias)
    if parametrize.is_parametrized(layer):
        _remove_parametrizations(layer)
    else:
        own = tuple(getattr(layer, name) for name in layer.kind.names)
        key = (*map(id, own), layer.spec)
        if key not in weights:
            weights[key] = _into_w(layer, weight, held), own
        weight = weights[key][0]
    names = layer.kind.names
    layer.__class__ = layer.ordinary
    del layer.spec
    for name in ("bias", *names):
        layer._parameters.pop(name, None)
        layer._buffers.pop(name, None)
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)


def _remove_parametrizations(layer: Any) -> None:
    """Remove them, with the hooks by which PyTorch's own read their older checkpoints."""
    del layer._modules["parametrizations"]
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if getattr(hook.hook, "__module__", "") == parametrizations.__name__:
            del layer._load_state_dict_pre_hooks[key]


def _into_w(layer: Any, folded: Any, held: Owners) -> Any:
    """Return W with the folded kernel in it, so that it stays the same object, where it can be."""
    weight, marks = layer.weight, layer.kind.names[1:]
    if not is_plain(weight):
        return folded
    if all(getattr(layer, name) is None for name in marks):
        return weight
    vars(folded).update(vars(weight))
    if weight.shape != folded.shape:
        return folded
    if weight.is_inference() or not all(
        name == "weight"
        and tied is weight
        and isinstance(other, ComposedConv)
        and other.kind is layer.kind
        and all(getattr(other, mark) is getattr(layer, mark) for mark in marks)
        and other.spec == layer.spec
        for other, name, tied in held[memory(weight)]
    ):
        return folded
    weight.copy_(folded)
    weight.grad = None  # it was W's
    return weight.requires_grad_(folded.requires_grad)


def _base_of(cls: type[ComposedConv[Any]]) -> type[ComposedConv[Any]]:
    """Return what the layers of a kind have in common: the class that names the kind."""
    return next(c for c in cls.__mro__ if "kind" in vars(c))


def _base(layer: ComposedConv[Any]) -> type[ComposedConv[Any]]:
    return _base_of(type(layer))


def _computes_as_told(layer: ComposedConv[Any]) -> bool:
    """Return whether neither the layer nor its class has another way to compose or to convolve."""
    cls = type(layer)
    return (
        cls._conv_forward is layer.ordinary._conv_forward
        and cls.composed_kernel is _base(layer).composed_kernel
        and vars(layer).keys().isdisjoint(("_conv_forward", "composed_kernel"))
    )


def check_ordinary(cls: Any, conv: Any) -> None:
    """Raise TypeError where `cls.from_conv` cannot know what `conv` computes."""
    if type(conv) is not cls.ordinary:
        raise TypeError(
            f"{cls.__name__}.from_conv takes over a torch.nn.{cls.ordinary.__name__}, exactly; "
            f"received {type(conv).__module__}.{type(conv).__qualname__}."
        )
    if "forward" in vars(conv):
        raise TypeError(
            f"{cls.__name__}.from_conv needs a layer with the forward of its type; this one's "
            "was replaced, and may compute something else."
        )
    if conv._parameters.get("weight") is None:
        raise TypeError(
            f"{cls.__name__}.from_conv needs a layer whose weight is a parameter; this "
            "one's is computed (weight norm, pruning). Make it permanent first."
        )


def check_foldable(layer: ComposedConv[Any]) -> None:
    """Raise NotFoldable, with the reason, where the ordinary layer would compute something else."""
    cls, own = type(layer), vars(layer)
    trusted = _base(layer)
    if (
        cls.forward is not trusted.forward
        or cls._conv_forward is not layer.ordinary._conv_forward
        or not own.keys().isdisjoint(("forward", "_conv_forward", "composed_kernel"))
    ):
        raise NotFoldable(own_method(cls, "forward", PLAIN))
    if any(is_sharded(parameter) for parameter in layer._parameters.values()):
        raise NotFoldable(f"its parameters are sharded (DTensor). To fold: {GATHER}")
    # What a hook sets before each call is no parameter, and is out of date after a training step.
    computed = [name for name in (*layer.kind.names, "bias") if name in own]
    if computed:
        raise NotFoldable(
            f"a hook computes {cls.__qualname__}.{computed[0]} before each call (old weight norm, "
            "pruning); make it permanent first, as torch.nn.utils.remove_weight_norm or "
            "torch.nn.utils.prune.remove does."
        )


def _check_finite(entries: Mapping[str, Tensor], kernel: Tensor) -> None:
    """Raise NotFoldable where a kernel that is composed has an entry that is not finite."""
    if len(entries) > 1 and not kernel.is_meta and not kernel.isfinite().all():
        raise NotFoldable(NOT_FINITE)


@contextmanager
def _in_evaluation(layer: nn.Module) -> Iterator[None]:
    """Put parametrizations into evaluation mode: spectral norm changes its state in training."""
    modes = {module: module.training for module in layer.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def filled(
    cls: type[Any], like: _ConvNd, options: dict[str, Any], **parameters: tuple[Tensor, bool]
) -> Any:
    """Return a new `cls` with the arguments, bias and mode of `like`, and the given parameters.

    The tensors become its own, and the channels are those of the weight; the bias is copied. It is
    created on the meta device: nothing is initialised only to be overwritten, and no random number
    is drawn.
    """
    outputs, per_group = parameters["weight"][0].shape[:2]
    layer = cls(
        per_group * like.groups, outputs, like.kernel_size, like.stride, like.padding,
        like.dilation, like.groups, like.bias is not None, like.padding_mode, "meta",
        like.weight.dtype, **options,
    )  # fmt: skip
    if like.bias is not None:
        parameters["bias"] = (like.bias.detach().clone(), like.bias.requires_grad)
    for name, (value, trainable) in parameters.items():
        setattr(layer, name, nn.Parameter(value, requires_grad=trainable))
    return layer.train(like.training)
