"""What W and D are, which users prune, cast and move: the sizes they have, or why they have none.

A layer's `spec` says what W and D were made as. An ordinary convolution computes with the weight
that it has; so the sizes here are those of the arrays, where these belong together.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from doconv_core.maths.spec import ConvSpec
from doconv_torch.matrix_products import is_tracing, shapes


def checked(weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> ConvSpec:
    """Return the sizes of W and D: `spec`, or one with fewer or more channels, as pruning leaves.

    Raises ValueError for shapes of no layer with this kernel size, depth multiplier and groups, and
    for W and D on two devices; TypeError for what is no tensor, and for a D whose numbers W's dtype
    is no kind of.
    """
    if not (isinstance(weight, Tensor) and isinstance(depthwise, Tensor)):
        raise TypeError(
            f"W and D must be tensors; received W of type {type(weight).__name__} and D of type "
            f"{type(depthwise).__name__}, of {spec}."
        )
    if weight.device != depthwise.device:
        raise ValueError(
            "W and D must be on one device, as layer.to(device) moves both; received W on "
            f"{weight.device} and D on {depthwise.device}, of {spec}."
        )
    if _kind(depthwise.dtype) > _kind(weight.dtype):
        raise TypeError(
            f"the kernel is in W's dtype, which must be able to hold D's numbers; received W in "
            f"{weight.dtype} and D in {depthwise.dtype}, of {spec}."
        )
    found = _shape(weight), _shape(depthwise)
    # Compilers follow no cache.
    expected = (shapes.__wrapped__ if torch.compiler.is_compiling() else shapes)(spec)
    return spec if found == expected else _of_other_channels(*found, spec)


def computed_in(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype to compose in: what PyTorch's operations promote to, of at least float32."""
    found = torch.float32 if dtypes[0].is_floating_point else dtypes[0]
    for dtype in dtypes:
        narrow = dtype.is_floating_point and dtype.itemsize < 4
        found = torch.promote_types(found, torch.float32 if narrow else dtype)
    return torch.complex64 if found == torch.complex32 else found


def _kind(dtype: torch.dtype) -> int:
    """Return 0 for integers, 1 for floats, 2 for complex numbers."""
    return 2 if dtype.is_complex else int(dtype.is_floating_point)


def _shape(array: Tensor) -> tuple[int, ...]:
    """Return the shape as numbers, which `torch.jit.trace` would make part of its graph."""
    if not is_tracing():
        return array.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return tuple(map(int, array.shape))


def _of_other_channels(
    weight: tuple[int, ...], depthwise: tuple[int, ...], spec: ConvSpec
) -> ConvSpec:
    groups, taps, multiplier = spec.groups, spec.taps, spec.depth_multiplier
    body = spec.parameter_shape[2:]
    fits = (
        len(weight) == len(spec.parameter_shape)
        and weight[2:] == body
        and 0 not in weight
        and weight[0] % groups == 0
        and depthwise == (weight[1] * groups, taps, multiplier)
        and taps > 1
    )
    if fits:
        return replace(spec, in_channels=depthwise[0], out_channels=weight[0])
    per_group = "I" if groups == 1 else f"I/{groups}"
    of_w = ", ".join(map(str, ("O", per_group, *body)))
    received = f"received W {tuple(weight)} and D {tuple(depthwise)}, of {spec}"
    if taps == 1:
        raise ValueError(f"a kernel of one tap has no D, which must be None; {received}.")
    divisible = "" if groups == 1 else f", O and I divisible by {groups}"
    raise ValueError(
        f"W and D must have the shapes ({of_w}) and (I, {taps}, {multiplier}){divisible}, such as "
        f"{spec.parameter_shape} and {spec.depthwise_shape}; {received}."
    )
