"""Dynamic group convolutions in whole models: what every framework does with them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from doconv_core.kinds.dgc import DGC, as_progress, inactive_channels
from doconv_core.models.view import Folding, LayerKind, Leave, ModelView, Site

DYNAMIC = "its channels are chosen anew for each image, which no ordinary convolution does"

Heads = TypeVar("Heads")


class DynamicLayers(LayerKind):
    """A framework's dynamic group convolutions. layer: their type; heads: that of their heads."""

    kind = DGC

    def __init__(self, layer: type, heads: type) -> None:
        self.layer, self.state_types = layer, (heads,)
        self.type_names = frozenset({layer.__name__})

    def owns(self, layer: Any) -> bool:
        """Return whether a layer is one of these, or of a subclass."""
        return isinstance(layer, self.layer)

    def replacement(self, layer: Any, options: Mapping[str, Any]) -> str:
        """Return the name of the type of layer."""
        return self.layer.__name__

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Leave every convolution."""
        raise Leave(self.kind.instead)

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Do nothing, as none is chosen."""

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Leave the layer."""
        raise Leave(DYNAMIC)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Do nothing, as none is planned."""


def set_progress(heads: Iterable[Heads], progress: Any, put: Callable[[Heads, int], Any]) -> None:
    """Let every layer drop as many channels as at this point of the training. put: does it."""
    progress = as_progress(progress)
    for each in heads:
        spec: Any = each.spec  # type: ignore[attr-defined]
        put(each, inactive_channels(spec.in_channels, spec.gate_factor, progress))


def lassos(heads: Iterable[Heads]) -> list[Any]:
    """Return the lasso of each layer's last pass, which is given once; ValueError for none."""
    passed = []
    for each in heads:
        if each.lasso is None:  # type: ignore[attr-defined]
            raise ValueError(
                "the saliencies of a dynamic group convolution are those of its last pass in "
                "training, taken once: call the model in training mode first, itself and not a "
                "replica of it, once for each lasso."
            )
        passed.append(each.lasso)  # type: ignore[attr-defined]
        each.lasso = None  # type: ignore[attr-defined]
    return passed


def found(heads: Sequence[Heads], layers: DynamicLayers) -> Sequence[Heads]:
    """Return the heads in a model; ValueError where there are none."""
    if not heads:
        name = layers.layer.__name__
        raise ValueError(f"the model has no dynamic group convolution, such as {name}.")
    return heads
