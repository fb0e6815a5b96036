"""What is asked of every network of the zoos: the same questions, whatever its framework.

A network is built with random weights, and its batch norms get the statistics of a batch, which are
then disturbed. It is over-parameterized, unless it was built so; compared, trained by one step,
folded, compared, counted, and folded once more with its batch norms fused. A driver, a module for
each framework, does what only that framework can.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from zoo_networks import Network
from zoo_row import Row

from doconv_core import Converted
from doconv_core.models.verify import largest_difference

SEED = 0
BATCH = 2
DISTURBANCE = 0.02  # the standard deviation of what is added to every D before folding
ENDS = (-np.inf, np.inf)
# Fusing rounds every kernel once more. What that amounts to differs between networks by orders of
# magnitude, so it is held against another rounding: the last bit of the batch norms' arrays.
ROUNDINGS = 10

Outputs = Mapping[str, np.ndarray]


class Norm(NamedTuple):
    """The variables of a batch norm; scale and offset are None where it has none."""

    mean: Any
    variance: Any
    scale: Any
    offset: Any


class Driver(Protocol):
    """What a framework's module has. Variables are its own; arrays are NumPy's."""

    def build(self, network: Network, seed: int) -> Any:
        """Return the network with random weights."""

    def settle(self, model: Any, inputs: Sequence[np.ndarray]) -> None:
        """Give its batch norms the statistics of this batch."""

    def norms(self, model: Any) -> list[Norm]:
        """Return the variables of its batch norms."""

    def read(self, variable: Any) -> np.ndarray:
        """Return a variable's value."""

    def write(self, variable: Any, value: np.ndarray) -> None:
        """Set a variable."""

    def outputs(self, model: Any, inputs: Sequence[np.ndarray], training: bool) -> Outputs:
        """Return the outputs by their places; what is random begins from the seed each time."""

    def step(self, model: Any, inputs: Sequence[np.ndarray], targets: Outputs) -> float:
        """Take a step of gradient descent towards the targets, and return the loss before it."""

    def depthwise(self, model: Any) -> list[Any]:
        """Return every D of the model, each once."""

    def ordinary(self, model: Any) -> int:
        """Return how many ordinary convolutions of more than one tap it has, each once."""

    def bsconvs(self, model: Any) -> int:
        """Return how many BSConv layers it has, each once."""

    def parameters(self, model: Any) -> int:
        """Return the number of its trainable numbers."""

    def entries(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what its checkpoint keeps, by names."""

    def traces(self, model: Any) -> list[str]:
        """Return the types of this package's layers in it that folding is to remove."""

    def over_parameterize(self, model: Any) -> Converted:
        """Over-parameterize it."""

    def fold(self, model: Any, fuse_batchnorm: bool) -> Converted:
        """Fold it."""

    def release(self) -> None:
        """Free what the framework keeps of models that are gone."""


def check(zoo: str, driver: Driver, network: Network, versions: str) -> Row:
    """Try a network, and return what came of it. An error becomes a problem of its row."""
    row = Row(zoo, network.name, network.shape, versions)
    begin = time.perf_counter()
    for action in (lambda: _try(driver, network, row), driver.release):
        try:
            action()
        except Exception as error:  # one network's failure must not hide the others
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            row.problems.append(message if len(message) < 200 else f"{message[:199]}…")
    row.seconds = round(time.perf_counter() - begin, 1)
    if network.failure and not row.problems:
        row.problems.append(f"did not fail, but was to, with {network.failure[0]!r}")
    return row


def _try(driver: Driver, network: Network, row: Row) -> None:
    rng = np.random.default_rng(SEED)
    inputs = make_inputs(network, rng)
    model = driver.build(network, SEED)
    is_folded = network.folded() == network
    ordinary = model if is_folded else driver.build(network.folded(), SEED)
    settle(driver, model, inputs, rng)
    before = driver.outputs(model, inputs, False)

    trained, targets = _over_parameterize(driver, (model, ordinary), inputs, before, row, rng)
    row.loss = driver.step(trained, inputs, targets)
    depthwise = driver.depthwise(trained)
    row.moved = sum(bool(driver.read(d).any()) for d in depthwise)
    _require(row, np.isfinite(row.loss), f"the loss is {row.loss}")
    _require(
        row,
        row.moved == len(depthwise),
        f"training moved {row.moved} of {len(depthwise)} depthwise weights",
    )
    for d in depthwise:
        value = driver.read(d)
        noise = rng.normal(0, DISTURBANCE, value.shape)
        driver.write(d, (value + noise).astype(value.dtype))
    after = driver.outputs(trained, inputs, False)
    row.change = largest_difference(after, before).relative
    _require(row, _finite(after), "the trained network's outputs are not finite")
    _require(row, 0 < row.change < np.inf, f"training changed the outputs by {row.change}")

    _fold(driver, ordinary, trained, inputs, after, row)
    _fuse(driver, trained, inputs, after, row, rng)


def make_inputs(network: Network, rng: np.random.Generator) -> list[np.ndarray]:
    """Return a batch for the network: normal numbers, and its further integers."""
    mean, deviation = network.distribution
    batch = rng.normal(mean, deviation, (BATCH, *network.shape)).astype(np.float32)
    return [batch, *([np.array(network.further)] if network.further else [])]


def settle(
    driver: Driver, model: Any, inputs: Sequence[np.ndarray], rng: np.random.Generator
) -> None:
    """Give every batch norm random scales and offsets, and a batch's statistics, disturbed.

    With statistics that had nothing to do with the network's weights, activations would grow or
    vanish from layer to layer, and a deep network's output would show nothing of its first layers.
    """
    norms = driver.norms(model)
    for norm in norms:
        _set(driver, norm.scale, lambda v: rng.uniform(0.5, 1.5, v.shape))
        _set(driver, norm.offset, lambda v: rng.normal(0, 0.2, v.shape))
    driver.settle(model, inputs)
    for norm in norms:
        # MXNet computes a constant channel's variance as a tiny negative number.
        spread = np.sqrt(np.maximum(driver.read(norm.variance), 0))
        shift = 0.1 * spread * rng.normal(size=spread.shape)
        _set(driver, norm.mean, lambda v, shift=shift: v + shift)
        _set(driver, norm.variance, lambda v: v * rng.uniform(0.7, 1.4, v.shape))


def _set(driver: Driver, variable: Any, change: Callable[[np.ndarray], np.ndarray]) -> None:
    if variable is not None:
        value = driver.read(variable)
        driver.write(variable, change(value).astype(value.dtype))


def _over_parameterize(
    driver: Driver,
    models: tuple[Any, Any],
    inputs: Any,
    before: Outputs,
    row: Row,
    rng: np.random.Generator,
) -> tuple[Any, Outputs]:
    """Over-parameterize, compare in both modes, and return the new model and targets for it.

    models: the network, and the one that it folds to: the same, or one without its DO-Conv layers.
    """
    model, ordinary = models
    _require(row, _finite(before), "the network's outputs are not finite")
    candidates = driver.ordinary(ordinary)
    built_so = len(driver.depthwise(model))
    with warnings.catch_warnings():
        if built_so:  # nothing is left to replace, which it warns of
            warnings.filterwarnings("ignore", "the model has no convolution that could be repl")
        new, report = driver.over_parameterize(model)
    row.replaced = built_so + len(report.changed)
    row.left = dict(Counter(f"{kind}: {reason}" for _, kind, reason in report.left))
    row.parameters = (driver.parameters(ordinary), driver.parameters(new))
    row.over = largest_difference(driver.outputs(new, inputs, False), before).absolute
    training = driver.outputs(model, inputs, True)
    row.over_training = largest_difference(driver.outputs(new, inputs, True), training).absolute
    # The statistics that the two have gathered meanwhile must be the same as well.
    second = driver.outputs(model, inputs, False)
    statistics = largest_difference(driver.outputs(new, inputs, False), second).absolute

    counted = (report.parameters_before, report.parameters_after)
    expected = (driver.parameters(model), row.parameters[1])
    _require(row, counted == expected, f"the report counts {counted}, not {expected}")
    _require(row, row.replaced > 0, "no layer was replaced")
    _require(
        row,
        row.replaced == candidates,
        f"{row.replaced} layers were replaced; there are {candidates} convolutions to replace",
    )
    _require(row, row.over == 0, f"over-parameterizing changed the output by {row.over}")
    _require(row, row.over_training == 0, f"it changed the training output by {row.over_training}")
    _require(row, statistics == 0, f"it changed what training gathered, by {statistics}")
    targets = {
        place: rng.normal(0, 1, value.shape).astype(value.dtype)
        for place, value in training.items()
        if value.dtype.kind == "f"
    }
    return new, targets


def _fold(
    driver: Driver, ordinary: Any, trained: Any, inputs: Any, after: Outputs, row: Row
) -> None:
    folded, report = driver.fold(trained, False)
    row.folded = largest_difference(driver.outputs(folded, inputs, False), after).relative
    row.parameters = (*row.parameters, driver.parameters(folded))
    traces = driver.traces(folded)
    _require(row, row.folded == 0, f"folding changed the output by {row.folded:.1e} relative")
    _require(row, not traces, f"folding left {', '.join(traces)}")
    same = driver.entries(folded) == driver.entries(ordinary)
    _require(row, same, "the folded network's checkpoint has other names or shapes")
    layers = row.replaced + driver.bsconvs(trained)
    _require(row, len(report.changed) == layers, f"{len(report.changed)} layers were folded")
    _require(
        row,
        row.parameters[2] == row.parameters[0] == report.parameters_after,
        f"the folded network has {row.parameters[2]:,} parameters",
    )
    untouched = largest_difference(driver.outputs(trained, inputs, False), after).absolute == 0
    _require(row, untouched, "folding changed the network that was folded")


def _fuse(
    driver: Driver, trained: Any, inputs: Any, after: Outputs, row: Row, rng: np.random.Generator
) -> None:
    fused, report = driver.fold(trained, True)
    row.unfused = dict(Counter(f"{kind}: {reason}" for _, kind, reason in report.left))
    norms = driver.norms(trained)
    row.norms = (len(norms), len(driver.norms(fused)))
    row.fused = largest_difference(driver.outputs(fused, inputs, False), after).relative
    _require(
        row,
        row.norms[1] == len(report.left),
        f"fusing left {row.norms[1]} batch norms, and the report names {len(report.left)}",
    )
    for variable in (variable for norm in norms for variable in norm):
        _set(driver, variable, lambda v: np.nextafter(v, v.dtype.type(rng.choice(ENDS, v.shape))))
    row.rounding = largest_difference(driver.outputs(trained, inputs, False), after).relative
    _require(
        row,
        row.fused <= ROUNDINGS * row.rounding,
        f"fusing changed the output by {row.fused:.1e} relative, rounding by {row.rounding:.1e}",
    )


def _require(row: Row, holds: bool, problem: str) -> None:
    if not holds:
        row.problems.append(problem)


def _finite(outputs: Outputs) -> bool:
    return all(np.isfinite(value).all() for value in outputs.values())


def flat(structure: Any, array: Any, place: str = "") -> dict[str, np.ndarray]:
    """Return the arrays of nested lists, tuples and mappings by their places.

    array: turns one of the framework's tensors into NumPy's.
    """
    if isinstance(structure, Mapping):
        items = structure.items()
    elif isinstance(structure, (list, tuple)):
        items = enumerate(structure)
    else:
        return {place: array(structure)}
    found: dict[str, np.ndarray] = {}
    for name, value in items:
        found.update(flat(value, array, f"{place}.{name}" if place else str(name)))
    return found
