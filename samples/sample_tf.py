"""Handwritten digits in TensorFlow, with ordinary and with over-parameterized convolutions.

The network and its training are those of TensorFlow's tutorial "quickstart for experts", with a
second convolution. Whether `Conv2D` below is `keras.layers.Conv2D` or `DOConv2D` is the only
difference between the two.
"""

import quiet_tensorflow  # noqa: F401  first, as it says what to install if Keras lacks

# isort: split
import harness
import keras
import tensorflow as tf
from keras.layers import Conv2D, Dense, Flatten

from doconv_tf import DOConv2D, export_state

LAYERS = {"conv": Conv2D, "doconv": DOConv2D}


class Network(keras.Model):
    """The tutorial's network: `(B, 28, 28, 1)` images to `(B, 10)` logits."""

    def __init__(self, Conv2D):
        super().__init__()
        self.conv1 = Conv2D(32, 3, activation="relu", name="conv1")
        self.conv2 = Conv2D(8, 3, activation="relu", name="conv2")
        self.flatten = Flatten()
        self.d1 = Dense(128, activation="relu", name="d1")
        self.d2 = Dense(10, name="d2")

    def call(self, x):
        """Return the logits."""
        x = self.conv1(x)
        x = self.conv2(x)
        x = self.flatten(x)
        x = self.d1(x)
        return self.d2(x)


def build(layer, seed, device):
    """Return a new network. Both layers draw the same weights from the same seed, and D is zero."""
    keras.utils.set_random_seed(seed)
    with tf.device(device):
        model = Network(LAYERS[layer])
        model(tf.zeros((1, 28, 28, 1)))  # creates the weights
    return model


def train(model, data, options, seed, device, epochs):
    """Train with Adam, as the tutorial does."""
    batches = tf.data.Dataset.from_tensor_slices((data.train_images[..., None], data.train_labels))
    batches = batches.shuffle(10000, seed=seed).batch(options.batch_size)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(options.lr)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    with tf.device(device):
        for _ in epochs:
            for x, y in batches:
                train_step(x, y)


def outputs(model, images, device):
    """Return the logits of `(N, 28, 28)` images, `(N, 10)`."""
    with tf.device(device):
        return model(images[..., None], training=False).numpy()


def fold(model, device):
    """Return the same network with ordinary convolutions in place of the over-parameterized."""
    folded = build("conv", 0, device)
    for ordinary, layer in zip(folded.layers, model.layers, strict=True):
        layer = layer.fold() if isinstance(layer, DOConv2D) else layer
        ordinary.set_weights(layer.get_weights())
    return folded


def devices():
    """Return TensorFlow's CPU, and its GPU where it finds one."""
    found = {"cpu": "CPU:0"}
    if tf.config.list_physical_devices("GPU"):
        found["gpu"] = "GPU:0"
    return found


SAMPLE = harness.Sample(
    name="sample_tf",
    description=__doc__,
    versions={"tensorflow": tf.__version__, "keras": keras.__version__},
    epochs={"digits": 12, "mnist": 5},
    lr={"digits": 0.001, "mnist": 0.001},
    why="5 epochs are the tutorial's, for MNIST. After 12 epochs of the digits, 480 steps, the "
    "baseline has converged: hardly a training image is wrong, and more epochs add nothing.",
    batch_size=32,
    devices=devices(),
    build=build,
    train=train,
    outputs=outputs,
    fold=fold,
    parameters=lambda model: model.count_params(),
    export_state=export_state,
)

if __name__ == "__main__":
    tf.config.experimental.enable_op_determinism()  # the same seed gives the same result
    harness.main(SAMPLE)
