"""Measure the preparation of images beside torch's DataLoader, and what an index of many takes.

Run: python benchmarks/training_data.py [--quick] [--docs]

The images are made up: JPEGs of 500x375, about as large as ImageNet's. Both ways read them with
Pillow, in the process itself, by one thread, by turns, and do the same: the transforms on the side
of torch are torchvision's, written out, as it does them on images of Pillow's. What is measured is
CPU time, so images per second and core. Memory is that of a process that opens a folder of
1,281,167 files in 1,000 classes and draws up an epoch's order, where what lists folders is
replaced, so that there are no files. Prints Markdown, and with --docs puts it into
`docs/image_data.md`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import exp, log, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import step_measure
from step_report import DOCS, machine, put

from doconv_core.training.data import as_data, batches, open_data, pipeline
from doconv_core.training.recipe import recipe

PAGE = DOCS / "image_data.md"
SIZE = 224
PHOTOGRAPH, LARGE = (375, 500), (1500, 2000)  # height and width
NORMALIZE = "normalize .485 .456 .406 .229 .224 .225"
CROP = ("random_resized_crop 224", "flip")
JITTERED = (*CROP, "jitter .4 .4 .4", "lighting .1", NORMALIZE)
CASES = (
    (PHOTOGRAPH, "crop, flip, normalize", (*CROP, NORMALIZE)),
    (PHOTOGRAPH, "the same with jitter and lighting", JITTERED),
    (LARGE, "crop, flip, normalize", (*CROP, NORMALIZE)),
)
FILES, CLASSES = 1_281_167, 1000  # of ImageNet's training part


def main() -> None:
    """Measure, print and write."""
    options = _options()
    if options.worker:
        print(*_index(*options.worker))
        return
    if options.docs and options.quick:
        raise SystemExit("--docs is for a whole run, without --quick.")
    import PIL
    import torch

    torch.set_num_threads(1)
    count, batch, patience = (4, 2, 0.1) if options.quick else (128, 64, options.patience)
    rows = []
    for size, name, operations in CASES:
        with tempfile.TemporaryDirectory() as folder, _alone():
            make_folder(Path(folder), count + 1, size)
            case = f"{size[1]}×{size[0]}: {name}"
            rows.append(measured(Path(folder), case, operations, batch, patience))
    described = machine(1, [f"torch {torch.__version__}", f"Pillow {PIL.__version__}"])
    text = f"{table(rows, count)}\n\n{memory(options.quick)}"
    print(f"{described}\n\n{text}")
    if options.docs:
        put(PAGE, f"{described}; {count} images, batches of {batch}.\n\n{text}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images, and few names")
    parser.add_argument("--patience", type=float, default=60, help="seconds for each row")
    parser.add_argument("--docs", action="store_true", help=f"write the tables of {PAGE.name}")
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def _alone() -> Iterator[None]:
    """Let the thread that asks for images prepare them, as DataLoader's does; count CPU time."""
    clock = SimpleNamespace(perf_counter=time.process_time)
    with mock.patch.object(pipeline, "THREADS", 0), mock.patch.object(step_measure, "time", clock):
        yield


