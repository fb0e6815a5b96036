"""Small models as data, and what a backend's adapter makes of them: the contract of whole models.

An adapter (`adapters/*_models.py`) builds a model from such data and speaks NumPy arrays, channels
first. Where a test needs what only one framework has, it is in that backend's own files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pytest
from frameworks import BACKENDS, need

SHAPE = (4, 8, 7)  # of an input, without the batch
BATCH = 2


@dataclass(frozen=True)
class Layer:
    """A layer of a model, which keeps the size of an image but for its strides.

    kind: conv, do_conv, transposed, own (a subclass of a convolution), patched (a convolution whose
    forward was replaced), doubled (a subclass of a DO layer that computes something else), named
    (one that computes the same), do_patched, norm, own_norm, patched_norm, relu, dropout, flatten,
    linear. tied: the name of a layer with whose weight it is to share its own.
    """

    kind: str
    to: int = 4
    of: int = 4
    kernel: int | tuple[int, ...] = 3
    groups: int = 1
    bias: bool = True
    stride: int = 1
    rank: int = 2
    multiplier: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    tied: str | None = None

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return (self.kernel,) * self.rank if isinstance(self.kernel, int) else self.kernel

    @property
    def padding(self) -> tuple[int, ...]:
        return tuple(size // 2 for size in self.kernel_size)


@dataclass(frozen=True)
class Again:
    """A layer that stands in the model already, under another name."""

    of: str


@dataclass(frozen=True)
class Net:
    """A model.

    layers: by name; a mapping is a chain of layers under that name. calls: (result, layer,
    argument), or (result, "+", argument, argument); none for each layer after the other. outputs:
    the results that are returned; none for the last. The input is "x".
    """

    layers: dict[str, Any]
    calls: tuple[tuple[str, ...], ...] = ()
    outputs: tuple[str, ...] = ()
    shape: tuple[int, ...] = SHAPE

    @property
    def steps(self) -> tuple[tuple[str, ...], ...]:
        if self.calls:
            return self.calls
        names = list(self.layers)
        return tuple(zip(names, names, ["x", *names[:-1]], strict=True))

    @property
    def results(self) -> tuple[str, ...]:
        return self.outputs or (self.steps[-1][0],)

    def input(self, seed: int = 1) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((BATCH, *self.shape)).astype(np.float32)

    def run(self, call: Any, x: Any) -> Any:
        """Return the outputs. call: what runs a layer of this name with an argument."""
        found = {"x": x}
        for result, name, *arguments in self.steps:
            given = [found[a] for a in arguments]
            found[result] = given[0] + given[1] if name == "+" else call(name, *given)
        outputs = tuple(found[name] for name in self.results)
        return outputs if len(outputs) > 1 else outputs[0]

    def over_parameterized(self, **options: Any) -> Net:
        """Return the model with DO layers in the place of convolutions."""

        def of(layer: Any) -> Any:
            if isinstance(layer, dict):
                return {name: of(each) for name, each in layer.items()}
            is_conv = isinstance(layer, Layer) and layer.kind == "conv"
            return replace(layer, kind="do_conv", **options) if is_conv else layer

        return replace(self, layers={name: of(layer) for name, layer in self.layers.items()})


conv = Layer("conv")
norm = Layer("norm")

# Branches, a chain within, batch norms, dropout, groups, strides, one tap and a layer called twice.
BRANCHES = Net(
    {
        "stem": Layer("conv", 8, bias=False),
        "stem_norm": Layer("norm", 8),
        "relu": Layer("relu"),
        "body": {
            "wide": Layer("conv", 8, 8, (3, 1), groups=2),
            "point": Layer("conv", 8, 8, 1),
            "norm": Layer("norm", 8),
        },
        "drop": Layer("dropout"),
        "each": Layer("conv", 8, 8, groups=8),
        "head": Layer("conv", 3, 8, stride=2),
    },
    (
        ("a", "stem", "x"), ("b", "stem_norm", "a"), ("c", "relu", "b"), ("d", "body", "c"),
        ("e", "+", "d", "c"), ("f", "drop", "e"), ("g", "each", "f"),
        ("scores", "head", "g"), ("more", "head", "f"),
    ),
    ("scores", "more"),
)  # fmt: skip
CHANGED = ["stem", "body.wide", "each", "head"]


class Models(Protocol):
    """What an adapter offers; a model is whatever the framework calls one.

    package: the backend. types: its names of types, by kind. exact: whether outputs are the same
    bit for bit for a depth multiplier above the taps, too.
    """

    package: ModuleType
    types: dict[str, str]
    exact: bool

    def build(self, net: Net, mode: str = "", dtype: str = "float32") -> Any:
        """Return the model in inference, with values as after training but for D, run once."""

    def layer(self, layer: Layer, shape: tuple[int, ...]) -> Any:
        """Return a layer by itself, built for inputs of this shape, with values."""

    def layers(self, model: Any) -> dict[str, Any]:
        """Return the model's layers by the path of each that a report gives."""

    def outputs(self, model: Any, x: np.ndarray, training: bool = False) -> list[np.ndarray]:
        """Return the outputs, with the same random numbers each time."""

    def values(self, model: Any) -> dict[str, np.ndarray]:
        """Return parameters and statistics by the names that files have for them, in order."""

    def identities(self, model: Any) -> dict[str, Any]:
        """Return the objects that hold them."""

    def count(self, model: Any) -> int:
        """Return the number of parameters, as the framework counts them."""

    def train(self, model: Any) -> Any:
        """Give every D values as after training; return the model."""

    def step(self, model: Any, x: np.ndarray) -> None:
        """Take a step down the sum of the squares of the outputs."""

    def save(self, model: Any, folder: Any) -> bytes:
        """Write the model's files and return what is in them."""

    def load(self, model: Any, folder: Any) -> None:
        """Load what `save` wrote of a model of the same architecture."""

    def returning(self, function: Any) -> Any:
        """Return a model, or what `verify` takes for one, that computes this function."""

    def array(self, values: Any) -> Any:
        """Return the values as the framework's."""


def runs() -> list[tuple[str, str]]:
    """Return the backends with the ways in which each runs a model."""
    return [(name, mode) for name in BACKENDS for mode in MODES.get(name, ("eager",))]


MODES = {"mx": ("eager", "hybridized")}


# Into copies or in place, S as it is or larger: of these pairs two are of the long tail.
PAIRS = [
    pytest.param(False, 20, id="copy-S=20"),
    pytest.param(True, None, id="inplace-S=M"),
    pytest.param(False, None, id="copy-S=M", marks=pytest.mark.exhaustive),
    pytest.param(True, 20, id="inplace-S=20", marks=pytest.mark.exhaustive),
]
WAYS = pytest.mark.parametrize(("inplace", "multiplier"), PAIRS)


def models_of(backend: str) -> ModuleType:
    """Return the backend's adapter to the contract of models."""
    need(backend)
    return import_module(f"adapters.{backend}_models")


def is_d(name: str) -> bool:
    """Whether this is a name of a D."""
    return "depthwise" in name or name.endswith("d_kernel")
