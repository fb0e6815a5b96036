"""DO-Conv for PyTorch: over-parameterized drop-ins for `torch.nn.Conv1d`, `Conv2d` and `Conv3d`."""

from doconv_core.backends import require_framework
from doconv_core.networks.names import list_models

require_framework("torch", "torch")

from doconv_torch.bsconv import (  # noqa: E402
    BSConvS,
    BSConvS1d,
    BSConvS2d,
    BSConvS3d,
    BSConvU,
    BSConvU1d,
    BSConvU2d,
    BSConvU3d,
)
from doconv_torch.dgc import DGConv2d, SkippingDGConv2d, saliency_lasso, set_progress  # noqa: E402
from doconv_torch.do_conv import DOConv1d, DOConv2d, DOConv3d  # noqa: E402
from doconv_torch.kernel_cache import composed_once  # noqa: E402
from doconv_torch.model import deploy, fold, over_parameterize, to_bsconv  # noqa: E402
from doconv_torch.normed import NormedConv1d, NormedConv2d, NormedConv3d  # noqa: E402
from doconv_torch.orthonormal import mark_orthonormal, orthonormality_loss  # noqa: E402
from doconv_torch.realize import build, get_model  # noqa: E402
from doconv_torch.rules import (  # noqa: E402
    BranchesConv1d,
    BranchesConv2d,
    BranchesConv3d,
    ExpandConv1d,
    ExpandConv2d,
    ExpandConv3d,
)
from doconv_torch.state import export_state, load_state  # noqa: E402
from doconv_torch.train import evaluate, train  # noqa: E402
from doconv_torch.verify import verify  # noqa: E402

__all__ = [
    "BSConvS",
    "BSConvS1d",
    "BSConvS2d",
    "BSConvS3d",
    "BSConvU",
    "BSConvU1d",
    "BSConvU2d",
    "BSConvU3d",
    "BranchesConv1d",
    "BranchesConv2d",
    "BranchesConv3d",
    "DGConv2d",
    "DOConv1d",
    "DOConv2d",
    "DOConv3d",
    "ExpandConv1d",
    "ExpandConv2d",
    "ExpandConv3d",
    "NormedConv1d",
    "NormedConv2d",
    "NormedConv3d",
    "SkippingDGConv2d",
    "build",
    "composed_once",
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
    "saliency_lasso",
    "set_progress",
    "to_bsconv",
    "train",
    "verify",
]
