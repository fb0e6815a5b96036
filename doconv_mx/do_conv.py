"""The DO-Conv layers of MXNet Gluon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mxnet as mx
from mxnet.gluon import nn
from mxnet.ndarray import NDArray

from doconv_core.kinds.do_conv import DO_CONV
from doconv_core.maths.spec import ConvSpec
from doconv_mx.compose import as_w, compose, grouped, tied
from doconv_mx.composed import ComposedConv, ComposedLayers, Ordinary
from doconv_mx.ordinary import is_channels_last

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` from Python 3.11 on


class _DOConv(ComposedConv[Ordinary]):
    """What the layers of every rank share.

    Parameters: `weight`, W, in the ordinary kernel's shape where `S == M`, else `(O, I/g, S)`, and
    `(O, S, I/g)` in a channels-last layout; `depthwise_weight`, D, `(I, M, S)`, zero at first, or
    None for a kernel of one tap; `bias`.
    """

    kind = DO_CONV
    made = (*ComposedConv.made, "_in_batches")
    _in_batches = False  # whether a graph was made that composes so

    def hybridize(self, *args: Any, **kwargs: Any) -> None:
        """Do as any block does: a graph that is made anew may compose in another form."""
        self._in_batches = False
        super().hybridize(*args, **kwargs)

    def compose(self, F: Any, entries: Mapping[str, Any]) -> Any:
        """Return the kernel; float16 is composed in float32 and rounded once.

        A kernel of one tap is W itself.
        """
        if "depthwise_weight" not in entries:
            return entries["weight"]
        spec, last, dtype = self._outline, is_channels_last(self), self.weight.dtype
        channels = 0
        if not self._in_batches:
            channels = grouped(self.weight, spec, self.inferred_in_channels())
        if F is mx.sym and not channels:
            # From now on everywhere, so that graph, folded kernel and eager calls round alike.
            self._in_batches = True
        pair = entries["weight"], entries["depthwise_weight"]
        return compose(F, *pair, spec, last, dtype, channels)

    def tied(self, F: Any, x: Any, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return W and D as they are, their shapes tied to that of `x` in the symbolic graph.

        Where `S == M`, W is added to the kernel: an operator that passes its shape already.
        """
        spec, found = self._outline, dict(entries)
        if spec.depth_multiplier != spec.taps:
            found = super().tied(F, x, entries)
        d = tied(F, found["weight"], entries["depthwise_weight"], spec)
        return {**found, "depthwise_weight": d}

    def as_weight(self, kernel: NDArray) -> NDArray:
        """Return the W that an ordinary kernel becomes."""
        return as_w(kernel, self._outline, is_channels_last(self), self.inferred_in_channels())

    @classmethod
    def from_conv(  # type: ignore[override]  # options by name
        cls, conv: Ordinary, *, depth_multiplier: int | None = None
    ) -> Self:
        """Return a new layer with the function of a trained ordinary convolution.

        conv: an `ordinary` layer of Gluon's own, exactly; its parameters are copied. D is zero.
        Raises TypeError for any other layer: a subclass may compute something else. Raises
        ValueError for a layer that has no values yet.
        """
        found: Self = super().from_conv(conv, depth_multiplier=depth_multiplier)
        return found


class DOConv1D(_DOConv[nn.Conv1D], nn.Conv1D):
    """A depthwise over-parameterized `mxnet.gluon.nn.Conv1D`, to be folded into one after training.

    `(B, I, W)` becomes `(B, O, W')`; all else is as of `DOConv2D`.

    >>> layer = DOConv1D(4, 8, 3)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6))).shape, layer.fold()
    ((1, 8, 4), Conv1D(4 -> 8, kernel_size=(3,), stride=(1,)))
    """

    ordinary, rank = nn.Conv1D, 1


class DOConv2D(_DOConv[nn.Conv2D], nn.Conv2D):
    """A depthwise over-parameterized `mxnet.gluon.nn.Conv2D`, to be folded into one after training.

    Takes `in_channels` (0: inferred from the first input), then `mxnet.gluon.nn.Conv2D`'s arguments
    in their order, and `depth_multiplier`, S: an integer of at least the number of kernel taps M,
    which is its default. `(B, I, H, W)` becomes `(B, O, H', W')`, or the like for `layout="NHWC"`,
    which MXNet computes on GPUs only.
    Raises TypeError or ValueError for arguments that give no layer, before anything is created.
    Source: DO-Conv, arXiv 2006.12030.

    >>> layer = DOConv2D(4, 8, 3, padding=1, depth_multiplier=12)
    >>> layer.initialize()
    >>> layer.weight.shape, layer.depthwise_weight.shape, layer.composed_kernel().shape
    ((8, 4, 12), (4, 9, 12), (8, 4, 3, 3))
    >>> verify(layer, layer.fold(), mx.nd.ones((1, 4, 6, 6)))
    Difference(absolute=0.0, relative=0.0)
    """

    ordinary, rank = nn.Conv2D, 2


class DOConv3D(_DOConv[nn.Conv3D], nn.Conv3D):
    """A depthwise over-parameterized `mxnet.gluon.nn.Conv3D`, to be folded into one after training.

    `(B, I, D, H, W)` becomes `(B, O, D', H', W')`, or the like for
    `layout="NDHWC"`, which MXNet computes on GPUs only; all else is as of `DOConv2D`.

    >>> layer = DOConv3D(4, 8, 3)
    >>> layer.initialize()
    >>> layer(mx.nd.ones((1, 4, 6, 6, 6))).shape, layer.fold()
    ((1, 8, 4, 4, 4), Conv3D(4 -> 8, kernel_size=(3, 3, 3), stride=(1, 1, 1)))
    """

    ordinary, rank = nn.Conv3D, 3


class DOConvLayers(ComposedLayers):
    """The DO-Conv layers. In a symbol without shapes they are those whose W is the kernel's."""

    operators = frozenset(
        {"batch_dot", "broadcast_add", "elemwise_add", "_identity_with_attr_like_rhs"}
    )

    def check_symbol(self, spec: ConvSpec) -> None:
        """Raise ValueError for a W of another shape than the kernel's."""
        if spec.depth_multiplier > spec.taps:
            raise ValueError(
                "in a symbol whose shapes are not known yet, depth_multiplier must be the number "
                f"of kernel taps, {spec.taps}; received depth_multiplier={spec.depth_multiplier}. "
                "Initialize the model and run it once."
            )


DO_CONVS = DOConvLayers(DOConv1D, DOConv2D, DOConv3D)
