"""The networks of MXNet Gluon: gluoncv.model_zoo's, and this package's own."""

from __future__ import annotations

import gc
import json
import random
import warnings
from ast import literal_eval
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import doconv_mx  # first: makes MXNet and GluonCV importable

# isort: split
import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn
from zoo_check import SEED, Norm, Outputs, flat
from zoo_networks import Network

from doconv_core import Converted

doconv_mx.import_gluoncv()
from gluoncv.model_zoo import get_model  # noqa: E402

ORDINARY = (nn.Conv1D, nn.Conv2D, nn.Conv3D)
# The modules of the blocks that this package's own networks have, which stay.
BLOCKS = ("doconv_mx.realize", "doconv_mx.activations")


def versions(network: Network) -> str:
    """Return what the table says about versions."""
    zoo = "" if network.own else f", GluonCV {metadata.version('gluoncv')}"
    return f"MXNet {mx.__version__}{zoo}"


def build(network: Network, seed: int) -> gluon.Block:
    """Return the network with random weights, biases included."""
    _seed(seed)
    model = _own(network) if network.own else _of_gluoncv(network)
    rng = np.random.default_rng(seed)
    for name, parameter in model.collect_params().items():
        shape = parameter.shape
        if name.endswith("bias"):
            write(parameter, rng.normal(0, 0.1, shape))
        elif name.endswith("weight") and len(shape) > 1 and not network.own:
            write(parameter, rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape))
    return model


def _own(network: Network) -> gluon.Block:
    return doconv_mx.get_model(network.name, input_shape=network.shape, **network.options)


def _of_gluoncv(network: Network) -> gluon.Block:
    model = get_model(network.name, pretrained=False, **network.options)
    with warnings.catch_warnings():
        # GluonCV initialises parts of some networks itself.
        warnings.filterwarnings("ignore", "Parameter .* is already initialized", UserWarning)
        model.initialize()
    outputs(model, [np.zeros((2, *network.shape), np.float32)], False)  # infers the shapes
    return model


def settle(model: gluon.Block, inputs: Sequence[np.ndarray]) -> None:
    """Give its batch norms the statistics of this batch."""
    blocks = list(_blocks(model))
    options = [m._kwargs for m in blocks if isinstance(m, nn.BatchNorm)]
    momenta = [option["momentum"] for option in options]
    for option in options:
        option["momentum"] = 0.0
    # The momentum of those in a graph is fixed, so that it takes several passes.
    passes = 30 if any(isinstance(m, gluon.SymbolBlock) for m in blocks) else 1
    for _ in range(passes):
        _seed(SEED)
        with autograd.record():  # MXNet gathers the statistics on its way back
            found = flat(model(*_arrays(inputs)), lambda array: array)
            total = sum(array.mean() for array in found.values())
        total.backward()
        mx.nd.waitall()
    for option, momentum in zip(options, momenta, strict=True):
        option["momentum"] = momentum


def norms(model: gluon.Block) -> list[Norm]:
    """Return the variables of its batch norms, of those in graphs too."""
    variables = dict(model.collect_params().items())
    found = []
    for name, mean in variables.items():
        beginning, _, end = name.rpartition("_")[0].rpartition("_")
        if name.endswith("_mean") and end in ("running", "moving"):  # the latter in graphs
            others = (f"{end}_var", "gamma", "beta")
            found.append(Norm(mean, *(variables.get(f"{beginning}_{kind}") for kind in others)))
    return found


def read(variable: gluon.Parameter) -> np.ndarray:
    """Return a variable's value."""
    return variable.data().asnumpy()


def write(variable: gluon.Parameter, value: np.ndarray) -> None:
    """Set a variable."""
    variable.set_data(mx.nd.array(value))


