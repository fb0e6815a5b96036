"""How far the outputs of two models differ, nested as they may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from doconv_core.maths.numeric import Difference, difference, largest
from doconv_core.models.report import listed

NUMBERS = (bool, int, float, np.ndarray, np.generic)


def nested(inputs: Any, change: Callable[[Any], Any]) -> Any:
    """Return a model's inputs, nested in dicts, lists and tuples, each as `change` makes it."""
    if isinstance(inputs, dict):
        return {key: nested(value, change) for key, value in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(nested(value, change) for value in inputs)
    return change(inputs)


def flat(
    output: Any, as_array: Callable[[Any], Any], tensors: str, place: str = ""
) -> dict[str, Any]:
    """Return the arrays of a model's output by their place in it, such as `boxes.0`.

    Dicts, lists, tuples and dataclasses are nested, numbers and NumPy's arrays are arrays, None is
    nothing. as_array: returns a framework's tensor as an array, and None of anything else. tensors:
    what the framework calls them, for the message. Raises TypeError for an output of another kind.
    """
    if output is None:
        return {}
    array = as_array(output)
    if array is not None:
        return {place: array}
    if isinstance(output, NUMBERS):
        return {place: np.asarray(output)}
    parts: Mapping[Any, Any]
    if isinstance(output, Mapping):
        parts = output
    elif isinstance(output, (list, tuple)):
        parts = dict(enumerate(output))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        parts = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    else:
        raise TypeError(
            f"output {place!r} is a {type(output).__qualname__}; "
            f"expected {tensors}, numbers, or dicts, lists, tuples and dataclasses of them."
        )
    return {
        inner: found
        for name, part in parts.items()
        for inner, found in flat(
            part, as_array, tensors, f"{place}.{name}" if place else str(name)
        ).items()
    }


def largest_difference(
    found: Mapping[str, ArrayLike], expected: Mapping[str, ArrayLike]
) -> Difference:
    """Return the largest absolute and the largest relative `difference` of a model's outputs.

    found, expected: arrays by their place in the output. The two maxima may be of different arrays.
    Raises ValueError where the places or the shapes differ.

    >>> largest_difference({"0": [1.0, 2.5], "1": [3.0]}, {"0": [1.0, 2.0], "1": [3.0]})
    Difference(absolute=0.5, relative=0.25)
    """
    if found.keys() != expected.keys():
        raise ValueError(
            f"the outputs have different structures: {listed(found)} and {listed(expected)}."
        )
    if not found:
        raise ValueError("the outputs hold no arrays, so that there is nothing to compare.")
    differences = []
    for place, array in found.items():
        try:
            differences.append(difference(array, expected[place]))
        except ValueError as error:
            raise ValueError(f"output {place!r}: {error}" if place else str(error)) from None
    return Difference(*map(largest, zip(*differences, strict=True)))
