"""Deploying a Keras model: everything at once, with the methods that its own layers have.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import numpy as np
import pytest
from frameworks import need

need("tf")

import keras  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_models import SHAPE, as_trained, filled, images  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402
from doconv_tf import deploy, over_parameterize, verify  # noqa: E402


def conv(filters=3, size=3, **options):
    return layers.Conv2D(filters, size, padding="same", **options)


class Branches(layers.Layer):
    """Two branches that become one convolution, as RepVGG's and MobileOne's do."""

    fused = True  # no method

    def __init__(self, **options):
        super().__init__(**options)
        self.conv, self.point = conv(name="conv"), conv(size=1, name="point")
        self.more = {"points": [conv(size=1, name="point_too")]}

    def build(self, shape):
        for each in (self.conv, self.point, *self.more["points"]):
            each.build(shape)

    def call(self, x):
        if self.point is None:
            return self.conv(x)
        return self.conv(x) + self.point(x) + self.more["points"][0](x)

    def switch_to_deploy(self):
        for point in (self.point, *self.more["points"]):
            self.conv.kernel.assign_add(ops.pad(point.kernel, [[1, 1], [1, 1], [0, 0], [0, 0]]))
            self.conv.bias.assign_add(point.bias)
        self.point = self.more = None


class Returning(Branches):
    """One whose method returns what takes its place."""

    def fuse(self):
        self.switch_to_deploy()
        return self.conv

    def reparameterize(self, how):
        """Is not called: it takes something."""


class Fusible(keras.Sequential):
    """A model that fuses its own parts."""

    def fuse(self):
        """Do so."""


def sequential(*parts, cls=keras.Sequential):
    return filled(cls([keras.Input(SHAPE[1:]), *parts]))


def test_methods_that_make_other_layers_are_named():
    model = sequential(Branches(name="a"), Returning(name="b"), cls=Fusible)
    _, report = over_parameterize(model, where="a.*")
    assert report.fusing == (("", "Fusible", "fuse"), ("a", "Branches", "switch_to_deploy"))
    _, report = over_parameterize(model, where="b.*")
    assert [method.name for method in report.fusing[1:]] == [
        "fuse", "reparameterize", "switch_to_deploy",
    ]  # fmt: skip
    assert over_parameterize(sequential(conv())).report.fusing == ()


@pytest.mark.parametrize("nested", [False, True])
def test_deploying_does_everything_in_the_right_order(nested):
    parts = [
        Branches(name="first"), layers.BatchNormalization(name="norm1"), Returning(name="second"),
        layers.BatchNormalization(name="norm2"), conv(4, name="conv"),
    ]  # fmt: skip
    model = sequential(*([sequential(*parts)] if nested else parts))
    model = as_trained(over_parameterize(model)[0])
    before = [ops.convert_to_numpy(v).copy() for v in model.weights]
    deployed, report = deploy(model, images())
    path = f"{model.layers[0].name}." if nested else ""
    assert [(c.path.removeprefix(path), c.after) for c in report.changed] == [
        ("first.conv", "Conv2D"), ("second.conv", "Conv2D"), ("conv", "Conv2D"),
        ("first", "what its switch_to_deploy() makes"), ("second", "what its fuse() makes"),
        ("norm2", "fused into Conv2D"),
    ]  # fmt: skip
    assert report.difference == verify(model, deployed, images())
    assert report.difference.relative < 1e-5
    assert str(deploy(model).report).endswith("not verified, as no inputs were given")
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    inner = deployed.layers[0] if nested else deployed
    assert [type(layer).__name__ for layer in inner.layers] == [
        "Branches", "BatchNormalization", "Conv2D", "Identity", "Conv2D",
    ]  # fmt: skip
    assert not [v.path for v in deployed.weights if "point" in v.path]
    assert report.parameters_after == 84 + 12 + 84 + 112
    again = deploy(inner.layers[-1], images()).report
    assert again.difference == (0, 0)
    alone, report = deploy(filled(built(Returning())), images())
    assert type(alone) is layers.Conv2D
    assert report.difference.relative < 1e-5


def built(layer):
    layer(images())
    return layer


class Wrong(Branches):
    def switch_to_deploy(self):
        self.point = None


class Failing(Branches):
    def switch_to_deploy(self):
        self.one = conv()


class Unbuilt(Branches):
    def fuse(self):
        return conv()


def test_what_deploying_cannot_do_right_is_said():
    message = r"layer 'it': Failing\.switch_to_deploy\(\) raised ValueError: You cannot add new el"
    with pytest.raises(NotFoldable, match=message):
        deploy(sequential(Failing(name="it")))
    message = r"layer 'it': Unbuilt\.fuse\(\) returned a Conv2D that is not built; it is to build"
    with pytest.raises(NotFoldable, match=message):
        deploy(sequential(Unbuilt(name="it")))
    with pytest.warns(UserWarning, match="the deployed model differs by .* of the largest output"):
        report = deploy(sequential(Wrong()), images()).report
    assert report.difference.relative > 0.02
