"""Training by each recipe: a framework's losses, step by step, beside the NumPy core's in float64.

A network that a recipe is about, with its own kind of layer, is trained on one sequence of batches
at rates from all of the recipe's schedule. So optimizers, decay, what kinds add to the loss, and
how far the training has come are compared, each as the recipe has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import NamedTuple

import numpy as np

from doconv_core import Network, Recipe, State, recipe
from doconv_core.kinds.base import recipe as kind
from doconv_core.networks.initialize import initialize
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Conv,
    Flatten,
    GlobalPool,
    Linear,
    Node,
    dynamic,
    sequence,
)
from doconv_core.training.engine import Batch, Engine, Step
from doconv_core.training.loss import targets
from doconv_core.training.reference import Trained, train
from doconv_core.training.schedule import learning_rate, progress

STEPS = 100
CLASSES, SHAPE = 4, (3, 9, 9)
IMAGES = 16  # of a batch


class Problem(NamedTuple):
    """What is trained: a network from a first state, by a recipe, on the batches of its steps."""

    recipe: Recipe
    network: Network
    state: State
    steps: list[tuple[Step, Batch]]


def make_problem(made: Recipe | str, steps: int = STEPS) -> Problem:
    """Return the problem of a recipe, or of the recipe of a name."""
    made = recipe(made) if isinstance(made, str) else made
    network = _network(made)
    per_epoch = -(-steps // made.epochs)
    numbers = np.arange(steps) * (made.epochs * per_epoch) // steps
    batches = _batches(made.label_smoothing)
    drawn = [
        (
            Step(
                int(number), int(number) // per_epoch, learning_rate(made, number, per_epoch),
                progress(made, number, per_epoch),
            ),
            next(batches),
        )
        for number in numbers
    ]  # fmt: skip
    return Problem(made, network, initialize(network), drawn)


def core(problem: Problem) -> Trained:
    """Return what the core's training comes to."""
    return train(problem.network, problem.state, problem.recipe, problem.steps)


def framework(backend: str, problem: Problem) -> tuple[np.ndarray, State]:
    """Return a framework's losses, and the state that is evaluated in the end."""
    package, module = import_module(f"doconv_{backend}"), import_module(f"doconv_{backend}.train")
    (engine_type,) = (
        each for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Engine) and each is not Engine
    )  # fmt: skip
    model = package.build(problem.network)
    if backend == "mx":
        model.initialize()
    package.load_state(model, problem.state)
    engine = engine_type(model, problem.recipe, devices="cpu" if backend == "torch" else None)
    for step, batch in _placed(problem, engine.layout):
        engine.train_step(step, batch)
    losses = [sums.loss / sums.images for sums in engine.taken()]
    return np.array(losses), engine.export_state()


def _placed(problem: Problem, layout: str) -> Iterator[tuple[Step, Batch]]:
    for step, batch in problem.steps:
        last = np.ascontiguousarray(batch.images.transpose(0, 2, 3, 1))
        yield step, batch._replace(images=last) if layout == "NHWC" else batch


def _network(made: Recipe) -> Network:
    """Return a small network with layers of the kind that a recipe has a loss for, or DO-Conv's.

    Its activations are smooth, so that rounding flips nothing.
    """
    middle: Node = Conv(12, (3, 3), stride=2, kind=kind("doconv"))
    if made.orthonormality:
        middle = Conv(12, (3, 3), stride=2, kind=kind("bsconvs", 0.5))
    if made.lasso:
        middle = dynamic(12, (3, 3), stride=2, heads=2, squeeze_rate=4)
    body = sequence(
        ("stem", Conv(8, (3, 3), kind=kind("doconv"))), ("bn1", BatchNorm()),
        ("act1", Activation("tanh")), ("middle", middle), ("bn2", BatchNorm()),
        ("act2", Activation("tanh")), ("pool", GlobalPool()), ("flatten", Flatten()),
        ("fc", Linear(CLASSES)),
    )  # fmt: skip
    return Network("by_recipe", body, SHAPE)


def _batches(smoothing: float) -> Iterator[Batch]:
    """Yield batches of noise, in which each class has a texture of its own."""
    random = np.random.default_rng(0)
    textures = random.standard_normal((CLASSES, SHAPE[0], 3, 3))
    textures = np.tile(textures, (1, 1, SHAPE[1] // 3, SHAPE[2] // 3))
    while True:
        labels = random.integers(CLASSES, size=IMAGES)
        images = 0.5 * textures[labels] + random.standard_normal((IMAGES, *SHAPE))
        wanted = targets(labels, CLASSES, smoothing)
        yield Batch(images.astype(np.float32), wanted, labels, IMAGES)
