"""Whole models and BSConv in PyTorch: convolutions become BSConvs, and BSConvs fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from doconv_core.kinds.bsconv import MIN_MID_CHANNELS, P
from doconv_core.kinds.bsconv_model import (
    BIAS_COMPUTED,
    GROUPED,
    KERNEL_SIZES,
    OVER_PARAMETERIZED,
    PART,
    SHARES,
    WEIGHT_BOUND,
    BSConvReport,
    Explained,
    other_size,
    replacement,
)
from doconv_core.models.report import (
    ALREADY,
    NOT_SELECTED,
    ONE_TAP,
    Change,
    Converted,
    Left,
    Selection,
    Where,
    place,
)
from doconv_torch.bsconv import LAYERS
from doconv_torch.bsconv_layer import BN_OPTIONS, _BSConv
from doconv_torch.copying import copied, ordinary_tensors
from doconv_torch.surgery import become
from doconv_torch.view import (
    check_model,
    count_parameters,
    is_bound,
    is_convolution,
    kind_of,
    memory,
    obstacle,
    owners,
)


def to_bsconv(
    model: nn.Module,
    variant: str = "u",
    *,
    kernel_sizes: Any = KERNEL_SIZES,
    p: float = P,
    min_mid_channels: int = MIN_MID_CHANNELS,
    with_bn: bool = False,
    bn_options: Mapping[str, Any] | None = None,
    where: Where = None,
    start: str = "weights",
    inplace: bool = False,
) -> Converted:
    """Return the model with BSConvs for its convolutions, and a report of what was done.

    Every `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, exactly, with groups=1 and one of the kernel
    sizes, becomes the BSConv with its arguments. The function changes: train the model on. What is
    left as it is, is in the report with its reason.

    variant: "u" or "s". kernel_sizes: which; an entry that is an integer stands for that size in
    each number of dimensions. p, min_mid_channels, with_bn, bn_options: as the layers take them.
    where, inplace: as in `over_parameterize`, which comes after this one.
    start: "weights" begins with the BSConv that is nearest to each trained kernel, and the report
    says how much of its variance that explains; "random" throws the kernels away.

    In place, layers stay the same objects, with their hooks, names and attributes, and so do
    biases; all other parameters are new: give them to an optimizer that was made before.
    Raises TypeError and ValueError for arguments that give no layer, and for a kernel that is not
    finite, with its path; before anything is changed. Warns where `where` matches nothing.
    Source: BSConv, arXiv 2003.13549; the start from trained weights is this package's own.
    """
    check_model(model)
    sizes, options = replacement(
        variant,
        kernel_sizes,
        p=p,
        min_mid_channels=min_mid_channels,
        with_bn=with_bn,
        bn_options=bn_options,
        allowed=BN_OPTIONS,
        start=start,
    )
    selection = Selection(where)
    chosen, left = _choose(model, selection, sizes)
    selection.warn()
    before = count_parameters(model)
    with ordinary_tensors():
        made = {path: _made(path, layer, variant, options) for path, layer in chosen.items()}
        changed = [Change(path, kind_of(chosen[path]), kind_of(new)) for path, new in made.items()]
        target = model if inplace else copied(model)
        layers = dict(target.named_modules())
        for path, new in made.items():
            _replace(layers[path], new)
    found = [(path, new.explained) for path, new in made.items()]
    explained = tuple(Explained(path, share) for path, share in found if share is not None)
    after = count_parameters(target)
    report = BSConvReport("replaced", tuple(changed), tuple(left), before, after, explained)
    return Converted(target, report)


def _choose(
    model: nn.Module, selection: Selection, sizes: frozenset[tuple[int, ...]]
) -> tuple[dict[str, Any], list[Left]]:
    """Return the layers to replace, by path, and those to leave, in the model's order."""
    parts = {
        part for module in model.modules() if isinstance(module, _BSConv)
        for part in module.modules()
    }  # fmt: skip
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_convolution(module):
            paths.setdefault(module, []).append(path)
    held, chosen, left = owners(model), {}, []
    for layer, places in paths.items():
        reason = PART if layer in parts else _obstacle(layer, sizes)
        if reason is None and not any([selection(path, layer) for path in places]):
            reason = NOT_SELECTED
        if reason is None and len(held[memory(layer.weight)]) > 1:
            reason = SHARES
        if reason is None:
            chosen[places[0]] = layer
        else:
            left.append(Left(places[0], kind_of(layer), reason))
    return chosen, left


def _obstacle(layer: Any, sizes: frozenset[tuple[int, ...]]) -> str | None:
    """Return why a convolution cannot become a BSConv; None where it can."""
    reason = obstacle(layer)
    if reason == ALREADY:
        return OVER_PARAMETERIZED
    if reason not in (None, ONE_TAP):
        return reason
    if layer.kernel_size not in sizes:
        return other_size(layer.kernel_size)
    if layer.groups != 1:
        return GROUPED
    if "bias" in vars(layer):
        return BIAS_COMPUTED
    return WEIGHT_BOUND if is_bound(layer.weight) else None


def _made(path: str, layer: Any, variant: str, options: dict[str, Any]) -> Any:
    try:
        return LAYERS[variant, type(layer)].from_conv(layer, **options)
    except ValueError as error:
        raise ValueError(f"{place(path)}: {error}") from None


def _replace(layer: Any, new: Any) -> None:
    """Make a convolution the BSConv, which keeps its bias."""
    if layer.bias is not None:
        new.depthwise.bias = layer.bias
    become(layer, new)
