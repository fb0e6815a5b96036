"""Keras models that are hard to copy: what their layers hold, and how they were made."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
from frameworks import need

need("tf")
if find_spec("tensorflow") is None:
    pytest.skip("some of these models are TensorFlow's", allow_module_level=True)

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers, ops  # noqa: E402
from keras_models import (  # noqa: E402
    as_trained,
    depthwise,
    images,
    nested,
    sequential,
    subclassed,
)

from doconv_tf import DOConv2D, fold, over_parameterize, to_bsconv, verify  # noqa: E402

TAIL = pytest.mark.exhaustive


def assert_converted(model, inputs, *paths):
    """Assert that the model is copied and converted with the same function; return the result."""
    new, report = over_parameterize(model)
    assert [change.path for change in report.changed] == list(paths)
    assert verify(model, new, inputs).absolute == 0
    as_trained(new)
    assert verify(model, new, inputs).absolute > 0
    assert verify(new, fold(new)[0], inputs).absolute == 0
    return new


# The mask is lost in the ordinary layer, too.
@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning")
def test_text_with_tables_masks_and_attention():
    inputs = keras.Input((1,), dtype="string")
    text = layers.TextVectorization(output_sequence_length=9, name="text")
    text.adapt(["a b c d e f g"])
    x = layers.Embedding(20, 8, mask_zero=True, name="embed")(text(inputs))
    x = layers.Conv1D(8, 3, name="conv")(x)
    x = layers.MultiHeadAttention(2, 4, name="attend")(x, x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    new = assert_converted(model, tf.constant([["a c b"], ["g g e"]]), "conv")
    assert new.get_layer("text").get_vocabulary() == text.get_vocabulary()


def test_random_and_adapted_preprocessing():
    normalize = layers.Normalization(name="normalize")
    normalize.adapt(images())
    parts = [normalize, layers.RandomFlip(seed=1), layers.RandomRotation(0.2, seed=2)]
    spectral = layers.SpectralNormalization(layers.Conv2D(3, 3, name="own"), name="spectral")
    model = keras.Sequential([keras.Input((9, 9, 3)), *parts, layers.Conv2D(3, 3, name="conv")])
    new = assert_converted(model, images(), "conv")
    again, _ = over_parameterize(model)
    flipped = [np.asarray(m(images(), training=True)) for m in (model, again)]
    np.testing.assert_array_equal(*flipped)
    model = keras.Sequential([keras.Input((9, 9, 3)), spectral, layers.Conv2D(3, 3, name="conv")])
    new, report = over_parameterize(model)
    reason = "it shares a weight with what is not over-parameterized alike"
    assert [(left.path, left.reason) for left in report.left] == [("spectral.own", reason)]
    assert verify(model, new, images()).absolute == 0


class Cell(layers.Layer):
    """A recurrent step with a convolution."""

    def __init__(self):
        super().__init__(name="cell")
        self.state_size = (5, 5, 3)
        self.conv = layers.Conv2D(3, 3, padding="same", name="conv")

    def build(self, input_shape):
        self.conv.build((None, 5, 5, 3))

    def call(self, x, states):
        x = self.conv(x + states[0])
        return x, [x]

    def get_initial_state(self, batch_size=None):
        return [ops.zeros((batch_size, *self.state_size))]


def test_a_recurrent_cell():
    inputs = keras.Input((4, 5, 5, 3))
    model = keras.Model(inputs, layers.RNN(Cell(), name="rnn")(inputs))
    assert_converted(model, images((2, 4, 5, 5, 3)), "rnn.cell.conv")


class Trainer(keras.Model):
    """A functional model with attributes, a metric and a training step of its own."""

    def __init__(self):
        inputs = keras.Input((9, 9, 3))
        self.conv = layers.Conv2D(3, 3, name="conv")
        super().__init__(inputs, layers.BatchNormalization(name="norm")(self.conv(inputs)))
        self.total = keras.metrics.Mean(name="total")
        self.other_optimizer = keras.optimizers.SGD(0.25)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = ops.mean(self(data[0], training=True) ** 2)
        variables = self.trainable_variables
        self.other_optimizer.apply(tape.gradient(loss, variables), variables)
        self.total.update_state(loss)
        return {"total": self.total.result()}

    @property
    def metrics(self):
        return [self.total]


def test_a_functional_subclass_with_a_training_step():
    model = Trainer()
    model.compile("sgd")
    model.fit(images(), images(), verbose=0)
    new = assert_converted(model, images(), "conv")
    assert new.conv is new.layers[1]
    assert new.total is not model.total
    assert new.other_optimizer is not model.other_optimizer
    assert new.other_optimizer.learning_rate == 0.25
    assert not new.other_optimizer.variables[2:]
    new.compile("sgd")
    before = np.array(new.conv.d_kernel)
    new.fit(images(), images(), verbose=0)
    assert (np.array(new.conv.d_kernel) != before).any()
    _, report = fold(new, fuse_batchnorm=True)
    assert [change.path for change in report.changed] == ["conv", "norm"]


def test_a_sequential_model_that_was_built_by_a_call_can_still_grow():
    model = keras.Sequential([layers.Conv2D(3, 3, name="conv"), layers.ReLU(name="relu")])
    model(images())
    new = assert_converted(model, images(), "conv")
    new.add(layers.Dense(2))
    assert new(images()).shape == (2, 7, 7, 2)
    assert model(images()).shape == (2, 7, 7, 3)


def test_a_graph_deeper_than_pythons_stack():
    inputs = x = keras.Input((4, 4, 1))
    convs = [layers.Conv2D(1, (2, 1), padding="same", name=f"c{n}") for n in range(2)]
    for n in range(450):  # more than that is too deep for Keras itself
        x = convs[n % 2](x) if n % 50 < 2 else x + 1.0
    model = keras.Model(inputs, x)
    assert_converted(model, images((1, 4, 4, 1)), "c0", "c1")


class Decorated(keras.Model):
    """Has a compiled call."""

    def __init__(self):
        super().__init__()
        self.conv = layers.Conv2D(3, 3, name="conv")

    @tf.function
    def call(self, x):
        return self.conv(x)


def test_compiled_functions_never_go_on_with_the_former_layers():
    model = Decorated()
    model(images())
    assert_converted(model, images(), "conv")
    with pytest.raises(TypeError, match=r"Decorated\.call is a compiled function.* Leave inplace"):
        over_parameterize(model, inplace=True)
    assert type(model.conv) is layers.Conv2D
    model = sequential()
    model.fast = tf.function(model.__call__)
    for inplace in (False, True):
        with pytest.raises(TypeError, match=r"Sequential\.fast is a compiled function.* Delete it"):
            over_parameterize(model, inplace=inplace)


def test_a_step_compiled_by_xla_composes_a_shared_kernel_once():
    layer = DOConv2D(4, 3, padding="same")
    x = images((1, 8, 8, 4))
    layer.build(x.shape)
    dots = []
    for calls in (1, 3):

        def run(x, calls=calls):
            for _ in range(calls):
                x = layer(x)
            return x

        compiled = tf.function(run, jit_compile=True)
        text = compiled.experimental_get_compiler_ir(x, calls)(stage="optimized_hlo")
        assert text.count(" convolution(") == calls
        dots.append(text.count(" dot("))
    assert dots == [1, 1]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_the_variables_of_a_distribution_strategy_stay_its_own(inside, inplace):
    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
    with strategy.scope():
        convs = [layers.Conv2D(3, 3, name=name) for name in ("conv", "other")]
        norm = layers.BatchNormalization(name="norm")
        model = keras.Sequential([keras.Input((9, 9, 3)), convs[0], norm, convs[1]])
    model.strategy, x = strategy, images()
    expected = np.array(model(x))
    with strategy.scope() if inside else nullcontext():
        new, _ = over_parameterize(model, where="conv", inplace=inplace)
        new, _ = to_bsconv(new, where="other", inplace=inplace)
        assert new.strategy is new.distribute_strategy is strategy
        folded, layer = fold(new)[0], new.get_layer("conv").fold()
        made = [new, folded, layer, DOConv2D.from_conv(layer)]
    assert inplace or (np.array(model(x)) == expected).all()
    variables = [v for each in made for v in each.weights]
    assert {getattr(v.value, "distribute_strategy", None) for v in variables} == {strategy}
    with strategy.scope():
        new.compile("sgd", "mse")
    new.fit(x, np.zeros((2, 5, 5, 3)), verbose=0)
    assert np.array(depthwise(new)[0]).any()


@pytest.mark.parametrize(
    "make", [sequential, *(pytest.param(m, marks=TAIL) for m in (nested, subclassed))]
)
def test_predict_then_compile_then_both_calls(make):
    """TensorFlow goes on tracking the function of `predict` that compiling lets go of."""
    model, x = make(), images()
    model.predict(x, verbose=0)
    model.compile("sgd", "mse")
    new, _ = over_parameterize(model)
    new.predict(x, verbose=0)
    new.compile("sgd", "mse")
    new.fit(x, keras.tree.map_structure(ops.zeros_like, new(x)), verbose=0)
    folded, _ = fold(new)
    assert verify(new, folded, x).relative < 1e-6
