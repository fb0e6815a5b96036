"""Dynamic group convolutions: several heads, each with the input channels that it chooses itself.

A layer normalizes its input, `z = ReLU(norm(x))`, and gives it to `h` heads. Each head rates all
input channels of each image by what is in the image, its saliencies, drops the `n` least salient,
multiplies the others by their saliency, and convolves them to its own `O/h` output channels. `n`
grows in training, from none to the share that is to be pruned. Channel `j·h + i` of the output is
channel `j` of head `i`. Axis letters as everywhere in this project; `h` heads, `q` squeezed
features of a head.
Source: Dynamic Group Convolution, arXiv 2007.04242.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.kinds.base import Array, Kind, Shape, register
from doconv_core.maths.convolve import convolve, convolve_gradient
from doconv_core.maths.numeric import as_floats, shaped
from doconv_core.maths.orthonormal import as_weight
from doconv_core.maths.spec import ConvSpec, as_integer, as_number, check_divisible

HEADS, SQUEEZE_RATE, GATE_FACTOR = 4, 16, 0.25  # the defaults of every backend
LASSO = 1e-5  # the weight of the saliencies in the loss
BEGIN, END = 1 / 12, 3 / 4  # of the training's progress, between which channels are pruned
FEW = 80  # channels, below which a head squeezes half as much


@dataclass(frozen=True)
class DGConvSpec:
    """The sizes of one dynamic group convolution, validated once, and every shape they imply.

    in_channels: `C`, and out_channels: `O`, both divisible by heads: `h`. kernel_size: one to three
    integers. squeeze_rate: how many channels a head squeezes into one feature, of which half, where
    there are fewer than 80. gate_factor: the share of the channels that each head keeps at the end
    of training, above 0 and at most 1.
    Raises TypeError for what is no number, ValueError for sizes that give no layer.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 3.

    >>> spec = DGConvSpec(32, 64, (1, 1))
    >>> spec.squeezed, spec.shapes["squeeze_weight"]
    (4, (4, 4, 32))
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    heads: int = HEADS
    squeeze_rate: int = SQUEEZE_RATE
    gate_factor: float = GATE_FACTOR

    def __post_init__(self) -> None:
        """Validate every field, and store plain numbers and a tuple in place of what came."""
        put = object.__setattr__
        conv = ConvSpec(self.in_channels, self.out_channels, self.kernel_size)
        for name in ("in_channels", "out_channels", "kernel_size"):
            put(self, name, getattr(conv, name))
        for name in ("heads", "squeeze_rate"):
            put(self, name, as_integer(name, getattr(self, name)))
        for name in ("in_channels", "out_channels"):
            check_divisible(name, getattr(self, name), self.heads, "heads")
        if not 0 < as_number("gate_factor", self.gate_factor) <= 1:
            raise ValueError(
                "gate_factor, the share of channels to keep, must be above 0 and at most 1; "
                f"received gate_factor={self.gate_factor!r}."
            )
        put(self, "gate_factor", float(self.gate_factor))
        if not self.squeezed:
            most = 2 * self.in_channels + 1 if self.in_channels < FEW else self.in_channels
            raise ValueError(
                f"squeeze_rate must be at most {most} for {self.in_channels} "
                "channels, so that a head has a feature to rate channels by; received "
                f"squeeze_rate={self.squeeze_rate}."
            )

    @cached_property
    def conv(self) -> ConvSpec:
        """The sizes of an ordinary convolution with as many weights."""
        return ConvSpec(self.in_channels, self.out_channels, self.kernel_size)

    def check_inactive(self, inactive: Array) -> None:
        """Raise ValueError where a head cannot drop so many channels."""
        most, value = inactive_channels(self.in_channels, self.gate_factor, 1), float(inactive)
        told = f"drops {value:g} of {self.in_channels} channels"
        if not value.is_integer() or value < 0:
            raise ValueError(f"{told}, which is no number of them.")
        if value > inactive.dtype.type(most):  # rounded as it may be
            raise ValueError(
                f"{told}, but gate_factor={self.gate_factor:g} at most {most}; give the network's."
            )

    @property
    def kernel_shape(self) -> Shape:
        """Shape of the heads' kernels, one head after the other, `(O, C, *kernel_size)`."""
        return self.conv.kernel_shape

    @property
    def squeezed(self) -> int:
        """`q`, the features from which a head rates the channels."""
        rate = self.squeeze_rate // 2 if self.in_channels < FEW else self.squeeze_rate
        return self.in_channels // max(rate, 1)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the heads' arrays, by name; head comes after head in each.

        weight: `(O, C, M)`. squeeze_weight: `(h, q, C)`. saliency_weight: `(h, C, q)`, and
        saliency_bias: `(h, C)`. inactive: `n`, how many channels each head drops.
        """
        heads, channels, squeezed = self.heads, self.in_channels, self.squeezed
        return {
            "weight": (self.out_channels, channels, self.conv.taps),
            "squeeze_weight": (heads, squeezed, channels),
            "saliency_weight": (heads, channels, squeezed),
            "saliency_bias": (heads, channels),
            "inactive": (),
        }


def inactive_channels(in_channels: int, gate_factor: float, progress: float) -> int:
    """Return `n`, how many channels each head drops at this point of the training.

    None up to a twelfth of the training, from where it grows evenly, until from three quarters on
    it is `in_channels · (1 - gate_factor)`; rounded, halves to even. progress: 0 to 1, the share of
    the training that is done. Raises TypeError for what is no number, ValueError for others.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 4.

    >>> [inactive_channels(64, 0.25, progress) for progress in (0, 0.5, 1)]
    [0, 30, 48]
    """
    progress = as_progress(progress)
    if progress <= BEGIN:
        return 0
    pruned = in_channels * (1 - gate_factor)
    return round(pruned if progress >= END else pruned * 3.0 / 2 * (progress - BEGIN))


def as_lasso(name: str, value: Any) -> float:
    """Return the weight of the saliencies in the loss, at least 0; TypeError or ValueError else."""
    return as_weight(name, value, "make all channels more salient")


def as_progress(progress: Any) -> float:
    """Return the progress of a training as a float; TypeError or ValueError for no share of one."""
    if not 0 <= as_number("progress", progress) <= 1:
        raise ValueError(
            "progress is the share of the training that is done, 0 to 1; received "
            f"progress={progress!r}."
        )
    return float(progress)


class HeadsPass(NamedTuple):
    """What the heads make of a batch.

    output: `(B, O, *out)`. lasso: the sum over heads of the mean saliency, to be made small.
    saliency: `(B, h, C)`, and active: which of them are kept. back: from the output's gradient, and
    that of the loss in the lasso, to the gradients of `z` and of every array that is trained.
    """

    output: Array
    lasso: Array
    saliency: Array
    active: Array
    back: Callable[..., tuple[Array, dict[str, Array]]]


def dynamic_heads(
    z: ArrayLike,
    arrays: Mapping[str, ArrayLike],
    spec: DGConvSpec,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> HeadsPass:
    """Return what the heads make of a normalized batch `(B, C, *spatial)`, and the way back.

    arrays: of the shapes that `spec.shapes` gives. stride, padding, dilation: as `convolve` takes
    them. A head drops all channels that are not above its `n`-th smallest saliency: of equal ones
    all. Of the choice there is no gradient. Raises TypeError or ValueError for other shapes.
    Source: Dynamic Group Convolution, arXiv 2007.04242, section 3.

    >>> spec = DGConvSpec(8, 4, (1,), heads=2)
    >>> arrays = {name: np.ones(shape) for name, shape in spec.shapes.items()}
    >>> found = dynamic_heads(np.ones((1, 8, 5)), arrays, spec)
    >>> found.output.shape, found.active.sum()  # they are all equal: none is above the smallest
    ((1, 4, 5), 0)
    """
    missing = [name for name in spec.shapes if name not in arrays]
    if missing:
        raise ValueError(f"arrays must have {', '.join(spec.shapes)}; received none of {missing}.")
    given = {**arrays, "inactive": np.asarray(arrays["inactive"], np.float64)}  # or an integer
    a = {name: shaped(name, given[name], shape) for name, shape in spec.shapes.items()}
    z = as_floats("z", z)
    if z.ndim != spec.conv.rank + 2 or z.shape[1] != spec.in_channels:
        raise ValueError(
            f"z must have axes (B, {spec.in_channels}, *spatial), {spec.conv.rank} of them "
            f"spatial; received shape {z.shape}."
        )
    how: Any = {"stride": stride, "padding": padding, "dilation": dilation, "groups": spec.heads}
    batch, heads, channels, space = len(z), spec.heads, spec.in_channels, z.shape[2:]
    everywhere = tuple(range(2, z.ndim))

    def wide(array: Array) -> Array:  # of channels, against the input's positions
        return array.reshape(*array.shape, *(1,) * len(space))

    pooled = z.mean(everywhere)
    squeezed = np.maximum(np.einsum("bc,hqc->bhq", pooled, a["squeeze_weight"]), 0)
    rated = np.einsum("bhq,hcq->bhc", squeezed, a["saliency_weight"]) + a["saliency_bias"]
    saliency = np.maximum(rated, 0)
    active = _above(saliency, int(a["inactive"]))
    gate = saliency * active
    gated = (z[:, None] * wide(gate)).reshape(batch, heads * channels, *space)
    kernel = a["weight"].reshape(spec.conv.kernel_shape)
    by_head = convolve(gated, kernel, **how)
    out = by_head.shape[2:]

    def back(output_gradient: ArrayLike, lasso: float = 0.0) -> tuple[Array, dict[str, Array]]:
        dy = shaped("output_gradient", output_gradient, (batch, spec.out_channels, *out))
        dy = dy.reshape(batch, -1, heads, *out).swapaxes(1, 2).reshape(by_head.shape)
        dgated, dkernel, _ = convolve_gradient(gated, kernel, dy, **how)
        dgated = dgated.reshape(batch, heads, *z.shape[1:])
        dgate = (dgated * z[:, None]).reshape(batch, heads, channels, -1).sum(-1)
        drated = (dgate * active + lasso / (batch * channels)) * (rated > 0)
        dsqueezed = np.einsum("bhc,hcq->bhq", drated, a["saliency_weight"]) * (squeezed > 0)
        dpooled = np.einsum("bhq,hqc->bc", dsqueezed, a["squeeze_weight"])
        dz = (dgated * wide(gate)).sum(1) + wide(dpooled) * (batch * channels / z.size)
        return dz, {
            "weight": dkernel.reshape(a["weight"].shape),
            "squeeze_weight": np.einsum("bhq,bc->hqc", dsqueezed, pooled),
            "saliency_weight": np.einsum("bhc,bhq->hcq", drated, squeezed),
            "saliency_bias": drated.sum(0),
        }

    output = by_head.reshape(batch, heads, -1, *out).swapaxes(1, 2).reshape(by_head.shape)
    return HeadsPass(output, saliency.mean((0, 2)).sum(), saliency, active, back)


def _above(saliency: Array, inactive: int) -> Array:
    """Return which saliencies, `(…, C)`, are above the `inactive`-th smallest; all, above none."""
    if not inactive:
        return np.ones(saliency.shape, bool)
    least = np.partition(saliency, inactive - 1)[..., inactive - 1, None]
    above: Array = saliency > least
    return above


SOURCE = re.compile(r"(.*\.|)headconv_(0|[1-9]\d*)\.(conv\.weight|fc[12]\.weight|fc2\.bias)")
_NAMES = {
    "conv.weight": "weight", "fc1.weight": "squeeze_weight", "fc2.weight": "saliency_weight",
    "fc2.bias": "saliency_bias",
}  # fmt: skip


def from_source(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return what a state dict of the source's implementation has, by the names of PyTorch's layer.

    Each layer's heads become one array each, `….heads.weight` `(O, C, *kernel_size)` and so on; all
    other arrays stay as they are, and in their order. Raises ValueError for heads of which some
    arrays are missing, or of different shapes.
    Source: Dynamic Group Convolution, arXiv 2007.04242, its implementation.

    >>> heads = {f"a.headconv_{i}.fc2.bias": np.ones(8) for i in range(4)}
    >>> {name: array.shape for name, array in from_source(heads).items()}
    {'a.heads.saliency_bias': (4, 8)}
    """
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        part = SOURCE.fullmatch(name)
        if part is not None:
            new = f"{part[1]}heads.{_NAMES[part[3]]}"
            found.setdefault(new, {})[int(part[2])] = array
        elif name.rpartition(".")[2] == "_inactive_channels":
            found[f"{name.removesuffix('_inactive_channels')}heads.inactive"] = array.reshape(())
        else:
            found[name] = array
    return {name: _joined(name, each) for name, each in found.items()}


