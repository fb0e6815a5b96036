"""The contract's cases in Keras, on whichever backend Keras runs.

Keras' layers have the channels last, so arrays are turned on the way in and out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from contract import Case, Problem, Results
from keras import ops

import doconv_tf
from doconv_core import LayerForm, State, from_canonical, to_canonical

LAYERS = (doconv_tf.DOConv1D, doconv_tf.DOConv2D, doconv_tf.DOConv3D)
ORDINARY = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
LAYOUTS = ("*IO", "*CN")  # of an ordinary and of a depthwise layer


def pads(case: Case) -> bool:
    """Whether Keras' layer can pad like the case: not at all, "same", or "causal"."""
    return _padding(case) is not None


def _padding(case: Case) -> str | None:
    if not any(map(any, case.padding)):
        return "valid"
    if case.padding_mode != "zeros":
        return None
    if case.padding == case.same_padding():
        return "same"
    if case.padding == ((case.dilation[0] * (case.spec.kernel_size[0] - 1), 0),):
        return "causal"
    return None


def arguments(case: Case) -> dict[str, Any]:
    """Return the constructor's arguments, the same for both layers."""
    spec = case.spec
    sizes = {"filters": spec.out_channels, "groups": spec.groups}
    if case.depthwise_layer:
        sizes = {"depth_multiplier": spec.out_channels_per_group}
    kernel = "depthwise_initializer" if case.depthwise_layer else "kernel_initializer"
    return {
        **sizes,
        "kernel_size": spec.kernel_size,
        "strides": case.stride,
        "padding": _padding(case),
        "data_format": "channels_last",
        "dilation_rate": case.dilation,
        "use_bias": case.bias,
        kernel: "zeros",  # which each test replaces; to draw values, JAX compiles for each shape
    }


def ordinary_type(case: Case) -> type:
    if case.depthwise_layer:
        return keras.layers.DepthwiseConv2D
    return ORDINARY[case.spec.rank - 1]


def empty(case: Case, dtype: str) -> keras.Layer:
    options = {"dtype": dtype, "depth_multiplier": case.spec.depth_multiplier}
    cls = LAYERS[case.spec.rank - 1]
    if case.depthwise_layer:
        options["d_multiplier"] = options.pop("depth_multiplier")
        cls = doconv_tf.DODepthwiseConv2D
    layer = cls(**arguments(case), **options)
    layer.build((None, *case.size, case.spec.in_channels))
    return layer


def build(case: Case, problem: Problem, dtype: str) -> keras.Layer:
    layer = empty(case, dtype)
    form = LayerForm(case.spec, case.spec.over_parameterized, case.bias)
    arrays = {
        "weight": problem.weight,
        "depthwise_weight": problem.depthwise,
        "bias": problem.bias,
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    doconv_tf.load_state(layer, State({"": form}, arrays))
    return layer


def ordinary(case: Case, kernel: np.ndarray, bias: np.ndarray | None) -> keras.Layer:
    layer = ordinary_type(case)(**arguments(case))
    layer.build((None, *case.size, case.spec.in_channels))
    layer.kernel.assign(from_canonical(kernel, _layout(layer), case.spec.groups))
    if bias is not None:
        layer.bias.assign(bias)
    return layer


def forward(layer: keras.Layer, x: np.ndarray) -> np.ndarray:
    return _out(layer(_in(x, layer)))


def pulled_back(layer: keras.Layer, x: np.ndarray, dy: np.ndarray) -> Any:
    """Return the output, and the gradients of the input and of each trainable variable."""
    backend = keras.backend.backend()
    compute = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[backend]
    output, dx, values = compute(layer, _in(x, layer), _in(dy, layer))
    return _out(output), _out(dx), list(map(_array, values))


def gradients(layer: keras.Layer, x: np.ndarray, dy: np.ndarray) -> Results:
    output, dx, values = pulled_back(layer, x, dy)
    found = {v.name: g for v, g in zip(layer.trainable_variables, values, strict=True)}
    weight = to_canonical(found["kernel"], layer.layout)
    weight = weight.reshape(layer.spec.weight_shape)
    depthwise, bias = found.get("depthwise_kernel"), found.get("bias")
    return Results(output, dx, weight, depthwise, bias)


def _tensorflow(layer, x, dy):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        output = layer(x)
    sources = [x, *(v.value for v in layer.trainable_variables)]
    dx, *values = tape.gradient(output, sources, output_gradients=dy)
    return output, dx, values


def _jax(layer, x, dy):
    import jax

    fixed = [v.value for v in layer.non_trainable_variables]

    def call(x, values):
        return layer.stateless_call(values, fixed, x)[0]

    @jax.jit  # as Keras does in `fit`; operation by operation takes twice the time
    def compute(x, values, dy):
        output, pull_back = jax.vjp(call, x, values)
        return output, *pull_back(dy)

    return compute(x, [v.value for v in layer.trainable_variables], dy)


def _torch(layer, x, dy):
    x = x.detach().requires_grad_()
    output = layer(x)
    output.backward(dy)
    return output, x.grad, [v.value.grad for v in layer.trainable_variables]


def composed_kernel(layer: keras.Layer) -> np.ndarray:
    return to_canonical(_array(layer.composed_kernel()), layer.layout)


def round_trip(layer: keras.Layer, case: Case, folder: Path) -> keras.Layer:
    keras.Sequential([keras.Input((*case.size, case.spec.in_channels)), layer]).save(
        folder / "model.keras"
    )
    return keras.saving.load_model(folder / "model.keras").layers[0]


def state(layer: keras.Layer) -> dict[str, np.ndarray]:
    return dict(doconv_tf.export_state(layer).arrays)


package = doconv_tf
types = {
    "conv": "Conv2D", "do_conv": "DOConv2D", "norm": "BatchNormalization", "own": "Own",
    "transposed": "Conv2DTranspose",
}  # fmt: skip


class Own(keras.layers.Conv2D):
    """A convolution that may compute something else."""


def network(kinds: dict[str, str]) -> keras.Model:
    layers = keras.layers
    made = {
        "conv": lambda **name: layers.Conv2D(4, 3, **name),
        "pointwise": lambda **name: layers.Conv2D(4, 1, **name),
        "do_conv": lambda **name: doconv_tf.DOConv2D(4, 3, **name),
        "own": lambda **name: Own(4, 3, **name),
        "transposed": lambda **name: layers.Conv2DTranspose(4, 3, **name),
        "patched": lambda **name: _patched(layers.Conv2D(4, 3, **name)),
        "norm": layers.BatchNormalization,
        "relu": layers.ReLU,
    }
    return keras.Sequential(
        [keras.Input((20, 20, 4)), *(made[kind](name=name) for name, kind in kinds.items())]
    )


def _patched(conv: keras.Layer) -> keras.Layer:
    conv.call = conv.call
    return conv


def _layout(layer: keras.Layer) -> str:
    return LAYOUTS[isinstance(layer, keras.layers.DepthwiseConv2D)]


def _in(values: np.ndarray, layer: keras.Layer) -> Any:
    values = np.ascontiguousarray(np.moveaxis(values, 1, -1))
    return ops.cast(ops.convert_to_tensor(values), layer.compute_dtype)


def _out(values: Any) -> np.ndarray:
    return np.moveaxis(_array(values), -1, 1)


def _array(values: Any) -> np.ndarray:
    array = ops.convert_to_numpy(values)
    return (
        array.astype(np.float32) if array.dtype.itemsize < 4 and array.dtype.kind == "V" else array
    )
