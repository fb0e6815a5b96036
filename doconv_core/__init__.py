"""DO-Conv's mathematics and rules in NumPy: composition, folding, cost, layouts and state.

Also networks by name, as data, and what they cost before they are built.

Letters as in the paper and throughout this project: `I` input and `O` output channels, `g` groups,
`M` kernel taps, `S` the depth multiplier. Source: DO-Conv, arXiv 2006.12030.
"""

from doconv_core.backends import available_backends, require_framework
from doconv_core.files.checkpoint import Checkpoint, fold_checkpoint, open_checkpoint
from doconv_core.files.entries import CheckpointError
from doconv_core.files.upstream import Upstream, read_upstream
from doconv_core.kinds.base import Cost
from doconv_core.kinds.bsconv import (
    Blueprints,
    BSConvCost,
    BSConvSpec,
    blueprints,
    bsconv_cost,
    compose_bsconv,
    compose_bsconv_gradient,
    mid_channels,
)
from doconv_core.kinds.do_conv import (
    LayerCost,
    compose,
    compose_gradient,
    feature_compose,
    from_kernel,
    identity,
    layer_cost,
)
from doconv_core.maths.batchnorm import NotFoldable, fuse_batchnorm
from doconv_core.maths.convolve import (
    ConvolutionGradients,
    convolve,
    convolve_gradient,
    pad,
    pad_gradient,
)
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.layout import from_canonical, to_canonical
from doconv_core.maths.numeric import Difference, difference
from doconv_core.maths.orthonormal import orthonormality, orthonormality_gradient
from doconv_core.maths.separable import (
    Folded,
    Normalization,
    Pointwise,
    check_dense,
    fold_dense,
    fold_pointwise,
    merge_pointwise,
    merge_pointwise_gradient,
)
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import (
    BSConvReport,
    Change,
    Converted,
    DeployReport,
    Explained,
    FoldReport,
    FusingMethod,
    Left,
    Report,
)
from doconv_core.models.select import Selection
from doconv_core.models.verify import largest_difference
from doconv_core.networks.cost import CountedLayer, NetworkCost, count
from doconv_core.networks.names import describe, list_models
from doconv_core.networks.nodes import Network
from doconv_core.state.file import State, StateError, read_state, write_state
from doconv_core.state.layers import (
    BatchNormSpec,
    EmbeddingSpec,
    GroupNormSpec,
    LayerForm,
    LayerNormSpec,
    LinearSpec,
    PReLUSpec,
    TransposedConvSpec,
)
from doconv_core.state.match import fit_state
from doconv_core.training.recipe import Recipe, recipe, recipes

__all__ = [
    "BSConvCost",
    "BSConvReport",
    "BSConvSpec",
    "BatchNormSpec",
    "Blueprints",
    "Change",
    "Checkpoint",
    "CheckpointError",
    "ConvSpec",
    "Converted",
    "ConvolutionGradients",
    "Cost",
    "CountedLayer",
    "DeployReport",
    "Difference",
    "EmbeddingSpec",
    "Explained",
    "FoldReport",
    "Folded",
    "FusingMethod",
    "Geometry",
    "GroupNormSpec",
    "LayerCost",
    "LayerForm",
    "LayerNormSpec",
    "Left",
    "LinearSpec",
    "Network",
    "NetworkCost",
    "Normalization",
    "NotFoldable",
    "PReLUSpec",
    "Pointwise",
    "Recipe",
    "Report",
    "Selection",
    "State",
    "StateError",
    "TransposedConvSpec",
    "Upstream",
    "available_backends",
    "blueprints",
    "bsconv_cost",
    "check_dense",
    "compose",
    "compose_bsconv",
    "compose_bsconv_gradient",
    "compose_gradient",
    "convolve",
    "convolve_gradient",
    "count",
    "describe",
    "difference",
    "feature_compose",
    "fit_state",
    "fold_checkpoint",
    "fold_dense",
    "fold_pointwise",
    "from_canonical",
    "from_kernel",
    "fuse_batchnorm",
    "identity",
    "largest_difference",
    "layer_cost",
    "list_models",
    "merge_pointwise",
    "merge_pointwise_gradient",
    "mid_channels",
    "open_checkpoint",
    "orthonormality",
    "orthonormality_gradient",
    "pad",
    "pad_gradient",
    "read_state",
    "read_upstream",
    "recipe",
    "recipes",
    "require_framework",
    "to_canonical",
    "write_state",
]