def _joined(name: str, heads: Any) -> Array:
    """Return the heads' arrays in one; what is an array already, as it is."""
    if not isinstance(heads, dict):
        array: Array = heads
        return array
    shapes = {array.shape for array in heads.values()}
    if set(heads) != set(range(len(heads))) or len(shapes) != 1:
        raise ValueError(
            f"{name!r} must be of heads 0 to {len(heads) - 1}, all of one shape; received "
            f"{', '.join(f'{n} of {heads[n].shape}' for n in sorted(heads))}."
        )
    ordered = [heads[n] for n in range(len(heads))]
    is_kernel = name.rpartition(".")[2] == "weight"
    return np.concatenate(ordered) if is_kernel else np.stack(ordered)


class DGConvCost(NamedTuple):
    """What the heads of a layer cost for one image at the end of training, in multiply-accumulates.

    counted: by the source's rule, with the selectors, and for the convolutions the gate factor's
    share, which need not be of whole channels. selector: of rating the channels. kept: of the
    convolutions over the channels that are kept, whole ones. dense: over all, which is what runs
    where dropped channels are multiplied by zero. gathered: the numbers that are copied so that
    the kept ones lie together, maps and weights. parameters: of the selectors alone.
    """

    counted: float
    selector: int
    kept: int
    dense: int
    gathered: int
    parameters: int


