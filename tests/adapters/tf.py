"""The contract in Keras, on whichever backend it runs: layers, chains, networks by description.

Keras' layers have the channels last, so arrays are turned on the way in and out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import keras
import keras_models
import numpy as np
from contract import Case, Results, snapshot
from equal import as_array
from keras import ops

import doconv_tf as package
from doconv_core import to_canonical
from doconv_tf import copying
from doconv_tf.bsconv import BSCONVS

BACKEND = keras.backend.backend()
LAYERS = (package.DOConv1D, package.DOConv2D, package.DOConv3D)
ORDINARY = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
ZEROS = (keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D)
WORDS = {
    "stride": "strides", "dilation": "dilation_rate", "out": "filters", "padding": "around",
    "eps": "epsilon", "wrong": "eps", "norms": "momentum, epsilon", "d": "D",
    "sequential": "Sequential", "call": "call", "conv": "keras.layers.Conv2D",
    "module": "keras.Layer", "root": "Functional", "none": "Identity",
}  # fmt: skip
# JAX computes in float32 unless it is told otherwise.
DOUBLE, EXACT = ("float32", 1e-5) if BACKEND == "jax" else ("float64", 1e-11)
HALF_TYPES = ("float16", "bfloat16")
REFUSE_OWN_CALLS = ("keep", "merge", "dense")
types = {
    "conv": "Conv2D", "do_conv": "DOConv2D", "norm": "BatchNormalization", "own": "Own",
    "transposed": "Conv2DTranspose",
}  # fmt: skip
copied, walk = copying.copied, lambda model: dict(keras_models.walk(model))


class Own(keras.layers.Conv2D):
    """A convolution that may compute something else."""


@keras.saving.register_keras_serializable(package="doconv_tests")
class Doubled(package.BSConvU2D):
    """A BSConv that computes something else."""

    def call(self, inputs: Any, **options: Any) -> Any:
        return 2 * super().call(inputs, **options)


class DoubledDO(package.DOConv2D):
    """A DO layer that computes something else."""

    def call(self, inputs: Any) -> Any:
        return 2 * super().call(inputs)


class Padded(package.DOConv2D):
    """A DO layer that convolves something else."""

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        return super().convolution_op(inputs + 1, kernel)


class Centred(package.DOConv2D):
    """A DO layer that convolves with another kernel than the composed one."""

    @property
    def kernel(self) -> Any:
        return super().kernel - ops.mean(super().kernel)


class Named(package.DOConv2D):
    """A DO layer that computes the same."""


OTHERS = {DoubledDO: "call", Padded: "convolution_op", Centred: "kernel"}


def pads(case: Case) -> bool:
    """Whether Keras' layer can pad like the case: not at all, "same", "causal", or a BSConv's."""
    return _padding(case) is not None


def _padding(case: Case) -> dict[str, Any] | None:
    if not any(map(any, case.padding)):
        return {}
    if case.padding_mode != "zeros":
        return None
    if case.padding == case.same_padding():
        return {"padding": "same"}
    if case.padding == ((case.dilation[0] * (case.spec.kernel_size[0] - 1), 0),):
        return {"padding": "causal"}
    if case.kind != "do_conv" and case.symmetric:
        return {"around": tuple(before for before, _ in case.padding)}
    return None


def make(
    kind: str, i: int, o: int, kernel: Any, rank: int = 2, size: Any = (20, 20, 20), **options: Any
) -> keras.Layer:
    conv, dtype = ORDINARY[rank - 1], options.pop("dtype", None)
    made = {
        "conv": conv, "patched": conv, "do_conv": LAYERS[rank - 1], "own": Own, "doubled": Doubled,
        "transposed": keras.layers.Conv2DTranspose,
    }  # fmt: skip
    if kind in ("norm", "relu"):
        cls = keras.layers.BatchNormalization if kind == "norm" else keras.layers.ReLU
        layer = cls(**options)
    else:
        cls = made.get(kind, kind)
        cls = BSCONVS.layers[kind, conv] if isinstance(cls, str) else cls
        layer = cls(o, kernel, dtype=dtype, **options)
        layer.build((None, *size[:rank], i))
    if kind == "patched":
        layer.call = layer.call
    return layer


def build(case: Case, dtype: str = "float32", kind: str | None = None) -> keras.Layer:
    spec, kind = case.spec, kind or case.kind
    usual = {
        "strides": case.stride, "dilation_rate": case.dilation, "use_bias": case.bias,
        "dtype": dtype, "data_format": "channels_last", **_padding(case),
    }  # fmt: skip
    if not case.depthwise_layer:
        # Which each test replaces; to draw values, JAX compiles for each shape.
        zeros = {"kernel_initializer": "zeros"} if kind in ("conv", "do_conv") else {}
        return make(
            kind, spec.in_channels, spec.out_channels, spec.kernel_size, spec.rank, case.size,
            **usual, **zeros, **case.options(kind, WORDS["eps"]),
        )  # fmt: skip
    usual |= {"depth_multiplier": spec.out_channels_per_group, "depthwise_initializer": "zeros"}
    if kind == "conv":
        layer = keras.layers.DepthwiseConv2D(spec.kernel_size, **usual)
    else:
        usual["d_multiplier"] = spec.depth_multiplier
        layer = package.DODepthwiseConv2D(spec.kernel_size, **usual)
    layer.build((None, *case.size, spec.in_channels))
    return layer


def ordinary_type(case: Case) -> type:
    return keras.layers.DepthwiseConv2D if case.depthwise_layer else ORDINARY[case.spec.rank - 1]


def dynamic(case: Any) -> keras.Layer:
    spec = case.spec
    layer = package.DGConv2D(
        spec.out_channels, spec.kernel_size, (case.stride,) * 2, around=case.padding,
        dilation_rate=case.dilation, data_format="channels_last", **case.sizes,
    )  # fmt: skip
    layer.build((None, *case.size, spec.in_channels))
    return layer


def lasso(model: keras.Layer, x: np.ndarray, weight: float) -> float:
    package.add_saliency_lasso(model, weight)
    model(_in(x, model), training=True)
    return float(ops.convert_to_numpy(sum(model.losses)))


def take_over(case: Case, conv: keras.Layer) -> keras.Layer:
    multiplier = case.spec.depth_multiplier
    if case.depthwise_layer:
        return package.DODepthwiseConv2D.from_conv(conv, d_multiplier=multiplier)
    return LAYERS[case.spec.rank - 1].from_conv(conv, depth_multiplier=multiplier)


def chain(*layers: Any, rank: int = 2, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    found: list[keras.Layer] = []
    x = y = keras.Input((*(12, 11, 10)[:rank], layers[0][1]))
    for n, row in enumerate(layers):
        again = isinstance(row, int)
        found.append(found[row] if again else make(*row, rank=rank, name=str(n), **options))
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


def _in(values: np.ndarray, layer: keras.Layer) -> Any:
    values = np.ascontiguousarray(np.moveaxis(values, 1, -1))
    return ops.cast(ops.convert_to_tensor(values), layer.compute_dtype)


def _out(values: Any) -> np.ndarray:
    return np.moveaxis(as_array(ops.convert_to_numpy(values)), -1, 1)


def forward(model: keras.Layer, x: np.ndarray) -> np.ndarray:
    return _out(model(_in(x, model)))


def gradients(
    model: keras.Layer,
    x: np.ndarray,
    dy: np.ndarray,
    training: bool = False,
    composed: bool = False,
    lasso: float = 0.0,
) -> Results:
    if lasso:
        package.add_saliency_lasso(model, lasso)
    inputs, factors = keras.Variable(_in(x, model), dtype=model.compute_dtype), _in(dy, model)

    def total() -> Any:
        given = ops.convert_to_tensor(inputs)
        options = {"training": training} if training else {}
        output = _by_kernel(model, given) if composed else model(given, **options)
        return ops.sum(output * factors) + (sum(model.losses) if lasso else 0), output

    variables = [inputs, *model.trainable_variables]
    (_, output), (dx, *found) = _differentiated(total, variables, model.non_trainable_variables)
    return Results(_out(output), _out(dx), _by_name(model, found))


def _by_kernel(layer: keras.Layer, x: Any) -> Any:
    rate = layer.dilation_rate
    return ops.conv(x, layer.composed_kernel(), layer.strides, dilation_rate=rate) + layer.bias


def penalty(model: keras.Layer, alpha: float = 0.1) -> tuple[float, dict[str, np.ndarray]]:
    def loss() -> Any:
        return package.orthonormality_loss(model, alpha), None

    (value, _), found = _differentiated(loss, model.trainable_variables)
    return float(ops.convert_to_numpy(value)), _by_name(model, found)


def _differentiated(
    function: Callable[[], Any], variables: list[Any], others: Sequence[Any] = ()
) -> tuple[Any, list[Any]]:
    """Return a function's value, with what comes beside it, and its gradients by variables.

    others: variables that it may change.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch([v.value for v in variables])
            found = function()
        gradients = tape.gradient(found[0], [v.value for v in variables])
    elif BACKEND == "torch":
        import torch

        found = function()
        values = [v.value for v in variables]
        gradients = torch.autograd.grad(found[0], values, allow_unused=True)
    else:
        import jax

        def call(values: list[Any]) -> Any:
            pairs = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=pairs, collect_losses=True) as scope:
                value, beside = function()
                return value, (beside, [scope.get_current_value(v) for v in others])

        compute = jax.jit(jax.value_and_grad(call, has_aux=True))  # as Keras does in `fit`
        (value, (beside, changed)), gradients = compute([v.value for v in variables])
        found = value, beside
        for variable, new in zip(others, changed, strict=True):
            variable.assign(variable if new is None else new)
    pairs = zip(variables, gradients, strict=True)
    return found, [ops.zeros_like(v) if g is None else g for v, g in pairs]


