"""What a PyTorch module is in a canonical state: one function for each kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from doconv_core.maths.geometry import Extra, Geometry, Pad, padded, same, symmetric
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
from doconv_core.state.match import check_owned, unsupported_layer
from doconv_torch.composed import ComposedLayers
from doconv_torch.kinds import LAYER_KINDS
from doconv_torch.ordinary import DTYPES, is_replaced, spec_of

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
    own, read = owned(module), _reader(type(module))
    if read is None:
        raise unsupported_layer(path, module, own)
    if is_replaced(module):
        raise unsupported_layer(path, module, own, REPLACED)
    try:
        form = read(module, uses)
    except _NoCounterpart as error:
        raise unsupported_layer(path, module, own, str(error)) from None
    check_owned(path, module, own, [attribute(name) for name in form.shapes])
    _check_values(path, own)
    return form


def _reader(cls: type[nn.Module]) -> Callable[[Any, Uses], LayerForm] | None:
    """Return what makes the form of modules of this very class; None where they have none."""
    kinds = (kind for kind in LAYER_KINDS.values() if isinstance(kind, ComposedLayers))
    return _composed if any(cls in kind.types.values() for kind in kinds) else FORMS.get(cls)


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
        sequential = type(module).forward is nn.Sequential.forward
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


class _NoCounterpart(Exception):
    """Why a layer of a known type has no counterpart."""


def _geometry(module: Any, uses: Uses) -> Geometry:
    stride, dilation, size = module.stride, module.dilation, module.kernel_size
    if module.padding == "same":
        pads = same(size, stride, dilation)
    else:
        pads = symmetric([0] * len(size) if module.padding == "valid" else module.padding)
    pads = padded(pads, uses, module.padding_mode)
    return Geometry(stride, dilation, pads, module.padding_mode)


def _conv(module: Any, uses: Uses) -> LayerForm:
    return LayerForm(spec_of(module), bias=_has_bias(module), geometry=_geometry(module, uses))


def _composed(module: Any, uses: Uses) -> LayerForm:
    geometry = _geometry(module, uses)
    return LayerForm(module.spec, module.kind.name, _has_bias(module), geometry=geometry)


def _transposed(module: Any, uses: Uses) -> LayerForm:
    spec = TransposedConvSpec(
        module.in_channels, module.out_channels, module.kernel_size, module.groups
    )
    pads: Sequence[Pad] = tuple(
        (p, p - o) for p, o in zip(module.padding, module.output_padding, strict=True)
    )
    # A zero before the input is as many positions of output as the stride.
    pads = padded(
        pads,
        {
            tuple((-b * s, -a * s) for (b, a), s in zip(use, module.stride, strict=bool(use)))
            for use in uses
        },
    )
    geometry = Geometry(module.stride, module.dilation, pads)
    return LayerForm(spec, bias=_has_bias(module), geometry=geometry)


def _linear(module: Any, uses: Uses) -> LayerForm:
    spec = LinearSpec(module.in_features, module.out_features)
    return LayerForm(spec, bias=_has_bias(module))


def _batch_norm(module: Any, uses: Uses) -> LayerForm:
    if not module.track_running_stats or module.running_mean is None:
        raise _NoCounterpart("a batch norm without running statistics has no counterpart")
    if module.momentum is None:
        raise _NoCounterpart(
            "momentum=None, the average of all batches, has no counterpart; set a momentum"
        )
    spec = BatchNormSpec(module.num_features, module.eps, module.momentum)
    return LayerForm(spec, bias=_has_bias(module), scale=module.weight is not None)


def _instance_norm(module: Any, uses: Uses) -> LayerForm:
    if module.running_mean is not None:
        raise _NoCounterpart("an instance norm with running statistics has no counterpart")
    spec = GroupNormSpec(module.num_features, module.num_features, module.eps)
    return LayerForm(spec, bias=_has_bias(module), scale=module.weight is not None)


def _group_norm(module: Any, uses: Uses) -> LayerForm:
    spec = GroupNormSpec(module.num_channels, module.num_groups, module.eps)
    return LayerForm(spec, bias=_has_bias(module), scale=module.weight is not None)


def _layer_norm(module: Any, uses: Uses) -> LayerForm:
    if len(module.normalized_shape) != 1:
        raise _NoCounterpart("a layer norm over several axes has no counterpart")
    spec = LayerNormSpec(module.normalized_shape[0], module.eps)
    return LayerForm(spec, bias=_has_bias(module), scale=module.weight is not None)


def _prelu(module: Any, uses: Uses) -> LayerForm:
    return LayerForm(PReLUSpec(module.num_parameters))


def _embedding(module: Any, uses: Uses) -> LayerForm:
    if module.max_norm is not None:
        raise _NoCounterpart("max_norm, which rescales the rows, has no counterpart")
    return LayerForm(EmbeddingSpec(module.num_embeddings, module.embedding_dim))


def _has_bias(module: Any) -> bool:
    return module.bias is not None


FORMS: dict[type[nn.Module], Callable[[Any, Uses], LayerForm]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _batch_norm
    ),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Linear: _linear,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
}


def _check_values(path: str, own: dict[str, Tensor]) -> None:
    for name, parameter in own.items():
        if parameter.is_meta:
            raise ValueError(
                f"{entry(path, name)!r} is on the meta device; use model.to_empty(device=…)."
            )
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"{entry(path, name)!r} is {parameter.dtype}; expected one of "
                f"{', '.join(map(str, DTYPES))}."
            )
