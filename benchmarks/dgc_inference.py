"""Measure what dynamic group convolutions gain by skipping what they drop, on the CPU.

Run: python benchmarks/dgc_inference.py [--docs] [--only BACKEND] [--quick] [--pure]
    [--channels-last]

One process for each framework, in which come by turns: the dense counterpart, which is the same
layer or network with every channel kept and no selector, the layer as it is trained, in evaluation,
and what it folds to. In PyTorch also a training step of `cifar_dydensenet86` beside the source's
own arithmetic. Prints tables, writes `results/dgc_inference.json`, and with --docs puts the tables
into `docs/dgc.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from step_measure import Row, emit, figure, measure
from step_report import DOCS, machine, put

from doconv_core import difference
from doconv_core.atomic import write_json
from doconv_core.networks.names import describe
from doconv_core.networks.nodes import (
    DGConv,
    DynamicHeads,
    Leaf,
    Network,
    Sequence,
    dynamic,
    sequence,
)

BACKENDS = ("torch", "tf", "mx")
# Channels, kernel size, height and width, gate factor.
LAYERS = (
    (256, 256, 3, 14, 0.25), (256, 128, 1, 28, 0.25), (400, 256, 1, 14, 0.25),
    (1040, 512, 1, 7, 0.25), (104, 32, 1, 32, 0.25), (512, 512, 3, 7, 0.25),
    (512, 512, 3, 7, 0.45), (256, 256, 3, 14, 0.45), (128, 128, 3, 28, 0.45),
    (64, 64, 3, 56, 0.25), (64, 64, 3, 56, 0.45),
)  # fmt: skip
NETWORKS = (
    ("dyresnet18", 0.25), ("dyresnet18", 0.45), ("dydensenet74", 0.25),
    ("cifar_dydensenet86", 0.25),
)  # fmt: skip
QUICK = slice(2)
TRAINED, IMAGES = "cifar_dydensenet86", 64
WAYS = ("masked", "folded")
PAGE = DOCS / "dgc.md"


class Case(NamedTuple):
    """A dynamic network, or one of a single layer, and its dense counterpart."""

    what: str
    name: str
    network: Network
    size: int


def main() -> None:
    """Measure, print and write."""
    options = _options()
    if options.worker:
        _work(options)
        return
    if options.channels_last and options.only != ["torch"]:
        raise SystemExit("--channels-last is PyTorch's; give --only torch, too.")
    others = options.quick or options.only or options.pure
    if options.docs and others:
        raise SystemExit("--docs is for a whole run, with neither --quick nor what follows it.")
    found: dict[str, Any] = {}
    for backend in options.only or BACKENDS:
        command = [sys.executable, __file__, "--worker", backend, *sys.argv[1:]]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        version, *rows = map(json.loads, lines.splitlines())
        found[backend] = {"version": version, "rows": [Row(**row) for row in rows]}
    described = machine(options.threads, [each["version"] for each in found.values()])
    text = "\n\n".join(table(each["rows"]) for each in found.values())
    print(text)
    rows = [row._asdict() for each in found.values() for row in each["rows"]]
    out = Path(options.out) / "dgc_inference.json"
    write_json(out, {"machine": described, "rows": rows})
    print(f"Written: {out}")
    if options.docs:
        told = f"batches of {options.batch}, {options.patience:g} seconds for each row"
        put(PAGE, f"{described}; {told}.\n\n{text}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", choices=BACKENDS, help="this framework alone")
    parser.add_argument("--quick", action="store_true", help="two layers and two networks")
    parser.add_argument(
        "--pure", action="store_true", help="PyTorch without the compiled code; no table of docs"
    )
    parser.add_argument(
        "--channels-last", action="store_true",
        help="in PyTorch, kernels of ordinary convolutions in groups in channels_last",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=5, help="seconds for each row")
    parser.add_argument("--out", default="results", help="folder for the JSON file")
    parser.add_argument("--docs", action="store_true", help="write docs/dgc.md's tables")
    parser.add_argument("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _work(options: argparse.Namespace) -> None:
    driver = DRIVERS[options.worker](options.threads)
    if options.pure:
        import_module("doconv_torch.skipping")._skipping = None
    print(json.dumps(driver.version), flush=True)
    for case in cases(options.quick):
        emit(measured(driver, case, options))
    if options.worker == "torch" and not options.pure:  # in training nothing is compiled
        for row in training(options.patience):
            emit(row)


def cases(quick: bool) -> Iterator[Case]:
    """Yield single layers, then networks."""
    for i, o, k, size, gate_factor in LAYERS[QUICK] if quick else LAYERS:
        name = f"{k}×{k} {i}→{o} @{size}², {gate_factor} kept"
        layer = dynamic(o, (k, k), gate_factor=gate_factor)
        yield Case(
            "layer", name, Network("layer", sequence(("layer", layer)), (i, size, size)), size
        )
    for name, gate_factor in NETWORKS[QUICK] if quick else NETWORKS:
        network = describe(name, gate_factor=gate_factor)
        case = f"`{name}`, {gate_factor} kept"
        yield Case("network", case, network, network.input_shape[-1])


def dense(node: Any) -> Any:
    """Return a node with an ordinary convolution for each dynamic one's heads."""
    if isinstance(node, DynamicHeads):
        return node.conv
    if isinstance(node, Sequence):
        kind = Sequence if isinstance(node, DGConv) else type(node)
        return kind(tuple((name, dense(child)) for name, child in node.children))
    if isinstance(node, Leaf):
        return node
    return replace(node, **{each.name: dense(getattr(node, each.name)) for each in fields(node)})


