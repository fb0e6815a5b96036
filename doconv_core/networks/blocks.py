"""What several families are built of: a convolution with what follows it, stages, and heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from doconv_core.kinds.base import Recipe
from doconv_core.networks.nodes import (
    ORDINARY,
    Activation,
    BatchNorm,
    Conv,
    Flatten,
    GlobalPool,
    Linear,
    Node,
    Pool,
    Scale,
    sequence,
)
from doconv_core.networks.nodes import Sequence as Nodes

Named = tuple[str, Node]
RELU = Activation("relu")
DEPTHWISE = 0  # groups: as many as there are channels


def conv_bn(
    channels: int,
    kernel: int = 1,
    activation: str | None = "relu",
    *,
    stride: int = 1,
    groups: int = 1,
    kind: Recipe = ORDINARY,
    orthonormal: bool = False,
) -> Nodes:
    """Return a convolution without bias, its batch norm and, unless None, an activation."""
    size = (kernel, kernel)
    return sequence(
        ("conv", Conv(channels, size, stride, None, groups, False, kind, orthonormal)),
        ("bn", BatchNorm()),
        None if activation is None else (activation, Activation(activation)),
    )


def large_stem() -> Nodes:
    """Return the ResNets' stem for images of 224x224: of its rows and columns, a quarter is left.

    Source: Deep residual learning, arXiv 1512.03385, table 1.
    """
    return sequence(*conv_bn(64, 7, stride=2).children, ("pool", Pool("max", 3, 2, 1)))


def squeeze_excite(channels: int, squeezed: int) -> Scale:
    """Return the factors from the means of all channels, as MobileNetV3 has them.

    Source: Searching for MobileNetV3, arXiv 1905.02244, section 5.3.
    """
    return Scale(
        sequence(
            ("pool", GlobalPool()),
            ("conv1", Conv(squeezed, bias=True)),
            ("relu", RELU),
            ("conv2", Conv(channels, bias=True)),
            ("hard_sigmoid", Activation("hard_sigmoid")),
        )
    )


def stages(
    unit: Callable[..., Node],
    rows: Iterable[Sequence[tuple[Any, ...]]],
    strides: Iterable[int],
    before: int,
    *,
    activation: Activation | None = None,
) -> list[Named]:
    """Return the stages of a network, named "stage1", …, of units "unit1", …

    unit: of the channels before it, the stride, and its sizes, of which the last is its channels.
    rows: the sizes of the units of each stage. strides: of each stage's first unit; the others have
    1. before: channels before the first stage. activation: after each unit, named "relu1", …
    """
    found: list[Named] = []
    for number, (row, first) in enumerate(zip(rows, strides, strict=True), 1):
        stage: list[Named] = []
        for place, sizes in enumerate(row, 1):
            stage.append((f"unit{place}", unit(before, first if place == 1 else 1, *sizes)))
            if activation is not None:
                stage.append((f"{activation.name}{place}", activation))
            before = sizes[-1]
        found.append((f"stage{number}", sequence(*stage)))
    return found


def convolution_head(classes: int, *, bias: bool = True) -> list[Named]:
    """Return the mean over all positions and the classifier, as a convolution of one tap."""
    return [
        ("pool", GlobalPool()),
        ("classifier", Conv(classes, bias=bias)),
        ("flatten", Flatten()),
    ]


def dense_head(classes: int) -> list[Named]:
    """Return the mean over all positions and the classifier, as a linear layer."""
    return [("pool", GlobalPool()), ("flatten", Flatten()), ("classifier", Linear(classes))]
