"""The networks of Keras: keras.applications', and this package's own."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from zoo_check import SEED, Norm, Outputs, flat
from zoo_networks import Network

import doconv_tf
from doconv_core import Converted

ORDINARY = (
    *(layers.Conv1D, layers.Conv2D, layers.Conv3D),
    *(layers.DepthwiseConv1D, layers.DepthwiseConv2D),
    *(layers.SeparableConv1D, layers.SeparableConv2D),
)
BLOCKS = "doconv_tf.pooling"  # of this package's own networks, which stay


def versions(network: Network) -> str:
    """Return what the table says about versions."""
    return f"Keras {keras.__version__}, TensorFlow {tf.__version__}"


def build(network: Network, seed: int) -> keras.Model:
    """Return the network with random weights, biases included."""
    keras.utils.set_random_seed(seed)
    model = _own(network) if network.own else _of_applications(network)
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if variable.name == "bias":
            write(variable, rng.normal(0, 0.1, variable.shape))
    return model


def _own(network: Network) -> keras.Model:
    height, width, channels = network.shape
    shape = (channels, height, width)
    return doconv_tf.get_model(network.name, input_shape=shape, **network.options)


def _of_applications(network: Network) -> keras.Model:
    constructor = getattr(keras.applications, network.name)
    # Without the softmax, which would hide differences where it is saturated.
    head = {"classes": 10, "classifier_activation": None}
    return constructor(weights=None, input_shape=network.shape, **head, **network.options)


def settle(model: keras.Model, inputs: Sequence[np.ndarray]) -> None:
    """Give its batch norms the statistics of this batch."""
    found = [m for m in _layers(model) if isinstance(m, layers.BatchNormalization)]
    momenta = [layer.momentum for layer in found]
    for layer in found:
        layer.momentum = 0.0
    outputs(model, inputs, True)
    for layer, momentum in zip(found, momenta, strict=True):
        layer.momentum = momentum


def norms(model: keras.Model) -> list[Norm]:
    """Return the variables of its batch norms."""
    return [
        Norm(m.moving_mean, m.moving_variance, m.gamma, m.beta)
        for m in _layers(model)
        if isinstance(m, layers.BatchNormalization)
    ]


def read(variable: keras.Variable) -> np.ndarray:
    """Return a variable's value."""
    return keras.ops.convert_to_numpy(variable)


def write(variable: keras.Variable, value: np.ndarray) -> None:
    """Set a variable."""
    variable.assign(value)


def outputs(model: keras.Model, inputs: Sequence[np.ndarray], training: bool) -> Outputs:
    """Return the outputs by their places; what is random begins from the seed each time."""
    _seed(model)
    return flat(model(inputs[0], training=training), keras.ops.convert_to_numpy)


def step(model: keras.Model, inputs: Sequence[np.ndarray], targets: Outputs) -> float:
    """Take a step of gradient descent, its gradient clipped, and return the loss before it."""
    _seed(model)
    optimizer = keras.optimizers.SGD(0.1, global_clipnorm=1.0)
    with tf.GradientTape() as tape:
        found = flat(model(inputs[0], training=True), lambda tensor: tensor)
        loss = sum(
            tf.reduce_mean(tf.square(found[place] - target)) for place, target in targets.items()
        )
    optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    return float(loss)


def depthwise(model: keras.Model) -> list[keras.Variable]:
    """Return every D of the model, each once."""
    names = ((m, getattr(m, "d_name", None)) for m in _layers(model) if _is_ours(m))
    return [getattr(m, name) for m, name in names if name is not None]


def ordinary(model: keras.Model) -> int:
    """Return how many ordinary convolutions of more than one tap it has, each once."""
    return sum(type(m) in ORDINARY and np.prod(m.kernel_size) > 1 for m in _layers(model))


def bsconvs(model: keras.Model) -> int:
    """Return how many BSConv layers it has, each once."""
    return sum(_is_ours(m) and type(m).__name__.startswith("BSConv") for m in _layers(model))


def parameters(model: keras.Model) -> int:
    """Return the number of its numbers, the statistics of batch norms among them, as Keras does."""
    return model.count_params()


def entries(model: keras.Model) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what it keeps, by names."""
    return {v.path: tuple(v.shape) for v in model.variables}


def traces(model: keras.Model) -> list[str]:
    """Return the types of this package's layers in it that folding is to remove."""
    return sorted({type(m).__qualname__ for m in _layers(model) if _is_ours(m)})


def over_parameterize(model: keras.Model) -> Converted:
    """Over-parameterize it."""
    return doconv_tf.over_parameterize(model)


def fold(model: keras.Model, fuse_batchnorm: bool) -> Converted:
    """Fold it."""
    return doconv_tf.fold(model, fuse_batchnorm=fuse_batchnorm)


def release() -> None:
    """Free what Keras keeps of models that are gone."""
    keras.backend.clear_session()
    gc.collect()


def _layers(model: keras.Model) -> list[keras.Layer]:
    """Return the model's layers at any depth, each once."""
    found = {id(m): m for m in model._flatten_layers(include_self=False)}
    return list(found.values())


def _is_ours(layer: keras.Layer) -> bool:
    module = type(layer).__module__
    return module.startswith("doconv") and module != BLOCKS


def _seed(model: keras.Model) -> None:
    """Let dropout begin anew: its layers keep generators of their own."""
    keras.utils.set_random_seed(SEED)
    for layer in _layers(model):
        generator = getattr(layer, "seed_generator", None)
        if generator is not None:
            generator.state.assign(np.array([SEED, 0]))
