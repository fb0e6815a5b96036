"""The DO-Conv layers of PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.spec import ConvSpec
from doconv_torch.compose import as_weight
from doconv_torch.composed import ComposedConv, ComposedLayers, Ordinary
from doconv_torch.convolve import Form, depthwise_form
from doconv_torch.kernel_cache import composed, composed_anew, may_reuse

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on


class _DOConv(ComposedConv[Ordinary]):
    """What the layers of every rank share.

    Parameters: `weight`, W, in the ordinary kernel's shape where `S == M`, else `(O, I/g, S)`;
    `depthwise_weight`, D, `(I, M, S)`, zero at first, or None for a kernel of one tap; `bias`.
    """

    kind = DO_CONV
    spec: ConvSpec
    depthwise_weight: nn.Parameter | None

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
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype, depth_multiplier=depth_multiplier,
        )  # fmt: skip

    def form(self, input: Tensor) -> Form | None:
        """Return the form for `convolve`; None where that is not what the layer does."""
        if self.depthwise_weight is None or may_reuse(self):
            return None
        return depthwise_form(self, input)

    def composed_kernel(self) -> Tensor:
        """Return the kernel that the layer convolves with, `(O, I/g, *kernel_size)`.

        It is composed in the parameters' dtype, under autocast too, and differentiable. A kernel of
        one tap is W itself.
        """
        if self.depthwise_weight is None and self.spec.depth_multiplier == self.spec.taps:
            return self.weight
        return composed(self)

    @classmethod
    def start(cls, kernel: Tensor, spec: ConvSpec) -> dict[str, Tensor]:
        """Return the W that a kernel becomes, and D of zeros where there is one."""
        return {**super().start(kernel, spec), "weight": as_weight(kernel, spec)}

    def fold(self) -> Ordinary:
        """Return a new ordinary convolution with the same function.

        It keeps device, dtype, mode and memory format. Its weight is trainable where W or D is.
        Parametrizations are folded in as in evaluation mode. Hooks are not carried over.
        Raises NotFoldable for a layer that computes something else, and for one whose parameters a
        hook computes (weight norm of the old kind, pruning).
        """
        with composed_anew():
            return super().fold()

    @classmethod
    def from_conv(  # type: ignore[override]  # options by name
        cls, conv: Ordinary, *, depth_multiplier: int | None = None
    ) -> Self:
        """Return a new layer with the function of a trained ordinary convolution.

        conv: an `ordinary` layer of PyTorch's own, exactly; its parameters are copied. D is zero.
        Raises TypeError for any other layer: a subclass may compute something else.
        """
        found: Self = super().from_conv(conv, depth_multiplier=depth_multiplier)
        return found

    def extra_repr(self) -> str:
        """Return the ordinary layer's description, with the depth multiplier."""
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.depthwise_weight is None:
            return plain
        return f"{plain}, depth_multiplier={self.spec.depth_multiplier}"


class DOConv1d(_DOConv[nn.Conv1d], nn.Conv1d):
    """A depthwise over-parameterized `torch.nn.Conv1d`, to be folded into one after training.

    Takes `torch.nn.Conv1d`'s arguments, and `depth_multiplier`, S: an integer of at least the
    number of kernel taps M, which is its default. `(B, I, L)` becomes `(B, O, L')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.

    >>> layer = DOConv1d(3, 4, 3, padding=1)
    >>> layer(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 4, 8])
    >>> layer.fold()
    Conv1d(3, 4, kernel_size=(3,), stride=(1,), padding=(1,))
    """

    ordinary, rank = nn.Conv1d, 1


class DOConv2d(_DOConv[nn.Conv2d], nn.Conv2d):
    """A depthwise over-parameterized `torch.nn.Conv2d`, to be folded into one after training.

    Takes `torch.nn.Conv2d`'s arguments, and `depth_multiplier`, S: an integer of at least the
    number of kernel taps M, which is its default. `(B, I, H, W)` becomes `(B, O, H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.

    >>> layer = DOConv2d(3, 4, 3, padding=1)
    >>> layer(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    >>> layer.fold()
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    ordinary, rank = nn.Conv2d, 2


class DOConv3d(_DOConv[nn.Conv3d], nn.Conv3d):
    """A depthwise over-parameterized `torch.nn.Conv3d`, to be folded into one after training.

    Takes `torch.nn.Conv3d`'s arguments, and `depth_multiplier`, S: an integer of at least the
    number of kernel taps M, which is its default. `(B, I, D, H, W)` becomes `(B, O, D', H', W')`.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.

    >>> layer = DOConv3d(3, 4, 3, padding=1)
    >>> layer(torch.zeros(2, 3, 8, 8, 8)).shape
    torch.Size([2, 4, 8, 8, 8])
    >>> layer.fold()
    Conv3d(3, 4, kernel_size=(3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1))
    """

    ordinary, rank = nn.Conv3d, 3


DO_CONVS = ComposedLayers(DOConv1d, DOConv2d, DOConv3d)
