"""What the three samples share: options, repeated runs, the table, the fold check and the files."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import needed  # noqa: F401  # first, as it says what to install

# isort: split
import digits
import numpy as np
from safetensors.numpy import save
from tqdm import tqdm

from doconv_core import NotFoldable, difference, write_state
from doconv_core.atomic import replacing, write_json

TITLES = {"conv": "Baseline", "doconv": "DO-Conv"}
EVALUATED_AT_ONCE = 500  # images; MNIST's test set in one piece would need a gigabyte


@dataclass(frozen=True)
class Sample:
    """One sample: its defaults, and the few functions that only its framework can fill in.

    name: begins the names of its files. versions: of the framework's packages, by name.
    epochs, lr: the defaults for each data set; why: their reasons, for `--help`.
    devices: what the framework calls its "cpu" and, where it finds one, its "gpu".
    build: `(layer, seed, device)` gives an initialised network of "conv" or "doconv" layers.
    train: `(model, data, options, seed, device, epochs)` trains it; `epochs` is iterated over.
    outputs: `(model, images, device)` gives the logits of `(N, 28, 28)` images, `(N, 10)`, NumPy.
    fold: `(model, device)` gives the ordinary network that a trained DO-Conv network folds to.
    parameters: the number of a model's trainable numbers. export_state: its canonical state.
    """

    name: str
    description: str
    versions: Mapping[str, str]
    epochs: Mapping[str, int]
    lr: Mapping[str, float]
    why: str
    batch_size: int
    devices: Mapping[str, Any]
    build: Callable[..., Any]
    train: Callable[..., None]
    outputs: Callable[..., np.ndarray]
    fold: Callable[..., Any]
    parameters: Callable[[Any], int]
    export_state: Callable[[Any], Any]


class Trained(NamedTuple):
    """What is left of a layer's runs: accuracies in percent, the last network and its logits."""

    accuracies: list[float]
    model: Any
    outputs: np.ndarray


def main(sample: Sample, arguments: Sequence[str] | None = None) -> None:
    """Run a sample from its command line to its files.

    Raises SystemExit with a message on standard error for wrong options, missing data and Ctrl-C.
    Whatever fails, and whenever, the files of an earlier run are left as they were.
    """
    options = parse_options(sample, arguments)
    try:
        run(sample, options)
    except digits.DataError as error:
        sys.exit(f"{sample.name}: {error}")
    except NotFoldable as error:  # as after a training that diverged
        sys.exit(f"{sample.name}: {error} Try a smaller --lr. Nothing was written.")
    except KeyboardInterrupt:
        print(f"\n{sample.name}: interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)  # what a shell expects after Ctrl-C


def run(sample: Sample, options: argparse.Namespace) -> None:
    """Train, print the table, fold, and write the results, in this order."""
    data = digits.load(options.data, options.data_dir)
    print(_headline(sample, options, data))
    trained = train_all(sample, options, data)
    print("\n" + table({layer: result.accuracies for layer, result in trained.items()}) + "\n")
    report = {
        "sample": sample.name,
        "options": {
            k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(options).items())
        },
        "device": str(sample.devices[options.device]),
        "versions": _versions(sample),
        "data": {"train": len(data.train_labels), "test": len(data.test_labels)},
        "accuracy": {layer: result.accuracies for layer, result in trained.items()},
    }
    outputs = {layer: result.outputs for layer, result in trained.items()}
    states = {}
    if "doconv" in trained:
        device = sample.devices[options.device]
        training = trained["doconv"].model
        folded = sample.fold(training, device)
        outputs["folded"] = evaluate(sample, folded, data.test_images, device)
        report["fold"] = fold_check(outputs["folded"], outputs["doconv"])
        report["parameters"] = {
            "training": sample.parameters(training),
            "folded": sample.parameters(folded),
            "ordinary": sample.parameters(sample.build("conv", options.seed, device)),
        }
        print(_describe_fold(report))
        states = {"doconv": sample.export_state(training), "folded": sample.export_state(folded)}
    files = write_results(options.out, sample.name, report, outputs, data.test_labels, states)
    print("Written: " + ", ".join(map(str, files)))


