"""What `make_models.py` says of the networks, beside the figures that it computes."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """What is told of some families. families: of each, the first name that `list_models` gives."""

    title: str
    text: str
    families: tuple[str, ...]


INTRODUCTION = """\
# Networks by name

This page was written by

```sh
python docs/make_models.py
```

A name stands for a network, which `doconv_core` describes as data. `list_models("cifar_resnet*")`
lists names, and `count(name)` and, in the shell, `doconv cost NAME` tell what a network costs
before it is built ([the command](command.md#cost)). What can stand behind a name:

- `_bsconvu` and `_bsconvs_pXdY`: its convolutions are blueprint separable (BSConv, arXiv
  2003.13549), of the variant U, or S with X/Y of the channels between its two pointwise
  convolutions.
- `_doconv`: its convolutions of more than one tap are over-parameterized (DO-Conv, arXiv
  2006.12030).

In the tables, costs are those of one image, of the size and for the classes that stand above:

- parameters: those that are trained.
- FLOPs: counted as in BSConv's tables. A convolution takes the entries of its weight at each
  position of its output, and a linear layer inputs times outputs; both one more for each output
  where they have a bias. A batch norm takes twice its inputs, a ReLU its outputs, a pooling its
  inputs. Other activations, the products of squeeze and excite and the sums of residuals take
  none.
- MACs: the multiply-accumulates of convolutions and linear layers alone, without biases.
- parameters, `_doconv`, and MACs of composing: what is trained with `_doconv` behind the name,
  and what composing all its kernels once takes, for a whole batch. Folded, it costs what the
  plain one does.

Accuracies are published ones, top-1 in percent ([sources](data/README.md)): on CIFAR100 those of
BSConv's tables; on ImageNet those of DO-Conv's table, where the reference is GluonCV's own
figure, the baseline the same network trained again, and DO-Conv that with `_doconv`. None was
trained for this page. Where a row has none, none was published there.
"""

PLOTS = """\
## Published accuracy against cost

BSConv's tables for CIFAR100, drawn of the same [data](data/README.md). Parameters and FLOPs are
the published ones; those that are counted here are the same to the two decimals that the tables
have.

![Accuracy on CIFAR100 against the number of parameters, on a logarithmic axis, for ResNets and wide
ResNets of depth 28 and 40, each with ordinary convolutions, BSConv-U and
BSConv-S.](models_parameters.svg)

![The same accuracies against FLOPs.](models_flops.svg)
"""

SECTIONS = (
    Section(
        "ResNets",
        """\
Units of two 3×3 convolutions, each with batch norm, and a shortcut that is added before the last
ReLU; where the width or the size changes, the shortcut is a 1×1 convolution with batch norm. As
in BSConv's tables, the network begins with a batch norm, its units are basic ones at every depth,
and its classifier is a 1×1 convolution. Source: arXiv 1512.03385.
""",
        ("resnet10", "cifar_resnet20"),
    ),
    Section(
        "Pre-activation ResNets",
        """\
The same with batch norm and ReLU before each convolution, not after it, and once more after the
last unit. A shortcut where the width or the size changes is a 1×1 convolution of what the unit's
first batch norm and ReLU give. Source: arXiv 1603.05027.
""",
        ("preresnet10", "cifar_preresnet20"),
    ),
    Section(
        "Wide ResNets",
        """\
Pre-activation ResNets for CIFAR, `cifar_wrnN_K`: of depth N, and K times as wide but for the
stem. K may be any number from 1; those that are listed are here. Source: arXiv 1605.07146.
""",
        ("cifar_wrn16_1",),
    ),
    Section(
        "MobileNetV1",
        """\
Units of a depthwise 3×3 and a pointwise convolution, each with batch norm and ReLU; with
`_bsconvu`, the pointwise one comes first, and one batch norm and ReLU follow both. `wX` and
`wXdY` are X and X/Y times the channels: any that leave each layer one. Source: arXiv 1704.04861.
""",
        ("mobilenetv1_w1", "cifar_mobilenetv1_w1"),
    ),
    Section(
        "MobileNetV2",
        """\
Units that expand the channels, convolve depthwise and project linearly, with ReLU6, and a
shortcut where neither width nor size change. They are BSConv-S units already: `_bsconvs_p1d6` has
the same layers, and only keeps the weights of the projections orthonormal in training. Widths as
in V1. Source: arXiv 1801.04381.
""",
        ("mobilenetv2_w1", "cifar_mobilenetv2_w1"),
    ),
    Section(
        "MobileNetV3",
        """\
The units of V2, some with 5×5 kernels, with hard swish, and with squeeze and excite, which scales
each channel by a factor from the means of all. `_bsconvs_p1d6` and widths as in V2. Source: arXiv
1905.02244.
""",
        (
            "mobilenetv3_small_w1",
            "mobilenetv3_large_w1",
            "cifar_mobilenetv3_small_w1",
            "cifar_mobilenetv3_large_w1",
        ),
    ),
    Section(
        "A plain network",
        """\
GluonCV's ResNet-18 without its shortcuts. Source: arXiv 2006.12030.
""",
        ("plain18",),
    ),
    Section(
        "GluonCV's ResNets and ResNeXts",
        """\
Under their names in GluonCV's model zoo, with exactly their parameters. Units are basic ones to
depth 34, and from 50 on bottlenecks: 1×1, 3×3, 1×1. Of these, `v1` has its strides, and biases, in
1×1 convolutions, `v1b` its strides in the 3×3; `v2` is the pre-activation form; in ResNeXt, the
3×3 convolution has groups. Source: arXiv 1512.03385, 1603.05027, 1611.05431.
""",
        ("resnet18_v1",),
    ),
    Section(
        "GluonCV's MobileNets",
        """\
Under their names in GluonCV's model zoo, with exactly their parameters: the networks above,
without a batch norm at the beginning, and with other last layers. In V2 and V3, the first unit
expands nothing; V3's squeezed widths are multiples of 8.
""",
        ("mobilenet1.0",),
    ),
    Section(
        "Dense networks and dynamic group convolutions",
        """\
Dense layers of a 1×1 and a grouped 3×3 convolution, whose output is joined to their input, in
stages of growing width. In a `dydensenet` the 1×1 convolutions are dynamic ones, which keep a
quarter of their channels, and in a `dyresnet` all but the stem, which keep 0.45; FLOPs and MACs
here are those of all channels ([what is kept](dgc.md#networks-and-what-they-cost)). Source: arXiv
2007.04242, 1711.09224.
""",
        (
            "dydensenet74",
            "densenet74",
            "dyresnet18",
            "cifar_dydensenet86",
            "cifar_densenet86",
            "cifar_dyresnet18",
        ),
    ),
    Section(
        "Tutorial networks",
        """\
The three small networks that this project's samples train on handwritten digits, from the
tutorials of PyTorch, TensorFlow and MXNet.
""",
        ("tutorial_pt",),
    ),
)
