"""Dynamic group convolutions in whole models: what every framework does with them alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from doconv_core.kinds.dgc import DGC, as_progress, inactive_channels
from doconv_core.models.report import SUBCLASS
from doconv_core.models.view import Folding, LayerKind, Leave, ModelView, Site

SKIPS = "it multiplies only the channels that it keeps already"


class DynamicLayers(LayerKind):
    """A framework's dynamic group convolutions, whose fold multiplies only what is kept.

    layer: their type; heads: that of their heads; skipping: what they fold to. follows: whether
    what is folded drops as many channels as is said later, and not only as when it was.
    """

    kind = DGC
    follows = False

    def __init__(self, layer: type, heads: type, skipping: type) -> None:
        self.layer, self.skipping = layer, skipping
        self.type_names = frozenset({layer.__name__, skipping.__name__})
        self.state_types = (heads,)

    def owns(self, layer: Any) -> bool:
        """Return whether a layer is one of these, or of a subclass."""
        return isinstance(layer, self.layer)

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return the layer that skips."""
        if isinstance(site.layer, self.skipping):
            raise Leave(SKIPS)
        obstacle = SUBCLASS if type(site.layer) is not self.layer else self.changed(site.layer)
        if obstacle is not None:
            raise Leave(obstacle)
        return Folding(self.skipping.__name__, None)

    def heads(self, parts: Iterable[Any]) -> list[Any]:
        """Return those of a model's parts that are heads; ValueError where none is."""
        found = [each for each in parts if isinstance(each, self.state_types)]
        if not found:
            name = self.layer.__name__
            raise ValueError(f"the model has no dynamic group convolution, such as {name}.")
        return found

    def set_progress(
        self, heads: Sequence[Any], progress: Any, put: Callable[[Any, int], Any]
    ) -> None:
        """Let heads drop as many channels as at this point of the training. put: does it."""
        progress = as_progress(progress)
        if not self.follows and any(each.dropped is not None for each in heads):
            raise ValueError(
                "the model is folded, and drops as many channels as when it was; set the progress "
                "of the model that it was folded of, and fold that."
            )
        for each in heads:
            put(each, inactive_channels(each.spec.in_channels, each.spec.gate_factor, progress))

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Let layers skip, in place."""
        for site, _ in planned:
            site.layer.__class__ = self.skipping
            self.skip(site.layer)

    @abstractmethod
    def changed(self, layer: Any) -> str | None:
        """Return why a layer may compute something else than its type does; None if not."""

    @abstractmethod
    def skip(self, layer: Any) -> None:
        """Note in a layer that has become one that skips how many channels it drops."""


def lassos(heads: Sequence[Any]) -> list[Any]:
    """Return the lasso of each layer's last pass, which is given once; ValueError for none."""
    passed = []
    for each in heads:
        if each.lasso is None:
            raise ValueError(
                "the saliencies of a dynamic group convolution are those of its last pass in "
                "training, taken once: call the model in training mode first, itself and not a "
                "replica of it, once for each lasso."
            )
        passed.append(each.lasso)
        each.lasso = None
    return passed
