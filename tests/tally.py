"""Counting BSConv's networks by hand, from how their tables are written; no description is used."""

from __future__ import annotations


class Tally:
    """A square image on its way through a network: its channels, its side, and what was counted."""

    def __init__(self, channels, side):
        self.channels, self.side = channels, side
        self.parameters = self.flops = self.macs = 0

    def conv(self, channels, kernel=1, stride=1, *, groups=1, bias=False):
        self.side = -(-self.side // stride)  # as the padding is half the kernel
        weight = channels * (self.channels // groups) * kernel**2
        self.channels = channels
        self.parameters += weight + bias * channels
        self.macs += weight * self.side**2
        self.flops += (weight + bias * channels) * self.side**2

    def norm(self):
        self.parameters += 2 * self.channels
        self.flops += 2 * self.channels * self.side**2

    def relu(self):
        self.flops += self.channels * self.side**2

    def pool(self, side):
        self.flops += self.channels * self.side**2
        self.side = side

    def unit(self, channels, kernel=1, stride=1, *, depthwise=False, relu=True):
        """A convolution and its batch norm, and a ReLU, which no other activation counts as."""
        self.conv(channels, kernel, stride, groups=self.channels if depthwise else 1)
        self.norm()
        if relu:
            self.relu()

    def squeeze_excite(self):
        wide, side = self.channels, self.side
        self.pool(1)
        self.conv(wide // 4, bias=True)
        self.relu()
        self.conv(wide, bias=True)
        self.channels, self.side = wide, side

    def aside(self, channels, side, stride, width, *, norm):
        """A projection beside a unit, of the image that went into it."""
        here = self.channels, self.side
        self.channels, self.side = channels, side
        self.conv(width, 1, stride)
        if norm:
            self.norm()
        self.channels, self.side = here

    def classify(self, classes):
        self.pool(1)
        self.conv(classes, bias=True)


def residual(stages, classes, *, cifar, pre=False, factor=1, side=None):
    """A ResNet of basic units; `pre`: each with its batch norms and ReLUs before."""
    net = Tally(3, side or (32 if cifar else 224))
    net.norm()
    if cifar:
        net.conv(16, 3)
    else:
        net.conv(64, 7, 2)
    if not (cifar and pre):
        net.norm()
        net.relu()
    if not cifar:
        net.pool(-(-net.side // 2))
    first = 16 * factor if cifar else 64
    for number, count in enumerate(stages):
        for place in range(count):
            stride = 2 if number and not place else 1
            width = first * 2**number
            before, side = net.channels, net.side
            if pre:
                net.norm()
                net.relu()
            net.conv(width, 3, stride)
            net.norm()
            net.relu()
            net.conv(width, 3)
            if not pre:
                net.norm()
            if stride == 2 or before != width:
                net.aside(before, side, stride, width, norm=not pre)
            if not pre:
                net.relu()
    if pre:
        net.norm()
        net.relu()
    net.classify(classes)
    return net


def scaled(text, above, below):
    """The numbers of each stage in text such as "16 | 24 24", times above / below."""
    return [[int(n) * above // below for n in stage.split()] for stage in text.split("|")]


def mobilenetv1(classes, *, cifar, above=1, below=1, bsconvu=False):
    widths = scaled("64 | 128 128 | 256 256 | 512 512 512 512 512 512 | 1024 1024", above, below)
    net = Tally(3, 32 if cifar else 224)
    net.norm()
    net.unit(32 * above // below, 3, 1 if cifar else 2)
    for stride, stage in zip((1, 1 if cifar else 2, 2, 2, 2), widths, strict=True):
        for place, width in enumerate(stage):
            step = 1 if place else stride
            if bsconvu:
                net.conv(width)
                net.unit(width, 3, step, depthwise=True)
            else:
                net.unit(net.channels, 3, step, depthwise=True)
                net.unit(width)
    net.classify(classes)
    return net


V2 = (
    "16 | 24 24 | 32 32 32 | 64 64 64 64 96 96 96 | 160 160 160 320",
    "32 | 96 144 | 144 192 192 | 192 384 384 384 384 576 576 | 576 960 960 960",
)


def mobilenetv2(classes, *, cifar, above=1, below=1):
    widths, expanded = (scaled(text, above, below) for text in V2)
    net = Tally(3, 32 if cifar else 224)
    net.norm()
    net.unit(32 * above // below, 3, 1 if cifar else 2, relu=False)
    for stride, outs, mids in zip((1, 1 if cifar else 2, 2, 2, 2), widths, expanded, strict=True):
        for place, (out, mid) in enumerate(zip(outs, mids, strict=True)):
            net.unit(mid, relu=False)
            net.unit(mid, 3, 1 if place else stride, depthwise=True, relu=False)
            net.unit(out, relu=False)
    net.unit(max(1280, 1280 * above // below), relu=False)
    net.classify(classes)
    return net


# Widths, expanded widths, kernels, stages with ReLU, units with squeeze and excite, strides on
# ImageNet and on CIFAR, the last width, and whether that is squeezed and excited.
V3 = {
    "small": (
        "16 | 24 24 | 40 40 40 48 48 | 96 96 96",
        "16 | 72 88 | 96 240 240 120 144 | 288 576 576",
        (3, 3, 5, 5), 2, "1 | 0 0 | 1 1 1 1 1 | 1 1 1", (2, 2, 2, 2), (1, 2, 2, 2), 576, True,
    ),
    "large": (
        "16 | 24 24 | 40 40 40 | 80 80 80 80 112 112 | 160 160 160",
        "16 | 64 72 | 72 120 120 | 240 200 184 184 480 672 | 672 960 960",
        (3, 3, 5, 3, 5), 3, "0 | 0 0 | 1 1 1 | 0 0 0 0 1 1 | 1 1 1",
        (1, 2, 2, 2, 2), (1, 1, 2, 2, 2), 960, False,
    ),
}  # fmt: skip


def mobilenetv3(size, classes, *, cifar, above=1, below=1):
    outs, mids, kernels, relus, excited, imagenet, small, last, excite_last = V3[size]
    outs, mids, excited = (
        scaled(outs, above, below),
        scaled(mids, above, below),
        scaled(excited, 1, 1),
    )
    net = Tally(3, 32 if cifar else 224)
    net.norm()
    net.unit(16 * above // below, 3, 1 if cifar else 2, relu=False)
    for number, stride in enumerate(small if cifar else imagenet):
        relu = number < relus
        for place, out in enumerate(outs[number]):
            mid = mids[number][place]
            net.unit(mid, relu=relu)
            net.unit(mid, kernels[number], 1 if place else stride, depthwise=True, relu=relu)
            if excited[number][place]:
                net.squeeze_excite()
            net.unit(out, relu=False)
    net.unit(max(last, last * above // below), relu=False)
    if excite_last:
        net.squeeze_excite()
    net.classify(classes)
    return net
