"""Dynamic group convolutions in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as f

from doconv_core.kinds.dgc import LASSO, DGConvSpec, as_lasso, skipping_pays
from doconv_core.maths.spec import as_tuple
from doconv_core.models.dynamic import DynamicLayers, lassos
from doconv_core.models.parted import HOOKED
from doconv_core.models.received import no_model
from doconv_torch import skipping
from doconv_torch.compose import without_autocast
from doconv_torch.ordinary import HOOKS
from doconv_torch.surgery import ordinary_tensors


class DynamicHeads2d(nn.Module):
    """The heads of a `DGConv2d`, which takes the same arguments: they see its normalized input."""

    weight: Tensor
    squeeze_weight: Tensor
    saliency_weight: Tensor
    saliency_bias: Tensor
    inactive: Tensor
    transposed, padding_mode = False, "zeros"  # as of an ordinary convolution
    dropped: int | None = None  # of a layer that skips: so many, when it is recorded

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, *, device: Any = None, dtype: Any = None, **sizes: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel_size = as_tuple("kernel_size", kernel_size, 2)
        self.spec = spec = DGConvSpec(in_channels, out_channels, self.kernel_size, **sizes)
        self.stride = as_tuple("stride", stride, 2)
        self.padding = as_tuple("padding", padding, 2, least=0)
        self.dilation = as_tuple("dilation", dilation, 2)
        for name, shape in {**spec.shapes, "weight": spec.kernel_shape}.items():
            if name != "inactive":
                values = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name, nn.Parameter(values))
        self.register_buffer("inactive", torch.zeros((), dtype=torch.int64, device=device))
        self.lasso: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, as `nn.Conv2d` does and, for the selectors, the source."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        nn.init.normal_(self.squeeze_weight, std=(2 / self.spec.in_channels) ** 0.5)
        nn.init.normal_(self.saliency_weight, std=(2 / self.spec.squeezed) ** 0.5)
        nn.init.ones_(self.saliency_bias)
        self.inactive.zero_()

    def saliency(self, z: Tensor) -> Tensor:
        """Return how each head rates the channels of each image, `(B, h, C)`."""
        with without_autocast(z.device):
            pooled = z.mean((2, 3)).to(self.squeeze_weight.dtype)
            squeezed = torch.relu(f.linear(pooled, self.squeeze_weight.flatten(0, 1)))
            squeezed = squeezed.view(-1, *self.squeeze_weight.shape[:2]).transpose(0, 1)
            bias = self.saliency_bias[:, None]
            rated = torch.baddbmm(bias, squeezed, self.saliency_weight.transpose(1, 2))
            return torch.relu(rated).transpose(0, 1)

    def gate(self, saliency: Tensor) -> Tensor:
        """Return the saliencies, zero for the `inactive` least ones of each head and their equals.

        The number stays on its device: there is nothing to wait for.
        """
        ordered = saliency.detach().sort(-1).values
        at = (self.inactive - 1).clamp(min=0).expand(*saliency.shape[:-1], 1)
        least = ordered.gather(-1, at).masked_fill(self.inactive == 0, -1)
        return saliency * (saliency > least)

    def forward(self, z: Tensor) -> Tensor:
        """Return `(B, O, H', W')` of `z` `(B, C, H, W)`, and keep the saliencies' lasso.

        The saliencies go into a kernel for each image where that is less than a map for each head.
        """
        saliency = self.saliency(z)
        if self.training:
            self.lasso = saliency.mean((0, 2)).sum()
        gate = self.gate(saliency).to(z.dtype)
        heads, batch = self.spec.heads, z.shape[0]
        per_kernel = self.spec.out_channels * self.spec.conv.taps
        # A number of groups that is not known cannot be exported to ONNX.
        if isinstance(batch, int) and batch and per_kernel < heads * z.shape[2] * z.shape[3]:
            weight = self.weight.unflatten(0, (heads, -1)).transpose(0, 1)  # (O/h, h, C, k, k)
            kernels = weight * gate[:, None, :, :, None, None]
            y = self._convolve(z.reshape(1, -1, *z.shape[2:]), kernels.flatten(0, 2), batch)
            return cast(Tensor, y.unflatten(1, (batch, -1))[0])
        gated = z[:, None] * gate[..., None, None]
        y = self._convolve(gated.flatten(1, 2), self.weight, heads)
        return cast(Tensor, y.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1, 2))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy gets: no saliencies of a pass, which only its graph's owner has."""
        return {**self.__dict__, "lasso": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.note_dropped()

    def note_dropped(self) -> None:
        """Let what is compiled or exported drop as many channels as the layer, where it skips."""
        if self.dropped is not None:
            self.dropped = int(self.inactive)

    def _convolve(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        return f.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)


class DGConv2d(nn.Module):
    """A dynamic group convolution: a batch norm, ReLU, and heads that choose their channels.

    Takes the place of a norm, a ReLU and a convolution without bias. Each of the `heads` convolves
    the input channels that it finds more salient in an image, multiplied by their saliency, to its
    share of the output channels. `set_progress` says how many it keeps: all at the start, from
    three quarters of the training on `gate_factor` of them. The loss gets `saliency_lasso`.

    Takes `nn.Conv2d`'s sizes, integers or pairs, and by keyword heads, squeeze_rate and gate_factor
    of `DGConvSpec`, device and dtype. Input `(B, C, H, W)`, output `(B, O, H', W')`.
    Raises TypeError or ValueError for sizes that give no layer.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 3.

    >>> layer = DGConv2d(32, 64, 3, padding=1)
    >>> layer(torch.zeros(2, 32, 8, 8)).shape
    torch.Size([2, 64, 8, 8])
    """

    def __init__(self, in_channels: int, *args: Any, **options: Any) -> None:
        super().__init__()
        factory = {name: options[name] for name in ("device", "dtype") if name in options}
        self.norm = nn.BatchNorm2d(in_channels, **factory)
        self.relu = nn.ReLU()
        self.heads = DynamicHeads2d(in_channels, *args, **options)

    @classmethod
    def of(cls, parts: Mapping[str, nn.Module]) -> DGConv2d:
        """Return the layer of these parts: `norm`, `relu` and `heads`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name, part in parts.items():
            layer.add_module(name, part)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, O, H', W')` of `x` `(B, C, H, W)`."""
        return cast(Tensor, self.heads(self.relu(self.norm(x))))


class SkippingDGConv2d(DGConv2d):
    """A dynamic group convolution whose dropped channels cost nothing, as `fold` makes it.

    It has a `DGConv2d`'s parts and, up to rounding, output; in training it is one. What belongs to
    the kept channels is gathered for each image and head and multiplied: on the CPU in float32 by
    compiled code, where there is some and no gradient is asked for, as under
    `torch.inference_mode()`; else in PyTorch's operations, where
    `doconv_core.kinds.dgc.skipping_pays`. What is compiled or exported drops as many channels as
    when it was folded, or as in the state that `load_state` put into it.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 3.

    >>> layer = DGConv2d(64, 64, 3, padding=1).eval()
    >>> set_progress(layer, 1)
    >>> x = torch.randn(1, 64, 14, 14)
    >>> skips = fold(layer).model
    >>> torch.testing.assert_close(skips(x), layer(x), rtol=1e-4, atol=1e-5)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `(B, O, H', W')` of `x` `(B, C, H, W)`."""
        if self.training:
            return super().forward(x)
        found = skipping.compiled(self.norm, self.relu, self.heads, x)
        if found is not None:
            return found
        heads: Any = self.heads
        z = skipping.normed(self.norm, self.relu, x)
        fixed = skipping.is_fixed()
        if not fixed and not skipping.is_for(heads, z):
            return cast(Tensor, heads(z))
        dropped = heads.dropped if fixed else int(heads.inactive)
        positions = prod(z.shape[2:]) // prod(heads.stride)
        if fixed or skipping_pays(heads.spec, dropped, z.shape[0], positions):
            return skipping.skipping(heads, z, dropped)
        return cast(Tensor, heads(z))


class DGConvs(DynamicLayers):
    """The dynamic group convolutions of PyTorch."""

    follows = True

    def changed(self, layer: Any) -> str | None:
        """Return which part has hooks, or has been exchanged."""
        parts = layer._modules
        if list(parts) != ["norm", "relu", "heads"] or type(parts["heads"]) is not DynamicHeads2d:
            return f"its parts are {', '.join(f'{n} {type(p).__name__}' for n, p in parts.items())}"
        watched = any(getattr(part, hooks) for part in parts.values() for hooks in HOOKS)
        return HOOKED if watched else None

    def skip(self, layer: Any) -> None:
        """Note what is dropped, and lay the kernel out for that."""
        layer.heads.dropped = int(layer.heads.inactive)
        with ordinary_tensors():
            layer.heads.weight.data = skipping.rearranged(layer.heads.weight.data)


DG_CONVS = DGConvs(DGConv2d, DynamicHeads2d, SkippingDGConv2d)


def set_progress(model: nn.Module, progress: float) -> None:
    """Let a model's dynamic group convolutions drop as many channels as at this point of training.

    progress: the share of the training that is done, 0 to 1; give it before each step. Their number
    follows by `doconv_core.kinds.dgc.inactive_channels`, and is in the model's state. Raises
    ValueError for a model without such layers and for another progress, TypeError for no number.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 4.

    >>> layer = DGConv2d(64, 64, 3)
    >>> set_progress(layer, 1)
    >>> layer.heads.inactive
    tensor(48)
    """

    def put(heads: DynamicHeads2d, inactive: int) -> None:
        heads.inactive.fill_(inactive)
        heads.note_dropped()

    DG_CONVS.set_progress(_heads(model), progress, put)


def saliency_lasso(model: nn.Module, weight: float = LASSO) -> Tensor:
    """Return the mean saliencies of the model's last pass in training, to add to the loss.

    `weight` times the sum over all heads, which makes saliencies sparse. Call it once after each
    forward pass in training; each process of `DistributedDataParallel` has that of its own part of
    the batch. Raises ValueError where there is no such layer, or no pass whose saliencies were not
    yet taken, as under `DataParallel`, whose replicas are not the model; TypeError for no module.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 4.

    >>> layer = DGConv2d(16, 8, 1)
    >>> loss = layer(torch.ones(1, 16, 3, 3)).mean() + saliency_lasso(layer)
    """
    passed = lassos(_heads(model))
    total = torch.stack([each.to(passed[0].device) for each in passed]).sum()
    return as_lasso("weight", weight) * total


def _heads(model: nn.Module) -> list[Any]:
    if not isinstance(model, nn.Module):
        raise no_model("torch.nn.Module", model)
    return DG_CONVS.heads(model.modules())
