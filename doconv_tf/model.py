"""Whole Keras models: over-parameterize every convolution, fold all of them again.

A layer is converted where it stands, so that it stays the same object: wherever it is used, in a
functional model's graph, in lists and attributes, in wrappers or by several models, that holds on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import keras

from doconv_core.kinds.bsconv import KERNEL_SIZES, MIN_MID_CHANNELS, P, replacement
from doconv_core.models import convert
from doconv_core.models.deploy import deploy as deploy_model
from doconv_core.models.fold import fold as fold_layers
from doconv_core.models.report import Converted
from doconv_core.models.select import Where
from doconv_tf.bsconv import BN_OPTIONS
from doconv_tf.former_variables import Former
from doconv_tf.kinds import LAYER_KINDS
from doconv_tf.verify import verify
from doconv_tf.view import View

Model = TypeVar("Model", bound=keras.Layer)


def over_parameterize(
    model: Model,
    *,
    kind: str = "doconv",
    where: Where = None,
    inplace: bool = False,
    **options: Any,
) -> Converted[Model]:
    """Return the model with DO layers for its convolutions, and a report of what was done.

    model: functional, sequential, subclassed, or any layer; built. Its layers that are exactly
    Keras' `Conv1D` to `Conv3D`, `DepthwiseConv1D` and `2D`, `SeparableConv1D` and `2D`, at any
    depth, become the DO layers of the same function, where their (depthwise) kernel has more than
    one tap: outputs are the same, in float32 where `S == M` bit for bit. Layers that are left are
    in the report, with the reason.

    where: which of them; a glob pattern on the path or several, a type, or a predicate on (path,
    layer), as `doconv_core.Selection` takes it. A path is made of the layers' names, which need not
    be unique in a subclassed model; a pattern then means all of its path. A layer that several
    layers hold is asked for by each path.
    kind: what they become; "doconv", or another registered kind that changes no output. options:
    the kind's, for all of them; of "doconv" depth_multiplier, S, or None for each one's taps M.
    "repvgg", "mobileone" (with `branches`, 4), "acnet", "dbb", "qarepvgg", "replknet" (with
    `small`, 5) and "unireplknet" take each convolution with the batch norm that alone follows it:
    parallel branches with a batch norm in each, whose sum in inference is the same.
    The trained kernel and batch norm go on in the first; a `keras.layers.Identity` takes its place.
    inplace: change the model itself, whose layers stay the objects they were; otherwise a copy is
    made, and `model` stays as it was.

    The model that is returned is to be compiled anew: what the former optimizer and compiled
    functions hold is the former variables. With `inplace` that goes for any other model with the
    same layers, which is no longer compiled either; and an optimizer that was built for variables
    which there are no more is warned of. Name, dtype policy, trainable flags, paths and order are
    kept.
    Raises TypeError for what is not a Keras layer, cannot be copied, or has a compiled function
    that would go on with the former layers; ValueError for what is not built, and, with the layer's
    path, for a `depth_multiplier` below its taps; before anything is changed. Warns where `where`
    matches nothing.

    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
    >>> trained, report = over_parameterize(model)
    >>> print(report)
    over-parameterized 1 layer, left 0; parameters: 112 before, 355 after (+216.96%)
      Conv2D -> DOConv2D (1)
        conv
    """
    view, former = View(model), Former(model, inplace)
    converted = convert.over_parameterize(
        view, LAYER_KINDS, kind, options, where=where, inplace=inplace
    )
    former.settle()
    return converted


def fold(
    model: Model,
    *,
    form: str | Mapping[str, str] | None = None,
    fuse_batchnorm: bool = False,
    merge_branches: bool = False,
    inplace: bool = False,
) -> Converted[Model]:
    """Return the model with ordinary layers for its DO and BSConv layers, and a report.

    Every DO layer becomes exactly the Keras layer that it stands in for, with the composed kernel;
    nothing of this package is left in the model, in its configuration or in its files, no
    orthonormality loss either. A model without such layers is returned as it is.

    Layers of branches, such as `NormedConv2D`, become one convolution with bias, of the same
    function in inference.

    form: what layers become whose kind leaves a choice: a name, for every kind that has a form of
    it, or a mapping from kinds to names, such as `{"bsconv": "dense"}`. Of BSConvs, "keep" (None):
    a `keras.Sequential` of the same parts; "merge": one of a pointwise and a depthwise convolution,
    with batch norms in the former; "dense": one convolution, and where it has zeros `around`, a
    `keras.Sequential` of zero padding and that. Each is exact, but none is always fastest: the
    report, a `FoldReport`, has the cost of all three. Merging makes two pointwise convolutions one
    with more operations where the channels between are few; dense has about as many times more as
    the kernel has taps.

    fuse_batchnorm: also make each batch norm a part of the convolution, transposed convolution or
    dense layer that it follows, where that layer's output goes nowhere else, or of the convolution
    that follows it, where that pads with no zeros, for inference; a `keras.layers.Identity` of the
    same name takes its place. What follows what is known in functional and sequential models, and
    in those inside one another, but not inside subclassed ones. Batch norms that are left are in
    the report, with the reason.
    merge_branches: also make one convolution of branches that compute what one does in inference:
    sums of convolutions, batch norms, identities, scales and average poolings of one value, as
    RepVGG, MobileOne and others train, and of convolutions in a row. They are found in functional
    and sequential models, and in those inside one another, but not inside subclassed ones. Each is
    tried on random values before, in float64, and none costs more. The convolution has the name
    of the largest branch, and a `ZeroPadding` layer before it where no word of Keras' says how it
    pads. What looks like branches and is left is in the report with the reason. It comes before
    `fuse_batchnorm`.
    inplace, and what is kept: as in `over_parameterize`.
    Keras has no training mode, so that there is none to be warned of: compare with
    `training=False`, which is what calling, `predict` and `verify` do.

    Raises NotFoldable, with the layer's path, for a DO or BSConv layer that no ordinary one
    computes exactly, or whose kernel is not finite; ValueError for a form that there is not, and
    TypeError and ValueError as `over_parameterize` does; before anything is changed.

    >>> model = keras.Sequential([keras.Input((8, 8, 3)), DOConv2D(4, 3, name="conv")])
    >>> folded, report = fold(model)
    >>> report.changed
    (Change(path='conv', before='DOConv2D', after='Conv2D'),)
    """
    view, former = View(model), Former(model, inplace)
    converted = fold_layers(
        view,
        LAYER_KINDS,
        form=form,
        fuse_batchnorm=fuse_batchnorm,
        merge_branches=merge_branches,
        inplace=inplace,
    )
    former.settle()
    return converted


def deploy(
    model: Model, inputs: Any = None, *, form: str | Mapping[str, str] | None = None
) -> Converted[Model]:
    """Return a copy of a trained model as it is to be deployed, and a report of what was done.

    In the order that is right: `fold`; then the methods `fuse`, `reparameterize` and
    `switch_to_deploy` that the model's own layers have, as those of RepVGG and MobileOne, which
    read weights; then the batch norms that are left, as `fold(fuse_batchnorm=True)`; and then
    `verify` against the model. A layer that such a method returns, built, takes its layer's place,
    under its name. What a method leaves in no attribute is no part of the model any more.

    inputs: as `verify` takes them, by which the report, a `DeployReport`, says how far the outputs
    differ; it says so too where they were not given. form: as in `fold`.
    Raises NotFoldable as `fold` does, and where a method of the model raises, as Keras does where
    it gives a built layer new parts; TypeError and ValueError as `fold` does. Warns where outputs
    differ by more than rounding.

    >>> layers = [DOConv2D(4, 3), keras.layers.BatchNormalization()]
    >>> net = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    >>> model, report = deploy(net, keras.ops.zeros((1, 8, 8, 3)))
    >>> type(model.layers[1]).__name__, report.difference.absolute < 1e-6
    ('Identity', True)
    """
    return deploy_model(View(model), LAYER_KINDS, verify, inputs, form=form)


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

    Every `keras.layers.Conv1D`, `Conv2D` and `Conv3D`, exactly, with groups=1 and one of the kernel
    sizes, becomes the BSConv with its arguments. The function changes: train the model on. What is
    left as it is, is in the report with its reason.

    variant: "u" or "s". kernel_sizes: which; an entry that is an integer stands for that size in
    each number of dimensions. p, min_mid_channels, with_bn, bn_options: as the layers take them.
    where, inplace, and what is kept: as in `over_parameterize`, which comes after this one.
    start: "weights" begins with the BSConv that is nearest to each trained kernel, and the report
    says how much of its variance that explains; "random" throws the kernels away.

    Raises TypeError and ValueError for arguments that give no layer, for a model that is not built,
    and for a kernel that is not finite, with its path; before anything is changed. Warns where
    `where` matches nothing.
    Source: BSConv, arXiv 2003.13549; the start from trained weights is this package's own.

    >>> model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="conv")])
    >>> model, report = to_bsconv(model, "s")
    >>> report.changed
    (Change(path='conv', before='Conv2D', after='BSConvS2D'),)
    """
    view = View(model)
    options = replacement(
        variant, kernel_sizes, p=p, min_mid_channels=min_mid_channels, with_bn=with_bn,
        bn_options=bn_options, allowed=BN_OPTIONS, start=start,
    )  # fmt: skip
    former = Former(model, inplace)
    converted = convert.replace(view, LAYER_KINDS, "bsconv", options, where=where, inplace=inplace)
    former.settle()
    return converted
