"""Keras: what was made of a model's variables before it was changed in place.

Nothing here names TensorFlow, so that it also runs on Keras' other backends.
"""

from __future__ import annotations

import keras
import pytest
from frameworks import need

need("tf")

from keras import layers  # noqa: E402
from keras_models import SHAPE, images  # noqa: E402

from doconv_tf import fold, over_parameterize, to_bsconv  # noqa: E402

X, Y = images(), images((2, 7, 7, 3))
CHANGES = {
    "over_parameterize": lambda model: over_parameterize(model, inplace=True),
    "to_bsconv": lambda model: to_bsconv(model, inplace=True),
    "fold": lambda model: fold(model, inplace=True, fuse_batchnorm=True),
}

TAIL = {"to_bsconv": pytest.mark.exhaustive}
EACH = pytest.mark.parametrize(
    "change", [pytest.param(c, id=name, marks=TAIL.get(name, ())) for name, c in CHANGES.items()]
)


def network():
    conv, norm = layers.Conv2D(3, 3, name="conv"), layers.BatchNormalization(name="norm")
    return keras.Sequential([keras.Input(SHAPE[1:]), conv, norm])


def trained(model, optimizer="sgd"):
    model.compile(optimizer, "mse", run_eagerly=True)
    model.fit(X, Y, verbose=0)
    return model


@EACH
def test_whatever_was_compiled_of_the_layers_says_that_it_is_to_be_compiled_anew(change):
    model, other = network(), trained(network())
    around = trained(keras.Sequential([keras.Input(SHAPE[1:]), model]))
    beside = trained(keras.Model(model.inputs[0], model.get_layer("conv").output))
    change(trained(model))
    for each in (model, around, beside):
        with pytest.raises(ValueError, match=r"must call `compile\(\)` before"):
            each.fit(X, Y, verbose=0)
    trained(model)
    assert other.compiled


@EACH
def test_an_optimizer_of_former_variables_is_warned_of(change):
    optimizer = keras.optimizers.SGD(use_ema=True)
    model = trained(network(), optimizer)
    with pytest.warns(UserWarning, match=r"an optimizer .* has '.*conv/kernel' still, which is no"):
        change(model)
    with pytest.raises((ValueError, KeyError), match="variable"):  # Keras' own
        trained(model, optimizer)


def test_an_optimizer_of_what_stays_is_not_warned_of():
    model, optimizer = network(), keras.optimizers.SGD()
    optimizer.build(model.get_layer("norm").trainable_variables)
    over_parameterize(model, inplace=True)
    optimizer.build(model.trainable_variables)
    fold(model)
