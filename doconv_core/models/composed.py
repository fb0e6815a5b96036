"""Layers of composed kinds in whole models: what every framework does with them alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doconv_core.kinds.base import ComposedKind
from doconv_core.models.view import LayerKind, ModelView

PLAIN = "; fold() is for the plain layer"  # the advice of `own_method`
READ_IN_FORWARD = (
    "the model's forward reads its weight other than by calling it: that is W, and would be the "
    "kernel in the folded model; keep such a layer out of over_parameterize, by where."
)


class ComposedLayers(LayerKind):
    """A framework's layers of a composed kind. A layer is converted where it stands.

    types: by the ordinary type in whose place each is.
    """

    kind: ComposedKind

    def __init__(self, *types: Any) -> None:
        self.types: dict[Any, Any] = {cls.ordinary: cls for cls in types}
        self.kind = types[0].kind
        self.type_names = frozenset(cls.__name__ for cls in types)

    def owns(self, layer: Any) -> bool:
        """Return whether a layer is one of these, or of a subclass."""
        return isinstance(layer, tuple(self.types.values()))

    def replacement(self, layer: Any, options: Mapping[str, Any]) -> str:
        """Return the name of the type that takes an ordinary layer's place."""
        return str(self.types[type(layer)].__name__)

    def realize(self, ordinary: Any, recipe: Any) -> tuple[Any, dict[str, Any]]:
        """Return the type of layer for a network's convolution, and what it takes more."""
        if ordinary not in self.types:
            return super().realize(ordinary, recipe)
        return self.types[ordinary], dict(getattr(recipe, "options", ()))

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution is left that nothing else keeps from being replaced."""
        if type(layer) not in self.types:
            return f"no layer of kind {self.kind.name!r} takes its place"
        return super().obstacle(view, layer, options)
