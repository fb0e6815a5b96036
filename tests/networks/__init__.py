"""ResNet-18 and MobileNetV2, narrow ones, built by hand in three frameworks with other names."""

from __future__ import annotations

CLASSES = 7
WIDTHS = (8, 12, 16, 20)  # of ResNet-18's four stages

# MobileNetV2: expansion, output channels, repetitions and first stride of each stage.
STEM, LAST = 8, 48
STAGES = (
    (1, 4, 1, 1), (6, 6, 2, 2), (6, 8, 3, 2), (6, 12, 4, 2), (6, 14, 3, 1), (6, 20, 3, 2),
    (6, 24, 1, 1),
)  # fmt: skip
SIZE = 64  # of the images, so that the last stages still have more than one position
