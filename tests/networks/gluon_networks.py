"""The networks in Gluon. conv: called as (in_channels, channels, kernel_size, …).

Import after `need("mx")`.
"""

from __future__ import annotations

# Before MXNet, which it makes importable.
import doconv_mx  # noqa: F401

# isort: split
from mxnet.gluon import HybridBlock, nn

from networks import CLASSES, LAST, STAGES, STEM, WIDTHS


def ordinary(in_channels, channels, kernel_size, **options):
    return nn.Conv2D(channels, kernel_size, in_channels=in_channels, **options)


def sequence(*blocks):
    net = nn.HybridSequential()
    net.add(*blocks)
    return net


def unit(conv, channels, width, size, stride, groups=1):
    convolution = conv(
        channels, width, size, strides=stride, padding=size // 2, groups=groups, use_bias=False
    )
    return convolution, nn.BatchNorm(in_channels=width)


def resnet18(conv=ordinary):
    net = sequence(*unit(conv, 3, WIDTHS[0], 7, 2), nn.Activation("relu"), nn.MaxPool2D(3, 2, 1))
    channels = WIDTHS[0]
    for number, width in enumerate(WIDTHS):
        net.add(Basic(conv, channels, width, 1 if number == 0 else 2))
        net.add(Basic(conv, width, width, 1))
        channels = width
    net.add(nn.GlobalAvgPool2D(), nn.Dense(CLASSES, in_units=channels))
    return net


class Basic(HybridBlock):
    """Two 3×3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, conv, channels, width, stride):
        super().__init__()
        self.body = sequence(
            *unit(conv, channels, width, 3, stride),
            nn.Activation("relu"),
            *unit(conv, width, width, 3, 1),
        )
        self.shortcut = None
        if stride != 1 or channels != width:
            self.shortcut = sequence(*unit(conv, channels, width, 1, stride))

    def hybrid_forward(self, F, x):
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.body(x) + shortcut)


class Clipped(HybridBlock):
    """ReLU6."""

    def hybrid_forward(self, F, x):
        return F.clip(x, 0, 6)


def mobilenet_v2(conv=ordinary):
    net = sequence(*unit(conv, 3, STEM, 3, 2), Clipped())
    channels = STEM
    for expansion, width, repetitions, stride in STAGES:
        for n in range(repetitions):
            net.add(Inverted(conv, channels, width, expansion, stride if n == 0 else 1))
            channels = width
    net.add(*unit(conv, channels, LAST, 1, 1), Clipped(), nn.GlobalAvgPool2D(), nn.Dropout(0.2))
    net.add(nn.Dense(CLASSES, in_units=LAST))
    return net


class Inverted(HybridBlock):
    """Expand, filter each channel, project; with a shortcut where the shape stays."""

    def __init__(self, conv, channels, width, expansion, stride):
        super().__init__()
        hidden = channels * expansion
        self.out = sequence()
        if expansion != 1:
            self.out.add(*unit(conv, channels, hidden, 1, 1), Clipped())
        self.out.add(*unit(conv, hidden, hidden, 3, stride, hidden), Clipped())
        self.out.add(*unit(conv, hidden, width, 1, 1))
        self.keeps_shape = stride == 1 and channels == width

    def hybrid_forward(self, F, x):
        return x + self.out(x) if self.keeps_shape else self.out(x)
