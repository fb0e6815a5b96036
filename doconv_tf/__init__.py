"""DO-Conv for Keras 3: over-parameterized drop-ins for its convolution layers."""

from doconv_core.backends import require_framework

require_framework("tf", "keras")

try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"doconv_tf needs Keras, and Keras needs {error.name}, which is not installed. Install "
        'Keras with TensorFlow with: python -m pip install "doconv[tf]". (Another backend of '
        "Keras is chosen by the environment variable KERAS_BACKEND, and installed by itself.)"
    ) from error

from doconv_tf.do_conv import DOConv1D, DOConv2D, DOConv3D, DODepthwiseConv2D  # noqa: E402
from doconv_tf.state import export_state, load_state  # noqa: E402

__all__ = [
    "DOConv1D",
    "DOConv2D",
    "DOConv3D",
    "DODepthwiseConv2D",
    "export_state",
    "load_state",
]
