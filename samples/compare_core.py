"""The comparison's problem in the NumPy core, in float64: the yardstick for the frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from compare_problem import (
    CONVOLUTIONS,
    LEARNING_RATE,
    MOMENTUM,
    WEIGHT_DECAY,
    Answer,
    Convolution,
    Problem,
)

from doconv_core import compose, compose_gradient, convolve, convolve_gradient

Arrays = dict[str, np.ndarray]


def run(problem: Problem, ticks: Any = None) -> Answer:
    """Return the answer in float64. `ticks` is iterated over, one step of training for each."""
    values = {name: array.astype(np.float64) for name, array in problem.state.arrays.items()}
    images, labels = problem.images.astype(np.float64), problem.labels
    output, _ = forward(values, problem.test_images.astype(np.float64))
    folded_output = apply_folded(fold(values), problem.test_images.astype(np.float64))
    _, gradients, input_gradient = loss_and_gradients(values, images[0], labels[0])
    velocity = {name: np.zeros_like(array) for name, array in values.items()}
    losses = []
    for step in ticks or range(len(images)):
        loss, slopes, _ = loss_and_gradients(values, images[step], labels[step])
        losses.append(loss)
        for name, slope in slopes.items():
            decayed = slope + WEIGHT_DECAY * values[name]
            velocity[name] = MOMENTUM * velocity[name] + decayed
            values[name] = values[name] - LEARNING_RATE * velocity[name]
    return Answer(
        output, folded_output, input_gradient, gradients, np.array(losses), fold(values), values
    )


def kernels(values: Arrays) -> Iterator[tuple[Convolution, np.ndarray | None, np.ndarray]]:
    """Yield each convolution with its D and its composed kernel."""
    for layer in CONVOLUTIONS:
        depthwise = values.get(f"{layer.name}.depthwise_weight")
        yield layer, depthwise, compose(values[f"{layer.name}.weight"], depthwise, layer.spec)


def geometry(layer: Convolution) -> dict[str, int]:
    """Return the arguments of the core's convolution."""
    return {"stride": layer.stride, "padding": layer.padding, "groups": layer.spec.groups}


def forward(values: Arrays, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the logits, and the input of each convolution and of the linear layer."""
    inputs = [x]
    for layer, _, kernel in kernels(values):
        y = convolve(inputs[-1], kernel, values[f"{layer.name}.bias"], **geometry(layer))
        inputs.append(np.tanh(y))
    features = inputs[-1][:, :, 0, 0]
    return features @ values["linear.weight"].T + values["linear.bias"], inputs


def loss_and_gradients(
    values: Arrays, x: np.ndarray, labels: np.ndarray
) -> tuple[float, Arrays, np.ndarray]:
    """Return the mean cross-entropy, its gradient for each value, and that for the input."""
    logits, inputs = forward(values, x)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    loss = -log_probabilities[rows, labels].mean()
    dlogits = np.exp(log_probabilities)
    dlogits[rows, labels] -= 1
    dlogits /= len(labels)
    gradients = {
        "linear.weight": dlogits.T @ inputs[-1][:, :, 0, 0],
        "linear.bias": dlogits.sum(axis=0),
    }
    dx = (dlogits @ values["linear.weight"])[:, :, None, None]
    for n, (layer, depthwise, kernel) in reversed(list(enumerate(kernels(values)))):
        dy = dx * (1 - inputs[n + 1] ** 2)
        dx, dkernel, dbias = convolve_gradient(inputs[n], kernel, dy, **geometry(layer))
        weight = values[f"{layer.name}.weight"]
        dweight, ddepthwise = compose_gradient(weight, depthwise, dkernel, layer.spec)
        gradients |= {f"{layer.name}.weight": dweight, f"{layer.name}.bias": dbias}
        if ddepthwise is not None:
            gradients[f"{layer.name}.depthwise_weight"] = ddepthwise
    return float(loss), gradients, dx


def fold(values: Arrays) -> Arrays:
    """Return the folded network's state: kernels as `(O, I/g, M)`, biases and the linear layer."""
    folded = {name: array for name, array in values.items() if "depthwise" not in name}
    for layer, _, kernel in kernels(values):
        folded[f"{layer.name}.weight"] = kernel.reshape(*kernel.shape[:2], -1)
    return folded


def apply_folded(folded: Arrays, x: np.ndarray) -> np.ndarray:
    """Return the logits of the folded network, by its ordinary convolutions alone."""
    for layer in CONVOLUTIONS:
        kernel = folded[f"{layer.name}.weight"].reshape(layer.spec.kernel_shape)
        x = np.tanh(convolve(x, kernel, folded[f"{layer.name}.bias"], **geometry(layer)))
    return x[:, :, 0, 0] @ folded["linear.weight"].T + folded["linear.bias"]
