"""Whole models in PyTorch: over-parameterize every convolution, and fold all of them again.

A layer is converted where it stands, by its class and parameters, as PyTorch's own lazy layers are
when they take their shape. So it stays the same object: wherever it is used, shared, hooked or
kept, that holds on.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from doconv_core.kinds.bsconv_model import FoldReport, as_form
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import ConvSpec, as_integer
from doconv_core.models.report import (
    NOT_SELECTED,
    TIED,
    Change,
    Converted,
    Left,
    Report,
    Selection,
    Where,
    place,
)
from doconv_torch.batchnorm import fuse_batchnorms
from doconv_torch.bsconv_convert import fold_bsconvs, plan_bsconvs
from doconv_torch.copying import copied, ordinary_tensors
from doconv_torch.do_conv import _DOConv, check_foldable
from doconv_torch.surgery import fold_layer, over_parameterize_layer
from doconv_torch.view import (
    REPLACEMENTS,
    check_model,
    count_parameters,
    is_bound,
    is_convolution,
    is_plain,
    kind_of,
    memory,
    obstacle,
    owners,
    spec_of,
)

_DO_CONVS = tuple(cls.__name__ for cls in REPLACEMENTS.values())

BOUND = "its weight has hooks, or a class of its own, for its present shape: S = M would keep it"


def over_parameterize(
    model: nn.Module,
    *,
    where: Where = None,
    depth_multiplier: int | None = None,
    inplace: bool = False,
) -> Converted:
    """Return the model with DO layers for its convolutions, and a report of what was done.

    Every `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, exactly, of more than one tap becomes the DO
    layer of the same function: outputs are the same, bit for bit in float32. What is left as it is,
    is in the report with its reason: subclasses, transposed, lazy, quantized and parametrized
    layers, and weights tied to something else.

    where: which of them; a glob pattern on the path or several, a type, or a predicate on (path,
    layer), as `doconv_core.Selection` takes it. A layer that is at several paths is asked for each.
    depth_multiplier: S, for all of them; None for each one's number of taps M.
    inplace: convert the model itself; otherwise a deep copy is, and `model` stays as it was.

    In place, layers stay the same objects, with their hooks, names, order and attributes; where
    `S == M`, so do their weights, and optimizers go on. Otherwise W is a new parameter, without
    gradient. D is new, last of its layer's, on W's device, and trainable where W is: give it to an
    optimizer that was made before. Shared layers stay shared, tied weights tied. A copy has its
    parameters' attributes, but not their own hooks (`Tensor.register_hook`).
    Raises TypeError for what is not a module, cannot be copied, or is wrapped in DDP or FSDP, and
    for a `depth_multiplier` that is no integer; ValueError, with the layer's path, for one below
    its taps; before anything is changed. Warns where `where` matches nothing.
    """
    check_model(model)
    if depth_multiplier is not None:
        depth_multiplier = as_integer("depth_multiplier", depth_multiplier)
    selection = Selection(where)
    chosen, left = _choose(model, selection, depth_multiplier)
    selection.warn()
    before = count_parameters(model)
    changed = [
        Change(path, kind_of(layer), REPLACEMENTS[type(layer)].__name__)
        for path, layer in model.named_modules()
        if layer in chosen
    ]
    specs = {path: chosen[layer] for path, layer in model.named_modules() if layer in chosen}
    with ordinary_tensors():
        target = model if inplace else copied(model)
        layers = dict(target.named_modules())
        parameters: dict[int, tuple[Tensor, ...]] = {}
        for path, spec in specs.items():
            over_parameterize_layer(layers[path], spec, parameters)
    report = Report(
        "over-parameterized", tuple(changed), tuple(left), before, count_parameters(target)
    )
    return Converted(target, report)


def fold(
    model: nn.Module, *, fuse_batchnorm: bool = False, bsconv: str = "keep", inplace: bool = False
) -> Converted:
    """Return the model with ordinary convolutions for its DO and BSConv layers, and a report.

    Every DO layer becomes a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, exactly, with the composed
    kernel; nothing of this package is left in the model, in its state dict or in its file. There
    may be none: folding twice is the same as once.

    bsconv: what BSConv layers become. "keep": a `torch.nn.Sequential` of the same parts. "merge":
    one of a pointwise and a depthwise convolution, with batch norms in the former. "dense": one
    convolution. Each is exact, but none is always fastest: the report, a `FoldReport`, has the cost
    of all three. Merging makes two pointwise convolutions one with more operations where the
    channels between are few; dense has about as many times more as the kernel has taps.

    fuse_batchnorm: also fold each batch norm in evaluation mode into the convolution before it,
    where that convolution's output goes nowhere else; `torch.nn.Identity` takes its place. Where it
    stands is found by symbolic tracing, which runs the model's Python code. Batch norms that are
    left are in the report with the reason.
    inplace: convert the model itself; otherwise a deep copy is, and `model` stays as it was.

    In place, layers stay the same objects, with their hooks, and where `S == M` so do their
    weights. A copy, and a weight of another shape than W, has no hooks of its own.
    Raises NotFoldable, with the layer's path, for a DO or BSConv layer that no ordinary one
    computes exactly, ValueError for another form of BSConv, and TypeError as `over_parameterize`
    does, before anything is changed. Warns of a model in training mode whose layers, such as
    dropout, then vary from call to call.
    """
    check_model(model)
    form = as_form(bsconv)
    paths = _foldable(model)
    with ordinary_tensors():
        plan = plan_bsconvs(model, form)
    _warn_of_training(model)
    before = count_parameters(model)
    changed, left = [], []
    with ordinary_tensors():
        target = model if inplace else copied(model, _given_up(model))
        layers = dict(target.named_modules())
        held, weights = owners(target), {}
        for path in paths:
            kind = kind_of(layers[path])
            fold_layer(layers[path], held, weights)
            changed.append(Change(path, kind, kind_of(layers[path])))
        changed += fold_bsconvs(layers, plan)
        left += plan.left
        if fuse_batchnorm:
            fused, kept = fuse_batchnorms(target)
            changed, left = [*changed, *fused], [*left, *kept]
    order = {path: n for n, path in enumerate(layers)}
    there = dict(target.named_modules())  # parts of a BSConv that is dense now are not
    changed = sorted((c for c in changed if c.path in there), key=lambda c: order[c.path])
    parts = tuple(changed), tuple(left), before, count_parameters(target)
    if plan.choices:
        return Converted(target, FoldReport("folded", *parts, form, plan.choices))
    return Converted(target, Report("folded", *parts))


def _choose(
    model: nn.Module, selection: Selection, depth_multiplier: int | None
) -> tuple[dict[nn.Module, ConvSpec], list[Left]]:
    """Return the layers to replace, with their sizes, and those to leave, in the model's order."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_convolution(module):
            paths.setdefault(module, []).append(path)
    chosen, reasons = {}, {}
    for layer, places in paths.items():
        reason = obstacle(layer)
        if reason is None and not any([selection(path, layer) for path in places]):
            reason = NOT_SELECTED
        if reason is None:
            chosen[layer] = spec_of(layer)
        else:
            reasons[layer] = reason
    held = owners(model)
    for layer, spec in list(chosen.items()):
        if any(
            name != "weight" or weight is not layer.weight or chosen.get(other) != spec
            for other, name, weight in held[memory(layer.weight)]
        ):
            reasons[layer] = TIED
    for layer in [layer for layer in chosen if layer not in reasons]:
        chosen[layer] = spec = _spec(paths[layer][0], layer, depth_multiplier)
        if spec.depth_multiplier != spec.taps and is_bound(layer.weight):
            reasons[layer] = BOUND
    left = [
        Left(paths[layer][0], kind_of(layer), reasons[layer]) for layer in paths if layer in reasons
    ]
    return {layer: spec for layer, spec in chosen.items() if layer not in reasons}, left


def _spec(path: str, layer: nn.Module, depth_multiplier: int | None) -> ConvSpec:
    try:
        return spec_of(layer, depth_multiplier)
    except ValueError as error:
        raise ValueError(f"{place(path)}: {error}") from None


def _foldable(model: nn.Module) -> list[str]:
    """Return the paths of the DO layers; NotFoldable names one that cannot be folded."""
    paths = []
    for path, module in model.named_modules():
        if isinstance(module, _DOConv):
            try:
                check_foldable(module)
            except NotFoldable as error:
                raise NotFoldable(f"{place(path)}: {error}") from None
            paths.append(path)
        elif isinstance(module, torch.jit.ScriptModule) and kind_of(module) in _DO_CONVS:
            raise NotFoldable(
                f"{place(path)} is a {kind_of(module)} that was compiled to TorchScript; fold the "
                "model first, and compile it afterwards."
            )
    return paths


def _given_up(model: nn.Module) -> list[Tensor]:
    """Return every D that no layer of the folded model has."""
    return [
        parameter
        for users in owners(model).values()
        for _, _, parameter in users
        if is_plain(parameter)
        and all(isinstance(m, _DOConv) and name == "depthwise_weight" for m, name, _ in users)
    ]


def _warn_of_training(model: nn.Module) -> None:
    """Warn where a comparison with the folded model would tell of the mode and not of folding."""
    modules = model.named_modules()
    varying = [f"{place(path)} ({kind_of(m)})" for path, m in modules if _varies(m)]
    if varying:
        others = f" and {len(varying) - 1} others" if len(varying) > 1 else ""
        warnings.warn(
            f"the model is in training mode, where {varying[0]}{others} depend on the batch or on "
            "chance; fold, compare and export it after model.eval().",
            UserWarning,
            stacklevel=3,
        )


def _varies(module: nn.Module) -> bool:
    """Return whether a module in training mode depends on the batch or on chance."""
    if not module.training:
        return False
    rates = (getattr(module, name, 0) for name in ("p", "dropout", "drop_prob"))
    return isinstance(module, (_BatchNorm, nn.RReLU)) or any(
        isinstance(rate, float) and rate > 0 for rate in rates
    )