def measured(driver: Any, case: Case, options: argparse.Namespace) -> Row:
    """Measure a case, and see that what it folds to computes the same."""
    channels = case.network.input_shape[0]
    x = np.random.default_rng(0).standard_normal((options.batch, channels, case.size, case.size))
    ordinary = driver.built(replace(case.network, body=dense(case.network.body)))
    model = driver.built(case.network)
    driver.package.set_progress(model, 1)
    for each in (ordinary, model):  # which depends on what is dropped
        driver.norm(each, several(x))
        if options.channels_last:
            driver.lay_out(each)
    ways = driver.ways({"dense": ordinary, "masked": model, "folded": driver.folded(model)}, x)
    found, expected = (np.asarray(ways[name](), float) for name in ("folded", "masked"))
    relative = difference(found, expected).relative
    if not relative < 1e-3:  # where two saliencies are as good as equal, another may be kept
        raise SystemExit(f"{case.name}: what it folds to differs by {relative}.")
    return measure(driver.name, case.what, case.name, ways, options.patience)


def several(x: np.ndarray) -> np.ndarray:
    """Return images to norm a network on: these and some more.

    Of a channel that all of them drop the variance is 0; in another image that keeps it, it would
    be divided by that.
    """
    noise = np.random.default_rng(1).standard_normal((4, *x.shape[1:]))
    return np.concatenate([x, noise]).astype("f4")


