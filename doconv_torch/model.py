"""Whole models in PyTorch: over-parameterize every convolution, and fold all of them again.

A layer is converted where it stands, by its class and parameters, as PyTorch's own lazy layers are
when they take their shape. So it stays the same object: wherever it is used, shared, hooked or
kept, that holds on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

from torch import nn

from doconv_core.kinds.bsconv import KERNEL_SIZES, MIN_MID_CHANNELS, P, replacement
from doconv_core.models import convert
from doconv_core.models.deploy import deploy as deploy_model
from doconv_core.models.fold import fold as fold_layers
from doconv_core.models.report import Converted
from doconv_core.models.select import Where
from doconv_torch import former_parameters
from doconv_torch.bsconv import BN_OPTIONS
from doconv_torch.composed import ComposedConv, Ordinary
from doconv_torch.kinds import LAYER_KINDS
from doconv_torch.surgery import ordinary_tensors
from doconv_torch.verify import verify
from doconv_torch.view import View

Model = TypeVar("Model", bound=nn.Module)


def over_parameterize(
    model: Model,
    *,
    kind: str = "doconv",
    where: Where = None,
    inplace: bool = False,
    **options: Any,
) -> Converted[Model]:
    """Return the model with DO layers for its convolutions, and a report of what was done.

    Every `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, exactly, of more than one tap becomes the DO
    layer of the same function: outputs are the same, bit for bit in float32. What is left as it is,
    is in the report with its reason: subclasses, transposed, lazy, quantized and parametrized
    layers, weights tied to something else, and weights that the model's own code is seen to read,
    when it is traced. The report also names methods, such as `fuse`, that are for the folded model.

    where: which of them; a glob pattern on the path or several, a type, or a predicate on (path,
    layer), as `doconv_core.Selection` takes it. A layer that is at several paths is asked for each.
    kind: what they become; "doconv", or another registered kind that changes no output. options:
    the kind's, for all of them; of "doconv" depth_multiplier, S, or None for each one's taps M.
    "repvgg", "mobileone" (with `branches`, 4), "acnet", "dbb", "qarepvgg", "replknet" (with
    `small`, 5) and "unireplknet" take each convolution with the batch norm that alone follows it:
    parallel branches with a batch norm in each, whose sum in evaluation mode is the same.
    The trained kernel and batch norm go on in the first; a `torch.nn.Identity` takes its place.
    inplace: convert the model itself; otherwise a deep copy is, and `model` stays as it was.

    In place, layers stay the same objects, with their hooks, names, order and attributes; where
    `S == M`, so do their weights, and optimizers go on. Otherwise W is a new parameter, without
    gradient. D is new, last of its layer's, on W's device, and trainable where W is: give it to an
    optimizer that was made before, which is warned of if it takes steps without. Shared layers stay
    shared, tied weights tied. A copy has its parameters' attributes, but not their own hooks
    (`Tensor.register_hook`).
    Raises TypeError for what is not a module, cannot be copied, or is wrapped in DDP or FSDP, and
    for a `depth_multiplier` that is no integer; ValueError, with the layer's path, for one below
    its taps; before anything is changed. Warns where `where` matches nothing.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3), torch.nn.ReLU())
    >>> model, report = over_parameterize(net)
    >>> type(model[0]).__name__, report.changed[0].after
    ('DOConv2d', 'DOConv2d')
    """
    view = View(model)
    known = former_parameters.of(model, inplace)
    with ordinary_tensors():
        converted = convert.over_parameterize(
            view, LAYER_KINDS, kind, options, where=where, inplace=inplace
        )
    return former_parameters.watched(converted, known, "over_parameterize")


@overload  # a layer itself becomes another
def fold(
    model: ComposedConv[Ordinary],
    *,
    form: str | Mapping[str, str] | None = None,
    fuse_batchnorm: bool = False,
    merge_branches: bool = False,
    inplace: bool = False,
) -> Converted[Ordinary]: ...
@overload
def fold(
    model: Model,
    *,
    form: str | Mapping[str, str] | None = None,
    fuse_batchnorm: bool = False,
    merge_branches: bool = False,
    inplace: bool = False,
) -> Converted[Model]: ...
def fold(
    model: Model,
    *,
    form: str | Mapping[str, str] | None = None,
    fuse_batchnorm: bool = False,
    merge_branches: bool = False,
    inplace: bool = False,
) -> Converted[Any]:
    """Return the model with ordinary convolutions for its DO and BSConv layers, and a report.

    Every DO layer becomes a `torch.nn.Conv1d`, `Conv2d` or `Conv3d`, exactly, with the composed
    kernel; nothing of this package is left in the model, in its state dict or in its file. There
    may be none: folding twice is the same as once.

    Layers of branches, `NormedConv1d` to `NormedConv3d`, become one convolution with bias, of
    the same function in evaluation mode; in training mode they raise NotFoldable.

    form: what layers become whose kind leaves a choice: a name, for every kind that has a form of
    it, or a mapping from kinds to names, such as `{"bsconv": "dense"}`. Of BSConvs, "keep" (None):
    a `torch.nn.Sequential` of the same parts; "merge": one of a pointwise and a depthwise
    convolution, with batch norms in the former; "dense": one convolution. Each is exact, but none
    is always fastest: the report, a `FoldReport`, has the cost of all three. Merging makes two
    pointwise convolutions one with more operations where the channels between are few; dense has
    about as many times more as the kernel has taps.

    fuse_batchnorm: also fold each batch norm in evaluation mode into the convolution, transposed
    convolution or linear layer before it, where that layer's output goes nowhere else, or into the
    convolution behind it, where that pads with no zeros. `torch.nn.Identity` takes its place, or a
    `torch.nn.Sequential` of what a batch norm of a class of its own has behind, as an activation.
    Where it stands is found by symbolic tracing, which runs the model's Python code. Batch norms
    that are left are in the report with the reason.
    merge_branches: also make one convolution of branches that compute what one does in evaluation
    mode: sums of convolutions, batch norms, identities, scales and average poolings of one value,
    as RepVGG, MobileOne and others train, and of convolutions in a row. Each is tried on random
    values before, in float64, and none costs more than before. A module that is no more than one
    becomes a `Conv2d`; one that has layers behind, a `torch.nn.Sequential`; any other one, a
    `torch.fx.GraphModule` of its own code. What looks like branches and is left is in the report
    with the reason. It comes before `fuse_batchnorm`.
    inplace: convert the model itself; otherwise a deep copy is, and `model` stays as it was.

    In place, layers stay the same objects, with their hooks, and where `S == M` so do their
    weights. A copy, and a weight of another shape than W, has no hooks of its own.
    Raises NotFoldable, with the layer's path, for a DO or BSConv layer that no ordinary one
    computes exactly, whose kernel is not finite, or whose weight the model's code is seen to read;
    ValueError for a form that there is not, and TypeError as `over_parameterize` does; before
    anything is changed. Warns of a model in training mode whose layers, such as dropout, then vary
    from call to call.

    >>> net = torch.nn.Sequential(DOConv2d(8, 4, 3), torch.nn.ReLU())
    >>> model, report = fold(net)
    >>> model[0]
    Conv2d(8, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    view = View(model)
    known = former_parameters.of(model, inplace)
    with ordinary_tensors():
        converted = fold_layers(
            view, LAYER_KINDS, form=form, fuse_batchnorm=fuse_batchnorm,
            merge_branches=merge_branches, inplace=inplace,
        )  # fmt: skip
    return former_parameters.watched(converted, known, "fold")


@overload
def deploy(
    model: ComposedConv[Ordinary],
    inputs: Any = None,
    *,
    form: str | Mapping[str, str] | None = None,
) -> Converted[Ordinary]: ...
@overload
def deploy(
    model: Model, inputs: Any = None, *, form: str | Mapping[str, str] | None = None
) -> Converted[Model]: ...
def deploy(
    model: Model, inputs: Any = None, *, form: str | Mapping[str, str] | None = None
) -> Converted[Any]:
    """Return a copy of a trained model as it is to be deployed, and a report of what was done.

    In the order that is right: `fold`; then the model's own methods `fuse`, `reparameterize` and
    `switch_to_deploy`, as timm, RepVGG and MobileOne have them, which read weights; then the batch
    norms that are left, as `fold(fuse_batchnorm=True)`; and then `verify` against the model.

    inputs: as `verify` takes them, by which the report, a `DeployReport`, says how far the outputs
    differ; it says so too where they were not given. form: as in `fold`.
    Raises ValueError for a model in training mode, NotFoldable as `fold` does and where a method of
    the model raises, TypeError as `fold` does. Warns where outputs differ by more than rounding.

    >>> net = torch.nn.Sequential(DOConv2d(8, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    >>> model, report = deploy(net, torch.zeros(1, 8, 5, 5))
    >>> model[1], report.difference.absolute < 1e-6
    (Identity(), True)
    """
    view = View(model)
    if getattr(model, "training", False):  # which a frozen script lacks
        raise ValueError(
            "deploy takes a model in evaluation mode; received one in training mode. Call "
            "model.eval() first."
        )
    with ordinary_tensors():
        return deploy_model(view, LAYER_KINDS, verify, inputs, form=form)


def to_bsconv(
    model: Model,
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
) -> Converted[Model]:
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

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3), torch.nn.ReLU())
    >>> model, report = to_bsconv(net)
    >>> type(model[0]).__name__
    'BSConvU2d'
    """
    view = View(model)
    options = replacement(
        variant, kernel_sizes, p=p, min_mid_channels=min_mid_channels, with_bn=with_bn,
        bn_options=bn_options, allowed=BN_OPTIONS, start=start,
    )  # fmt: skip
    known = former_parameters.of(model, inplace)
    with ordinary_tensors():
        converted = convert.replace(
            view, LAYER_KINDS, "bsconv", options, where=where, inplace=inplace
        )
    return former_parameters.watched(converted, known, "to_bsconv")
