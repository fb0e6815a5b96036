"""What every backend must make of a description: the core's function, gradients and cost.

The same state and the same input; outputs and gradients, in training and in inference. The
adapters are those of `contract_bsconv`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from equal import assert_close

from doconv_core import Network, State, count
from doconv_core.networks.evaluate import evaluate, gradients
from doconv_core.networks.initialize import initialize
from doconv_core.networks.shapes import infer


class Problem(NamedTuple):
    """A network, its state, an input, and a gradient of the output; in float32.

    answers: for training and for inference what the core computes, in float64: the output, and
    the gradients by their names in a state.
    """

    network: Network
    state: State
    x: np.ndarray
    dy: np.ndarray
    answers: dict[bool, tuple[np.ndarray, dict[str, np.ndarray]]]


def trained(network: Network) -> State:
    """Return a state with values as after training: nothing in it is zero, or one, for all.

    Batch norms shift by about one of their standard deviations, which leaves ReLU most of its
    input: with half of it, each layer would amplify the rounding of the ones before, by thousands
    in all. A convolution's outputs have about twice the variance of its inputs, by Kaiming's rule.
    """
    state, rng = initialize(network), np.random.default_rng(3)
    arrays = {}
    for name, array in state.arrays.items():
        spread = np.abs(array).mean() if name.endswith(".weight") else 1
        values = array + 0.1 * spread * rng.standard_normal(array.shape)
        if name.endswith(".beta"):
            values += 1
        if name.endswith(".running_var"):
            values = 2 * np.abs(values) + 0.2
        if name.endswith(".saliency_weight"):  # or each layer would square the one before
            values = values / 20
        if name.endswith(".inactive"):
            values = np.array(state.layers[name.removesuffix(".inactive")].spec.in_channels // 2)
        arrays[name] = values.astype("f4")
    return State(state.layers, arrays)


def images(network: Network, batch: int = 6, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, *network.input_shape)).astype("f4")


def problem_of(network: Network, batch: int = 6, seed: int = 1) -> Problem:
    """Return the network's problem, the same in every process."""
    state, x = trained(network), images(network, batch, seed)
    shape = (batch, *infer(network)[""].after)
    dy = np.random.default_rng(seed + 1).standard_normal(shape).astype("f4")
    exact = x.astype("f8"), dy.astype("f8")
    answers = {
        training: (
            evaluate(network, state, exact[0], training=training),
            gradients(network, state, *exact, training=training).parameters,
        )
        for training in (False, True)
    }
    return Problem(network, state, x, dy, answers)


def check_network(adapter: Any, problem: Problem, tolerance: float) -> None:
    """Assert that a backend's network has the core's cost and state, outputs and gradients.

    tolerance: of outputs; relative to the largest entry of the float64 result.
    """
    network, state, x, dy, answers = problem
    model = adapter.described(network)
    assert adapter.trainable(model) == count(network, None).training_parameters, "cost"
    for training, (expected, exact) in answers.items():
        adapter.package.load_state(model, state)
        found = adapter.gradients(model, x, dy, training=training)
        assert expected.std() > 1e-3
        assert_close(found.output, expected, tolerance, f"output, training={training}")
        largest = max(np.abs(gradient).max() for gradient in exact.values())
        for entry, gradient in exact.items():
            # What a batch norm takes out again has no gradient but roundoff.
            none = np.abs(gradient).max() < 1e-12 * largest
            size = largest if none else np.abs(gradient).max()
            off = np.abs(found.arrays[entry] - gradient).max() / size
            assert off < 1e-4, f"gradient of {entry}, training={training}: {off}"
