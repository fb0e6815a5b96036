"""Models of one's own classes, whose config may not tell Keras of the layers they hold now.

To load a file, Keras makes the model anew from its config. A class that makes its layers in its
constructor makes the ordinary ones, for which the file's weights are not: Keras says so on loading,
when the training is over. Such a layer refuses to give its config instead, when it is first saved.
Keras opens, and so empties, the file before it asks: a model around such a layer is asked first.
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

_CONFIG, _SAVE = "get_config", "save"


def guard(model: keras.Layer) -> None:
    """Let each layer refuse a config that does not tell of a kind's layers that it holds.

    Those of Keras' own classes tell of all; from one that holds none of a kind, what this put there
    is taken away.
    """
    layers = [layer for _, layer in first_occurrences(model)]
    for layer in layers:
        own = vars(layer)
        for name in (_CONFIG, _SAVE):
            if _is_guarded(layer, name):
                del own[name]
        if _CONFIG not in own and not is_of_keras(layer) and _of_a_kind(layer):
            own[_CONFIG] = types.MethodType(_checked(type(layer).get_config), layer)
    for layer in layers:
        inside = (each for _, each in first_occurrences(layer))
        if (
            isinstance(layer, keras.Model)
            and _SAVE not in vars(layer)
            and any(_is_guarded(each, _CONFIG) for each in inside)
        ):
            vars(layer)[_SAVE] = types.MethodType(_asked_first(type(layer).save), layer)


def _is_guarded(layer: keras.Layer, name: str) -> bool:
    return hasattr(getattr(vars(layer).get(name), "__func__", None), "of_a_guard")


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


def _asked_first(save: Callable[..., Any]) -> Any:
    """Return a `save` that lets no file be opened where the model refuses its config."""

    @functools.wraps(save)
    def asked_first(model: Any, *args: Any, **options: Any) -> Any:
        keras.saving.serialize_keras_object(model)
        return save(model, *args, **options)

    asked_first.of_a_guard = True  # type: ignore[attr-defined]
    return asked_first


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
