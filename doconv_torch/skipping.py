"""Dynamic group convolutions that multiply only what they keep: PyTorch's operations, and compiled.

The kernel is `(O, C, *kernel_size)`, but lies in memory channel by channel, so that what belongs to
a kept one and a head is copied in one piece; where there is compiled code, in one for each tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as f

from doconv_core.kinds.dgc import filled_up
from doconv_torch.matrix_products import is_tracing

try:
    from doconv_torch import _skipping
except ImportError:  # installed without a compiler
    _skipping = None  # type: ignore[assignment]

_BY_TAPS, _BY_CHANNELS = (1, 2, 3, 0), (1, 0, 2, 3)  # the kernel's axes, as they lie in memory


def rearranged(weight: Tensor) -> Tensor:
    """Return a kernel that lies in memory as it is gathered: for compiled code, where there is."""
    if _skipping is None:
        return weight.permute(_BY_CHANNELS).contiguous().permute(_BY_CHANNELS)
    return weight.permute(_BY_TAPS).contiguous().permute(3, 0, 1, 2)


def skipping(heads: Any, z: Tensor, inactive: int) -> Tensor:
    """Return what the heads make of `z` `(B, C, H, W)`, of the channels that they keep.

    heads: a `DynamicHeads2d`. inactive: its `n`. Differentiable, for any batch.
    """
    spec, size, stride, padding = heads.spec, heads.kernel_size, heads.stride, heads.padding
    batch, groups, fixed = z.shape[0], z.shape[0] * spec.heads, is_fixed()
    out = _output(z.shape, size, stride, padding, heads.dilation)
    is_one_tap = spec.conv.taps == 1 and not any(padding)
    in_groups = not (is_one_tap or fixed)  # a number of groups is not exported
    kept = spec.in_channels - inactive
    gate, index = _kept(heads.saliency(z), kept, filled_up(kept) if in_groups else max(kept, 1))
    width, gate = index.shape[-1], gate.to(z.dtype).view(groups, -1, 1)
    kernels = _kernels(heads, index)
    if is_one_tap and stride != (1, 1):
        z = z[..., :: stride[0], :: stride[1]]
    if fixed or batch > 1:
        images = torch.arange(0, batch * spec.in_channels, spec.in_channels, device=z.device)
        index = index + images[:, None, None]
    x = z.flatten(0, 1).index_select(0, index.flatten())  # (B·h·K, H, W)
    if is_one_tap:
        kernels = kernels.view(groups, width, -1) * gate
        y = torch.bmm(kernels.transpose(1, 2), x.view(groups, width, -1))
    else:
        x = x * gate.flatten()[:, None, None]
        kernels = kernels.unflatten(0, (groups, width)).permute(0, 3, 1, 2, 4)  # (…, O/h, K, M)
        if in_groups:
            kernels = kernels.reshape(-1, width, *size)
            y = f.conv2d(x[None], kernels, None, stride, padding, heads.dilation, groups)
        else:
            x = x.unflatten(0, (-1, width))
            columns = f.unfold(x, size, heads.dilation, padding, stride)
            y = torch.bmm(kernels.flatten(2), columns)
    by_head = y.view(batch, spec.heads, -1, *out)
    return by_head.transpose(1, 2).reshape(batch, spec.out_channels, *out)


def _kept(saliency: Tensor, kept: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the saliencies and numbers of the kept channels, and zeros up to a width."""
    channels = saliency.shape[-1]
    ordered, index = saliency.topk(min(max(width, kept + 1), channels))
    gate = ordered[..., :width]
    if kept < channels:
        gate = gate * (gate > ordered[..., kept : kept + 1])
    return gate, index[..., :width]


def _kernels(heads: Any, index: Tensor) -> Tensor:
    """Return the kernels of channels `(B, h, K)`, `(B·h·K, 1, O/h, M)` or `(B·h·K, M, O/h, 1)`."""
    count, taps = heads.spec.heads, heads.spec.conv.taps
    by_taps = taps > 1 and heads.weight.stride(0) == 1
    pieces, order = (taps, _BY_TAPS) if by_taps else (1, _BY_CHANNELS)
    of_heads = torch.arange(count, device=index.device)[:, None]
    if by_taps:
        steps = torch.arange(taps, device=index.device)
        index, of_heads = torch.add(steps, index[..., None], alpha=taps), of_heads[..., None]
    rows = torch.add(of_heads, index, alpha=count).flatten()
    weight = heads.weight.permute(order).reshape(heads.spec.in_channels * pieces * count, -1)
    sizes = -1, pieces, heads.spec.out_channels // count, taps // pieces
    kernels: Tensor = weight.index_select(0, rows).view(sizes)
    return kernels


def normed(norm: Any, relu: Any, x: Tensor) -> Tensor:
    """Return the normed input after the ReLU, in one piece of memory where nothing else sees it."""
    z: Tensor = norm(x)
    own = type(norm) is nn.BatchNorm2d and type(relu) is nn.ReLU and not _are_watched(norm, relu)
    return torch.relu_(z) if own else relu(z)


