"""DO-Conv for MXNet Gluon: over-parameterized drop-ins for `nn.Conv1D`, `Conv2D` and `Conv3D`."""

from doconv_core.backends import require_framework
from doconv_core.networks.names import list_models

require_framework("mx", "mxnet")
require_framework("mx", "numpy")  # MXNet 1 needs NumPy 1, and does not say so

from doconv_mx.frameworks import import_gluoncv, import_mxnet  # noqa: E402

import_mxnet()  # every later `import mxnet`, here and in the user's code, finds it imported

from doconv_mx.bsconv import (  # noqa: E402
    BSConvS,
    BSConvS1D,
    BSConvS2D,
    BSConvS3D,
    BSConvU,
    BSConvU1D,
    BSConvU2D,
    BSConvU3D,
)
from doconv_mx.dgc import DGConv2D, SkippingDGConv2D, add_saliency_lasso, set_progress  # noqa: E402
from doconv_mx.do_conv import DOConv1D, DOConv2D, DOConv3D  # noqa: E402
from doconv_mx.model import deploy, fold, over_parameterize, to_bsconv  # noqa: E402
from doconv_mx.normed import NormedConv1D, NormedConv2D, NormedConv3D  # noqa: E402
from doconv_mx.orthonormal import mark_orthonormal, orthonormality_loss  # noqa: E402
from doconv_mx.realize import build, get_model  # noqa: E402
from doconv_mx.rules import (  # noqa: E402
    BranchesConv1D,
    BranchesConv2D,
    BranchesConv3D,
    ExpandConv1D,
    ExpandConv2D,
    ExpandConv3D,
)
from doconv_mx.state import export_state, load_state  # noqa: E402
from doconv_mx.train import evaluate, train  # noqa: E402
from doconv_mx.verify import verify  # noqa: E402

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
    "DGConv2D",
    "DOConv1D",
    "DOConv2D",
    "DOConv3D",
    "ExpandConv1D",
    "ExpandConv2D",
    "ExpandConv3D",
    "NormedConv1D",
    "NormedConv2D",
    "NormedConv3D",
    "SkippingDGConv2D",
    "add_saliency_lasso",
    "build",
    "deploy",
    "evaluate",
    "export_state",
    "fold",
    "get_model",
    "import_gluoncv",
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
