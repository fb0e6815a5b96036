"""The layers of a Keras model, by path."""

from __future__ import annotations

from collections.abc import Iterator

import keras


def children(layer: keras.Layer) -> list[keras.Layer]:
    """Return the layers that this layer holds, each once, in its order."""
    return layer._flatten_layers(include_self=False, recursive=False)


def walk(layer: keras.Layer, path: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """Yield the layer and all below it, with their paths; a shared one wherever it occurs."""
    yield path, layer
    for child in children(layer):
        yield from walk(child, f"{path}.{child.name}" if path else child.name)


def first_occurrences(layer: keras.Layer) -> list[tuple[str, keras.Layer]]:
    """Return what `walk` yields, a layer that occurs several times by its first path alone."""
    found: dict[int, tuple[str, keras.Layer]] = {}
    todo = [("", layer)]
    while todo:
        path, each = todo.pop()
        if id(each) not in found:  # or else what is below it has been found, too
            found[id(each)] = (path, each)
            below = [(f"{path}.{c.name}" if path else c.name, c) for c in children(each)]
            todo += reversed(below)
    return list(found.values())