def is_fixed() -> bool:
    """Return whether what is computed is recorded, for inputs of other values."""
    return torch.compiler.is_compiling() or is_tracing()


class _Known(NamedTuple):
    """Arrays that have been looked at, kept so that no other is taken for one; where they lie."""

    arrays: list[Tensor | None]
    addresses: list[int]
    strides: tuple[int, ...]  # of the kernel


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def is_for(heads: Any, z: Tensor) -> bool:
    """Return whether `skipping` may do what the heads would: not for a batch without numbers."""
    mapped = torch._C._are_functorch_transforms_active()
    there = type(z) is Tensor and not z.is_meta and not mapped and len(z) > 0
    return there and not _are_watched(heads)


def _are_watched(*parts: Any) -> bool:
    """Return whether hooks are to be called with what goes through a part."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def compiled(norm: Any, relu: Any, heads: Any, x: Tensor) -> Tensor | None:
    """Return a layer's output by compiled code, which has no gradient; None where it is not for it.

    It is for float32 on the CPU, and not where operations are recorded, or hooks see the parts.
    """
    if (
        _skipping is None
        or type(x) is not Tensor  # symbolic tracing gives proxies
        or type(norm) not in (nn.BatchNorm2d, nn.Identity)  # which a fused one becomes
        or type(relu) is not nn.ReLU
        or norm.training
        or is_fixed()
        # There is no public way to ask whether operations are counted, faked or traced.
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
        or _are_watched(norm, relu, heads)
        or getattr(norm, "running_var", norm) is None  # that of the batch
    ):
        return None
    given, own = _of_norm(norm), heads._parameters
    given += [own.get(name) for name in _ARRAYS]
    if not _is_plain(x) or not _are_plain(heads, given):
        return None
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (x, *given)):
        return None
    spec, shape = heads.spec, x.shape
    sizes = heads.kernel_size, heads.stride, heads.padding, heads.dilation
    if len(shape) != 4 or shape[1] != spec.in_channels or not shape[0]:
        return None
    out = _output(shape, *sizes)
    if min(out) < 1:
        return None  # PyTorch says what is wrong
    x = x.contiguous()
    y = x.new_empty((shape[0], spec.out_channels, *out))
    of_heads = spec.out_channels // spec.heads, spec.heads, spec.squeezed, int(heads.inactive)
    addresses = x.data_ptr(), *_known[heads].addresses, y.data_ptr()
    _skipping.skip(
        addresses, getattr(norm, "eps", 0.0), shape, of_heads, *sizes, torch.get_num_threads()
    )
    return y


def _of_norm(norm: Any) -> list[Tensor | None]:
    """Return a batch norm's arrays; four times None where another layer has done its work."""
    if type(norm) is nn.Identity:
        return [None] * 4
    of_norm, buffers = norm._parameters, norm._buffers
    return [of_norm["weight"], of_norm["bias"], buffers["running_mean"], buffers["running_var"]]


_ARRAYS = "weight", "squeeze_weight", "saliency_weight", "saliency_bias"


def _are_plain(heads: Any, given: list[Tensor | None]) -> bool:
    """Return whether compiled code may take a layer's arrays, which are looked at once."""
    addresses = [0 if each is None else each.data_ptr() for each in given]
    known, kernel = _known.get(heads), given[4]
    if (
        known is not None
        and all(map(is_, known.arrays, given))
        and known.addresses == addresses
        # Of the same memory, given back and taken again in another type or order.
        and {torch.float32}.issuperset(each.dtype for each in given if each is not None)
        and known.strides == kernel.stride()  # type: ignore[union-attr]
    ):
        return True
    spec = heads.spec
    channels, *of_heads = (spec.in_channels,), *(spec.shapes[name] for name in _ARRAYS[1:])
    shapes = [*[channels] * 4, (*spec.kernel_shape[1:], spec.out_channels), *of_heads]
    if any(each is None for each in given[4:]):
        return False
    arrays = [*given[:4], kernel.permute(_BY_TAPS), *given[5:]]  # type: ignore[union-attr]
    for each, shape in zip(arrays, shapes, strict=True):
        if each is not None and not (_is_plain(each) and _lies_there(each, shape)):
            return False
    _known[heads] = _Known(given, addresses, kernel.stride())  # type: ignore[union-attr]
    return True


def _lies_there(array: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether an array of this shape lies in memory in a row."""
    there = array.untyped_storage().nbytes() // 4 - array.storage_offset()
    return array.shape == shape and array.is_contiguous() and there >= array.numel()


def _is_plain(array: Tensor) -> bool:
    """Return whether it is an array of float32 in the processor's memory."""
    plain = array.dtype == torch.float32 and array.device.type == "cpu"
    return plain and type(array) in (Tensor, nn.Parameter) and not array.is_neg()


def _output(shape: Sequence[int], *geometry: Sequence[int]) -> list[int]:
    """Return the height and width of the output. geometry: size, stride, padding, dilation."""
    numbers = zip(shape[2:], *geometry, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in numbers]
