"""DO-Conv and BSConv for Keras 3: drop-ins for its convolution layers."""

from doconv_core.backends import require_framework
from doconv_core.networks.names import list_models

require_framework("tf", "keras")

try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"doconv_tf needs Keras, and Keras needs {error.name}, which is not installed. Install "
        'Keras with TensorFlow with: python -m pip install "overconv[tf]". (Another backend of '
        "Keras is chosen by the environment variable KERAS_BACKEND, and installed by itself.)"
    ) from error

from doconv_tf.bsconv import (  # noqa: E402
    BSConvS,
    BSConvS1D,
    BSConvS2D,
    BSConvS3D,
    BSConvU,
    BSConvU1D,
    BSConvU2D,
    BSConvU3D,
)
from doconv_tf.depthwise_conv import (  # noqa: E402
    DODepthwiseConv1D,
    DODepthwiseConv2D,
    DOSeparableConv1D,
    DOSeparableConv2D,
)
from doconv_tf.devices import cluster_scope  # noqa: E402
from doconv_tf.dgc import (  # noqa: E402
    DGConv2D,
    ProgressCallback,
    SkippingDGConv2D,
    add_saliency_lasso,
    set_progress,
)
from doconv_tf.do_conv import DOConv1D, DOConv2D, DOConv3D  # noqa: E402
from doconv_tf.model import deploy, fold, over_parameterize, to_bsconv  # noqa: E402
from doconv_tf.normed import (  # noqa: E402
    NormedConv1D,
    NormedConv2D,
    NormedConv3D,
    NormedDepthwiseConv1D,
    NormedDepthwiseConv2D,
)
from doconv_tf.orthonormal import (  # noqa: E402
    add_orthonormality,
    mark_orthonormal,
    orthonormality_loss,
)
from doconv_tf.realize import build, get_model  # noqa: E402
from doconv_tf.rules import (  # noqa: E402
    BranchesConv1D,
    BranchesConv2D,
    BranchesConv3D,
    BranchesDepthwiseConv1D,
    BranchesDepthwiseConv2D,
    ExpandConv1D,
    ExpandConv2D,
    ExpandConv3D,
    ExpandDepthwiseConv1D,
    ExpandDepthwiseConv2D,
)
from doconv_tf.state import export_state, load_state  # noqa: E402
from doconv_tf.train import evaluate, train  # noqa: E402
from doconv_tf.verify import verify  # noqa: E402

__all__ = [
    "BSConvS",
    "BSConvS1D",
    "BSConvS2D",
    "BSConvS3D",
    "BSConvU",
    "BSConvU1D",
    "BSConvU2D",
    "BSConvU3D",
    "BranchesConv1D",
    "BranchesConv2D",
    "BranchesConv3D",
    "BranchesDepthwiseConv1D",
    "BranchesDepthwiseConv2D",
    "DGConv2D",
    "DOConv1D",
    "DOConv2D",
    "DOConv3D",
    "DODepthwiseConv1D",
    "DODepthwiseConv2D",
    "DOSeparableConv1D",
    "DOSeparableConv2D",
    "ExpandConv1D",
    "ExpandConv2D",
    "ExpandConv3D",
    "ExpandDepthwiseConv1D",
    "ExpandDepthwiseConv2D",
    "NormedConv1D",
    "NormedConv2D",
    "NormedConv3D",
    "NormedDepthwiseConv1D",
    "NormedDepthwiseConv2D",
    "ProgressCallback",
    "SkippingDGConv2D",
    "add_orthonormality",
    "add_saliency_lasso",
    "build",
    "cluster_scope",
    "deploy",
    "evaluate",
    "export_state",
    "fold",
    "get_model",
    "list_models",
    "load_state",
    "mark_orthonormal",
    "orthonormality_loss",
    "over_parameterize",
    "set_progress",
    "to_bsconv",
    "train",
    "verify",
]
