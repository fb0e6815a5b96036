"""A convolution with a composed kernel that takes no more memory than it must.

Autograd would keep every layer's kernel beside its W until the backward pass, as much memory again
as the weights take. Where composing it once more is cheap beside the convolution, that is done
instead. The kernel's gradient becomes that of W in its place. Values and gradients are the same,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from doconv_torch import matrix_products
from doconv_torch.compose import compose, gradients, is_transformed

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    1: nn.functional.conv1d,
    2: nn.functional.conv2d,
    3: nn.functional.conv3d,
}
# Composing costs as many operations as the convolution at `taps` positions of its output, of which
# there are three passes: at this many times as many positions, half a hundredth of them.
POSITIONS = 64


def form_for(layer: Any, x: Tensor) -> matrix_products.Compiled | None:
    """Return the form for `convolve`, where it does what the layer does in less memory; or None.

    layer: a DO layer that has a D, with a `forward` of its own. Where x is not what the layer takes
    there is none, and the ordinary convolution raises its error.
    """
    if not torch.is_grad_enabled():
        return None
    weight, depthwise = layer.weight, layer.depthwise_weight
    # First, so that what records operations does not come upon the rest.
    form = matrix_products.form(weight, depthwise, layer.spec)
    if not isinstance(form, matrix_products.Compiled):
        return None
    taken = (
        (weight.requires_grad or depthwise.requires_grad)
        and type(x) is Tensor
        and x.dim() == weight.dim()
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.shape[1] > 0
        and layer.padding_mode == "zeros"
        and layer.groups == layer.spec.groups
        # The ordinary convolution also takes a number, or "same" of padding.
        and all(type(each) in (tuple, list) for each in _geometry(layer))
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
    )
    return form if taken else None


def convolve(layer: Any, x: Tensor, form: matrix_products.Compiled) -> Tensor:
    """Return the convolution of `x` with the layer's composed kernel, in the form that applies."""
    parameters = layer.weight, layer.depthwise_weight, layer.bias
    arguments = x, *parameters, form, *_geometry(layer)
    output: Tensor = _Convolution.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def _geometry(layer: Any) -> tuple[Any, Any, Any]:
    return layer.stride, layer.padding, layer.dilation


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        depthwise: Tensor,
        bias: Tensor | None,
        form: matrix_products.Compiled,
        *geometry: Sequence[int],
    ) -> Tensor:
        spec, kernel = form.spec, form.kernel(weight, depthwise)
        positions = x.numel() // (x.shape[1] * prod(geometry[0]))
        kept = () if positions >= POSITIONS * spec.taps else (kernel,)
        ctx.save_for_backward(x, weight, depthwise, *kept)
        ctx.form, ctx.geometry = form, geometry
        return _CONVOLUTIONS[spec.rank](x, kernel, bias, *geometry, spec.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, depthwise, *kept = ctx.saved_tensors
        form, spec, needed = ctx.form, ctx.form.spec, ctx.needs_input_grad
        # Recorded for a second derivative, or by a compiler: then the kernel must come of W and D.
        recorded = torch.is_grad_enabled() or type(gradient) is not Tensor
        if recorded:
            kernel = compose(weight, depthwise, spec)
        else:
            kernel = kept.pop() if kept else form.kernel(weight, depthwise)
        by_x, by_kernel, by_bias = torch.ops.aten.convolution_backward(
            gradient, x, kernel, [spec.out_channels], *ctx.geometry, False, [0] * spec.rank,
            spec.groups, [needed[0], needed[1] or needed[2], needed[3]],
        )  # fmt: skip
        del kernel, kept  # before the gradients of W and D need memory
        by_weight = by_depthwise = None
        if by_kernel is not None and recorded:
            by_weight, by_depthwise = gradients(weight, depthwise, spec, by_kernel, needed[1:3])
        elif by_kernel is not None:
            by_weight, by_depthwise = form.gradients(
                by_kernel, weight, depthwise, needed[1:3], owned=True
            )
        return by_x, by_weight, by_depthwise, by_bias, None, None, None, None
