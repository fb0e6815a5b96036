"""BSConv layers, models with them, and networks by name, in Keras, on whichever backend it runs."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import keras
import numpy as np
from contract_bsconv import EPSILON, BSConvCase, Results
from keras import ops
from keras_models import filled, traces

import doconv_tf as package
from adapters.tf import LAYERS as DO_LAYERS
from adapters.tf import LAYOUTS, ORDINARY, Own, forward, pulled_back, to_canonical
from adapters.tf import round_trip as _stored
from doconv_core import Left
from doconv_core.kinds.bsconv_model import GROUPED, other_size
from doconv_core.models.report import TRANSPOSED
from doconv_tf.bsconv import LAYERS
from doconv_tf.bsconv_model import SEPARABLE
from doconv_tf.copying import copied  # noqa: F401
from doconv_tf.view import walk

BACKEND = keras.backend.backend()
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
ZEROS = (keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D)
WORDS = {
    "stride": "strides", "padding": "around", "eps": "epsilon", "wrong": "eps",
    "norms": "momentum, epsilon", "d": "D", "sequential": "Sequential", "call": "call",
    "conv": "keras.layers.Conv2D", "module": "keras.Layer", "root": "Functional",
}  # fmt: skip
# JAX computes in float32 unless it is told otherwise.
DOUBLE, EXACT, FOUND = ("float32", 1e-5, 1e-4) if BACKEND == "jax" else ("float64", 1e-11, 1e-4)
HALF_TYPES = ("float16", "bfloat16")
REFUSE_OWN_CALLS = ("merge", "dense")


def pads(case: BSConvCase) -> bool:
    """Whether Keras' layer can pad like the case: with zeros alone."""
    return case.padding_mode == "zeros" or not any(map(any, case.padding))


