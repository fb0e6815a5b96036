"""What BSConv layers are made of in PyTorch: how their parts are read, folded and put in models."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from doconv_core.kinds.bsconv import BIAS_COMPUTED, WEIGHT_BOUND, obstacle
from doconv_core.maths.geometry import Geometry, same, symmetric
from doconv_core.maths.separable import Folded, Normalization, Pointwise
from doconv_core.models.separable import HOOKED, SeparableLayers
from doconv_core.models.view import Folding, ModelView, Site
from doconv_torch import ordinary
from doconv_torch.batchnorm import norm_obstacle
from doconv_torch.composed import ComposedConv
from doconv_torch.ordinary import HOOKS, is_bound, kind_of, spec_of
from doconv_torch.surgery import become


class BSConvLayers(SeparableLayers):
    """The BSConv layers of PyTorch."""

    composed, sequence, batch_norm = ComposedConv, nn.Sequential, _BatchNorm
    is_replaced = staticmethod(ordinary.is_replaced)

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution cannot become a BSConv."""
        reason = obstacle(spec_of(layer), options["kernel_sizes"])
        if reason is None and "bias" in vars(layer):
            return BIAS_COMPUTED
        return reason or (WEIGHT_BOUND if is_bound(layer.weight) else None)

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions the BSConvs, which keep their biases."""
        for site, new in chosen:
            if site.layer.bias is not None:
                new.depthwise.bias = site.layer.bias
            become(site.layer, new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold BSConvs. A depthwise convolution that stays is the one that was there."""
        for site, (_, new) in planned:
            layer = site.layer
            if new is None:
                new = nn.Sequential(OrderedDict(layer.named_children()))
            elif isinstance(new, nn.Sequential):
                new.depthwise = layer.depthwise
            become(layer, new)

    def _parts(self, layer: nn.Module) -> dict[str, nn.Module]:
        return dict(layer.named_children())

    def _strides(self, layer: Any) -> Sequence[int] | None:
        found = isinstance(layer._modules.get("depthwise"), _ConvNd)
        return layer.stride if found else None

    def _passes_on(self, part: nn.Module) -> bool:
        return type(part) is nn.Identity

    def _watcher(self, part: nn.Module) -> str | None:
        return HOOKED if any(getattr(part, hooks) for hooks in HOOKS) else None

    def _norm_obstacle(self, layer: Any, norm: Any) -> str | None:
        reason = norm_obstacle(norm)
        return f"{reason}; call model.eval() first" if reason and norm.training else reason

    def _conv_obstacle(self, layer: Any, name: str, part: nn.Module) -> str | None:
        kind = layer.ordinary
        reason = ordinary.obstacle(part) if type(part) is kind else f"it is a {kind_of(part)}"
        if reason is None and "bias" in vars(part):
            reason = "its bias is computed before each call"
        return reason and f"{reason}; expected a torch.nn.{kind.__name__}"

    def _is_pointwise(self, conv: Any) -> bool:
        padded = not isinstance(conv.padding, str) and any(conv.padding)
        taps = conv.weight[0].numel()
        return taps == conv.in_channels and set(conv.stride) == {1} and not padded

    def _is_depthwise(self, conv: Any) -> bool:
        return bool(conv.groups == conv.in_channels == conv.out_channels)

    def _matrix(self, conv: Any, context: Any) -> Pointwise:
        weight = as_array(conv.weight).reshape(conv.out_channels, -1)
        return Pointwise(weight, None if conv.bias is None else as_array(conv.bias))

    def _normalization(self, norm: Any, context: Any) -> Normalization:
        affine = norm.weight, norm.bias
        scale, offset = (None if value is None else as_array(value) for value in affine)
        mean, variance = as_array(norm.running_mean), as_array(norm.running_var)
        return Normalization(mean, variance, norm.eps, scale, offset)

    def _geometry(self, layer: Any, depthwise: Any) -> Geometry:
        stride, dilation = depthwise.stride, depthwise.dilation
        if depthwise.padding == "same":
            pads = same(depthwise.kernel_size, stride, dilation)
        else:
            valid = depthwise.padding == "valid"
            pads = symmetric([0] * len(stride) if valid else depthwise.padding)
        return Geometry(stride, dilation, pads, depthwise.padding_mode)

    def _ordinary(self, part: nn.Module) -> nn.Module:
        return part.fold() if isinstance(part, ComposedConv) else copy.deepcopy(part)

    def _convolution(
        self, layer: Any, values: Mapping[Any, Folded], depthwise: Any = None
    ) -> nn.Module:
        (kernel, bias), like = values[None], depthwise or layer[0]
        conv: nn.Module = layer.ordinary(
            kernel.shape[1], len(kernel), tuple(like.weight.shape[2:]), like.stride, like.padding,
            like.dilation, 1, bias is not None, like.padding_mode, "meta", like.weight.dtype,
        )  # fmt: skip
        trainable = any(parameter.requires_grad for parameter in layer.parameters())
        for name, value in (("weight", kernel), ("bias", bias)):
            if value is not None:
                tensor = as_tensor(value, like.weight).reshape(getattr(conv, name).shape)
                setattr(conv, name, nn.Parameter(tensor, requires_grad=trainable))
        return conv

    def _sequenced(self, layer: Any, parts: Mapping[str, nn.Module]) -> nn.Module:
        return nn.Sequential(OrderedDict(parts))


def as_array(tensor: Tensor) -> Any:
    """Return a tensor's values in float64; zeros for one that has none, on the meta device."""
    if tensor.is_meta:
        return np.zeros(tuple(tensor.shape))
    return tensor.detach().cpu().double().numpy()


def as_tensor(values: Any, like: Tensor) -> Tensor:
    """Return an array as a tensor of the dtype and on the device of `like`, rounded once."""
    return torch.from_numpy(np.array(values)).to(like.dtype).to(like.device)
