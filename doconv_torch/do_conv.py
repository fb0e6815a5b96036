"""The DO-Conv layers of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import ConvSpec, as_tuple
from doconv_torch.compose import as_weight
from doconv_torch.convolve import convolve, form_for
from doconv_torch.kernel_cache import composed, composed_anew, may_reuse


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
        if self.depthwise_weight is not None and not may_reuse(self):
            cls, form = type(self), form_for(self, x)
            if (
                form is not None
                and cls._conv_forward is self.ordinary._conv_forward
                and cls.composed_kernel is _DOConv.composed_kernel
                and vars(self).keys().isdisjoint(("_conv_forward", "composed_kernel"))
            ):
                return convolve(self, x, form)
        return self._conv_forward(x, self.composed_kernel(), self.bias)

    def composed_kernel(self) -> Tensor:
        """Return the kernel that the layer convolves with, `(O, I/g, *kernel_size)`.

        It is composed in the parameters' dtype, under autocast too, and differentiable. A kernel of
        one tap is W itself.
        """
        if self.depthwise_weight is None:
            return self.weight
        return composed(self)

    def fold(self) -> _ConvNd:
        """Return a new ordinary convolution with the same function.

        It keeps device, dtype, mode and memory format. Its weight is trainable where W or D is.
        Parametrizations are folded in as in evaluation mode. Hooks are not carried over.
        Raises NotFoldable for a layer that computes something else, and for one whose parameters a
        hook computes (weight norm of the old kind, pruning).
        """
        check_foldable(self)
        cls = type(self)
        with _in_evaluation(self), composed_anew(), torch.enable_grad():
            composed = [p for p in (self.weight, self.depthwise_weight) if p is not None]
            trainable = any(p.requires_grad for p in composed)
            kernel = self.composed_kernel().detach()
            if self.depthwise_weight is None or cls.composed_kernel is not _DOConv.composed_kernel:
                kernel = kernel.clone()  # else it is a new tensor, of nobody's
            folded = _filled(self.ordinary, self, {}, weight=(kernel, trainable))
        return folded.train(self.training)

    @classmethod
    def from_conv(cls, conv: _ConvNd, *, depth_multiplier: int | None = None) -> _DOConv:
        """Return a new layer with the function of a trained ordinary convolution.

        conv: an `ordinary` layer of PyTorch's own, exactly; its parameters are copied. D is zero.
        Raises TypeError for any other layer: a subclass may compute something else.
        """
        check_ordinary(cls, conv)
        spec = ConvSpec(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups, depth_multiplier
        )
        weight, trainable = conv.weight.detach(), conv.weight.requires_grad
        parameters = {"weight": (as_weight(weight.clone(), spec), trainable)}
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
            state_dict = {
                **state_dict,
                f"{prefix}weight": as_weight(weight, self.spec),
                name: zeros,
            }
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


def check_foldable(layer: _DOConv) -> None:
    """Raise NotFoldable, with the reason, where the ordinary layer would compute something else."""
    cls, own = type(layer), vars(layer)
    if (
        cls.forward is not _DOConv.forward
        or cls._conv_forward is not layer.ordinary._conv_forward
        or not own.keys().isdisjoint(("forward", "_conv_forward", "composed_kernel"))
    ):
        raise NotFoldable(
            f"{cls.__module__}.{cls.__qualname__} has a forward of its own, so the convolution "
            "it would be folded to might compute something else; fold() is for the plain layer."
        )
    # What a hook sets before each call is no parameter, and is out of date after a training step.
    computed = [name for name in ("weight", "depthwise_weight", "bias") if name in own]
    if computed:
        raise NotFoldable(
            f"a hook computes {cls.__qualname__}.{computed[0]} before each call (old weight norm, "
            "pruning); make it permanent first, as torch.nn.utils.remove_weight_norm or "
            "torch.nn.utils.prune.remove does."
        )


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


def _filled(
    cls: type[Any], like: _ConvNd, options: dict[str, Any], **parameters: tuple[Tensor, bool]
) -> Any:
    """Return a new `cls` with the arguments, bias and mode of `like`, and the given parameters.

    The tensors become its own; the bias is copied. It is created on the meta device: nothing is
    initialised only to be overwritten, and no random number is drawn.
    """
    layer = cls(
        like.in_channels, like.out_channels, like.kernel_size, like.stride, like.padding,
        like.dilation, like.groups, like.bias is not None, like.padding_mode, "meta",
        like.weight.dtype, **options,
    )  # fmt: skip
    if like.bias is not None:
        parameters["bias"] = (like.bias.detach().clone(), like.bias.requires_grad)
    for name, (value, trainable) in parameters.items():
        setattr(layer, name, nn.Parameter(value, requires_grad=trainable))
    return layer.train(like.training)