def make_folder(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write a data set of made-up photographs, in which large shapes are the most pronounced."""
    from PIL import Image

    rng = np.random.default_rng(0)
    across = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1]))
    across[0, 0] = 1

    def field(steepness: float) -> Any:
        waves = rng.normal(size=(2, *across.shape))
        found = np.fft.irfft2((waves[0] + 1j * waves[1]) / across**steepness, s=size)
        return found / found.std()

    for n in range(count):
        place = folder / ("train" if n else "val") / "one"
        place.mkdir(parents=True, exist_ok=True)
        bright = field(1.0)
        colours = np.stack([bright + 0.6 * field(1.4) for _ in range(3)], -1)
        pixels = np.clip(128 + 45 * colours, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{n}.jpg", quality=92)


def measured(
    folder: Path, case: str, operations: tuple[str, ...], batch: int, patience: float
) -> step_measure.Row:
    """Measure an epoch in both ways."""
    made = recipe("gluoncv_imagenet", batch_size=batch, train_images=operations, mixup=0)
    train = open_data("folder", folder).train
    loader = torch_loader(train, operations == JITTERED, batch)
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: [None for _ in loader],
        "ours": lambda: [None for _ in batches(train, 1, made, training=True)],
    }
    return step_measure.measure("torch", "epoch", case, ways, patience)


def torch_loader(source: Any, more: bool, batch: int) -> Any:
    """Return torch's DataLoader of a folder's images, in this process."""
    import torch
    from PIL import Image

    mean, deviation = (torch.tensor(x)[:, None, None] for x in (
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
    ))  # fmt: skip
    files = [(source.name(n), int(source.labels[n])) for n in range(len(source))]

    class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> Any:
            name, label = files[index]
            with open(name, "rb") as stream:
                image = Image.open(stream).convert("RGB")
            left, upper, width, height = _part(*image.size)
            image = image.crop((left, upper, left + width, upper + height))
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            if torch.rand(1) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image = _jittered(image) if more else image
            pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
            pixels = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
            pixels = _lit(pixels) if more else pixels
            return pixels.clone().sub_(mean).div_(deviation), label

    return torch.utils.data.DataLoader(Images(), batch, shuffle=True, drop_last=True)


def _part(width: int, height: int) -> tuple[int, int, int, int]:
    import torch

    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(0.08, 1).item()
        ratio = exp(torch.empty(1).uniform_(log(3 / 4), log(4 / 3)).item())
        w, h = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            upper, left = (int(torch.randint(0, n + 1, (1,))) for n in (height - h, width - w))
            return left, upper, w, h
    return 0, 0, width, height


def _jittered(image: Any) -> Any:
    import torch
    from PIL import ImageEnhance

    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in torch.randperm(3).tolist():
        image = enhancers[number](image).enhance(float(torch.empty(1).uniform_(0.6, 1.4)))
    return image


def _lit(pixels: Any) -> Any:
    import torch

    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    values = torch.tensor([55.46, 4.794, 1.148]) / 255
    return pixels + (vectors @ (0.1 * torch.randn(3) * values))[:, None, None]


def table(rows: list[step_measure.Row], count: int) -> str:
    """Return images per second as a Markdown table."""
    lines = [
        "| operations | torch's DataLoader, images per second | ours | of torch's |", "|-|-|-|-|",
    ]  # fmt: skip
    for row in rows:
        theirs, ours = (count / row.seconds[way] for way in ("torch", "ours"))
        ratio, spread = 1 / row.ratios["ours"], row.spread["ours"] / row.ratios["ours"] ** 2
        lines.append(f"| {row.case} | {theirs:.0f} | {ours:.0f} | **{ratio:.2f}** ± {spread:.2f} |")
    return "\n".join(lines)


def memory(quick: bool) -> str:
    """Return what a large index takes, measured in a process of its own."""
    files, classes = (2000, 10) if quick else (FILES, CLASSES)
    command = [sys.executable, __file__, "--worker", str(files), str(classes)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    before, after, seconds = map(float, told.split())
    return (
        "| files | classes | memory with all libraries | with the index | seconds to open |\n"
        "|-|-|-|-|-|\n"
        f"| {files:,} | {classes:,} | {before:.0f} MB | {after:.0f} MB | {seconds:.1f} |"
    )


def _index(files: int, classes: int) -> tuple[float, float, float]:
    """Return the most memory used before and with an index, and how long it took to open."""
    sys.modules["jax"] = None  # type: ignore[assignment]  # grain imports it where it is installed
    with tempfile.TemporaryDirectory() as folder:
        for n in range(classes):
            for part in ("train", "val"):
                (Path(folder) / part / f"n{n:08}").mkdir(parents=True)
        few = as_data((np.zeros((10, 8, 8), np.uint8), np.arange(10))).train
        next(batches(few, 10, recipe("digits"), training=True))  # which imports all it needs
        before, began = _peak(), time.perf_counter()
        with mock.patch("os.scandir", _many(files // classes, os.scandir)):
            source = open_data("folder", folder).train
        seconds = time.perf_counter() - began
        assert len(source) == files // classes * classes
        order = source.shuffled(np.random.default_rng(0))
        assert Path(source.name(int(order[0]))).suffix == ".JPEG"
        return before, _peak(), seconds


def _many(count: int, real: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return what lists folders as if each class had so many files."""

    @contextmanager
    def scandir(path: Any) -> Iterator[Any]:
        name = Path(path).name
        if name in ("train", "val"):
            with real(path) as entries:
                yield entries
        else:
            own = count if Path(path).parent.name == "train" else 50
            yield [SimpleNamespace(name=f"{name}_{n}.JPEG") for n in range(own)]

    return scandir


def _peak() -> float:
    """Return the most memory that this process had, in MB."""
    # Not what `getrusage` tells, which begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
