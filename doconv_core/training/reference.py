"""Training in NumPy alone, in float64: what every framework's must agree with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from doconv_core.kinds.dgc import DGConvSpec, inactive_channels
from doconv_core.maths.numeric import Array
from doconv_core.maths.orthonormal import orthonormality, orthonormality_gradient
from doconv_core.networks.evaluate import training_pass
from doconv_core.networks.lowering import layers, lowered
from doconv_core.networks.nodes import Conv, DynamicHeads, Network, replaced
from doconv_core.networks.shapes import infer
from doconv_core.state.file import State, entry
from doconv_core.state.layers import LayerForm
from doconv_core.state.match import fit_state
from doconv_core.training.engine import Batch, Step
from doconv_core.training.fields import KERNELS
from doconv_core.training.loss import cross_entropy, cross_entropy_gradient
from doconv_core.training.optimizer import Moments, averaged, clipped, trained, update
from doconv_core.training.recipe import Recipe
from doconv_core.training.schedule import parts


class Trained(NamedTuple):
    """What a training came to.

    losses: of each step, before its update: the mean over its images, with what kinds add to it.
    state: the last, in float64. averaged: the state to evaluate, of the moving average; the same
    where the recipe has none.
    """

    losses: Array
    state: State
    averaged: State


def train(
    network: Network, state: State, recipe: Recipe, steps: Iterable[tuple[Step, Batch]]
) -> Trained:
    """Train a network on the batches of the steps, and return the losses and the last state.

    state: the first; one of the same network with ordinary convolutions will do. steps: with
    images of axes `(B, C, H, W)`, all of a batch in one process. Running statistics move as
    PyTorch's do. The moving average begins with the first state. Raises StateError, ValueError and
    TypeError as `evaluate` does.

    >>> import numpy as np
    >>> from doconv_core.networks.initialize import initialize
    >>> from doconv_core.training.loss import targets
    >>> network, mine = describe("tutorial_pt"), recipe("tutorial_pt")
    >>> images, labels = np.ones((2, 1, 28, 28)), np.array([3, 5])
    >>> steps = [(Step(0, 0, 0.1, 0.0), Batch(images, targets(labels, 10), labels, 2))]
    >>> train(network, initialize(network), mine, steps).losses.shape
    (1,)
    """
    forms = layers(network)
    fitted = fit_state(state, forms, network=network.name)
    arrays = {
        entry(path, name): array.astype(np.float64)
        for path, own in fitted.items()
        for name, array in own.items()
    }
    orthonormal = [
        entry(path, "weight")
        for path, placed in infer(lowered(network)).items()
        if isinstance(placed.node, Conv) and placed.node.orthonormal
    ]
    moments, losses = Moments(), []
    average = _averaged_of(recipe, forms, arrays)
    for step, batch in steps:
        arrays |= _inactive(forms, step.progress)
        loss, gradients, arrays = _step(network, forms, arrays, recipe, batch)
        for name in orthonormal if recipe.orthonormality else ():
            weight = arrays[name][..., 0]  # its only tap
            loss += recipe.orthonormality * orthonormality(weight)
            gradients[name] += recipe.orthonormality * orthonormality_gradient(weight)[..., None]
        weights = {name: arrays[name] for name in gradients}
        gradients = clipped(gradients, recipe.clip_norm)
        weights, moments = update(recipe, weights, gradients, moments, step.learning_rate)
        arrays |= weights
        losses.append(loss)
        if recipe.average is not None:
            average = averaged(average, _averaged_of(recipe, forms, arrays), recipe.average)
    last = State(forms, arrays)
    if recipe.average is None:
        return Trained(np.array(losses), last, last)
    evaluated = State(forms, {**arrays, **_started(recipe, forms, average)})
    return Trained(np.array(losses), last, evaluated)


def _step(
    network: Network, forms: Mapping[str, LayerForm], arrays: dict[str, Array], recipe: Recipe,
    batch: Batch,
) -> tuple[float, dict[str, Array], dict[str, Array]]:  # fmt: skip
    """Return a batch's loss, its gradients, and the arrays with the new running statistics."""
    loss, gradients = 0.0, dict[str, Array]()
    for rows in parts(recipe, len(batch.images)):
        images = batch.images[rows].astype(np.float64)
        share = len(images) / batch.total
        weighted = _with_lasso(network, recipe.lasso * share)
        found = training_pass(weighted, State(forms, arrays), images)
        logits, targets = found.output, batch.targets[rows]
        loss += cross_entropy(logits, targets).sum() / batch.total
        loss += recipe.lasso * share * found.lasso
        own = found.back(cross_entropy_gradient(logits, targets) / batch.total).parameters
        gradients = {name: gradients.get(name, 0.0) + each for name, each in own.items()}
        arrays = {**arrays, **found.running}
    return float(loss), gradients, arrays


def _inactive(forms: Mapping[str, LayerForm], progress: float) -> dict[str, Array]:
    """Return how many channels each head drops at this point of the training, by entry."""
    return {
        entry(path, "inactive"): np.array(
            inactive_channels(form.spec.in_channels, form.spec.gate_factor, progress), np.float64
        )
        for path, form in forms.items()
        if isinstance(form.spec, DGConvSpec)
    }


def _with_lasso(network: Network, weight: float) -> Network:
    def change(heads: DynamicHeads) -> DynamicHeads:
        return replace(heads, lasso=weight)

    return replace(network, body=replaced(network.body, change, DynamicHeads))


def _averaged_of(
    recipe: Recipe, forms: Mapping[str, LayerForm], arrays: Mapping[str, Array]
) -> dict[str, Array]:
    """Return what a moving average is of: all that is trained; or kernels, where it is of them."""
    found = {name: array for name, array in arrays.items() if trained(name)}
    for path, form in forms.items() if recipe.average_of == KERNELS else ():
        if form.composed is not None:
            names = form.composed.entries(form.spec)
            own = {name: found.pop(entry(path, name)) for name in names}
            found[entry(path, "weight")] = form.composed.compose(own, form.spec)
    return found


def _started(
    recipe: Recipe, forms: Mapping[str, LayerForm], average: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the arrays of layers whose weights, or kernels, are the averaged ones."""
    found = dict(average)
    for path, form in forms.items() if recipe.average_of == KERNELS else ():
        if form.composed is not None:
            own = form.composed.start(found[entry(path, "weight")], form.spec)
            found |= {entry(path, name): array for name, array in own.items()}
    return found
