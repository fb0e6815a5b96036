"""The recipes that go by a name, as data: of the papers' implementations, of tutorials, of digits.

Sources: BSConv, arXiv 2003.13549; DO-Conv, arXiv 2006.12030, whose baselines are GluonCV's; Dynamic
Group Convolution, arXiv 2007.04242; and their implementations' command lines. What each leaves open
is what `Recipe` has by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CIFAR_CROP = ("random_crop 32 4", "flip")
CIFAR10 = "normalize .4914 .4822 .4465 .2023 .1994 .2010"
CIFAR100 = "normalize .5071 .4867 .4408 .2675 .2565 .2761"
IMAGENET = "normalize .485 .456 .406 .229 .224 .225"

_BSCONV = {
    "epochs": 200, "batch_size": 128, "optimizer": "sgd", "learning_rate": 0.1,
    "weight_decay": 1e-4, "schedule": "steps", "milestones": (100, 150, 180),
    "orthonormality": 0.1,
}  # fmt: skip
_DGC = {
    "optimizer": "nesterov", "learning_rate": 0.1, "weight_decay": 1e-4, "schedule": "cosine",
    "lasso": 1e-5,
}  # fmt: skip
_SMALL = ("resize 28 28",)

NAMED: Mapping[str, Mapping[str, Any]] = {
    "bsconv_cifar": {**_BSCONV, "train_images": CIFAR_CROP, "eval_images": ()},
    "bsconv_finegrained": {
        **_BSCONV,
        "train_images": ("resize 256 256", "random_crop 224", "flip", "jitter 0.4 0 0"),
        "eval_images": ("resize 256 256", "center_crop 224"),
    },
    "gluoncv_imagenet": {
        "epochs": 120, "batch_size": 1024, "optimizer": "nesterov", "learning_rate": 0.4,
        "weight_decay": 1e-4, "schedule": "cosine", "warmup_epochs": 5, "drop_last": True,
        "train_images": (
            "random_resized_crop 224", "flip", "jitter 0.4 0.4 0.4", "lighting 0.1", IMAGENET,
        ),
        "eval_images": ("short_side 256", "center_crop 224", IMAGENET),
    },
    "gluoncv_cifar": {
        "epochs": 200, "batch_size": 128, "optimizer": "nesterov", "learning_rate": 0.1,
        "weight_decay": 1e-4, "schedule": "steps", "milestones": (100, 150),
        "train_images": (*CIFAR_CROP, CIFAR10), "eval_images": (CIFAR10,),
    },
    "dgc_cifar": {
        **_DGC, "epochs": 300, "batch_size": 64,
        "train_images": (*CIFAR_CROP, CIFAR100), "eval_images": (CIFAR100,),
    },
    "dgc_imagenet": {
        **_DGC, "epochs": 120, "batch_size": 256,
        "train_images": ("random_resized_crop 224", "flip", IMAGENET),
        "eval_images": ("short_side 256", "center_crop 224", IMAGENET),
    },
    "tutorial_pt": {
        "epochs": 2, "batch_size": 64, "optimizer": "sgd", "learning_rate": 0.1,
        "schedule": "constant", "train_images": _SMALL, "eval_images": _SMALL,
    },
    "tutorial_tf": {  # Adam: AdamW without decay
        "epochs": 5, "batch_size": 32, "optimizer": "adamw", "learning_rate": 0.001,
        "epsilon": 1e-7, "schedule": "constant", "train_images": _SMALL, "eval_images": _SMALL,
    },
    "tutorial_gluon": {
        "epochs": 10, "batch_size": 100, "optimizer": "sgd", "learning_rate": 0.03, "momentum": 0,
        "schedule": "constant", "train_images": _SMALL, "eval_images": _SMALL,
    },
    "digits": {
        "epochs": 8, "batch_size": 32, "optimizer": "nesterov", "learning_rate": 0.1,
        "weight_decay": 1e-4, "schedule": "cosine",
        "train_images": ("resize 32 32",), "eval_images": ("resize 32 32",),
    },
}  # fmt: skip

# The tutorials are about MNIST. On the 1,437 digits, of which an epoch is a few steps, they take
# more epochs, and the rates with which the networks converge there.
TUTORIALS_ON_DIGITS: Mapping[str, Mapping[str, Any]] = {
    "tutorial_pt": {"epochs": 150, "learning_rate": 0.03},
    "tutorial_tf": {"epochs": 12},
    "tutorial_gluon": {"epochs": 20, "learning_rate": 0.1},
}
