"""The contract's whole models in Keras, on whichever backend Keras runs."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from model_contract import Again, Layer, Net

import doconv_tf as package
from adapters.tf import LAYERS, ORDINARY, Own, types

TRANSPOSED = (
    keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose,
)  # fmt: skip

__all__ = ["package", "types"]
types = types | {"own_norm": "OwnNorm", "doubled": "Doubled", "named": "Named"}
exact = True


class OwnNorm(keras.layers.BatchNormalization):
    """A batch norm that may compute something else."""

    def call(self, inputs, **options):
        return super().call(inputs, **options)


class Doubled(package.DOConv2D):
    """A layer that computes something else."""

    def call(self, inputs):
        return 2 * super().call(inputs)


class Named(package.DOConv2D):
    """A layer that computes the same."""


def _made(name: str, each: Any, dtype: str) -> keras.Layer:
    if isinstance(each, dict):
        parts = [_made(n, part, dtype) for n, part in each.items()]
        return keras.Sequential(parts, name=name)
    rank, options = each.rank - 1, {"name": name, "dtype": dtype, **dict(each.options)}
    kind = each.kind
    if kind in ("norm", "own_norm", "patched_norm"):
        if not options.pop("affine", True):
            options |= {"scale": False, "center": False}
        made = (OwnNorm if kind == "own_norm" else keras.layers.BatchNormalization)(**options)
        return patched(made) if kind == "patched_norm" else made
    if kind in ("relu", "dropout", "flatten", "linear"):
        return {
            "relu": lambda: keras.layers.ReLU(**options),
            "dropout": lambda: keras.layers.Dropout(0.3, **options),
            "flatten": lambda: keras.layers.Flatten(**options),
            "linear": lambda: keras.layers.Dense(each.to, use_bias=each.bias, **options),
        }[kind]()
    cls = {
        "conv": ORDINARY[rank], "do_conv": LAYERS[rank], "transposed": TRANSPOSED[rank], "own": Own,
        "patched": ORDINARY[rank], "doubled": Doubled, "named": Named, "do_patched": LAYERS[rank],
    }[kind]  # fmt: skip
    if each.multiplier:
        options["depth_multiplier"] = each.multiplier
    if kind != "transposed":
        options["groups"] = each.groups
    made = cls(
        each.to, each.kernel_size, strides=each.stride, padding="same", use_bias=each.bias,
        **options,
    )  # fmt: skip
    return patched(made) if "patched" in kind else made


def patched(layer: keras.Layer) -> keras.Layer:
    layer.call = layer.call
    return layer


def build(net: Net, mode: str = "", dtype: str = "float32") -> keras.Model:
    keras.utils.set_random_seed(0)
    made: dict[str, keras.Layer] = {}
    for name, each in net.layers.items():
        made[name] = made[each.of] if isinstance(each, Again) else _made(name, each, dtype)
    inputs = keras.Input((*net.shape[1:], net.shape[0]))
    return _valued(keras.Model(inputs, net.run(lambda name, *given: made[name](*given), inputs)))


def layer(each: Layer, shape: tuple[int, ...]) -> keras.Layer:
    keras.utils.set_random_seed(0)
    made = _made("layer", each, "float32")
    made.build((None, *shape[2:], shape[1]))
    return _valued(made)


def _valued(model: keras.Layer) -> keras.Layer:
    rng = np.random.default_rng(0)
    for variable in model.weights:
        drawn = rng.uniform(0.5, 1.5, variable.shape)
        if variable.path.endswith("kernel"):
            drawn = 0.3 * rng.standard_normal(variable.shape)
        if "depthwise" not in variable.path and variable.name != "d_kernel":
            variable.assign(drawn)
    return model


def layers(model: keras.Layer) -> dict[str, keras.Layer]:
    found: dict[str, keras.Layer] = {}
    seen: set[int] = set()

    def visit(path: str, each: keras.Layer) -> None:
        if not isinstance(each, keras.layers.InputLayer) and id(each) not in seen:
            seen.add(id(each))
            found[path] = each
            for child in each._flatten_layers(include_self=False, recursive=False):
                visit(f"{path}.{child.name}" if path else child.name, child)

    visit("", model)
    return found


def outputs(model: keras.Layer, x: np.ndarray, training: bool = False) -> list[np.ndarray]:
    keras.utils.set_random_seed(3)
    found = model(ops.convert_to_tensor(np.moveaxis(x, 1, -1)), training=training)
    found = found if isinstance(found, (list, tuple)) else (found,)
    return [np.moveaxis(_numpy(each), -1, 1) for each in found]


def values(model: keras.Layer) -> dict[str, np.ndarray]:
    return {name: _numpy(v).copy() for name, v in identities(model).items()}


def identities(model: keras.Layer) -> dict[str, Any]:
    return {v.path: v for v in model.weights}


def count(model: keras.Layer) -> int:
    return model.count_params()


def train(model: keras.Layer) -> keras.Layer:
    rng = np.random.default_rng(7)
    for name, variable in identities(model).items():
        if name.endswith("d_kernel"):
            variable.assign(0.1 * rng.standard_normal(variable.shape))
    return model


def step(model: keras.Layer, x: np.ndarray) -> None:
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(1e-3)
    with tf.GradientTape() as tape:
        found = model(ops.convert_to_tensor(np.moveaxis(x, 1, -1)), training=True)
        total = sum(ops.sum(each**2) for each in keras.tree.flatten(found))
    optimizer.apply(tape.gradient(total, model.trainable_variables), model.trainable_variables)


def save(model: keras.Layer, folder: Path) -> bytes:
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    archive = zipfile.ZipFile(folder / "model.keras")
    content = b"".join(archive.read(member) for member in archive.namelist())
    return content + (folder / "model.weights.h5").read_bytes()


def load(model: keras.Layer, folder: Path) -> None:
    model.load_weights(folder / "model.weights.h5")


def array(values: np.ndarray) -> Any:
    return ops.convert_to_tensor(values)


def _numpy(values: Any) -> np.ndarray:
    return ops.convert_to_numpy(values)


def returning(function: Any) -> Any:
    return function
