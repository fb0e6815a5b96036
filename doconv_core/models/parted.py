"""Layers that are made of ordinary ones, their parts: how a framework reads and checks these."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from doconv_core.kinds.bsconv import SHARES
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.separable import Normalization, Pointwise
from doconv_core.models.report import own_method
from doconv_core.models.view import LayerKind

HOOKED = "hooks, which would see other values; remove them first"


class PartedLayers(LayerKind):
    """A kind's layers that are made of ordinary ones.

    base: what the layers all are. composed: what layers of composed kinds all are. batch_norm: the
    framework's. methods: with which a layer computes; messages name the first.
    """

    shared = SHARES
    base: type
    composed: type
    batch_norm: type
    methods: tuple[str, ...] = ("forward",)

    @abstractmethod
    def is_replaced(self, layer: Any, /) -> bool:
        """Return whether this one layer has a method of its own in its class's forward's place."""

    @abstractmethod
    def _parts(self, layer: Any) -> Mapping[str, Any]:
        """Return the parts of a layer by name, in the order of their use."""

    def _contexts(self, layer: Any) -> Sequence[Any]:
        """Return where the layer's weights are, each in values of its own; None for one place."""
        return (None,)

    @abstractmethod
    def _watcher(self, part: Any) -> str | None:
        """Return what of a part would see other values where it becomes a part of another."""

    @abstractmethod
    def _norm_obstacle(self, layer: Any, norm: Any) -> str | None:
        """Return why a batch norm of a layer cannot be folded."""

    @abstractmethod
    def _conv_obstacle(self, layer: Any, name: str, part: Any) -> str | None:
        """Return why a part cannot be folded as a convolution, and what was expected."""

    @abstractmethod
    def _matrix(self, conv: Any, context: Any) -> Pointwise:
        """Return a convolution's kernel, canonical but for its shape, and bias, in float64.

        `(O, I)` of a pointwise one, `(O, M)` of a depthwise one.
        """

    @abstractmethod
    def _normalization(self, norm: Any, context: Any) -> Normalization:
        """Return a batch norm's values, in float64."""

    @abstractmethod
    def _ordinary(self, part: Any) -> Any:
        """Return a copy of a part; of one of a composed kind, the layer that it folds to."""

    def _check_own(self, layer: Any, hint: str = "") -> None:
        """Raise NotFoldable where a layer may compute something else than its type does."""
        cls = type(layer)
        own = any(getattr(cls, name) is not getattr(self.base, name) for name in self.methods)
        if own or self.is_replaced(layer):
            raise NotFoldable(own_method(cls, self.methods[0], hint))

    def _check_names(self, found: Iterable[str], expected: Iterable[str]) -> None:
        """Raise NotFoldable where a layer has not the parts that its type makes, in their order."""
        if [*found] != [*expected]:
            given = ", ".join(found) or "none"
            raise NotFoldable(f"its parts are {given}; expected {', '.join(expected)}.")

    def _check_watcher(self, name: str, part: Any) -> None:
        """Raise NotFoldable for what of a part would see other values."""
        watcher = self._watcher(part)
        if watcher is not None:
            raise NotFoldable(f"its {name} has {watcher}.")

    def _check(self, name: str, reason: str | None) -> None:
        """Raise NotFoldable where there is a reason."""
        if reason is not None:
            raise NotFoldable(f"its {name} cannot be folded: {reason}.")
