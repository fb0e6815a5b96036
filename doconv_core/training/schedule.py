"""The numbers that a step is computed with: its learning rate, and how far the training has come.

They are functions of the recipe and the step alone. Frameworks are told them, and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from doconv_core.maths.spec import as_integer
from doconv_core.training.fields import CONSTANT, EPOCH, STEPS
from doconv_core.training.recipe import Recipe


def steps_per_epoch(recipe: Recipe, images: int) -> int:
    """Return how many steps an epoch of so many images has.

    The last batch, where it is short, counts unless the recipe leaves it out.

    >>> steps_per_epoch(recipe("bsconv_cifar"), 50_000)
    391
    """
    images = as_integer("images", images)
    whole, rest = divmod(images, recipe.batch_size)
    return whole + (rest > 0 and not recipe.drop_last)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, which counts from 0 over all epochs.

    In the epochs of warm-up, which need not be whole, it rises evenly from 0, with each step. Then
    it is the recipe's; with "steps", times the factor for each milestone that has come; with
    "cosine", `(1 + cos(π·t)) / 2` of it, where `t` is the share that is done of what follows the
    warm-up, at the step, or at the start of its epoch. Raises TypeError or ValueError for a step
    that the recipe has not.
    Source: Dynamic Group Convolution, arXiv 2007.04242, its implementation; cosine: arXiv
    1608.03983.

    >>> [learning_rate(recipe("digits"), step, 45) for step in (0, 180, 359)]
    [0.1, 0.05, 1.903...e-06]
    """
    step, steps_per_epoch = _checked(recipe, step, steps_per_epoch)
    highest, warmup = recipe.learning_rate, recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return highest * step / warmup
    epoch = step // steps_per_epoch
    if recipe.schedule == CONSTANT:
        return highest
    if recipe.schedule == STEPS:
        return highest * recipe.factor ** sum(epoch >= each for each in recipe.milestones)
    at = epoch * steps_per_epoch if recipe.per == EPOCH else step
    share = max(at - warmup, 0) / (recipe.epochs * steps_per_epoch - warmup)
    return highest * 0.5 * (1 + math.cos(math.pi * share))


def progress(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the share of the training that is done before a step, 0 to below 1.

    The arguments, and the errors, are those of `learning_rate`.
    Source: Dynamic Group Convolution, arXiv 2007.04242, its implementation.

    >>> progress(recipe("digits"), 180, 45)
    0.5
    """
    step, steps_per_epoch = _checked(recipe, step, steps_per_epoch)
    return step / (recipe.epochs * steps_per_epoch)


def parts(recipe: Recipe, rows: int) -> Iterator[slice]:
    """Yield the parts that a process computes its rows of a batch in, one after the other.

    All have as many rows but the last, which may have fewer.

    >>> list(parts(recipe("digits", accumulate=3), 32))
    [slice(0, 11, None), slice(11, 22, None), slice(22, 32, None)]
    """
    size = -(-rows // recipe.accumulate)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, max(size, 1)))


def _checked(recipe: Recipe, step: int, steps_per_epoch: int) -> tuple[int, int]:
    step = as_integer("step", step, least=0)
    steps_per_epoch = as_integer("steps_per_epoch", steps_per_epoch)
    if step >= recipe.epochs * steps_per_epoch:
        raise ValueError(
            f"step must be below {recipe.epochs * steps_per_epoch}, which is all of them; received "
            f"step={step}."
        )
    return step, steps_per_epoch
