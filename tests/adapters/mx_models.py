"""The contract's whole models in MXNet Gluon."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import doconv_mx as package  # before MXNet, which it makes importable

# isort: split
import mxnet as mx
import numpy as np
from model_contract import Again, Layer, Net
from mxnet import autograd, gluon
from mxnet.gluon import HybridBlock, nn

from adapters.mx import LAYERS, ORDINARY, Own, array, types

TRANSPOSED = (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose)

__all__ = ["array", "package", "types"]
types = types | {"own_norm": "OwnNorm", "doubled": "Doubled", "named": "Named"}
exact = False


class OwnNorm(nn.BatchNorm):
    """A batch norm that computes something else."""

    def hybrid_forward(self, F, x, **parameters):
        return 2 * super().hybrid_forward(F, x, **parameters)


class Doubled(package.DOConv2D):
    """A layer that computes something else."""

    def hybrid_forward(self, F, x, *args, **kwargs):
        return 2 * super().hybrid_forward(F, x, *args, **kwargs)


class Named(package.DOConv2D):
    """A layer that computes the same."""


class Model(HybridBlock):
    """A model of a description."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net
        for name, each in net.layers.items():
            if isinstance(each, Again):
                made = self._children[each.of]
            else:
                tied = each.tied if isinstance(each, Layer) else None
                made = _made(each, self._children[tied].params if tied else None)
            self.register_child(made, name)

    def hybrid_forward(self, F, x):
        return self.net.run(lambda name, *given: self._children[name](*given), x)


def _made(each: Any, params: Any = None) -> HybridBlock:
    if isinstance(each, dict):
        chain = nn.HybridSequential()
        for name, part in each.items():
            chain.register_child(_made(part), name)
        return chain
    rank, options = each.rank - 1, dict(each.options)
    if each.kind in ("norm", "own_norm", "patched_norm"):
        if not options.pop("affine", True):
            options |= {"scale": False, "center": False}
        made = (OwnNorm if each.kind == "own_norm" else nn.BatchNorm)(
            in_channels=each.to, **options
        )
        return patched(made) if each.kind == "patched_norm" else made
    if each.kind in ("relu", "dropout", "flatten", "linear"):
        return {
            "relu": lambda: nn.Activation("relu"), "dropout": lambda: nn.Dropout(0.3),
            "flatten": nn.Flatten,
            "linear": lambda: nn.Dense(each.to, in_units=each.of, use_bias=each.bias),
        }[each.kind]()  # fmt: skip
    cls = {
        "conv": ORDINARY[rank], "do_conv": LAYERS[rank], "transposed": TRANSPOSED[rank], "own": Own,
        "patched": ORDINARY[rank], "doubled": Doubled, "named": Named, "do_patched": LAYERS[rank],
    }[each.kind]  # fmt: skip
    if each.multiplier:
        options["depth_multiplier"] = each.multiplier
    made = cls(
        channels=each.to, kernel_size=each.kernel_size, strides=each.stride, padding=each.padding,
        groups=each.groups, use_bias=each.bias, in_channels=each.of, params=params, **options,
    )  # fmt: skip
    return patched(made) if "patched" in each.kind else made


def patched(layer: HybridBlock) -> HybridBlock:
    layer.hybrid_forward = layer.hybrid_forward
    return layer


def build(net: Net, mode: str = "", dtype: str = "float32") -> HybridBlock:
    return _valued(Model(net), (2, *net.shape), mode == "hybridized", dtype)


def layer(each: Layer, shape: tuple[int, ...]) -> HybridBlock:
    return _valued(_made(each), shape)


def _valued(
    model: HybridBlock, shape: tuple[int, ...], hybridized: bool = False, dtype: str = "float32"
) -> HybridBlock:
    mx.random.seed(0)
    model.initialize(mx.init.Normal(0.3))
    model.hybridize(hybridized)
    outputs(model, np.ones(shape, "float32"))
    rng = np.random.default_rng(5)
    for name, parameter in model._collect_params_with_prefix().items():
        if name.endswith(("gamma", "running_var")):
            parameter.set_data(array(rng.uniform(0.5, 1.5, parameter.shape)))
        elif name.endswith(("beta", "running_mean", "bias")):
            parameter.set_data(array(rng.normal(0, 0.5, parameter.shape)))
    model.cast(dtype)  # at last, as MXNet convolves in float16 on GPUs only
    return model


def layers(model: HybridBlock) -> dict[str, HybridBlock]:
    found: dict[str, HybridBlock] = {}

    def visit(path: str, block: HybridBlock) -> None:
        if not any(block is each for each in found.values()):
            found[path] = block
            for name, child in block._children.items():
                visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return found


def outputs(model: HybridBlock, x: np.ndarray, training: bool = False) -> list[np.ndarray]:
    """In training also the gradient of the sum of their squares in the input."""
    mx.random.seed(3)
    inputs = array(x).astype(next(iter(model.collect_params().values())).dtype)
    inputs.attach_grad()
    with autograd.record() if training else autograd.pause(train_mode=False):
        found = model(inputs)
        found = found if isinstance(found, (tuple, list)) else (found,)
        total = sum((each**2).sum() for each in found)
    if training:
        total.backward()
    return [each.asnumpy() for each in (*found, *([inputs.grad] if training else []))]


def values(model: HybridBlock) -> dict[str, np.ndarray]:
    return {name: p.data().asnumpy() for name, p in identities(model).items()}


def identities(model: HybridBlock) -> dict[str, Any]:
    return model._collect_params_with_prefix()


def count(model: HybridBlock) -> int:
    return sum(p.data().size for p in model.collect_params().values())


def train(model: HybridBlock) -> HybridBlock:
    rng = np.random.default_rng(7)
    for parameter in model.collect_params(".*depthwise_weight").values():
        parameter.set_data(array(0.1 * rng.standard_normal(parameter.shape)))
    return model


def step(model: HybridBlock, x: np.ndarray) -> None:
    trainer = gluon.Trainer(model.collect_params(), "sgd", {"learning_rate": 1e-3})
    with autograd.record():
        found = model(array(x))
        found = found if isinstance(found, (tuple, list)) else (found,)
        total = sum((each**2).sum() for each in found)
    total.backward()
    trainer.step(1)


def save(model: HybridBlock, folder: Path) -> bytes:
    model.save_parameters(str(folder / "model.params"))
    pieces = []
    for each in layers(model).values():
        if isinstance(each, ORDINARY):
            arrays = [p.data().asnumpy() for p in each.collect_params().values()]
            pieces.append(pickle.dumps((type(each), arrays, each._kwargs)))
    names = " ".join(model.collect_params().keys()).encode()
    return (folder / "model.params").read_bytes() + b"".join(pieces) + names


def load(model: HybridBlock, folder: Path) -> None:
    model.load_parameters(str(folder / "model.params"))


class Returning(gluon.Block):
    """A model that returns what a function does."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


returning = Returning