def dgc_cost(spec: DGConvSpec, positions: int, input_positions: int) -> DGConvCost:
    """Return what the heads cost. positions: of the output; input_positions: of the input.

    Source: Dynamic Group Convolution, arXiv 2007.04242, section 3, and its implementation.

    >>> dgc_cost(DGConvSpec(64, 64, (1, 1)), 100, 100).kept
    102400
    """
    heads, channels, squeezed = spec.heads, spec.in_channels, spec.squeezed
    kept = channels - inactive_channels(channels, spec.gate_factor, 1)
    each = spec.out_channels * spec.conv.taps
    selector = heads * 2 * channels * squeezed
    rated = selector + heads * (squeezed + 3 * channels)
    return DGConvCost(
        counted=channels * input_positions + rated + spec.gate_factor * channels * each * positions,
        selector=selector,
        kept=kept * each * positions,
        dense=channels * each * positions,
        gathered=heads * kept * input_positions + kept * each,
        parameters=selector + heads * channels,
    )


FEW_NUMBERS = 2**16  # of kernels, gathered for a place of the output, beyond which they cost more
FEW_SLICES = 2**15  # of kernels, gathered one by one
WIDTH = 16  # convolutions in groups are slow for numbers of channels that this does not divide


def skipping_pays(
    spec: DGConvSpec,
    inactive: int,
    batch: int = 1,
    positions: int | None = None,
    *,
    columns: bool = False,
) -> bool:
    """Return whether a framework's own operations are faster on the kept channels alone.

    Copying what is kept has to pay, else the layer computes as in training. In operations of one
    tap it does for at most half of the channels, or a quarter where a head has few outputs; in
    convolutions with a group for each head, for at most half with what they are filled up with,
    where a head's outputs are not few, and an image is alone or kernels are few to the output. With
    columns, what each place sees copied side by side, it does for at most half where the output has
    no more positions than channels; where nothing tells the positions, for a quarter, several taps
    and few kernels. Compiled code pays always. inactive: channels that each head drops. positions:
    of the output, of one image. Found by `benchmarks/dgc_inference.py`.

    >>> skipping_pays(DGConvSpec(256, 256, (3, 3)), 192, batch=1, positions=196)
    True
    """
    channels, taps, kept = spec.in_channels, spec.conv.taps, spec.in_channels - inactive
    if positions is None:
        return taps > 1 and kept * spec.out_channels <= FEW_SLICES and 4 * kept <= channels
    if columns:
        return positions <= spec.out_channels and 2 * kept <= channels
    are_few = spec.out_channels < WIDTH * spec.heads
    if taps == 1:
        return (4 if are_few else 2) * kept <= channels
    gathered = batch * kept * spec.out_channels * taps
    alone = batch == 1 or gathered <= FEW_NUMBERS * positions
    return alone and not are_few and 2 * filled_up(kept) <= channels


def filled_up(kept: int) -> int:
    """Return with how many channels those that are kept are convolved in groups.

    >>> filled_up(58)
    64
    """
    return -(-max(kept, 1) // WIDTH) * WIDTH


class DGCKind(Kind):
    """Dynamic group convolutions, which compute something else for each image."""

    name = "dgc"
    forms = ("skipping",)
    exact = False
    instead = (
        "there is no dynamic group convolution of a trained one: build the network with DGConv "
        "layers, and train it"
    )


DGC = register(DGCKind())
