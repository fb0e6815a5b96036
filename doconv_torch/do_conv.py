"""The DO-Conv layers of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from doconv_core.fold import NotFoldable
from doconv_core.spec import ConvSpec, as_tuple


class _DOConv(_ConvNd):
    """What the layers of every rank share; each names the ordinary layer it stands in for.

    Parameters: `weight`, W, in the ordinary kernel's shape where `S == M`, else `(O, I/g, S)`;
    `depthwise_weight`, D, `(I, M, S)`, zero at first, or None for a kernel of one tap; `bias`.
    """

    ordinary: type[_ConvNd]
    rank: int

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
        *,
        depth_multiplier: int | None = None,
    ) -> None:
        rank = self.rank
        kernel_size = as_tuple("kernel_size", kernel_size, rank)
        spec = ConvSpec(in_channels, out_channels, kernel_size, groups, depth_multiplier)
        as_tuple("stride", stride, rank)
        as_tuple("dilation", dilation, rank)
        if not isinstance(padding, str):
            as_tuple("padding", padding, rank, least=0)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.spec = spec
        if spec.parameter_shape != spec.kernel_shape:
            self.weight = nn.Parameter(self.weight.new_empty(spec.parameter_shape))
            self.reset_parameters()
        depthwise = None
        if spec.depthwise_shape is not None:
            depthwise = nn.Parameter(self.weight.new_zeros(spec.depthwise_shape))
        self.register_parameter("depthwise_weight", depthwise)

    def reset_parameters(self) -> None:
        """Initialise W and the bias as the ordinary layer does, and D to zero."""
        super().reset_parameters()
        if self._parameters.get("depthwise_weight") is not None:
            nn.init.zeros_(self.depthwise_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of `x`, `(B, I, *spatial)`, with the composed kernel."""
        return self._conv_forward(x, self.composed_kernel(), self.bias)

    def composed_kernel(self) -> Tensor:
        """Return the kernel that the layer convolves with, `(O, I/g, *kernel_size)`.

        It is composed in the parameters' dtype, under autocast too, and differentiable. A kernel of
        one tap is W itself.
        """
        if self.depthwise_weight is None:
            return self.weight
        device = self.weight.device.type
        if not self.weight.is_meta and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return _compose(self.weight, self.depthwise_weight, self.spec)
        return _compose(self.weight, self.depthwise_weight, self.spec)

    def fold(self) -> _ConvNd:
        """Return a new ordinary convolution with the same function.

        It keeps device, dtype and mode, and where `S == M` the memory format. Its weight is
        trainable where W or D is. Hooks are not carried over. Raises NotFoldable for a subclass
        that computes something else.
        """
        cls = type(self)
        if (
            cls.forward is not _DOConv.forward
            or cls._conv_forward is not self.ordinary._conv_forward
        ):
            raise NotFoldable(
                f"{cls.__module__}.{cls.__qualname__} has a forward of its own, so the convolution "
                "it would be folded to might compute something else; fold() is for the plain layer."
            )
        composed = [p for p in (self.weight, self.depthwise_weight) if p is not None]
        trainable = any(p.requires_grad for p in composed)
        kernel = self.composed_kernel().detach()
        return _filled(self.ordinary, self, {}, weight=(kernel, trainable))

    @classmethod
    def from_conv(cls, conv: _ConvNd, *, depth_multiplier: int | None = None) -> _DOConv:
        """Return a new layer with the function of a trained ordinary convolution.

        conv: an `ordinary` layer of PyTorch's own, exactly; its parameters are copied. D is zero.
        Raises TypeError for any other layer: a subclass may compute something else.
        """
        if type(conv) is not cls.ordinary:
            raise TypeError(
                f"{cls.__name__}.from_conv takes over a torch.nn.{cls.ordinary.__name__}, exactly; "
                f"received {type(conv).__module__}.{type(conv).__qualname__}."
            )
        if conv._parameters.get("weight") is None:
            raise TypeError(
                f"{cls.__name__}.from_conv needs a layer whose weight is a parameter; this "
                "one's is computed (weight norm, pruning). Make it permanent first."
            )
        spec = ConvSpec(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups, depth_multiplier
        )
        weight, trainable = conv.weight.detach(), conv.weight.requires_grad
        parameters = {"weight": (_as_w(weight, spec), trainable)}
        if spec.depthwise_shape is not None:
            zeros = weight.new_zeros(spec.depthwise_shape)
            parameters["depthwise_weight"] = (zeros, trainable)
        options = {"depth_multiplier": spec.depth_multiplier}
        return _filled(cls, conv, options, **parameters)

    def extra_repr(self) -> str:
        """Return the ordinary layer's description, with the depth multiplier."""
        if self.depthwise_weight is None:
            return super().extra_repr()
        return f"{super().extra_repr()}, depth_multiplier={self.spec.depth_multiplier}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as every module does; an ordinary layer's weight is taken over, with D zero."""
        weight = state_dict.get(f"{prefix}weight")
        name = f"{prefix}depthwise_weight"
        ordinary = isinstance(weight, Tensor) and tuple(weight.shape) == self.spec.kernel_shape
        if self.depthwise_weight is not None and ordinary and name not in state_dict:
            zeros = weight.new_zeros(self.spec.depthwise_shape)
            state_dict = {**state_dict, f"{prefix}weight": _as_w(weight, self.spec), name: zeros}
        super()._load_from_state_dict(state_dict, prefix, *args)


