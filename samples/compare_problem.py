"""The comparison's problem: one network, one canonical initial state, one sequence of batches.

The network has a convolution of every kind: one with a larger depth multiplier, a grouped one, a
depthwise one, one of a single tap and one of an even size, which leaves a single position, so that
no framework's order of flattening matters. Its activation is the hyperbolic tangent: a ReLU's kink
turns a rounding error into another course of the training, and the curves would compare that.
"""

from __future__ import annotations

from typing import NamedTuple

import digits
import numpy as np

from doconv_core import ConvSpec, LayerForm, LinearSpec, State

BATCH_SIZE, STEPS = 64, 100
ONE_PASS, TRAINED = 1e-5, 1e-3  # tolerances: relative, for one pass and for 100 steps
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 1e-3


class Convolution(NamedTuple):
    """One over-parameterized convolution of the network; a hyperbolic tangent follows it."""

    name: str
    spec: ConvSpec
    stride: int
    padding: int


CONVOLUTIONS = (
    Convolution("conv1", ConvSpec(1, 12, (3, 3), 1, 12), 2, 0),
    Convolution("conv2", ConvSpec(12, 16, (3, 3), 4), 1, 1),
    Convolution("conv3", ConvSpec(16, 16, (3, 3), 16, 18), 2, 0),
    Convolution("conv4", ConvSpec(16, 24, (1, 1)), 1, 0),
    Convolution("conv5", ConvSpec(24, 32, (6, 6)), 1, 0),
)
LINEAR = LinearSpec(32, 10)  # named "linear", of the one position that is left


class Problem(NamedTuple):
    """What every framework is given.

    state: float32. images: `(steps, batch, 1, 28, 28)` in float32. labels: `(steps, batch)`.
    test_images: `(N, 1, 28, 28)`. Gradients are those of the first batch's mean cross-entropy.
    """

    state: State
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray


def make_problem(steps: int = STEPS) -> Problem:
    """Return the problem, the same whenever and wherever it is made."""
    rng = np.random.default_rng(0)
    data = digits.load_small()
    order = [rng.permutation(len(data.train_labels)) for _ in range(steps)]
    chosen = np.stack([permutation[:BATCH_SIZE] for permutation in order])
    return Problem(
        initial_state(rng),
        data.train_images[chosen][:, :, None],
        data.train_labels[chosen],
        data.test_images[:, None],
    )


def initial_state(rng: np.random.Generator) -> State:
    """Return normal weights, zero biases, and a D that is small, but not zero."""
    layers = {c.name: LayerForm(c.spec, over_parameterized=True) for c in CONVOLUTIONS}
    layers["linear"] = LayerForm(LINEAR)
    arrays = {}
    for path, form in layers.items():
        for name, shape in form.shapes.items():
            scale = {"weight": (2 / np.prod(shape[1:])) ** 0.5, "depthwise_weight": 0.1, "bias": 0}
            arrays[f"{path}.{name}"] = (scale[name] * rng.standard_normal(shape)).astype(np.float32)
    return State(layers, arrays)


class Answer(NamedTuple):
    """What a framework answers, in canonical order and as NumPy arrays.

    output: logits of the test images before training, `(N, 10)`. folded_output: the same, by the
    folded network. input_gradient: of the first batch. gradients: of each entry of the state.
    losses: one for each step, before it. folded: the folded network's state after training.
    trained: the state after training.
    """

    output: np.ndarray
    folded_output: np.ndarray
    input_gradient: np.ndarray
    gradients: dict[str, np.ndarray]
    losses: np.ndarray
    folded: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]


def answer_shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of an answer, by `field`, or by `field/entry`."""
    entries = {name: array.shape for name, array in problem.state.arrays.items()}
    folded = {name: shape for name, shape in entries.items() if "depthwise" not in name}
    for layer in CONVOLUTIONS:
        folded[f"{layer.name}.weight"] = (*layer.spec.kernel_shape[:2], layer.spec.taps)
    logits = (len(problem.test_images), LINEAR.out_features)
    shapes = {"output": logits, "folded_output": logits}
    shapes |= {"input_gradient": problem.images[0].shape, "losses": problem.labels.shape[:1]}
    for field, arrays in (("gradients", entries), ("folded", folded), ("trained", entries)):
        shapes |= {f"{field}/{name}": shape for name, shape in arrays.items()}
    return shapes
