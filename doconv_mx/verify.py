"""How far two Gluon models differ on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mxnet import autograd
from mxnet.gluon import Block
from mxnet.ndarray import NDArray

from doconv_core.maths.numeric import Difference
from doconv_core.models.received import check_callable
from doconv_core.models.verify import flat, largest_difference, nested
from doconv_mx.private import has_values, waiting
from doconv_mx.tree import parameters


def verify(a: Callable[..., Any], b: Callable[..., Any], inputs: Any) -> Difference:
    """Return the largest absolute and relative difference of b's outputs from a's, in inference.

    a, b: blocks, or other callables, such as one that runs an exported network. inputs: a tuple of
    positional arguments, or one argument, which may be nested; arrays on a context that
    both models have their values on. Each model gets a copy of its own. Outputs may be nested
    tuples, lists and dictionaries; numbers and NumPy's arrays may stand in the place of MXNet's,
    and None counts as nothing.
    MXNet's random numbers cannot be put back: what draws some in inference too draws others in each
    run, and differs from itself.
    Raises TypeError for what cannot be called and for an output of another kind; ValueError where
    the outputs differ in structure or shape, or where a model got its values by this very run, so
    that the outputs were those of random numbers.

    >>> conv = mx.gluon.nn.Conv2D(8, 3, in_channels=3)
    >>> conv.initialize()
    >>> verify(conv, conv, mx.nd.ones((1, 3, 5, 5)))
    Difference(absolute=0.0, relative=0.0)
    """
    check_callable("mxnet.gluon.Block", a=a, b=b)
    expected, found = _outputs("a", a, inputs), _outputs("b", b, inputs)
    return largest_difference(found, expected)


def _outputs(name: str, model: Callable[..., Any], inputs: Any) -> dict[str, Any]:
    """Return the arrays of a model's outputs in inference; `name` is the model's in messages."""
    owned = parameters(model) if isinstance(model, Block) else []
    undrawn = [p for p in owned if waiting(p)]
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    with autograd.pause(train_mode=False):
        output = model(*nested(arguments, _own))
    drawn = [p.name for p in undrawn if has_values(p)]
    if drawn:
        raise ValueError(
            f"the model given as {name!r} had no values for {drawn[0]!r} before this run, which "
            "has drawn them at random: run a model once before it is over-parameterized, folded or "
            "compared."
        )
    return flat(output, _as_array, "arrays")


def _own(value: Any) -> Any:
    """Return an input of its own, where it is an array: a model may change it in place."""
    return value.copy() if isinstance(value, (NDArray, np.ndarray)) else value


def _as_array(value: Any) -> Any:
    return value.asnumpy() if isinstance(value, NDArray) else None