def outputs(model: gluon.Block, inputs: Sequence[np.ndarray], training: bool) -> Outputs:
    """Return the outputs by their places; what is random begins from the seed each time."""
    _seed(SEED)
    with autograd.train_mode() if training else autograd.predict_mode():
        found = model(*_arrays(inputs))
    return flat(found, lambda array: array.asnumpy())


def step(model: gluon.Block, inputs: Sequence[np.ndarray], targets: Outputs) -> float:
    """Take a step of gradient descent, its gradient clipped, and return the loss before it."""
    _seed(SEED)
    variables = model.collect_params()
    trainer = gluon.Trainer(variables, "sgd", {"learning_rate": 0.1})
    with autograd.record():
        found = flat(model(*_arrays(inputs)), lambda array: array)
        loss = sum(
            mx.nd.square(found[place] - mx.nd.array(target)).mean()
            for place, target in targets.items()
        )
    loss.backward()
    gradients = [p.grad() for p in variables.values() if p.grad_req != "null"]
    gluon.utils.clip_global_norm(gradients, 1.0)
    trainer.step(1)
    return float(loss.asscalar())


def depthwise(model: gluon.Block) -> list[gluon.Parameter]:
    """Return every D of the model, each once."""
    named = model.collect_params().items()
    # D has three axes; the weight of a BSConv's part named "depthwise" has four.
    return [p for name, p in named if name.endswith("depthwise_weight") and len(p.shape) == 3]


def ordinary(model: gluon.Block) -> int:
    """Return how many ordinary convolutions of more than one tap it has, each once."""
    blocks = list(_blocks(model))
    kernels = [m._kwargs["kernel"] for m in blocks if type(m) in ORDINARY]
    for block in blocks:
        if isinstance(block, gluon.SymbolBlock):
            nodes = json.loads(block._cached_graph[1].tojson())["nodes"]
            convolutions = (node for node in nodes if node["op"] == "Convolution")
            kernels += [literal_eval(node["attrs"]["kernel"]) for node in convolutions]
    return sum(np.prod(kernel) > 1 for kernel in kernels)


def bsconvs(model: gluon.Block) -> int:
    """Return how many BSConv layers it has, each once."""
    return sum(name.startswith("BSConv") for name in map(_our_type, _blocks(model)))


def parameters(model: gluon.Block) -> int:
    """Return the number of its numbers, as Gluon keeps them: statistics of batch norms too."""
    return sum(int(np.prod(p.shape)) for p in model.collect_params().values())


def entries(model: gluon.Block) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what it keeps, by names."""
    return {name: p.shape for name, p in model._collect_params_with_prefix().items()}


def traces(model: gluon.Block) -> list[str]:
    """Return the types of this package's layers in it that folding is to remove."""
    return sorted({*map(_our_type, _blocks(model))} - {""})


def over_parameterize(model: gluon.Block) -> Converted:
    """Over-parameterize it."""
    return doconv_mx.over_parameterize(model)


def fold(model: gluon.Block, fuse_batchnorm: bool) -> Converted:
    """Fold it."""
    return doconv_mx.fold(model, fuse_batchnorm=fuse_batchnorm)


def release() -> None:
    """Free what is left of models that are gone."""
    mx.nd.waitall()
    gc.collect()


def _blocks(model: gluon.Block) -> Iterator[gluon.Block]:
    """Return the model's blocks at any depth, each once."""
    found: dict[int, gluon.Block] = {}

    def visit(block: gluon.Block) -> None:
        if id(block) not in found:
            found[id(block)] = block
            for child in block._children.values():
                visit(child)

    visit(model)
    return iter(found.values())


def _our_type(block: gluon.Block) -> str:
    """Return the type's name of one of this package's layers, and nothing of another block."""
    module, name = type(block).__module__, type(block).__qualname__
    return name if module.startswith("doconv") and module not in BLOCKS else ""


def _arrays(inputs: Sequence[np.ndarray]) -> list[Any]:
    return [mx.nd.array(value) for value in inputs]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    mx.random.seed(seed)
