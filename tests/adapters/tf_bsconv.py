"""BSConv layers, models with them, and networks by name, in Keras, on whichever backend it runs."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import keras
import numpy as np
from contract_bsconv import BSConvCase, Results, options_of, snapshot
from keras import ops

import doconv_tf as package
from adapters.tf import LAYERS as DO_LAYERS
from adapters.tf import ORDINARY, Own, forward, to_canonical
from doconv_tf import copying, ordinary
from doconv_tf.bsconv import BSCONVS

__all__ = ["forward"]
BACKEND = keras.backend.backend()
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
ZEROS = (keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D)
WORDS = {
    "stride": "strides", "padding": "around", "eps": "epsilon", "wrong": "eps",
    "norms": "momentum, epsilon", "d": "D", "sequential": "Sequential", "call": "call",
    "conv": "keras.layers.Conv2D", "module": "keras.Layer", "root": "Functional",
    "none": "Identity",
}  # fmt: skip
# JAX computes in float32 unless it is told otherwise.
DOUBLE, EXACT = ("float32", 1e-5) if BACKEND == "jax" else ("float64", 1e-11)
HALF_TYPES = ("float16", "bfloat16")
REFUSE_OWN_CALLS = ("keep", "merge", "dense")
copied, walk = copying.copied, lambda model: dict(ordinary.walk(model))


def pads(case: BSConvCase) -> bool:
    """Whether Keras' layer can pad like the case: with zeros alone."""
    return case.padding_mode == "zeros" or not any(map(any, case.padding))


