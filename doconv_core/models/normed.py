"""Layers of branches with batch norms in whole models: what every framework does with them alike.

One takes the place of a convolution and of the batch norm that alone follows it, and what passes
its input on takes that one's. Its parts are ordinary layers, which travel in states by their names.
Convolutions among them may be DO layers, and fold with the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from doconv_core.kinds.normed import (
    BranchedKind,
    BranchedSpec,
    Conv,
    Kernel,
    obstacle,
)
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.geometry import Geometry
from doconv_core.maths.separable import Folded
from doconv_core.models.fuse import norms_behind
from doconv_core.models.parted import PartedLayers
from doconv_core.models.view import Folding, ModelView, Site

PART = "a part of a layer of branches"
NO_NORM = "no batch norm follows it directly, and it alone"
NO_LAYER = "no layer of branches takes its place"


def of_norm(reason: str) -> str:
    """Return why a convolution is left of which the batch norm cannot be taken over."""
    return f"the batch norm behind it cannot be taken over: {reason}"


class Seen(NamedTuple):
    """What is seen of a model. norms: by a convolution's id, the one behind it, and its site's
    index. unseen: why nothing is known of a layer. parts: the ids of layers inside such layers.
    """

    norms: Mapping[int, tuple[Any, int]]
    unseen: Mapping[int, str]
    parts: frozenset[int]


class NormedLayers(PartedLayers):
    """A framework's layers of one rule. Those that are converted or folded stay the same objects.

    base: what the layers of all rules are. types: by the ordinary type in whose place each is.
    """

    part = PART
    kind: BranchedKind
    types: Mapping[Any, Any]

    def __init__(self, kind: BranchedKind) -> None:
        self.kind = kind
        self.type_names = frozenset(cls.__name__ for cls in self.types.values())
        self._seen: WeakKeyDictionary[ModelView, Seen] = WeakKeyDictionary()

    @abstractmethod
    def _norm_options(self, epsilon: float, momentum: float) -> dict[str, Any]:
        """Return a batch norm's arguments. momentum: the new batch's weight."""

    @abstractmethod
    def _geometry(self, conv: Any) -> Geometry:
        """Return where the taps of an ordinary convolution meet its input."""

    @abstractmethod
    def _taken_obstacle(self, conv: Any, norm: Any) -> str | None:
        """Return why a batch norm cannot become a part of a layer, whatever stands around it."""

    @abstractmethod
    def _take(self, conv: Any, norm: Any, new: Any) -> None:
        """Make a convolution a new layer, in place, and the batch norm what passes its input on."""

    @abstractmethod
    def _is_as_made(self, conv: Any, made: Conv) -> bool:
        """Return whether a convolution has the sizes, stride, padding and dilation of a part."""

    @abstractmethod
    def _convolution(self, layer: Any, values: Mapping[Any, Folded]) -> Any:
        """Return an ordinary convolution, in a layer's place, of these values by context."""

    @abstractmethod
    def _become(self, layer: Any, new: Any) -> None:
        """Make a layer the convolution that it folds to, in place."""

    # What all frameworks do with them alike.

    def owns(self, layer: Any) -> bool:
        """Return whether a layer is one of this rule."""
        return isinstance(layer, self.base) and layer.rule == self.kind.name  # type: ignore[attr-defined]

    def replacement(self, layer: Any, options: Mapping[str, Any]) -> str:
        """Return the name of the type that takes an ordinary layer's place."""
        return f"{self.types[type(layer)].__name__}, {self.kind.name}"

    def realize(self, ordinary: Any, recipe: Any) -> tuple[Any, dict[str, Any]]:
        """Return the type of layer for a network's convolution, and what it takes more."""
        norms = self._norm_options(recipe.epsilon, recipe.momentum)
        own = {"rule": self.kind.name, "bn_options": norms, **dict(recipe.options)}
        return self.types[ordinary], own

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution is left that nothing else keeps from being replaced."""
        seen = self._look(view)
        if id(layer) in seen.parts:
            return PART
        if type(layer) not in self.types:
            return NO_LAYER
        small = {name: value for name, value in options.items() if name == "small"}
        reason = obstacle(view.outline(layer), self._geometry(layer), self.kind.name, **small)
        if reason is not None:
            return reason
        norm, _ = seen.norms.get(id(layer), (None, 0))
        if norm is None:
            return seen.unseen.get(id(layer), NO_NORM)
        reason = self._taken_obstacle(layer, norm) or view.pair_obstacle(layer, norm)
        return None if reason is None else of_norm(reason)

    def _look(self, view: ModelView) -> Seen:
        """Return what is seen of a model, as it was when that was first asked."""
        if view not in self._seen:
            sites = view.sites()
            inside = (view.below(site.layer) for site in sites if isinstance(site.layer, self.base))
            norms, flow = norms_behind(view, sites)
            parts = frozenset(id(part) for below in inside for part in below)
            self._seen[view] = Seen(norms, flow.unseen, parts)
        return self._seen[view]

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return the new layer, and the index of the batch norm's site."""
        norm, index = self._look(view).norms[id(layer)]
        cls = self.types[type(layer)]
        return cls.from_conv(layer, norm, rule=self.kind.name, **options), index

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Make convolutions, with their batch norms, the new layers."""
        sites = view.sites()
        for site, (new, index) in chosen:
            self._take(site.layer, sites[index].layer, new)

    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return the convolution that a layer folds to."""
        new = site.layer.fold()
        return Folding(view.name_of(new), new)

    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold layers, where they stand."""
        for site, (_, new) in planned:
            self._become(site.layer, new)

    def folded(self, layer: Any) -> Any:
        """Return the new convolution that a layer folds to, as its `fold` says."""
        spec = layer.spec
        self._check_own(layer)
        parts = self._checked(layer, spec)
        values = {
            context: spec.fold(
                {
                    name: Kernel(*self._matrix(part, context))
                    if isinstance(spec.parts[name], Conv)
                    else self._normalization(part, context)
                    for name, part in parts.items()
                }
            )
            for context in self._contexts(layer)
        }
        return self._convolution(layer, values)

    def _checked(self, layer: Any, spec: BranchedSpec) -> dict[str, Any]:
        """Return a layer's parts, ordinary ones; NotFoldable where they are not what it makes."""
        parts = dict(self._parts(layer))
        if parts.keys() != spec.parts.keys():  # in whatever order
            self._check_names(parts, spec.parts)
        for name, part in parts.items():
            self._check_watcher(name, part)
            made = spec.parts[name]
            if isinstance(made, Conv):
                if isinstance(part, self.composed):
                    parts[name] = part = self._ordinary(part)
                reason = self._conv_obstacle(layer, name, part)
            elif isinstance(part, self.batch_norm):
                reason = self._norm_obstacle(layer, part)
            else:
                reason = f"it is a {type(part).__name__}; expected a batch norm"
            self._check(name, reason)
            if isinstance(made, Conv) and not self._is_as_made(part, made):
                raise NotFoldable(f"its {name} is not as its rule makes it: {part}.")
        return parts
