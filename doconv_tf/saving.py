"""Models of one's own classes, whose config may not tell Keras of the layers they hold now.

To load a file, Keras makes the model anew from its config. A class that makes its layers in its
constructor makes the ordinary ones, for which the file's weights are not: Keras says so on loading,
when the training is over. Such a layer refuses to give its config instead, when it is first saved.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras

from doconv_tf.kinds import LAYER_KINDS
from doconv_tf.ordinary import first_occurrences
from doconv_tf.private import is_of_keras

_CONFIG = "get_config"


def guard(model: keras.Layer) -> None:
    """Let each layer refuse a config that does not tell of a kind's layers that it holds.

    Those of Keras' own classes tell of all; from one that holds none of a kind, what this put there
    is taken away.
    """
    for _, layer in first_occurrences(model):
        own = vars(layer)
        if hasattr(getattr(own.get(_CONFIG), "__func__", None), "of_a_guard"):
            del own[_CONFIG]
        if _CONFIG not in own and not is_of_keras(layer) and _of_a_kind(layer):
            own[_CONFIG] = types.MethodType(_checked(type(layer).get_config), layer)


def _of_a_kind(layer: keras.Layer) -> list[Any]:
    """Return the layers of any kind that this one holds, at any depth."""
    below = (each for _, each in first_occurrences(layer)[1:])
    return [each for each in below if any(kind.owns(each) for kind in LAYER_KINDS.values())]


def _checked(get_config: Callable[[Any], Any]) -> Any:
    """Return a `get_config` that raises TypeError where it tells too little."""

    @functools.wraps(get_config)  # with the attribute by which Keras knows its own
    def checked(layer: Any) -> Any:
        config = get_config(layer)
        untold = _untold(_of_a_kind(layer), config)
        if untold:
            raise TypeError(_advice(layer, untold))
        return config

    checked.of_a_guard = True  # type: ignore[attr-defined]
    return checked


def _untold(layers: list[Any], config: Any) -> list[Any]:
    """Return the layers whose own config is nowhere in this one."""
    told: dict[str, list[Any]] = {}
    for each in _dicts(config):
        told.setdefault(str(each.get("name")), []).append(each)
    untold = []
    for layer in layers:
        named, own = told.get(layer.name, []), layer.own_arguments().keys()
        place = next((n for n, each in enumerate(named) if own <= each.keys()), None)
        if place is None:
            untold.append(layer)
        else:
            del named[place]  # another layer of that name has a config of its own
    return untold


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple)):
        for item in items:
            yield from _dicts(item)


def _advice(layer: keras.Layer, untold: list[Any]) -> str:
    more = f" and {len(untold) - 1} more" if len(untold) > 1 else ""
    return (
        f"{type(layer).__name__} {layer.name!r} holds {untold[0].name!r}, a "
        f"{type(untold[0]).__name__},{more} of which its get_config() does not tell, so that Keras "
        "would make ordinary layers in their place, and a file of the model would not load. Store "
        "the weights alone: model.save_weights('model.weights.h5'), or "
        "ModelCheckpoint('model.weights.h5', save_weights_only=True); to load them, make the model "
        "as it was made, convert it alike, and call load_weights. Or fold it first; or let "
        "get_config() hold its layers, by keras.saving.serialize_keras_object."
    )
