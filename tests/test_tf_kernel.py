"""A kernel that is used other than by calling its layer, in Keras.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_layers import array  # noqa: E402
from keras_models import SHAPE, as_trained, images  # noqa: E402

from doconv_core.models.report import READ, TIED  # noqa: E402
from doconv_tf import DOConv2D, fold, over_parameterize, to_bsconv, verify  # noqa: E402


def standardized(conv, y):
    """Return the convolution by a standardized kernel of what it takes, as code of one's own."""
    kernel = conv.kernel - ops.mean(conv.kernel, axis=(0, 1, 2))
    return ops.conv(y, kernel / ops.std(conv.kernel, axis=(0, 1, 2)), data_format="channels_last")


USES = {
    "a tied decoder": lambda conv, y: ops.conv_transpose(
        ops.relu(y), conv.kernel, data_format="channels_last"
    ),
    "a penalty": lambda conv, y: y + ops.sum(conv.kernel**2),
    "a standardized weight": lambda conv, y: standardized(conv, y[..., :3]),
}


class Reading(keras.Model):
    """A model whose code does something with a convolution beside calling it."""

    def __init__(self, use):
        super().__init__()
        self.conv, self.use = layers.Conv2D(4, 3, name="conv"), use

    def call(self, x):
        return self.use(self.conv, self.conv(x))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_code_that_reads_kernel_sees_the_composed_one(use):
    model, x = Reading(use), images()
    expected = model(x)
    training, report = over_parameterize(model)
    assert [change.path for change in report.changed] == ["conv"]
    assert verify(model, training, x).absolute == 0
    training.compile("sgd", "mse", run_eagerly=True)
    training.fit(x, ops.zeros_like(expected), epochs=2, verbose=0)
    assert np.asarray(ops.any(training.conv.d_kernel != 0))
    assert verify(training, as_trained(training), x).absolute == 0
    assert verify(training, fold(training).model, x).absolute == 0


def by_operation(conv, x):
    return ops.conv(x, conv.kernel, data_format="channels_last")


def by_closure(conv, x):
    kernel = conv.kernel
    return layers.Lambda(lambda y: y + ops.sum(kernel))(x)


@pytest.mark.parametrize("read", [by_operation, by_closure])
def test_a_variable_that_something_else_holds_is_left(read):
    inputs, conv = keras.Input(SHAPE[1:]), layers.Conv2D(3, 3, name="read")
    y = read(conv, layers.Conv2D(3, 3, name="other")(conv(inputs)))
    model = keras.Model(inputs, y)
    for report in (over_parameterize(model).report, to_bsconv(model).report):
        assert [change.path for change in report.changed] == ["other"]
        assert [(left.path, left.reason) for left in report.left] == [("read", READ)]


def test_what_normalizes_the_kernel_in_place_is_left():
    normed = layers.SpectralNormalization(layers.Conv2D(3, 3, name="conv"))
    model = keras.Sequential([keras.Input(SHAPE[1:]), normed, layers.Conv2D(3, 3)])
    (left,) = over_parameterize(model).report.left
    assert left.reason == TIED


@pytest.mark.parametrize(
    ("regularizer", "changed"),
    [
        (keras.regularizers.L1L2(0.1, 0.1), 2),
        (lambda kernel: ops.sum(ops.norm(ops.reshape(kernel, (-1, kernel.shape[3])), axis=0)), 1),
    ],
)
def test_a_regularizer_of_the_kernel_is_that_of_each_weight_or_the_layer_is_left(
    regularizer, changed
):
    conv = layers.Conv2D(3, 3, name="conv", kernel_regularizer=regularizer)
    model = keras.Sequential([keras.Input(SHAPE[1:]), conv, layers.Conv2D(3, 3)])
    training, report = over_parameterize(model)
    assert len(report.changed) == changed
    for left in report.left:
        assert left.reason.startswith("its kernel_regularizer would be given each of the weights")
    losses = [sum(float(array(x)) for x in each.losses) for each in (model, training)]
    assert losses[0] == losses[1] > 0


def test_a_composed_kernel_cannot_be_set():
    layer = DOConv2D(3, 3)
    layer.build(SHAPE)
    with pytest.raises(
        AttributeError, match=r"no kernel that could be set: .* then fold\(\) it to"
    ):
        layer.kernel = np.zeros((3, 3, 3, 3))
