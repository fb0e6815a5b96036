"""Kernel composition in PyTorch: the kernel of W and D, and the W that a kernel becomes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from doconv_core.maths.spec import ConvSpec
from doconv_torch import matrix_products
from doconv_torch.sizes import checked, computed_in

_HALVES = (torch.float16, torch.bfloat16)


def compose(weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> Tensor:
    """Return `W·(E + D)ᵀ`: the product with D, added to W as it is.

    weight: W, `(O, I/g, S)`, in the kernel's shape where `S == M`. depthwise: D, `(I, M, S)`.
    O and I may be others than `spec` says, as after pruning.
    Returns `(O, I/g, *kernel_size)`, with W's memory format, in W's dtype, under autocast too.
    Types of half precision are composed in float32, a W and a D of two dtypes in the one that
    PyTorch promotes to, and the kernel rounded once. Raises ValueError and TypeError as `checked`.
    """
    spec, form = _chosen(weight, depthwise, spec)
    with without_autocast(weight.device):
        if form is None:
            return plain(weight, depthwise, spec)
        recorded = torch.is_grad_enabled() and (weight.requires_grad or depthwise.requires_grad)
        if recorded or is_transformed():
            arguments = weight, depthwise, spec, form
            kernel: Tensor = _Composition.apply(*arguments)  # type: ignore[no-untyped-call]
            return kernel
        return form.kernel(weight, depthwise)


def _chosen(
    weight: Tensor, depthwise: Tensor, spec: ConvSpec
) -> tuple[ConvSpec, matrix_products.Form | None]:
    """Return the sizes of W and D, as `checked` does, and the form to take, or None."""
    form = matrix_products.form(weight, depthwise, spec)
    if form is not None:
        return spec, form
    present = checked(weight, depthwise, spec)
    return present, None if present is spec else matrix_products.form(weight, depthwise, present)


def is_transformed() -> bool:
    """Return whether a transform of `torch.func`, or forward mode, may see the operations."""
    # There is no public way to ask for these; autograd.Function itself asks for the first.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def gradients(
    weight: Tensor, depthwise: Tensor, spec: ConvSpec, gradient: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of W and D, from that of the kernel; None for what is not needed.

    They are differentiable where autograd records, for a second derivative.
    """
    spec, form = _chosen(weight, depthwise, spec)
    with without_autocast(weight.device):
        if form is None or torch.is_grad_enabled() or type(gradient) is not Tensor:
            return _gradients(weight, depthwise, spec, gradient, needed)
        return form.gradients(gradient, weight, depthwise, needed)


