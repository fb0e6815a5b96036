"""A convolution with a composed kernel that takes no more memory than it must.

Autograd would keep every layer's kernel beside its W until the backward pass, as much memory again
as the weights take. Where composing it once more is cheap beside the convolution, that is done
instead. What a composition computes on its way is never kept. The kernel's gradient becomes that of
W in its place. Values are the same, bit for bit; of W and D gradients too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from doconv_core.maths.spec import ConvSpec
from doconv_torch import matrix_products
from doconv_torch.compose import compose, gradients, is_transformed

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    1: nn.functional.conv1d,
    2: nn.functional.conv2d,
    3: nn.functional.conv3d,
}
# Composing costs as many operations as the convolution at a number of positions of its output, of
# which there are three passes: at this many times as many positions, half a hundredth of them.
POSITIONS = 64


class Form(Protocol):
    """How a kernel is composed of a layer's entries, and its gradient becomes theirs."""

    @property
    def conv(self) -> ConvSpec:
        """The sizes of the kernel."""

    @property
    def cost(self) -> float:
        """What composing it costs, in positions of the output of a convolution with it."""

    def kernel(self, *entries: Tensor) -> Tensor:
        """Return the kernel where nothing is recorded."""

    def recorded(self, *entries: Tensor) -> Tensor:
        """Return the kernel by operations that are differentiable."""

    def gradients(
        self, by_kernel: Tensor, entries: Sequence[Tensor], needed: Sequence[bool], recorded: bool
    ) -> Sequence[Tensor | None]:
        """Return the entries' gradients from the kernel's; None for what is not needed.

        recorded: whether by operations that are differentiable. Else the memory of the kernel's
        gradient may be taken.
        """


class DepthwiseForm(NamedTuple):
    """That of W and D."""

    compiled: matrix_products.Compiled

    @property
    def conv(self) -> ConvSpec:
        """The sizes of the kernel."""
        return self.compiled.spec

    @property
    def cost(self) -> float:
        """As many positions as the kernel has taps."""
        return self.conv.taps

    def kernel(self, *entries: Tensor) -> Tensor:
        """Return the kernel where nothing is recorded."""
        return self.compiled.kernel(*entries)

    def recorded(self, *entries: Tensor) -> Tensor:
        """Return the kernel by operations that are differentiable."""
        weight, depthwise = entries
        return compose(weight, depthwise, self.conv)

    def gradients(
        self, by_kernel: Tensor, entries: Sequence[Tensor], needed: Sequence[bool], recorded: bool
    ) -> Sequence[Tensor | None]:
        """Return W's and D's gradients from the kernel's; None for what is not needed."""
        weight, depthwise = entries
        if recorded:
            return gradients(weight, depthwise, self.conv, by_kernel, needed)
        return self.compiled.gradients(by_kernel, weight, depthwise, needed, owned=True)


def depthwise_form(layer: Any, x: Tensor) -> DepthwiseForm | None:
    """Return the form for `convolve`, where it does what a DO layer does in less memory; or None.

    layer: one that has a D.
    """
    if not torch.is_grad_enabled():
        return None
    # First, so that what records operations does not come upon the rest.
    form = matrix_products.form(layer.weight, layer.depthwise_weight, layer.spec)
    if not isinstance(form, matrix_products.Compiled) or not may_convolve(layer, x):
        return None
    return DepthwiseForm(form)


def may_convolve(layer: Any, x: Tensor) -> bool:
    """Return whether `convolve` does what a layer with a `forward` of its own does.

    Where x is not what the layer takes it does not, and the ordinary convolution raises its error.
    """
    entries, weight = layer.entries(), layer.weight
    return (
        type(x) is Tensor  # before all else: symbolic tracing gives proxies
        and any(entry.requires_grad for entry in entries.values())
        and x.dim() == layer.rank + 2
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.shape[1] > 0
        and layer.padding_mode == "zeros"
        and layer.groups == layer.spec.groups
        # The ordinary convolution also takes a number, or "same" of padding.
        and all(type(each) in (tuple, list) for each in _geometry(layer))
        and not torch.is_autocast_enabled(x.device.type)
        and not is_transformed()
    )


def is_cheap(form: Form, x: Tensor, stride: Sequence[int]) -> bool:
    """Return whether composing the kernel once more is nothing beside the convolution."""
    return x.numel() >= POSITIONS * form.cost * x.shape[1] * prod(stride)


def convolve(layer: Any, x: Tensor, form: Form) -> Tensor:
    """Return the convolution of `x` with the layer's composed kernel, in the form that applies."""
    arguments = x, layer.bias, form, _geometry(layer), *layer.entries().values()
    output: Tensor = _Convolution.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def _geometry(layer: Any) -> tuple[Any, Any, Any]:
    return layer.stride, layer.padding, layer.dilation


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, form: Form, geometry: Any, *entries: Tensor
    ) -> Tensor:
        conv, kernel = form.conv, form.kernel(*entries)
        kept = () if is_cheap(form, x, geometry[0]) else (kernel,)
        ctx.save_for_backward(x, *entries, *kept)
        ctx.form, ctx.geometry, ctx.entries = form, geometry, len(entries)
        return _CONVOLUTIONS[conv.rank](x, kernel, bias, *geometry, conv.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *entries = ctx.saved_tensors
        entries, kept = entries[: ctx.entries], entries[ctx.entries :]
        form, conv = ctx.form, ctx.form.conv
        by_x, by_bias, _, _, *needed = ctx.needs_input_grad
        # Recorded for a second derivative, or by a compiler: then the kernel must come of W and D.
        recorded = torch.is_grad_enabled() or type(gradient) is not Tensor
        if recorded:
            kernel = form.recorded(*entries)
        else:
            kernel = kept.pop() if kept else form.kernel(*entries)
        of_x, by_kernel, of_bias = torch.ops.aten.convolution_backward(
            gradient, x, kernel, [conv.out_channels], *ctx.geometry, False, [0] * conv.rank,
            conv.groups, [by_x, any(needed), by_bias],
        )  # fmt: skip
        del kernel, kept  # before the entries' gradients need memory
        found: Sequence[Tensor | None] = [None] * len(entries)
        if by_kernel is not None:
            found = form.gradients(by_kernel, entries, needed, recorded)
        return of_x, of_bias, None, None, *found
