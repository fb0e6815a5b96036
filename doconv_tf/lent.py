"""What a model is lent to its training with, and what is taken back from it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from doconv_core.training.recipe import Recipe
from doconv_tf.devices import Devices
from doconv_tf.dgc import DynamicHeads2D
from doconv_tf.ordinary import first_occurrences
from doconv_tf.orthonormal import is_marked
from doconv_tf.private import exchange, made_anew, strategy_of

POLICIES = {"float32": None, "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


class Lent:
    """A model in training: its layers in another precision, its variables in a strategy's scope.

    And with the recipe's weights of the losses that kinds add, in place of the layers' own. `back`
    gives all of it back, but what was trained; `left` for a while.
    """

    def __init__(
        self, model: keras.Layer, recipe: Recipe, devices: Devices, precision: str
    ) -> None:
        if precision not in POLICIES:
            raise ValueError(
                f"precision must be {', '.join(POLICIES)}; received precision={precision!r}."
            )
        self._recipe, self._policy = recipe, POLICIES[precision]
        self._layers = [layer for _, layer in first_occurrences(model)]
        self._undo: list[tuple[Any, ...]] = []
        self._others: list[tuple[Any, Any]] = []  # what each variable holds at other times
        if devices.strategy is not None and strategy_of(model.variables) is None:
            with devices.scope():
                self._others = [(each, made_anew(each)) for each in model.variables]
        self._lend()

    def _lend(self) -> None:
        for layer in self._layers:
            if self._policy is not None and layer.dtype_policy.name == "float32":
                self._set(layer, "dtype_policy", keras.DTypePolicy(self._policy))
            if is_marked(layer):
                self._set(layer.kernel_regularizer, "alpha", self._recipe.orthonormality)
            if isinstance(layer, DynamicHeads2D):
                self._set(layer, "lasso", self._recipe.lasso)

    def _set(self, holder: Any, name: str, value: Any) -> None:
        self._undo.append((holder, name, getattr(holder, name)))
        setattr(holder, name, value)

    def _exchange(self) -> None:
        self._others = [(variable, exchange(variable, other)) for variable, other in self._others]

    def back(self) -> None:
        """Give the model back as it was, with what was trained; it is not lent again."""
        self._take_back()
        self._others = []

    def _take_back(self) -> None:
        while self._undo:
            setattr(*self._undo.pop())
        self._exchange()

    @contextmanager
    def left(self) -> Iterator[None]:
        """Give the model back for a while."""
        self._take_back()
        try:
            yield
        finally:
            self._exchange()
            self._lend()

    def is_scaled(self) -> bool:
        """Return whether something is computed in float16, whose loss is to be scaled."""
        return any(layer.compute_dtype == "float16" for layer in self._layers)