def train_all(sample: Sample, options: argparse.Namespace, data: digits.Data) -> dict[str, Trained]:
    """Train every layer asked for `--runs` times, and return what came of it, by layer.

    Run `n` has the seed `--seed + n`. It decides the initial weights and the order of the batches,
    so that both layers begin as the same function and see the same batches.
    """
    layers = ("conv", "doconv") if options.layer == "both" else (options.layer,)
    device = sample.devices[options.device]
    accuracies: dict[str, list[float]] = {layer: [] for layer in layers}
    last = {}
    # disable=None: no bar where the output is not a terminal
    with tqdm(total=options.runs * len(layers) * options.epochs, disable=None, unit="ep") as bar:
        for n in range(options.runs):
            for layer in layers:
                bar.set_description(f"run {n + 1}/{options.runs} {TITLES[layer]}")
                model = sample.build(layer, options.seed + n, device)
                epochs = _ticking(bar, options.epochs)
                sample.train(model, data, options, options.seed + n, device, epochs)
                logits = evaluate(sample, model, data.test_images, device)
                accuracies[layer].append(accuracy(logits, data.test_labels))
                last[layer] = (model, logits)
                percent = accuracies[layer][-1]
                bar.write(f"run {n + 1}/{options.runs}  {TITLES[layer]:8}  {percent:.2f} %")
    return {layer: Trained(accuracies[layer], *last[layer]) for layer in layers}


def _ticking(bar: Any, epochs: int) -> Iterator[int]:
    for epoch in range(epochs):
        yield epoch
        bar.update()