class _Composition(torch.autograd.Function):
    """A fast form of the composition, with its derivatives.

    Second derivatives, `torch.func.vmap` and forward mode are those of the plain formula.
    """

    @staticmethod
    def forward(
        weight: Tensor, depthwise: Tensor, spec: ConvSpec, form: matrix_products.Form
    ) -> Tensor:
        return form.kernel(weight, depthwise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, depthwise, ctx.spec, _ = inputs
        ctx.save_for_backward(weight, depthwise)
        ctx.save_for_forward(weight, depthwise)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, depthwise = ctx.saved_tensors
        found = gradients(weight, depthwise, ctx.spec, gradient, ctx.needs_input_grad[:2])
        return *found, None, None

    @staticmethod
    def jvp(ctx: Any, weight_tangent: Any, depthwise_tangent: Any, *_: Any) -> Tensor:
        weight, depthwise = ctx.saved_tensors
        tangent = torch.zeros_like(weight)
        if weight_tangent is not None:
            tangent = tangent + plain(weight_tangent, depthwise, ctx.spec)
        if depthwise_tangent is not None:
            product = _product(weight, depthwise_tangent, ctx.spec)
            tangent = tangent + product.reshape(weight.shape)
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        weight, depthwise, spec, _ = inputs
        each = torch.vmap(lambda w, d: plain(w, d, spec), in_dims[:2])
        return each(weight, depthwise), 0


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a block in which operations on the device keep their dtypes."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def plain(weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> Tensor:
    """Return what `compose` does, in PyTorch's differentiable operations alone."""
    if weight.dtype in _HALVES or depthwise.dtype != weight.dtype:
        wide = computed_in(weight.dtype, depthwise.dtype)
        return plain(weight.to(wide), depthwise.to(wide), spec).to(weight.dtype)
    taps, multiplier = spec.taps, spec.depth_multiplier
    product = _product(weight, depthwise, spec)
    if multiplier != taps:
        w = weight.unflatten(0, _split(spec)[:2])
        tiles = multiplier // taps
        w = w[..., : tiles * taps].unflatten(-1, (tiles, *spec.kernel_size)).sum(-spec.rank - 1)
        kernel = (w + product).reshape(spec.kernel_shape)
        return _channels_last(kernel, spec) if weight.stride(1) == 1 else kernel.contiguous()
    if spec.groups == 1:
        return _with_strides_of(weight, weight + product.squeeze(0), spec)
    w = weight.unflatten(0, _split(spec)[:2])
    return _with_strides_of(weight, (w + product).flatten(0, 1), spec)


def _product(weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> Tensor:
    """Return `W·Dᵀ`, `(g, O/g, I/g, *kernel_size)`."""
    product = torch.bmm(as_matrices(weight, spec), depthwise.transpose(1, 2))
    kernels: Tensor = from_matrices(product, spec).unflatten(-1, spec.kernel_size)
    return kernels


def _gradients(
    weight: Tensor, depthwise: Tensor, spec: ConvSpec, gradient: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    if gradient.dtype in _HALVES or depthwise.dtype != weight.dtype:
        wide = computed_in(weight.dtype, depthwise.dtype)
        arrays = (weight.to(wide), depthwise.to(wide), spec, gradient.to(wide))
        by_weight, by_depthwise = _gradients(*arrays, needed)
        return (
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_depthwise is None else by_depthwise.to(depthwise.dtype),
        )
    by_weight = by_depthwise = None
    matrices = as_matrices(gradient, spec)  # (I, O/g, M)
    if needed[1]:
        by_depthwise = torch.bmm(as_matrices(weight, spec).transpose(1, 2), matrices)
        by_depthwise = by_depthwise.transpose(1, 2)
    if needed[0]:
        by_weight = from_matrices(torch.bmm(matrices, depthwise), spec).reshape(spec.weight_shape)
        # E is the unit matrix, tiled: every whole tile of W has the kernel's gradient.
        tiles = spec.depth_multiplier // spec.taps
        tiled = gradient.flatten(2).repeat(1, 1, tiles)
        tiled = nn.functional.pad(tiled, (0, spec.depth_multiplier - tiles * spec.taps))
        by_weight = (tiled + by_weight).reshape(weight.shape)
    return by_weight, by_depthwise


def as_matrices(weight: Tensor, spec: ConvSpec) -> Tensor:
    """Return `(O, I/g, …)` as one `(O/g, …)` matrix for each of the I input channels."""
    split = weight.reshape(*_split(spec), -1)  # (g, o, i, …) -> (g, i, o, …)
    return split.transpose(1, 2).reshape(spec.in_channels, spec.out_channels_per_group, -1)


def from_matrices(matrices: Tensor, spec: ConvSpec) -> Tensor:
    """Return what `as_matrices` was given, as `(g, O/g, I/g, …)`."""
    g, o, i = _split(spec)
    return matrices.reshape(g, i, o, -1).transpose(1, 2)


def _split(spec: ConvSpec) -> tuple[int, int, int]:
    return spec.groups, spec.out_channels_per_group, spec.in_channels_per_group


def _with_strides_of(weight: Tensor, kernel: Tensor, spec: ConvSpec) -> Tensor:
    """Return the kernel with W's strides, where it is one input channel deep.

    Channels first and channels last are the same memory there, and the strides alone say which is
    meant: by them PyTorch chooses the convolution's algorithm and its output's format.
    """
    if spec.in_channels_per_group > 1 or kernel.stride() == weight.stride():
        return kernel
    return _channels_last(kernel, spec)


def _channels_last(array: Tensor, spec: ConvSpec) -> Tensor:
    """Return `(O, I/g, …)` with the input channels last in memory."""
    if spec.in_channels_per_group == 1:
        return array.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return array.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def as_weight(kernel: Tensor, spec: ConvSpec) -> Tensor:
    """Return the W that a kernel becomes, in the shape in which a layer keeps it.

    Where that is `(O, I/g, S)`, the input channels are last in memory if they were in the kernel.
    """
    if kernel.shape == spec.parameter_shape:
        return kernel
    weight = nn.functional.pad(kernel.flatten(2), (0, spec.depth_multiplier - spec.taps))
    return _channels_last(weight, spec) if kernel.stride(1) == 1 else weight