class Torch:
    """PyTorch, in inference mode."""

    name = "PyTorch"

    def __init__(self, threads: int) -> None:
        import torch

        self.torch, self.package = torch, import_module("doconv_torch")
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.version = f"PyTorch {torch.__version__}"

    def built(self, network: Network) -> Any:
        """Return the network."""
        return self.package.build(network)

    def lay_out(self, model: Any) -> None:
        """Let kernels of ordinary convolutions in groups lie in channels_last."""
        for module in model.modules():
            if isinstance(module, self.torch.nn.Conv2d) and module.groups > 1:
                module.to(memory_format=self.torch.channels_last)

    def norm(self, model: Any, images: np.ndarray) -> None:
        """Let the norms be those of some images, as values grow by layers in new networks."""
        for module in model.modules():
            if isinstance(module, self.torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with self.torch.no_grad():
            model.train()(self.torch.from_numpy(images))
        model.eval()

    def folded(self, model: Any) -> Any:
        """Return what a model folds to."""
        return self.package.fold(model).model

    def ways(self, models: dict[str, Any], x: np.ndarray) -> dict[str, Callable[[], Any]]:
        """Return calls of the models."""
        images = self.torch.from_numpy(x.astype("f4"))

        def call(model: Any) -> Any:
            with self.torch.inference_mode():
                return model(images).numpy()

        return {name: lambda model=model: call(model) for name, model in models.items()}


class Keras:
    """Keras on TensorFlow, as a compiled function."""

    name = "Keras"

    def __init__(self, threads: int) -> None:
        import keras
        import tensorflow as tf

        self.keras, self.tf, self.package = keras, tf, import_module("doconv_tf")
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        keras.utils.set_random_seed(0)
        self.version = f"Keras {keras.__version__}, TensorFlow {tf.__version__}"

    built = Torch.built

    def norm(self, model: Any, images: np.ndarray) -> None:
        """Let the norms be those of some images."""
        for layer in model._flatten_layers():
            if isinstance(layer, self.keras.layers.BatchNormalization):
                layer.momentum = 0.0
        model(np.moveaxis(images, 1, -1), training=True)

    folded = Torch.folded

    def ways(self, models: dict[str, Any], x: np.ndarray) -> dict[str, Callable[[], Any]]:
        """Return calls of the models."""
        images = self.tf.constant(np.moveaxis(x, 1, -1).astype("f4"))
        called = {
            name: self.tf.function(lambda x, model=model: model(x, training=False))
            for name, model in models.items()
        }
        return {
            n: lambda function=function: function(images).numpy() for n, function in called.items()
        }


class Gluon:
    """Gluon, hybridized."""

    name = "Gluon"

    def __init__(self, threads: int) -> None:
        self.package = import_module("doconv_mx")
        self.mx = import_module("mxnet")
        self.mx.random.seed(0)
        self.version = f"MXNet {self.mx.__version__}"

    def built(self, network: Network) -> Any:
        """Return the network."""
        model = self.package.build(network)
        model.initialize()
        return model

    def norm(self, model: Any, images: np.ndarray) -> None:
        """Let the norms be those of some images."""
        norms: list[Any] = []

        def see(block: Any) -> None:
            if isinstance(block, self.mx.gluon.nn.BatchNorm):
                norms.append(block)

        model.apply(see)
        for norm in norms:
            norm._kwargs["momentum"] = 0.0
        with self.mx.autograd.record():
            y = model(self.mx.nd.array(images))
        y.backward()  # which is where MXNet's norms take up their means
        self.mx.nd.waitall()

    folded = Torch.folded

    def ways(self, models: dict[str, Any], x: np.ndarray) -> dict[str, Callable[[], Any]]:
        """Return calls of the models."""
        images = self.mx.nd.from_numpy(np.ascontiguousarray(x, "f4"))
        for model in models.values():
            model.hybridize(static_alloc=True)
        return {n: lambda model=model: model(images).asnumpy() for n, model in models.items()}


DRIVERS = {"torch": Torch, "tf": Keras, "mx": Gluon}


def training(patience: float) -> Iterable[Row]:
    """Measure a step of training by the source's arithmetic, and by the layer: time and memory."""
    import torch

    from doconv_torch import get_model, saliency_lasso, set_progress
    from doconv_torch.dgc import DynamicHeads2d

    def by_source(heads: Any, z: Any) -> Any:
        """Compute each head's saliencies, threshold and copy of the maps by itself."""
        pooled, maps, lasso, n = z.mean((2, 3)), [], 0, int(heads.inactive)
        for i in range(heads.spec.heads):
            features = torch.relu(pooled @ heads.squeeze_weight[i].T)
            rated = features @ heads.saliency_weight[i].T + heads.saliency_bias[i]
            saliency = torch.relu(rated)
            lasso = lasso + saliency.mean()
            if n:
                least = saliency.topk(n, largest=False, sorted=True).values[:, -1:]
                saliency = saliency * (saliency > least)
            maps.append(z * saliency[:, :, None, None])
        heads.lasso = lasso
        y = heads._convolve(torch.cat(maps, 1), heads.weight, heads.spec.heads)
        return y.unflatten(1, (heads.spec.heads, -1)).transpose(1, 2).flatten(1, 2)

    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.randint(100, (IMAGES,))
    ordinary = import_module("doconv_torch").build(
        replace(describe(TRAINED), body=dense(describe(TRAINED).body))
    )
    models = {"source": get_model(TRAINED), "layer": get_model(TRAINED), "dense": ordinary}
    for module in models["source"].modules():
        if isinstance(module, DynamicHeads2d):
            module.forward = by_source.__get__(module)

    def step(name: str) -> None:
        model = models[name]
        for parameter in model.parameters():
            parameter.grad = None
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        if name != "dense":
            loss = loss + saliency_lasso(model)
        loss.backward()

    for name in ("source", "layer"):
        set_progress(models[name], 1)
    steps = {name: lambda name=name: step(name) for name in models}
    case = f"`{TRAINED}`, {IMAGES} images"
    yield measure("PyTorch", "training step", case, steps, patience)
    peaks = {name: float(_peak(way)) for name, way in steps.items()}
    extra = {name: peaks[name] - peaks["dense"] for name in ("source", "layer")}
    yield figure("PyTorch", "memory of a step, beyond the dense one's", case, **extra)


def _peak(step: Callable[[], Any]) -> int:
    """Return the most bytes that are in use at a time in a step, beyond those before it."""
    import torch

    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def table(rows: list[Row]) -> str:
    """Return a framework's rows as Markdown: how many times as fast as dense."""
    backend = rows[0].backend
    lines = [
        f"| {backend} | dense | as it is trained | folded |", "|-|-|-|-|"
    ]  # fmt: skip
    lines += [
        f"| {row.case} | {1000 * row.seconds['dense']:.3g} ms | "
        + " | ".join(f"{1 / row.ratios[way]:.2f}×" for way in WAYS)
        + " |"
        for row in rows
        if "folded" in row.ratios
    ]
    others = [row for row in rows if "folded" not in row.ratios]
    if others:
        lines += ["", "| | source's arithmetic | layer |", "|-|-|-|"]
    for row in others:
        first = row.seconds["source"]
        amount = f"{first:.2f} s" if row.what == "training step" else f"{first / 2**20:.0f} MiB"
        lines.append(f"| {row.what}, {row.case} | {amount} | {row.ratios['layer']:.2f} of it |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