class DOConv1d(_DOConv, nn.Conv1d):
    """A depthwise over-parameterized `torch.nn.Conv1d`, to be folded into one after training.

    Takes `torch.nn.Conv1d`'s arguments, and `depth_multiplier`, S: an integer of at least the
    number of kernel taps M, which is its default. `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary, rank = nn.Conv1d, 1


class DOConv2d(_DOConv, nn.Conv2d):
    """A depthwise over-parameterized `torch.nn.Conv2d`, to be folded into one after training.

    Takes `torch.nn.Conv2d`'s arguments, and `depth_multiplier`, S: an integer of at least the
    number of kernel taps M, which is its default. `(B, I, H, W)` becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary, rank = nn.Conv2d, 2


class DOConv3d(_DOConv, nn.Conv3d):
    """A depthwise over-parameterized `torch.nn.Conv3d`, to be folded into one after training.

    Takes `torch.nn.Conv3d`'s arguments, and `depth_multiplier`, S: an integer of at least the
    number of kernel taps M, which is its default. `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.
    """

    ordinary, rank = nn.Conv3d, 3


def _compose(weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> Tensor:
    """Return `W·(E + D)ᵀ`: one matrix product for each input channel, added to W as it is.

    The sum has W's memory format where `S == M`, and is contiguous otherwise.
    """
    g, taps, multiplier = spec.groups, spec.taps, spec.depth_multiplier
    split = (g, spec.out_channels_per_group, spec.in_channels_per_group)
    w = weight.reshape(*split, multiplier)
    # (g, o, i, s) -> (g, i, o, s) -> one (O/g, S) matrix for each of the I input channels
    matrices = w.transpose(1, 2).reshape(spec.in_channels, -1, multiplier)
    product = torch.bmm(matrices, depthwise.transpose(1, 2))
    product = product.reshape(g, split[2], split[1], taps).transpose(1, 2)
    tiles = multiplier // taps
    if multiplier != taps:
        w = w[..., : tiles * taps].unflatten(-1, (tiles, taps)).sum(-2)
    return (w + product).reshape(spec.kernel_shape)


def _as_w(kernel: Tensor, spec: ConvSpec) -> Tensor:
    """Return the W that a kernel becomes, in the shape in which a layer keeps it."""
    if kernel.shape == spec.parameter_shape:
        return kernel
    return nn.functional.pad(kernel.flatten(2), (0, spec.depth_multiplier - spec.taps))


def _filled(
    cls: type[Any], like: _ConvNd, options: dict[str, Any], **parameters: tuple[Tensor, bool]
) -> Any:
    """Return a new `cls` with the arguments, bias and mode of `like`, and the given parameters.

    It is created on the meta device: nothing is initialised only to be overwritten, and no random
    number is drawn.
    """
    layer = cls(
        like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding,
        like.dilation, like.groups, like.bias is not None, like.padding_mode, "meta",
        like.weight.dtype, **options,
    )  # fmt: skip
    if like.bias is not None:
        parameters["bias"] = (like.bias.detach(), like.bias.requires_grad)
    for name, (value, trainable) in parameters.items():
        setattr(layer, name, nn.Parameter(value.clone(), requires_grad=trainable))
    return layer.train(like.training)
