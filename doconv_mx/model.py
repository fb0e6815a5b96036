"""Whole Gluon models: over-parameterized, folded, and with blueprint separable convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from mxnet.gluon import Block

from doconv_core.kinds.bsconv import KERNEL_SIZES, MIN_MID_CHANNELS, P, replacement
from doconv_core.models import convert
from doconv_core.models.deploy import deploy as deploy_model
from doconv_core.models.fold import fold as fold_layers
from doconv_core.models.report import Converted
from doconv_core.models.select import Where
from doconv_mx.bsconv import BN_OPTIONS
from doconv_mx.kinds import LAYER_KINDS
from doconv_mx.ordinary import require_values
from doconv_mx.private import is_dense
from doconv_mx.tree import parameters
from doconv_mx.verify import verify
from doconv_mx.view import View

Model = TypeVar("Model", bound=Block)


def over_parameterize(
    model: Model,
    *,
    kind: str = "doconv",
    where: Where = None,
    inplace: bool = False,
    **options: Any,
) -> Converted[Model]:
    """Make the model's convolutions DO-Conv layers that compute the same; return it and a report.

    model: any block; its `nn.Conv1D`, `Conv2D` and `Conv3D` of more than one tap are meant, at any
    depth, initialized or not, and the convolutions in the graphs of `SymbolBlock`s. where: which of
    them, as in `doconv_core.Selection`; paths are those of `save_parameters`, and of a layer in
    several places one of them is enough. kind: what they become; "doconv", or another registered
    kind that changes no output. options: the kind's, for all of them; of "doconv" depth_multiplier,
    S, or None for each layer's taps M. inplace: change the model itself, not a copy; then a layer
    stays the object it was, and where `S == M` its weight too.
    "repvgg", "mobileone" (with `branches`, 4), "acnet", "dbb", "qarepvgg", "replknet" (with
    `small`, 5) and "unireplknet" take each convolution with the batch norm that alone follows it:
    parallel branches with a batch norm in each, whose sum in inference is the same. The trained
    kernel and batch norm go on in the first; an `nn.Dropout` of rate 0 takes its place.
    The output does not change, in float32 where `S == M` not by one bit. What the layers share
    stays shared; names, order, contexts, dtypes, `grad_req`, multipliers, hooks and hybridization
    are kept. Layers that are left are in the report, with the reason; also those whose weight the
    model's code is seen to read, and methods, such as `fuse`, that are for the folded model. Warns
    of a `where` that selects nothing. Raises, before anything is changed, TypeError for what is not
    a block, cannot be copied or is no selection; ValueError, by path, for a depth multiplier below
    a layer's taps.

    >>> net = mx.gluon.nn.HybridSequential()
    >>> net.add(mx.gluon.nn.Conv2D(8, 3, in_channels=3), mx.gluon.nn.Activation("relu"))
    >>> net.initialize()
    >>> model, report = over_parameterize(net)
    >>> model[0]
    DOConv2D(3 -> 8, kernel_size=(3, 3), stride=(1, 1), depth_multiplier=9)
    >>> print(report)
    over-parameterized 1 layer, left 0; parameters: 224 before, 467 after (+108.48%)
      Conv2D -> DOConv2D (1)
        0
    """
    return convert.over_parameterize(
        View(model), LAYER_KINDS, kind, options, where=where, inplace=inplace
    )


def fold(
    model: Model,
    *,
    form: str | Mapping[str, str] | None = None,
    fuse_batchnorm: bool = False,
    merge_branches: bool = False,
    inplace: bool = False,
) -> Converted[Model]:
    """Make the model's DO-Conv and BSConv layers ordinary ones that compute the same; return it and
    a report.

    form: what layers become whose kind leaves a choice: a name, for every kind that has a form of
    it, or a mapping from kinds to names, such as `{"bsconv": "dense"}`. Of BSConvs, "keep" (None):
    an `nn.HybridSequential` of the same parts; "merge": one of a pointwise and a depthwise
    convolution, with batch norms in the former, for inference; "dense": one convolution. Each is
    exact, but none is always fastest: the report, a `FoldReport`, has the cost of all three.
    Merging makes two pointwise convolutions one with more operations where the channels between
    are few; dense has about as many times more as the kernel has taps.
    Layers of branches, `NormedConv1D` to `NormedConv3D`, become one convolution with bias, of
    the same function in inference.
    fuse_batchnorm: also make batch norms part of the convolution, transposed convolution or dense
    layer before them, or of a convolution behind them that pads with nothing, for inference: in
    training a batch norm computes something else. merge_branches: refused with NotImplementedError,
    which says what to do instead; in PyTorch it makes one convolution of branches. inplace: change
    the model itself, not a copy.
    Nothing of this package is left in the model, its parameters or its files. The kernels are new
    parameters, for which a trainer is to be created anew. What is shared stays shared; names,
    order, contexts, dtypes, `grad_req`, multipliers, hooks and hybridization are kept. A batch norm
    that cannot be fused is left as it is, and the report says why.
    Raises, before anything is changed, TypeError for what is not a block or cannot be copied;
    NotFoldable, by path, for a layer that no ordinary one computes exactly, whose weight a forward
    is seen to read, or whose kernel is not finite; ValueError for another
    form of BSConv, and, by path, for a layer that has no values for all of its parameters, which a
    BSConv that is kept need not have.

    >>> net = mx.gluon.nn.HybridSequential()
    >>> net.add(DOConv2D(3, 8, 3), mx.gluon.nn.BatchNorm(in_channels=8))
    >>> net.initialize()
    >>> model, report = fold(net, fuse_batchnorm=True)
    >>> model[0], model[1]
    (Conv2D(3 -> 8, kernel_size=(3, 3), stride=(1, 1)), Dropout(p = 0, axes=()))
    >>> verify(net, model, mx.nd.ones((1, 3, 5, 5))).relative < 1e-5
    True
    """
    return fold_layers(
        View(model),
        LAYER_KINDS,
        form=form,
        fuse_batchnorm=fuse_batchnorm,
        merge_branches=merge_branches,
        inplace=inplace,
    )


def deploy(
    model: Model, inputs: Any = None, *, form: str | Mapping[str, str] | None = None
) -> Converted[Model]:
    """Return a copy of a trained model as it is to be deployed, and a report of what was done.

    In the order that is right: `fold`; then the methods `fuse`, `reparameterize` and
    `switch_to_deploy` that the model's own blocks have, as those of RepVGG and MobileOne, which
    read weights; then the batch norms that are left, as `fold(fuse_batchnorm=True)`; and then
    `verify` against the model. A block that such a method returns takes its block's place, and is
    hybridized as that was; no graph that was cached before stays.

    inputs: as `verify` takes them, by which the report, a `DeployReport`, says how far the outputs
    differ; it says so too where they were not given. form: as in `fold`.
    Raises ValueError for a model that has no values yet, NotFoldable as `fold` does and where a
    method of the model raises or returns what cannot take the place, TypeError as `fold` does.
    Warns where outputs differ by more than rounding.

    >>> net = mx.gluon.nn.HybridSequential()
    >>> net.add(DOConv2D(3, 8, 3), mx.gluon.nn.BatchNorm(in_channels=8))
    >>> net.initialize()
    >>> model, report = deploy(net, mx.nd.ones((1, 3, 5, 5)))
    >>> model[1], report.difference.absolute < 1e-6
    (Dropout(p = 0, axes=()), True)
    """
    view = View(model)
    require_values(filter(is_dense, parameters(model)), "deploy")
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

    Every `nn.Conv1D`, `Conv2D` and `Conv3D`, exactly, with groups=1 and one of the kernel sizes,
    becomes the BSConv with its arguments. The function changes: train the model on. What is left as
    it is, is in the report with its reason.

    variant: "u" or "s". kernel_sizes: which; an entry that is an integer stands for that size in
    each number of dimensions. p, min_mid_channels, with_bn, bn_options: as the layers take them.
    where, inplace: as in `over_parameterize`, which comes after this one.
    start: "weights" begins with the BSConv that is nearest to each trained kernel, and the report
    says how much of its variance that explains; "random" throws the kernels away, and does with a
    model that has no values yet.

    In place, layers stay the same objects, with their hooks, names and attributes, and so do
    biases; all other parameters are new: create the trainer anew.
    Raises TypeError and ValueError for arguments that give no layer, and, with its path, for a
    kernel that is not finite or has no values yet; before anything is changed. Warns where `where`
    matches nothing.
    Source: BSConv, arXiv 2003.13549; the start from trained weights is this package's own.

    >>> net = mx.gluon.nn.HybridSequential()
    >>> net.add(mx.gluon.nn.Conv2D(8, 3, in_channels=8, padding=1))
    >>> net.initialize()
    >>> model, report = to_bsconv(net, "s", p=0.5)
    >>> len(model[0]), report.parameters_after  # two pointwise, one depthwise
    (3, 144)
    """
    view = View(model)
    options = replacement(
        variant, kernel_sizes, p=p, min_mid_channels=min_mid_channels, with_bn=with_bn,
        bn_options=bn_options, allowed=BN_OPTIONS, start=start,
    )  # fmt: skip
    return convert.replace(view, LAYER_KINDS, "bsconv", options, where=where, inplace=inplace)