def _padding(case: BSConvCase) -> dict[str, Any]:
    totals = [(k - 1) * d for k, d in zip(case.spec.kernel_size, case.dilation, strict=True)]
    halves = tuple((total // 2, total - total // 2) for total in totals)
    if set(case.stride) == {1} and case.padding == halves:
        return {"padding": "same"}
    return {"around": tuple(before for before, _ in case.padding)}


@keras.saving.register_keras_serializable(package="doconv_tests")
class Doubled(package.BSConvU2D):
    """A BSConv that computes something else."""

    def call(self, inputs: Any, **options: Any) -> Any:
        return 2 * super().call(inputs, **options)


def make(
    kind: str, i: int, o: int, kernel: Any, rank: int = 2, size: Any = (12, 11, 10), **options: Any
) -> keras.Layer:
    conv, do_conv = ORDINARY[rank - 1], DO_LAYERS[rank - 1]
    made = {"conv": conv, "do_conv": do_conv, "own": Own, "doubled": Doubled}
    layer = (made.get(kind) or BSCONVS.layers[kind, conv])(o, kernel, **options)
    layer.build((None, *size[:rank], i))
    return layer


def build(case: BSConvCase, dtype: str = "float32") -> keras.Layer:
    spec = case.spec
    return make(
        spec.variant, spec.in_channels, spec.out_channels, spec.kernel_size, spec.rank, case.size,
        strides=case.stride, dilation_rate=case.dilation, use_bias=case.bias, dtype=dtype,
        data_format="channels_last", **_padding(case), **options_of(case, WORDS["eps"]),
    )  # fmt: skip


def chain(*layers: Any, rank: int = 2) -> keras.Model:
    keras.utils.set_random_seed(0)
    found: list[keras.Layer] = []
    x = y = keras.Input((*(12, 11, 10)[:rank], layers[0][1]))
    for n, row in enumerate(layers):
        again = isinstance(row, int)
        found.append(found[row] if again else make(*row, rank=rank, name=str(n)))
        y = found[-1](y)
    return keras.Model(x, y)


def described(network: Any, dtype: str = "float32", **options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        return package.build(network, **options)
    finally:
        keras.config.set_dtype_policy(policy)


def empty(network: Any) -> keras.Model:
    """Return the network without values: Keras leaves them until the scope is left, or for good."""
    with keras.StatelessScope(initialize_variables=False):
        return package.build(network)


def round_trip(layer: keras.Layer, new: Any, x: np.ndarray, folder: Path) -> keras.Layer:
    """Return what a file says by itself, without the new layer."""
    model = keras.Sequential([keras.Input((*x.shape[2:], x.shape[1])), layer])
    model.save(folder / "layer.keras")
    return keras.saving.load_model(folder / "layer.keras").layers[0]


def gradients(
    model: keras.Layer,
    x: np.ndarray,
    dy: np.ndarray,
    training: bool = False,
    composed: bool = False,
) -> Results:
    inputs = keras.Variable(np.moveaxis(x, 1, -1), dtype=x.dtype.name)
    factors, outputs = ops.convert_to_tensor(np.moveaxis(dy, 1, -1).copy()), []

    def total() -> Any:
        given = ops.convert_to_tensor(inputs)
        output = _by_kernel(model, given) if composed else model(given, training=training)
        outputs.append(output)
        return ops.sum(output * factors)

    dx, *found = _differentiated(total, [inputs, *model.trainable_variables])[1]
    if BACKEND == "jax":
        total()  # what it gave while it was traced has no values
    output = np.moveaxis(ops.convert_to_numpy(outputs[-1]), -1, 1)
    return Results(output, np.moveaxis(dx, -1, 1), _by_name(model, found))


def _by_kernel(layer: keras.Layer, x: Any) -> Any:
    rate = layer.dilation_rate
    return ops.conv(x, layer.composed_kernel(), layer.strides, dilation_rate=rate) + layer.bias


def penalty(model: keras.Layer, alpha: float = 0.1) -> tuple[float, dict[str, np.ndarray]]:
    variables = model.trainable_variables
    loss, found = _differentiated(lambda: package.orthonormality_loss(model, alpha), variables)
    return float(ops.convert_to_numpy(loss)), _by_name(model, found)


def _differentiated(function: Callable[[], Any], variables: list[Any]) -> tuple[Any, list[Any]]:
    """Return a function's value, and its gradients by variables, on any backend."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch([v.value for v in variables])
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
    pairs = zip(variables, found, strict=True)
    return value, [ops.convert_to_numpy(ops.zeros_like(v) if g is None else g) for v, g in pairs]


def _by_name(model: keras.Layer, gradients: list[Any]) -> dict[str, np.ndarray]:
    """Return the gradients of the trainable variables, by their names in a state."""
    state = snapshot(package, model)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        variable.assign(gradient)
    found = snapshot(package, model).arrays
    package.load_state(model, state)
    return found


def composed_kernel(layer: keras.Layer) -> tuple[np.ndarray, str]:
    kernel = layer.composed_kernel()
    name = keras.backend.standardize_dtype(kernel.dtype)
    return to_canonical(ops.convert_to_numpy(ops.cast(kernel, "float32")), "*IO"), name


def is_ordinary(layer: keras.Layer, form: str) -> bool:
    parts = getattr(layer, "layers", [layer])
    if len(parts) > 1 and type(layer) is not keras.Sequential:
        return False
    parts = [part for part in parts if not isinstance(part, ZEROS)]
    types = {type(part) for part in parts}
    if form == "dense":
        return len(parts) == 1 and types <= set(ORDINARY)
    if form == "merge":
        names = [part.name for part in parts]
        return types <= {*ORDINARY, *DEPTHWISE} and names == ["pointwise", "depthwise"]
    return types <= {*ORDINARY, *DEPTHWISE, keras.layers.BatchNormalization}


def dtypes(layer: keras.Layer) -> set[str]:
    return {variable.dtype for variable in layer.weights}


def trainable(model: keras.Model) -> int:
    return sum(prod(variable.shape) for variable in model.trainable_variables)


def own_call(made: keras.Layer) -> None:
    made.call = made.call


NOT_FOLDABLE = [
    (own_call, "has a call of its own, so the convolution"),
    (
        lambda made: setattr(made.pointwise1, "activation", keras.activations.relu),
        "its pointwise1 is no pointwise convolution of stride 1 without activation",
    ),
    (
        lambda made: setattr(made.pointwise2, "activity_regularizer", keras.regularizers.L2(0.1)),
        "its pointwise2 has an activity regularizer, which would see other values",
    ),
    (
        lambda made: setattr(made.batch_norm1, "axis", 1),
        "its batch_norm1 cannot be folded: normalizes another axis",
    ),
    (
        lambda made: made.add(keras.layers.ReLU(name="more")),
        "its parts are pointwise1, batch_norm1, .*, more; expected pointwise1",
    ),
]
