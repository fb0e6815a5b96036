"""How far two Keras models differ on the same inputs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from doconv_core.maths.numeric import Difference
from doconv_core.models.received import check_callable
from doconv_core.models.verify import flat, largest_difference


def verify(a: Any, b: Any, inputs: Any) -> Difference:
    """Return the largest absolute and relative difference of b's outputs from a's.

    a, b: models or layers, which are called with `training=False`, or other functions, such as one
    that runs an exported model. inputs: one argument, which may be nested: several inputs
    are one tuple, list or dict of tensors or arrays, as a Keras model takes them. Outputs may be
    nested, too. Relative is to the largest entry of a's output. Keras has no mode that were to be
    restored, and no variable is changed but by layers that do so in inference, too: those that draw
    random numbers even then differ from call to call, and their seed generators move on.
    Raises ValueError where the outputs differ in structure or shape, TypeError for an output of
    another kind.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> verify(model, model, np.ones((1, 4), "float32"))
    Difference(absolute=0.0, relative=0.0)
    """
    check_callable("keras.Layer", a=a, b=b)
    return largest_difference(_outputs(b, inputs), _outputs(a, inputs))


def _outputs(model: Any, inputs: Any) -> dict[str, Any]:
    if isinstance(model, keras.Layer):
        return _flat(model(keras.tree.map_structure(_as_tensor, inputs), training=False))
    return _flat(model(inputs))


def _as_tensor(value: Any) -> Any:
    """Return an array of numbers as a tensor: Keras takes no mixture of both."""
    numbers = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    return ops.convert_to_tensor(value) if numbers else value


def _flat(output: Any) -> dict[str, Any]:
    return flat(output, lambda v: ops.convert_to_numpy(v) if ops.is_tensor(v) else None, "tensors")
