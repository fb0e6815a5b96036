"""What `training_step.py` measures in Keras on TensorFlow. Run by it, in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers as kl
from keras import ops
from step_cases import TUTORIAL, LayerCase, ModelCase
from step_measure import Row, figure, measure

from doconv_tf import DOConv2D, fold, get_model, over_parameterize, verify
from doconv_tf.over_parameterized import OverParameterized

NAME = "Keras"
CONVS = {1: kl.Conv1D, 2: kl.Conv2D, 3: kl.Conv3D}
LARGEST = "ResNet152"


def version() -> str:
    """Return the versions of the framework and its backend."""
    return f"Keras {keras.__version__}, TensorFlow {tf.__version__}"


def formula(weight: Any, depthwise: Any, groups: int) -> Any:
    """Return the kernel by the plain formula: the identity added to D, and one einsum."""
    channels, taps, _ = depthwise.shape
    d = ops.reshape(depthwise + ops.eye(taps), (groups, channels // groups, taps, taps))
    w = ops.reshape(weight, (taps, channels // groups, groups, -1))
    return ops.reshape(ops.einsum("gims,sigo->migo", d, w), weight.shape)


def by_formula(model: Any) -> Any:
    """Return the model with the plain formula in its DO layers."""
    for layer in model._flatten_layers():
        if isinstance(layer, OverParameterized):
            layer.composed_kernel = _formula_of(layer)
    return model


def _formula_of(layer: Any) -> Callable[[], Any]:
    return lambda: formula(layer._kernel, getattr(layer, layer.d_name), layer.spec.groups)


def moved(model: Any) -> Any:
    """Return the model with a D that is not zero, as after some training."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.name == "d_kernel":
            variable.assign(0.02 * rng.standard_normal(variable.shape))
    return model


def resnet18(size: int) -> Any:
    """Return a ResNet-18, which keras.applications lacks."""

    def conv(x: Any, filters: int, kernel: int, stride: int = 1, relu: bool = True) -> Any:
        x = kl.ZeroPadding2D(kernel // 2)(x) if kernel > 1 else x
        x = kl.Conv2D(filters, kernel, strides=stride, use_bias=False)(x)
        x = kl.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        return kl.ReLU()(x) if relu else x

    inputs = keras.Input((size, size, 3))
    x = kl.MaxPooling2D(3, 2, padding="same")(conv(inputs, 64, 7, 2))
    for stage, filters in enumerate((64, 128, 256, 512)):
        for unit in range(2):
            stride = 2 if stage and not unit else 1
            short = conv(x, filters, 1, stride, relu=False) if stride > 1 else x
            x = conv(conv(x, filters, 3, stride), filters, 3, relu=False)
            x = kl.ReLU()(kl.add([x, short]))
    return keras.Model(inputs, kl.Dense(1000)(kl.GlobalAveragePooling2D()(x)))


def network(name: str, size: int) -> Any:
    """Return an ordinary network for images of this size."""
    if name == TUTORIAL:
        shape = (3, size, size)
        return get_model(name, num_classes=1000, in_channels=3, input_shape=shape)
    if name == "ResNet-18":
        return resnet18(size)
    make = {"ResNet-50": keras.applications.ResNet50, "MobileNetV2": keras.applications.MobileNetV2}
    return make[name](input_shape=(size, size, 3), weights=None, classifier_activation=None)


def layers(cases: Iterable[LayerCase], patience: float) -> Iterable[Row]:
    """Yield a row for each layer in a `tf.function`: forward and backward, the input's gradient."""
    for case in cases:
        x = tf.random.normal((case.batch, *(case.size,) * case.rank, case.in_channels))
        layer = _layer(case)
        model = keras.Sequential([keras.Input(x.shape[1:]), layer])
        named = {
            "plain": model,
            "formula": by_formula(moved(over_parameterize(model)[0])),
            "ours": moved(over_parameterize(model)[0]),
        }
        gradient = tf.random.normal(model(x).shape)
        ways = {name: _layer_step(model, x, gradient) for name, model in named.items()}
        yield measure(NAME, "layer", case.name, ways, patience)


def _layer(case: LayerCase) -> Any:
    if case.groups == case.in_channels:
        multiplier = case.out_channels // case.in_channels
        return kl.DepthwiseConv2D(
            case.kernel, padding="same", depth_multiplier=multiplier, use_bias=False
        )
    return CONVS[case.rank](
        case.out_channels, case.kernel, padding="same", groups=case.groups, use_bias=False
    )


def _layer_step(model: Any, x: Any, gradient: Any) -> Callable[[], Any]:
    variables = [variable.value for variable in model.trainable_variables]

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = model(x)
        return tape.gradient(y, [x, *variables], gradient)

    return step


def models(cases: Iterable[ModelCase], patience: float) -> Iterable[Row]:
    """Yield a row for each network: `train_on_batch` with SGD and momentum."""
    for case in cases:
        plain = network(case.network, case.size)
        named = {
            "plain": plain,
            "formula": by_formula(moved(over_parameterize(plain)[0])),
            "ours": moved(over_parameterize(plain)[0]),
        }
        ways = {name: _model_step(model, case) for name, model in named.items()}
        yield measure(NAME, "training step", case.name, ways, patience)


def step(way: str, case: ModelCase) -> Callable[[], Any]:
    """Return one way's training step, and nothing else in memory."""
    model = network(case.network, case.size)
    if way != "plain":
        model = moved(over_parameterize(model)[0])
    return _model_step(by_formula(model) if way == "formula" else model, case)


def _model_step(model: Any, case: ModelCase) -> Callable[[], Any]:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-4, momentum=0.9), loss)
    x = tf.random.normal((case.batch, case.size, case.size, 3))
    labels = np.random.default_rng(0).integers(1000, size=case.batch)
    return lambda: model.train_on_batch(x, labels)


