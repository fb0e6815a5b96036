"""Merge the branches of keras_cv_attention_models' networks, and compare with that package's way.

Run: python benchmarks/merge_sweep_keras.py [--only GLOB …] [--docs]

Networks are those of its families whose `switch_to_deploy` adds up branches, with random weights
and random statistics in their batch norms, on small images. The package is of Keras 2: its own way
runs there, in a process of its own. Its code also runs under the name `keras_core`, of which Keras
3 is the successor: so it makes the same network there, which takes over the weights.
Prints how many convolutions the network has, how many `fold(merge_branches=True)` and
`switch_to_deploy` leave, and how far each one's output is from the network's. Writes
`results/merge_sweep_keras.json`, and with --docs puts the table into `docs/merging.md`. Needs
`pip install --no-deps keras_cv_attention_models tf_keras`. The exit status is 1 if a row leaves
more convolutions than that package's way, or differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from merge_rows import ALLOWED, Row, document, line

NETWORKS = {
    "repvit": ["RepViT_M09", "RepViT_M10", "RepViT_M11", "RepViT_M15", "RepViT_M23"],
    "fastvit": ["FastViT_T8", "FastViT_T12", "FastViT_S12", "FastViT_SA12", "FastViT_SA24",
                "FastViT_SA36", "FastViT_MA36"],
}  # fmt: skip
SMALL = 64  # rows and columns of an image
CONVOLUTIONS = ("Conv2D", "DepthwiseConv2D", "SeparableConv2D")


def main() -> int:
    """Run the sweep, print and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", metavar="GLOB", help="names like this")
    parser.add_argument("--out", default="results", help="folder for the JSON file")
    parser.add_argument("--docs", action="store_true", help="write docs/merging.md's table")
    parser.add_argument("--theirs", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.theirs:
        by_their_way(*options.theirs)
        return 0
    from step_report import DOCS, machine, put

    from doconv_core.atomic import write_json

    rows = []
    for family, names in NETWORKS.items():
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in options.only or ["*"]):
                rows.append(tried(family, name))
                print(line(rows[-1]), flush=True)
                write_json(
                    Path(options.out) / "merge_sweep_keras.json", [asdict(row) for row in rows]
                )
    if options.docs:
        names = {"Keras": "keras", "TensorFlow": "tensorflow"}
        names["keras_cv_attention_models"] = "keras_cv_attention_models"
        versions = [f"{word} {version(name)}" for word, name in names.items()]
        told = document(rows, "the package's")
        put(DOCS / "merging.md", f"{machine(2, versions)}.\n\n{told}", "keras")
    failed = [row for row in rows if not row.holds]
    print(f"{len(rows)} networks, {len(failed)} that do not hold.")
    return bool(failed)


def made(family: str, name: str) -> Any:
    """Return a network, by whatever Keras the package has been told to use."""
    module = importlib.import_module(f"keras_cv_attention_models.{family}")
    return getattr(module, name)(
        pretrained=None, num_classes=10, input_shape=(SMALL, SMALL, 3), classifier_activation=None
    )


def by_their_way(family: str, name: str, file: str) -> None:
    """Write weights of a network, an image, and its outputs before and after, by Keras 2."""
    model = made(family, name)
    random, weights = np.random.default_rng(0), {}
    for layer in model.layers:
        norm = type(layer).__name__ == "BatchNormalization"
        values = [_value(random, v, norm) for v in layer.weights]
        layer.set_weights(values)
        weights |= {f"{layer.name}:{n}": value for n, value in enumerate(values)}
    x = random.standard_normal((1, *model.input_shape[1:])).astype("float32")
    before, counts = output(model, x), [convolutions(model)]
    deployed = model.switch_to_deploy()
    np.savez(
        file, **weights, _x=x, _before=before, _after=output(deployed, x),
        _counts=[*counts, convolutions(deployed)],
    )  # fmt: skip


def _value(random: Any, variable: Any, norm: bool) -> Any:
    shape = tuple(variable.shape)
    if norm:
        spread = variable.name.rpartition("/")[2].startswith(("gamma", "moving_variance"))
        value = random.uniform(0.5, 1.5, shape) if spread else random.normal(0, 0.1, shape)
    elif len(shape) > 1:
        value = random.normal(0, 1 / np.sqrt(np.prod(shape[:-1])), shape)
    else:
        value = random.normal(0, 0.1, shape)
    return value.astype("float32")


def tried(family: str, name: str) -> Row:
    """Return what becomes of a network."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "network.npz")
        environment = {
            **os.environ, "TF_USE_LEGACY_KERAS": "1", "KECAM_BACKEND": "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }  # fmt: skip
        command = [sys.executable, __file__, "--theirs", family, name, file]
        subprocess.run(command, env=environment, check=True)
        theirs = dict(np.load(file))
    _as_keras_core()
    from doconv_tf import fold

    model = made(family, name)
    for layer in model.layers:
        layer.set_weights([theirs[f"{layer.name}:{n}"] for n in range(len(layer.weights))])
    del model.switch_to_deploy  # a function that holds the model, and may read anything of it
    expected = output(model, theirs["_x"])
    if relative(expected, theirs["_before"]) > ALLOWED:
        raise SystemExit(f"{name} is another network by Keras 3 than by Keras 2.")
    begin = time.perf_counter()
    folded, report = fold(model, merge_branches=True)
    seconds = time.perf_counter() - begin
    before, after = map(int, theirs["_counts"])
    return Row(
        name, theirs["_x"].shape[1], (before, convolutions(folded), after),
        (relative(output(folded, theirs["_x"]), expected),
         relative(theirs["_after"], theirs["_before"])),
        len(report.changed), seconds, dict(Counter(each.reason for each in report.left)),
    )  # fmt: skip


def _as_keras_core() -> None:
    """Let the package find Keras 3 where it looks for `keras_core`."""
    os.environ["KECAM_BACKEND"] = "keras_core"
    import keras

    sys.modules["keras_core"] = keras
    for part in ("layers", "models", "initializers", "callbacks", "metrics", "utils", "ops",
                 "losses", "optimizers"):  # fmt: skip
        sys.modules[f"keras_core.{part}"] = getattr(keras, part)


def output(model: Any, x: Any) -> Any:
    """Return a network's output in inference."""
    found = model(x, training=False)
    found = found if isinstance(found, (list, tuple)) else [found]
    return np.concatenate([np.asarray(each) for each in found], -1)


def relative(found: Any, expected: Any) -> float:
    """Return the largest difference, of the largest output."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def convolutions(model: Any) -> int:
    """Return how many convolutions a network has."""
    return sum(type(layer).__name__ in CONVOLUTIONS for layer in model.layers)


if __name__ == "__main__":
    sys.exit(main())
