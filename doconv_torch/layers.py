"""What a PyTorch module is in a canonical state: one function for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from doconv_core.maths.geometry import Extra, Geometry, padded
from doconv_core.models.report import REPLACED
from doconv_core.state.file import entry
from doconv_core.state.layers import (
    BatchNormSpec,
    EmbeddingSpec,
    GroupNormSpec,
    LayerForm,
    LayerNormSpec,
    LinearSpec,
    PReLUSpec,
    TransposedConvSpec,
)
from doconv_core.state.match import check_owned
from doconv_core.state.reading import (
    NoCounterpart,
    has_own_spec,
    in_outputs,
    is_composed,
    read_layer,
)
from doconv_torch.affine import BATCHNORMS
from doconv_torch.arguments import pads_of
from doconv_torch.composed import ComposedConv
from doconv_torch.kinds import LAYER_KINDS
from doconv_torch.ordinary import DTYPES, ORDINARY, is_replaced, spec_of

Uses: TypeAlias = "Set[Extra]"

# Where PyTorch's name for an entry is not the state's.
ATTRIBUTES = {"gamma": "weight", "beta": "bias", "alpha": "weight"}
# What counts batches only: with a momentum it takes no part in a batch norm's computation.
UNSTORED = "num_batches_tracked"

_ZERO_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
# What acts on each position alone and keeps a zero: with it, zeros around go on to the next layer.
_KEEP_ZEROS = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Tanh, nn.Softsign,
)  # fmt: skip


def form_of(path: str, module: nn.Module, uses: Uses = frozenset()) -> LayerForm:
    """Return what a module that owns something is in a state.

    uses: what `paddings` gives for it. Raises TypeError, by the path, for a module without a
    counterpart, with a forward pass of its own, or with other parameters than its kind has;
    ValueError for parameters on the meta device.
    """
    own, cls = owned(module), type(module)
    known = cls in SPECS or is_composed(LAYER_KINDS, cls) or has_own_spec(LAYER_KINDS, cls)
    read = _form if known else None
    obstacle = REPLACED if is_replaced(module) else None
    form = read_layer(read, path, module, own, uses, obstacle=obstacle)
    check_owned(path, module, own, [attribute(name) for name in form.shapes])
    _check_values(path, own)
    return form


def attribute(name: str) -> str:
    """Return the name that a state's entry has in a module."""
    return ATTRIBUTES.get(name, name)


def owned(module: nn.Module) -> dict[str, Tensor]:
    """Return what the module itself has in its state dict, by name."""
    buffers = dict(module.named_buffers(recurse=False))
    counter = {UNSTORED} if isinstance(module, nn.modules.batchnorm._NormBase) else set()
    for name in module._non_persistent_buffers_set | counter:
        buffers.pop(name, None)
    return {**dict(module.named_parameters(recurse=False)), **buffers}


def paddings(model: nn.Module) -> dict[int, set[Extra]]:
    """Return the zero padding that comes directly before a module, by its id, for each of its uses.

    That of a `Sequential` is seen; what a model's own forward pads is not.
    """
    found: dict[int, set[Extra]] = {}

    def visit(module: nn.Module, before: Extra) -> Extra:
        found.setdefault(id(module), set()).add(before)
        # A script's class raises where it is asked for its forward.
        sequential = getattr(type(module), "forward", None) is nn.Sequential.forward
        for child in module._modules.values():  # also one that comes again
            if child is not None:
                after = visit(child, before if sequential else ())
                before = after if sequential else before
        return before if sequential else _zeros(module, before)

    visit(model, ())
    return found


def _zeros(module: Any, before: Extra) -> Extra:
    """Return the zeros that this module gives the next one, whose own input has those `before`."""
    if type(module) in _KEEP_ZEROS:
        return before
    constant = type(module) in _CONSTANT_PADS and module.value == 0
    if not (constant or type(module) in _ZERO_PADS):
        return ()
    own = tuple(zip(module.padding[::2], module.padding[1::2], strict=True))[::-1]
    return cast(Extra, padded(own, [before]))  # of zeros on zeros: pairs, and no words


def _form(module: Any, uses: Uses) -> LayerForm:
    cls, composed = type(module), isinstance(module, ComposedConv)
    own = composed or has_own_spec(LAYER_KINDS, cls)
    return LayerForm(
        module.spec if own else SPECS[cls](module),
        module.kind.name if composed else False,
        bias=getattr(module, "bias", None) is not None,
        scale=getattr(module, "weight", None) is not None,
        geometry=_geometry(module, uses) if own or isinstance(module, _ConvNd) else None,
    )


def _geometry(module: Any, uses: Uses) -> Geometry:
    stride, dilation, size = module.stride, module.dilation, module.kernel_size
    if module.transposed:
        pads = [(p, p - o) for p, o in zip(module.padding, module.output_padding, strict=True)]
        return Geometry(stride, dilation, padded(pads, in_outputs(uses, stride)))
    own, mode = pads_of(size, stride, module.padding, dilation), module.padding_mode
    return Geometry(stride, dilation, padded(own, uses, mode), mode)


def _transposed(module: Any) -> TransposedConvSpec:
    sizes = module.in_channels, module.out_channels, module.kernel_size
    return TransposedConvSpec(*sizes, module.groups)


def _batch_norm(module: Any) -> BatchNormSpec:
    if not module.track_running_stats or module.running_mean is None:
        raise NoCounterpart("a batch norm without running statistics has no counterpart")
    if module.momentum is None:
        raise NoCounterpart(
            "momentum=None, the average of all batches, has no counterpart; set a momentum"
        )
    return BatchNormSpec(module.num_features, module.eps, module.momentum)


def _instance_norm(module: Any) -> GroupNormSpec:
    if module.running_mean is not None:
        raise NoCounterpart("an instance norm with running statistics has no counterpart")
    return GroupNormSpec(module.num_features, module.num_features, module.eps)


def _layer_norm(module: Any) -> LayerNormSpec:
    if len(module.normalized_shape) != 1:
        raise NoCounterpart("a layer norm over several axes has no counterpart")
    return LayerNormSpec(module.normalized_shape[0], module.eps)


def _embedding(module: Any) -> EmbeddingSpec:
    if module.max_norm is not None:
        raise NoCounterpart("max_norm, which rescales the rows, has no counterpart")
    return EmbeddingSpec(module.num_embeddings, module.embedding_dim)


SPECS: dict[type[nn.Module], Callable[[Any], Any]] = {
    **dict.fromkeys(ORDINARY, spec_of),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    **dict.fromkeys(BATCHNORMS, _batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm),
    nn.GroupNorm: lambda norm: GroupNormSpec(norm.num_channels, norm.num_groups, norm.eps),
    nn.LayerNorm: _layer_norm,
    nn.Linear: lambda linear: LinearSpec(linear.in_features, linear.out_features),
    nn.PReLU: lambda prelu: PReLUSpec(prelu.num_parameters),
    nn.Embedding: _embedding,
}


def _check_values(path: str, own: dict[str, Tensor]) -> None:
    for name, parameter in own.items():
        if parameter.is_meta:
            raise ValueError(
                f"{entry(path, name)!r} is on the meta device; use model.to_empty(device=…)."
            )
        if parameter.dtype not in (*DTYPES, torch.int64):  # which counts
            raise TypeError(
                f"{entry(path, name)!r} is {parameter.dtype}; expected one of "
                f"{', '.join(map(str, DTYPES))}."
            )
