"""What was made of a model's variables before it was changed in place, and would go on with them.

A model that was compiled holds them in its optimizer and its functions, an optimizer of one's own
in its state; neither shows when it takes steps, which a compiled function does without any Python.
So they are looked for among all objects when a model is changed, in a fraction of a second.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any, TypeVar

import keras

from doconv_tf.ordinary import first_occurrences
from doconv_tf.private import own_variables, trained_by
from doconv_tf.surgery import uncompile_all

_Kind = TypeVar("_Kind")
# What a model has that was compiled, or called by `predict`, which compiles it.
COMPILED = ("compiled", "train_function", "test_function", "predict_function")
MISSED = (
    "an optimizer was made before the model was changed in place, and has {path!r} still, which is "
    "no variable of the model any more: it, and functions that were compiled with it, would train "
    "that on. Make a new optimizer, and compile anew."
)


class Former:
    """The layers and variables of a model that is to be changed; nothing, unless `inplace`."""

    def __init__(self, model: keras.Layer, inplace: bool) -> None:
        self._model = model
        layers = [layer for _, layer in first_occurrences(model)] if inplace else []
        self._held = [(layer, own_variables(layer)) for layer in layers]

    def settle(self) -> None:
        """Uncompile all models with a layer that was changed; warn of optimizers that are left."""
        kept = {id(variable) for variable in self._model.weights}
        gone = {id(v): v for _, held in self._held for v in held if id(v) not in kept}
        if not gone:
            return
        changed = {id(layer) for layer, held in self._held if any(id(v) in gone for v in held)}
        for model in alive(keras.Model):
            own = vars(model)  # as a model that is being made, or could not be, has less
            compiled = own.get("built") and any(own.get(name) for name in COMPILED)
            if compiled and changed & {id(layer) for _, layer in first_occurrences(model)}:
                uncompile_all(model)
        if _missed(gone):
            gc.collect()  # those that nobody has any more
            missed = _missed(gone)
            if missed:
                warnings.warn(MISSED.format(path=missed[0]), UserWarning, stacklevel=3)


def _missed(gone: dict[int, Any]) -> list[str]:
    """Return the paths of these variables that there are optimizers for."""
    optimizers = alive(keras.Optimizer)
    return [v.path for each in optimizers for v in trained_by(each) if id(v) in gone]


def alive(kind: type[_Kind]) -> list[_Kind]:
    """Return all objects of this type that there are."""
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]
