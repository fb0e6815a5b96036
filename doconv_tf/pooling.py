"""Pooling of padded images, where Keras' own "same" would pad otherwise than other frameworks."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from doconv_core.maths.spec import as_integer

_PACKAGE = "doconv"


class _Padded(keras.layers.Layer):
    """What both poolings share; `around`: rows and columns added on every side."""

    def __init__(
        self, pool_size: Any = 2, strides: Any = None, *, around: int = 0, **options: Any
    ) -> None:
        self.around = as_integer("around", around, least=0)
        super().__init__(pool_size, strides, padding="valid", **options)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape of the output."""
        first = self._first_axis()
        shape = [
            n + 2 * self.around if axis in (first, first + 1) and n is not None else n
            for axis, n in enumerate(input_shape)
        ]
        return super().compute_output_shape(tuple(shape))

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, of which `padding` is no part."""
        config = super().get_config()
        del config["padding"]
        return {**config, "around": self.around}

    def _first_axis(self) -> int:
        return 2 if self.data_format == "channels_first" else 1

    def _pad(self, x: Any, value: float) -> Any:
        pads = [[0, 0]] * 4
        pads[self._first_axis()] = pads[self._first_axis() + 1] = [self.around] * 2
        return ops.pad(x, pads, constant_values=value)


@keras.saving.register_keras_serializable(package=_PACKAGE)
class PaddedMaxPooling2D(_Padded, keras.layers.MaxPooling2D):
    """A `keras.layers.MaxPooling2D` of the image with `around` rows and columns on every side.

    What is added is less than any number. Otherwise it takes that layer's arguments, but no
    `padding`.
    """

    def call(self, inputs: Any) -> Any:
        """Return the largest entry of each window, in the layer's data format."""
        return super().call(self._pad(inputs, float("-inf")))


@keras.saving.register_keras_serializable(package=_PACKAGE)
class PaddedAveragePooling2D(_Padded, keras.layers.AveragePooling2D):
    """A `keras.layers.AveragePooling2D` of the image with `around` zeros on every side.

    The mean is that of a window's entries in the image, without what was added. Otherwise it takes
    that layer's arguments, but no `padding`.
    """

    def call(self, inputs: Any) -> Any:
        """Return the mean of each window, in the layer's data format."""
        means = super().call(self._pad(inputs, 0.0))
        shares = super().call(self._pad(ops.ones_like(inputs[:1]), 0.0))
        return means / shares
