"""The networks in Keras, functional. conv, depthwise: the classes of the convolutions.

"same" pads a strided convolution otherwise than PyTorch does, so that explicit layers pad here.
"""

from __future__ import annotations

import keras
from keras import layers

from networks import CLASSES, LAST, SIZE, STAGES, STEM, WIDTHS


def norm(name):
    return layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name=name)


def resnet18(conv=layers.Conv2D, padding="explicit"):
    def convolve(x, width, size, stride, name):
        pad = "valid"
        if padding == "same":
            pad = "same"
        elif size > 1:
            x = layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
        x = conv(width, size, strides=stride, padding=pad, use_bias=False, name=name)(x)
        return norm(f"{name}_norm")(x)

    def basic(x, width, stride, name):
        y = layers.ReLU()(convolve(x, width, 3, stride, f"{name}_a"))
        y = convolve(y, width, 3, 1, f"{name}_b")
        if stride != 1 or x.shape[-1] != width:
            x = convolve(x, width, 1, stride, f"{name}_shortcut")
        return layers.ReLU()(layers.Add()([y, x]))

    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.ReLU()(convolve(inputs, WIDTHS[0], 7, 2, "stem"))
    x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))  # of what is not negative
    for number, width in enumerate(WIDTHS):
        x = basic(x, width, 1 if number == 0 else 2, f"stage{number}_first")
        x = basic(x, width, 1, f"stage{number}_second")
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(x))


def mobilenet_v2(conv=layers.Conv2D, depthwise=layers.DepthwiseConv2D):
    def point(x, width, name, activation=True):
        x = norm(f"{name}_norm")(conv(width, 1, use_bias=False, name=name)(x))
        return layers.ReLU(6.0)(x) if activation else x

    def inverted(x, width, expansion, stride, name):
        y = point(x, x.shape[-1] * expansion, f"{name}_expand") if expansion != 1 else x
        y = layers.ZeroPadding2D(1)(y)
        y = depthwise(3, strides=stride, use_bias=False, name=f"{name}_filter")(y)
        y = layers.ReLU(6.0)(norm(f"{name}_filter_norm")(y))
        y = point(y, width, f"{name}_project", activation=False)
        return layers.Add()([x, y]) if stride == 1 and x.shape[-1] == width else y

    inputs = keras.Input((SIZE, SIZE, 3))
    x = conv(STEM, 3, strides=2, use_bias=False, name="stem")(layers.ZeroPadding2D(1)(inputs))
    x = layers.ReLU(6.0)(norm("stem_norm")(x))
    for number, (expansion, width, repetitions, stride) in enumerate(STAGES):
        for n in range(repetitions):
            x = inverted(x, width, expansion, stride if n == 0 else 1, f"block{number}_{n}")
    x = layers.GlobalAveragePooling2D()(point(x, LAST, "last"))
    return keras.Model(inputs, layers.Dense(CLASSES, name="logits")(layers.Dropout(0.2)(x)))