def compositions(kernels: Iterable[tuple[int, int]], patience: float) -> Iterable[Row]:
    """Yield a row for each kernel: composing it in a `tf.function`, forward and backward."""
    for channels_in, channels_out in kernels:
        named = {}
        for name in ("formula", "ours"):
            model = keras.Sequential(
                [keras.Input((8, 8, channels_in)), DOConv2D(channels_out, 3, use_bias=False)]
            )
            named[name] = moved(model)
        by_formula(named["formula"])
        gradient = tf.random.normal((3, 3, channels_in, channels_out))
        ways = {name: _composition(model, gradient) for name, model in named.items()}
        weight = tf.random.normal(gradient.shape)

        @tf.function
        def stream(weight: Any = weight, gradient: Any = gradient) -> Any:
            return weight + 1.0, gradient + 1.0

        name = f"3×3, {channels_in}→{channels_out}"
        yield measure(NAME, "composition alone", name, {**ways, "floor": stream}, patience)


def _composition(model: Any, gradient: Any) -> Callable[[], Any]:
    variables = [variable.value for variable in model.trainable_variables]

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            kernel = model.layers[0].composed_kernel()
        return tape.gradient(kernel, variables, gradient)

    return step


def inference(case: ModelCase, patience: float) -> Iterable[Row]:
    """Yield a row for the folded network, and for the unfolded one."""
    plain = network(case.network, case.size)
    ours = moved(over_parameterize(plain)[0])
    named = {"plain": plain, "folded": fold(ours)[0], "unfolded": ours}
    x = tf.random.normal((case.batch, case.size, case.size, 3))
    ways = {name: _call(model, x) for name, model in named.items()}
    yield measure(NAME, "inference", case.name, ways, patience)


def _call(model: Any, x: Any) -> Callable[[], Any]:
    return tf.function(lambda: model(x, training=False))


def tools() -> Iterable[Row]:
    """Yield the seconds that the whole-model tools take on the largest network."""
    plain = getattr(keras.applications, LARGEST)(input_shape=(64, 64, 3), weights=None)
    begin = time.perf_counter()
    model, _ = over_parameterize(plain)
    middle = time.perf_counter()
    folded, _ = fold(model)
    end = time.perf_counter()
    x = np.random.default_rng(0).random((1, 64, 64, 3), np.float32)
    assert verify(folded, model, x).absolute == 0
    yield figure(NAME, "over_parameterize, seconds", "ResNet-152", ours=middle - begin)
    yield figure(NAME, "fold, seconds", "ResNet-152", ours=end - middle)