def _same(case: BSConvCase) -> bool:
    totals = [(k - 1) * d for k, d in zip(case.spec.kernel_size, case.dilation, strict=True)]
    halves = tuple((total // 2, total - total // 2) for total in totals)
    return set(case.stride) == {1} and case.padding == halves


def build(case: BSConvCase, dtype: str = "float32") -> keras.Layer:
    spec = case.spec
    options: dict[str, Any] = {"with_bn": spec.with_bn, "dtype": dtype}
    if spec.with_bn:
        options["bn_options"] = {"epsilon": EPSILON}
    if spec.variant == "s":
        options |= {"p": spec.p, "min_mid_channels": spec.min_mid_channels}
    if _same(case):
        options["padding"] = "same"
    else:
        options["around"] = tuple(before for before, _ in case.padding)
    layer = LAYERS[spec.variant, ORDINARY[spec.rank - 1]](
        spec.out_channels, spec.kernel_size, case.stride, data_format="channels_last",
        dilation_rate=case.dilation, use_bias=case.bias, **options,
    )  # fmt: skip
    layer.build((None, *case.size, spec.in_channels))
    return layer


def round_trip(layer: keras.Layer, case: BSConvCase, folder: Path) -> keras.Layer:
    return _stored(layer, case, folder)


def with_gradients(function: Callable[[], Any], variables: list[Any]) -> tuple[Any, list[Any]]:
    """Return a function's value, and its gradients by variables, as arrays, on any backend."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = function()
        found = tape.gradient(value, [v.value for v in variables])
    elif BACKEND == "torch":
        import torch

        value = function()
        found = torch.autograd.grad(value, [v.value for v in variables], allow_unused=True)
    else:
        import jax

        def call(values: list[Any]) -> Any:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return function()

        value, found = jax.value_and_grad(call)([v.value for v in variables])
    return value, [None if g is None else ops.convert_to_numpy(g) for g in found]


def gradients(layer: keras.Layer, x: np.ndarray, dy: np.ndarray, composed: bool = False) -> Results:
    if composed:
        return _by_kernel(layer, x, dy)
    output, dx, values = pulled_back(layer, x, dy)
    return Results(output, dx, _by_name(layer, values))


def _by_kernel(layer: keras.Layer, x: np.ndarray, dy: np.ndarray) -> Results:
    last, factors = np.moveaxis(x, 1, -1), np.moveaxis(dy, 1, -1)

    def output() -> Any:
        kernel, rate = layer.composed_kernel(), layer.dilation_rate
        return ops.conv(last, kernel, layer.strides, dilation_rate=rate) + layer.bias

    variables = layer.trainable_variables
    _, values = with_gradients(lambda: ops.sum(output() * factors), variables)
    return Results(
        np.moveaxis(ops.convert_to_numpy(output()), -1, 1), x, _by_name(layer, values)
    )


def _by_name(layer: keras.Layer, values: list[Any]) -> dict[str, np.ndarray]:
    gradients = {id(v): g for v, g in zip(layer.trainable_variables, values, strict=True)}
    found = {}
    for part in layer.layers:
        for variable in part.trainable_variables:
            gradient = gradients[id(variable)]
            if variable.name == "kernel":
                gradient = to_canonical(gradient, LAYOUTS[isinstance(part, DEPTHWISE)])
                gradient = gradient.reshape(*gradient.shape[:2], -1)
            entry = {"kernel": "weight"}.get(variable.name, variable.name)
            found[f"{part.name}.{entry}"] = gradient
    return found


def composed_kernel(layer: keras.Layer) -> tuple[np.ndarray, str]:
    kernel = layer.composed_kernel()
    name = keras.backend.standardize_dtype(kernel.dtype)
    return to_canonical(ops.convert_to_numpy(ops.cast(kernel, "float32")), "*IO"), name


def is_ordinary(layer: keras.Layer, form: str) -> bool:
    parts = getattr(layer, "layers", [layer])
    if len(parts) > 1 and type(layer) is not keras.Sequential:
        return False
    types = [type(part) for part in parts if not isinstance(part, ZEROS)]
    if form == "dense":
        return len(types) == 1 and types[0] in ORDINARY
    if form == "merge":
        names = [part.name for part in parts if not isinstance(part, ZEROS)]
        return set(types) <= {*ORDINARY, *DEPTHWISE} and names == ["pointwise", "depthwise"]
    return set(types) <= {*ORDINARY, *DEPTHWISE, keras.layers.BatchNormalization}


def dtypes(layer: keras.Layer) -> set[str]:
    return {variable.dtype for variable in layer.weights}


def penalty(model: keras.Layer, layer: keras.Layer, alpha: float) -> tuple[float, Any, Any]:
    """Return the loss, and its gradients of the pointwise weights of one layer of the model."""
    kernels = [layer.pointwise1.kernel, layer.pointwise2.kernel]
    loss, found = with_gradients(lambda: package.orthonormality_loss(model, alpha), kernels)
    value = float(ops.convert_to_numpy(loss))
    return value, *(None if g is None else g.reshape(g.shape[-2:]).T for g in found)


def _activated(made: keras.Layer) -> None:
    made.pointwise1.activation = keras.activations.relu


def _regularized(made: keras.Layer) -> None:
    made.pointwise2.activity_regularizer = keras.regularizers.L2(0.1)


def _turned(made: keras.Layer) -> None:
    made.batch_norm1.axis = 1


def own_call(made: keras.Layer) -> None:
    made.call = made.call


# What may be done to a BSConv-S with batch norms, 8 channels to 6, and why it is then not folded.
NOT_FOLDABLE = [
    (own_call, "has a call of its own, so the convolution"),
    (_activated, "its pointwise1 is no pointwise convolution of stride 1 without activation"),
    (_regularized, "its pointwise2 has an activity regularizer, which would see other values"),
    (_turned, "its batch_norm1 cannot be folded: normalizes another axis"),
    (
        lambda made: made.add(keras.layers.ReLU(name="more")),
        "its parts are pointwise1, batch_norm1, .*, more; expected pointwise1",
    ),
]


# Whole models.

REPLACED = ["first", "block.conv", "last"]
LEFT = (
    Left("grouped", "Conv2D", GROUPED),
    Left("depthwise", "DepthwiseConv2D", GROUPED),
    Left("separable", "SeparableConv2D", SEPARABLE),
    Left("transposed", "Conv2DTranspose", TRANSPOSED),
    Left("one_tap", "Conv2D", other_size((1, 1))),
)
IMAGES = (2, 6, 11, 11)
LAST = "last"


@keras.saving.register_keras_serializable(package="doconv_tests")
class Doubled(package.BSConvU2D):
    """A BSConv that computes something else."""

    def call(self, inputs: Any, **options: Any) -> Any:
        return 2 * super().call(inputs, **options)


def make(kind: str, i: int, o: int, kernel: int, rank: int = 2, **options: Any) -> keras.Layer:
    """Return a layer that takes `i` channels, as Keras finds by itself, and gives `o`."""
    made = {
        "conv": ORDINARY[rank - 1], "do_conv": DO_LAYERS[rank - 1], "own": Own, "doubled": Doubled,
        "u": LAYERS["u", ORDINARY[rank - 1]], "s": LAYERS["s", ORDINARY[rank - 1]],
    }  # fmt: skip
    return made[kind](o, kernel, **options)


def built(kind: str, i: int, o: int, kernel: int, rank: int = 2, **options: Any) -> keras.Layer:
    layer = make(kind, i, o, kernel, rank, **options)
    layer.build((None, *(7, 8, 9)[:rank], i))
    return layer


def dense() -> keras.Layer:
    return keras.layers.Dense(2)


def chain(*layers: Any, rank: int = 2) -> keras.Model:
    """Return a model of layers, each as `make` takes it, or the number of an earlier one."""
    keras.utils.set_random_seed(0)
    found: list[keras.Layer] = []
    x = y = keras.Input((*(12, 11, 10)[:rank], layers[0][1]))
    for n, row in enumerate(layers):
        again = isinstance(row, int)
        found.append(found[row] if again else make(*row, rank=rank, name=str(n)))
        y = found[-1](y)
    return keras.Model(x, y)


def network() -> keras.Model:
    """Return a model with convolutions of each kind, one of them in a model inside it."""
    layers, inputs = keras.layers, keras.Input((9, 9, 8))
    inner = layers.Conv2D(6, 3, name="conv", activation="relu", use_bias=False)(inputs)
    block = keras.Model(inputs, inner, name="block")
    x = keras.Input((11, 11, 6))
    y = layers.Conv2D(8, 3, name="first", dtype="float32", kernel_regularizer="l2")(x)
    y = layers.BatchNormalization(name="norm")(y)
    y = layers.Conv2D(6, 3, name="last", strides=2, padding="same")(block(y))
    y = layers.Conv2D(6, 3, groups=2, name="grouped", padding="same")(y)
    y = layers.DepthwiseConv2D(3, name="depthwise", padding="same")(y)
    y = layers.SeparableConv2D(5, 3, name="separable", padding="same")(y)
    y = layers.Conv2DTranspose(5, 3, name="transposed")(y)
    y = layers.Conv2D(4, 1, name="one_tap")(y)
    return filled(keras.Model(x, layers.Dense(3, name="head")(y), name="net"))


def converted(variant: str = "u", **options: Any) -> keras.Model:
    """Return the network with BSConvs, with values as after training."""
    options = {"start": "random", **options}
    return filled(package.to_bsconv(network(), variant, **options).model, 1)


def at(model: keras.Model, path: str) -> keras.Layer:
    return dict(walk(model))[path]


def kinds(model: keras.Model) -> dict[str, str]:
    return {path: type(layer).__name__ for path, layer in walk(model)}


def count(model: keras.Model) -> int:
    return model.count_params()


def parts(layer: keras.Layer) -> list[str]:
    return [part.name for part in layer.layers]


def is_bare(model: keras.Model) -> bool:
    """Whether nothing of this package is left in the model."""
    return not traces(model) and "doconv" not in model.to_json()


# Networks by name.


def described(network: Any, **options: Any) -> keras.Model:
    return package.build(network, **options)


def empty(network: Any) -> keras.Model:
    """Return the network without values: Keras leaves them until the scope is left, or for good."""
    with keras.StatelessScope(initialize_variables=False):
        return package.build(network)


def trainable(model: keras.Model) -> int:
    """Return the number of what is trained."""
    return sum(prod(variable.shape) for variable in model.trainable_variables)


def inference(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return forward(model, x)


def network_gradients(
    model: keras.Model, x: np.ndarray, dy: np.ndarray, *, training: bool
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the output, and the gradients of `sum(output · dy)`, as a state's."""
    last, factors, outputs = np.moveaxis(x, 1, -1).copy(), np.moveaxis(dy, 1, -1).copy(), []

    def total() -> Any:
        outputs.append(model(last, training=training))
        return ops.sum(outputs[-1] * factors)

    _, found = with_gradients(total, model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, found, strict=True):
        variable.assign(gradient)
    output = np.moveaxis(ops.convert_to_numpy(outputs[0]), -1, 1)
    return output, dict(package.export_state(model).arrays)