def evaluate(sample: Sample, model: Any, images: np.ndarray, device: Any) -> np.ndarray:
    """Return the model's logits, `(N, 10)` in float32, a part of the images at a time."""
    starts = range(0, len(images), EVALUATED_AT_ONCE)
    parts = [sample.outputs(model, images[i : i + EVALUATED_AT_ONCE], device) for i in starts]
    return np.concatenate(parts)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return how many of the labels `(N,)` are the largest of their logits, in percent.

    Logits that are no numbers, as after a training that diverged, predict nothing.
    """
    return 100 * float(np.mean((logits.argmax(1) == labels) & ~np.isnan(logits).any(1)))


def fold_check(folded: np.ndarray, training: np.ndarray) -> dict[str, Any]:
    """Return how far the folded network's logits lie from those of the network it came from.

    Where one of them is not finite, None, as JSON has neither NaN nor infinity.
    """
    absolute, relative = difference(folded, training)
    told = math.isfinite(absolute)  # what is not finite predicts nothing
    same = told and bool(np.array_equal(folded.argmax(1), training.argmax(1)))
    return {
        "largest_difference": absolute if told else None,
        "relative_to_largest_output": relative if told else None,
        "all_predictions_agree": same,
    }


def table(accuracies: Mapping[str, Sequence[float]]) -> str:
    """Return the accuracies of each layer, their average, standard deviation and gain, as Markdown.

    The standard deviation is that of a sample, and there is none of a single run.
    """
    runs = len(next(iter(accuracies.values())))
    rows = [["", *(f"run{n + 1}" for n in range(runs)), "avg", "std", "+"]]
    for layer, values in accuracies.items():
        std = f"{np.std(values, ddof=1):.3f}" if runs > 1 else "-"
        gain = "-"
        if layer == "doconv" and "conv" in accuracies:
            difference_of_means = np.mean(values) - np.mean(accuracies["conv"])
            gain = f"{round(difference_of_means, 3) + 0:.3f}"  # + 0 turns -0 into 0
        numbers = (f"{value:.2f}" for value in values)
        rows.append([TITLES[layer], *numbers, f"{np.mean(values):.3f}", std, gain])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def write_results(
    folder: Path,
    name: str,
    report: dict[str, Any],
    outputs: Mapping[str, np.ndarray],
    labels: np.ndarray,
    states: Mapping[str, Any],
) -> list[Path]:
    """Write the report, the test outputs and the states, all or none, and return their paths.

    Nothing takes its place before everything has been written, so that an error or an interruption
    leaves the files of an earlier run whole and belonging together.
    """
    files = {"outputs": folder / f"{name}.outputs.safetensors"}
    files |= {kind: folder / f"{name}.{kind}.safetensors" for kind in states}
    main_file = folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        write_json(
            stack.enter_context(replacing(main_file)),
            report | {"files": {kind: file.name for kind, file in files.items()}},
        )
        arrays = {"labels": labels, **outputs}
        arrays = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        stack.enter_context(replacing(files["outputs"])).write_bytes(save(arrays))
        for kind, state in states.items():
            write_state(state, stack.enter_context(replacing(files[kind])))
    return [main_file, *files.values()]


def parse_options(sample: Sample, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, complete and checked; SystemExit says which of them is wrong, and why."""
    parser = argparse.ArgumentParser(
        prog=f"{sample.name}.py",
        description=sample.description,
        epilog=sample.why,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", type=_positive(int), default=5, help="trainings of each layer, each another seed")
    for name, kind, what in (
        ("epochs", int, "passes through the training images"),
        ("lr", float, "learning rate"),
    ):
        defaults = ", ".join(f"{value} for {data}" for data, value in getattr(sample, name).items())
        text = f"{what} (default: {defaults}; see below)"
        add(f"--{name}", type=_positive(kind), default=argparse.SUPPRESS, help=text)
    add("--batch-size", type=_positive(int), default=sample.batch_size, help="images a step")
    add("--seed", type=_seed, default=0, help="of the first run; run n adds n - 1 to it")
    add(
        "--layer", choices=("both", "conv", "doconv"), default="both",
        help="what to train: the baseline's convolutions, DO-Conv's, or both to compare them",
    )  # fmt: skip
    add(
        "--data", choices=digits.DATASETS, default="digits",
        help="scikit-learn's 1,797 digits, which need no download, or the 70,000 of MNIST",
    )  # fmt: skip
    add(
        "--data-dir", type=Path, default=Path("data"),
        help=f"where MNIST is kept once fetched, and where {digits.MNIST_FILE} is looked for",
    )  # fmt: skip
    add("--out", type=Path, default=Path("results"), help="folder for the result files")
    add(
        "--device", choices=("auto", "cpu", "gpu"), default="auto",
        help="where to compute; auto: the GPU if the framework finds one, else the CPU",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.epochs = getattr(options, "epochs", sample.epochs[options.data])
    options.lr = getattr(options, "lr", sample.lr[options.data])
    if options.device == "gpu" and "gpu" not in sample.devices:
        found = " and ".join(f"{name} {version}" for name, version in sample.versions.items())
        parser.error(f"argument --device: {found} found no GPU here; use cpu or auto.")
    if options.device == "auto":
        options.device = "gpu" if "gpu" in sample.devices else "cpu"
    problem = _not_a_folder(options.out)
    if problem:
        parser.error(f"argument --out: {problem}")
    return options


def _positive(kind: type[int] | type[float]) -> Callable[[str], Any]:
    wanted = "a whole number of at least 1" if kind is int else "a number above 0"

    def parse(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            number = kind(0)  # refused below, like the numbers that are too small
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"must be {wanted}; received {text!r}.")
        return number

    return parse


def _seed(text: str) -> int:
    # Every framework takes 31 bits, and the seeds of all the runs have to fit.
    if not text.isdecimal() or int(text) >= 2**31 - 2**16:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 0 to {2**31 - 2**16 - 1}; received {text!r}."
        )
    return int(text)


def _not_a_folder(path: Path) -> str | None:
    """Return why nothing could be written in `path`, which need not exist yet; None if it could."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is a file; name a folder for the results."
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"nothing can be written in {existing}; name another folder."
    return None


def _headline(sample: Sample, options: argparse.Namespace, data: digits.Data) -> str:
    found = ", ".join(f"{name} {version}" for name, version in sample.versions.items())
    steps = math.ceil(len(data.train_labels) / options.batch_size)
    return (
        f"{found} on {sample.devices[options.device]}: {options.data}, "
        f"{len(data.train_labels)} images to train with, {len(data.test_labels)} to test with; "
        f"{options.epochs} epochs of {steps} steps"
    )


def _versions(sample: Sample) -> dict[str, str]:
    ours = {"python": platform.python_version(), "numpy": np.__version__}
    return ours | {"doconv": metadata.version("overconv")} | dict(sample.versions)


def _describe_fold(report: Mapping[str, Any]) -> str:
    fold, count = report["fold"], report["parameters"]
    if fold["largest_difference"] is None:
        outputs = "outputs are NOT FINITE, so that nothing can be compared: a smaller --lr may help"
    else:
        agree = "all agree" if fold["all_predictions_agree"] else "DIFFER"
        outputs = (
            f"outputs differ by at most {fold['largest_difference']:.3g} "
            f"({fold['relative_to_largest_output']:.3g} of the largest); predictions: {agree}"
        )
    return (
        "Folded into ordinary convolutions (last run):\n"
        f"  {outputs}\n"
        f"  parameters: {count['training']} in training, {count['folded']} folded, "
        f"{count['ordinary']} in the ordinary network"
    )
