"""The networks in PyTorch, as torchvision lays them out. conv: the class of the convolutions."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from networks import CLASSES, LAST, STAGES, STEM, WIDTHS


def resnet18(conv=nn.Conv2d):
    stages = OrderedDict()
    channels = WIDTHS[0]
    for number, width in enumerate(WIDTHS, 1):
        first = Basic(conv, channels, width, 1 if number == 1 else 2)
        stages[f"layer{number}"] = nn.Sequential(first, Basic(conv, width, width, 1))
        channels = width
    return nn.Sequential(
        OrderedDict(
            conv1=conv(3, WIDTHS[0], 7, stride=2, padding=3, bias=False),
            bn1=nn.BatchNorm2d(WIDTHS[0]),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(3, 2, 1),
            **stages,
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(channels, CLASSES),
        )
    )


class Basic(nn.Module):
    """Two 3×3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, conv, channels, width, stride):
        super().__init__()
        self.conv1 = conv(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = nn.Identity()
        if stride != 1 or channels != width:
            projection = conv(channels, width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))


def mobilenet_v2(conv=nn.Conv2d):
    blocks = [_block(conv, 3, STEM, 3, 2)]
    channels = STEM
    for expansion, width, repetitions, stride in STAGES:
        for n in range(repetitions):
            blocks.append(Inverted(conv, channels, width, expansion, stride if n == 0 else 1))
            channels = width
    blocks.append(_block(conv, channels, LAST, 1, 1))
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(LAST, CLASSES)),
        )
    )


class Inverted(nn.Module):
    """Expand, filter each channel, project; with a shortcut where the shape stays."""

    def __init__(self, conv, channels, width, expansion, stride):
        super().__init__()
        hidden = channels * expansion
        blocks = [_block(conv, channels, hidden, 1, 1)] if expansion != 1 else []
        blocks.append(_block(conv, hidden, hidden, 3, stride, groups=hidden))
        blocks += [conv(hidden, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.conv = nn.Sequential(*blocks)
        self.shortcut = stride == 1 and channels == width

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


def _block(conv, channels, width, size, stride, groups=1):
    convolution = conv(
        channels, width, size, stride=stride, padding=size // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU6())