def _by_name(model: keras.Layer, gradients: list[Any]) -> dict[str, np.ndarray]:
    """Return the gradients of the trainable variables, by their names in a state."""
    variables = model.trainable_variables
    before = [ops.copy(variable) for variable in variables]
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.assign(gradient)
    found = snapshot(package, model).arrays
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
    return found


def descend(
    model: keras.Model, x: np.ndarray, target: np.ndarray, alpha: float, rates: Iterable[float]
) -> None:
    package.add_orthonormality(model, alpha)
    rates, (x, target) = list(rates), (np.moveaxis(each, 1, -1) for each in (x, target))
    x, target = (np.tile(each, (len(rates), 1, 1)) for each in (x, target))

    class Rates(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            return ops.take(ops.convert_to_tensor(rates, "float32"), ops.cast(step, "int32"))

    model.compile(keras.optimizers.SGD(Rates()), "mse", jit_compile=BACKEND == "jax")
    model.fit(x, target, len(x) // len(rates), shuffle=False, verbose=0)


def composed_kernel(layer: keras.Layer) -> tuple[np.ndarray, str]:
    kernel = layer.composed_kernel()
    name, layout = keras.backend.standardize_dtype(kernel.dtype), getattr(layer, "layout", "*IO")
    return to_canonical(as_array(ops.convert_to_numpy(kernel)), layout), name


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


def entries(layer: keras.Layer) -> dict[str, Any]:
    names = {"d_kernel": "depthwise_weight", "bias": "bias"}
    if hasattr(layer, "layers"):
        return {variable.path: variable for variable in layer.weights}
    return {names.get(variable.name, "weight"): variable for variable in layer.weights}


def freeze(variable: Any) -> None:
    variable.trainable = False


def is_trained(variable: Any) -> bool:
    return variable.trainable


def drawn_after(call: Callable[[], Any]) -> Any:
    """Return what Python draws next, from where Keras takes its seeds."""
    random.seed(0)
    call()
    return random.random()


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
