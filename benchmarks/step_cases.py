"""What `training_step.py` measures: layers and networks, each with sizes of its input."""

from __future__ import annotations

from typing import NamedTuple


class LayerCase(NamedTuple):
    """A convolution with its input. size: of the input, in every direction; the stride is 1."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    size: int
    batch: int = 8
    groups: int = 1
    rank: int = 2


class ModelCase(NamedTuple):
    """A network with its input, `batch` images of `size` × `size`."""

    name: str
    network: str
    batch: int
    size: int


LAYERS = (
    LayerCase("3×3, 64→64 @56²", 64, 64, 3, 56),
    LayerCase("3×3, 128→128 @28²", 128, 128, 3, 28),
    LayerCase("3×3, 256→256 @14²", 256, 256, 3, 14),
    LayerCase("3×3, 512→512 @7²", 512, 512, 3, 7),
    LayerCase("3×3, 512→512 @7², batch 1", 512, 512, 3, 7, batch=1),
    LayerCase("7×7, 3→64 @224²", 3, 64, 7, 224, batch=2),
    LayerCase("3×3, 256→256 @14², 32 groups", 256, 256, 3, 14, groups=32),
    LayerCase("3×3, depthwise 256 @14²", 256, 256, 3, 14, groups=256),
    LayerCase("3×3, depthwise 64→256 @14²", 64, 256, 3, 14, groups=64),
    LayerCase("3×3×3, 64→64 @14³", 64, 64, 3, 14, batch=2, rank=3),
)
MODELS = tuple(
    ModelCase(f"{network}, {batch}×{size}²", network, batch, size)
    for network in ("ResNet-18", "ResNet-50", "MobileNetV2")
    for batch, size in ((16, 224), (64, 64), (2, 224))
)
COMPOSITIONS = ((512, 512), (256, 256), (64, 64))  # channels in and out, of 3×3 kernels
QUICK_LAYERS = tuple(LAYERS[n] for n in (2, 7))
QUICK_COMPOSITIONS = COMPOSITIONS[1:]
# This package's own network, by that name, which every framework has soon.
TUTORIAL = "tutorial_pt"
QUICK_MODELS = (ModelCase("tutorial network, 2×64²", TUTORIAL, 2, 64),)
