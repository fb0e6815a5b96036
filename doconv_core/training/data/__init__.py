"""STUB until the data arrive."""
from __future__ import annotations
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
import numpy as np
from doconv_core.training.engine import Batch
from doconv_core.training.loss import targets

@dataclass
class Source:
    images: Any
    labels: Any
    def __len__(self): return len(self.labels)
    def image(self, i): return self.images[i]

@dataclass
class ImageData:
    name: str
    classes: tuple[str, ...]
    train: Source
    val: Source
    channels: int

def open_data(name, data_dir=None, *, max_broken=0):
    from sklearn.datasets import load_digits
    d = load_digits()
    x = (d.images / 16 * 255).astype("uint8")[..., None]
    return ImageData("digits", tuple(map(str, range(10))), Source(x[:1437], d.target[:1437]), Source(x[1437:], d.target[1437:]), 1)

def as_data(obj):
    if isinstance(obj, ImageData): return obj
    images, labels = obj
    s = Source(images, labels)
    return ImageData("arrays", tuple(map(str, range(int(labels.max()) + 1))), s, s, images.shape[-1])

def batches(source, classes, recipe, *, training, epoch=0, start=0, seed=0, process=0, processes=1, layout="NCHW", workers=0):
    n = len(source)
    order = np.random.default_rng((seed, epoch)).permutation(n) if training else np.arange(n)
    for at in range(start * recipe.batch_size, n, recipe.batch_size):
        rows = order[at:at + recipe.batch_size]
        total = len(rows)
        if training and recipe.drop_last and total < recipe.batch_size: return
        rows = np.array_split(rows, processes)[process]
        x = np.stack([source.image(i) for i in rows]).astype("f4") / 255 if len(rows) else np.zeros((0,) + source.image(0).shape, "f4")
        ops = recipe.train_images if training else recipe.eval_images
        for op in ops:
            if op.startswith("resize"):
                size = int(op.split()[1])
                x = x.repeat(-(-size // x.shape[1]), 1).repeat(-(-size // x.shape[2]), 2)[:, :size, :size]
        x = x if layout == "NHWC" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        labels = source.labels[rows].astype("i8")
        yield Batch(x, targets(labels, classes, recipe.label_smoothing if training else 0), labels, total)
