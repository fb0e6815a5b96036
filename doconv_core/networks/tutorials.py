"""The small networks that the three frameworks' tutorials train on handwritten digits.

Their names are `tutorial_pt`, `tutorial_tf` and `tutorial_gluon`; images are of one channel, 28x28.
"""

from __future__ import annotations

from doconv_core.networks.blocks import RELU
from doconv_core.networks.nodes import (
    Activation,
    Conv,
    Flatten,
    GlobalPool,
    Linear,
    Pool,
    Sequence,
    sequence,
)

TANH = Activation("tanh")


def pytorch(classes: int) -> Sequence:
    """Return the network of PyTorch's tutorial "What is torch.nn really?"."""

    def conv(channels: int) -> Conv:
        return Conv(channels, (3, 3), stride=2, bias=True)

    return sequence(
        ("conv1", conv(16)), ("relu1", RELU),
        ("conv2", conv(16)), ("relu2", RELU),
        ("conv3", conv(classes)), ("relu3", RELU),
        ("pool", GlobalPool()), ("flatten", Flatten()),
    )  # fmt: skip


def tensorflow(classes: int) -> Sequence:
    """Return the network of TensorFlow's quickstart for experts, with a second convolution."""
    return sequence(
        ("conv1", Conv(32, (3, 3), padding=0, bias=True)), ("relu1", RELU),
        ("conv2", Conv(8, (3, 3), padding=0, bias=True)), ("relu2", RELU),
        ("flatten", Flatten()),
        ("dense", Linear(128)), ("relu3", RELU),
        ("classifier", Linear(classes)),
    )  # fmt: skip


def gluon(classes: int) -> Sequence:
    """Return the network of MXNet's tutorial "Hand-written digit recognition on MNIST"."""
    return sequence(
        ("conv1", Conv(20, (5, 5), padding=0, bias=True)), ("tanh1", TANH),
        ("pool1", Pool("max", 2, 2)),
        ("conv2", Conv(50, (5, 5), padding=0, bias=True)), ("tanh2", TANH),
        ("pool2", Pool("max", 2, 2)),
        ("flatten", Flatten()),
        ("dense", Linear(500)), ("tanh3", TANH),
        ("classifier", Linear(classes)),
    )  # fmt: skip


TUTORIALS = {"tutorial_pt": pytorch, "tutorial_tf": tensorflow, "tutorial_gluon": gluon}
