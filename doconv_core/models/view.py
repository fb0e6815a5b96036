"""What a backend says of a model, and of a kind's layers; every whole-model tool stands on it.

A backend has one `ModelView`, and for each kind one `LayerKind`, which it registers. The walk, the
choice of layers, the report and the order of what is checked and changed are in this package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from doconv_core.kinds.base import Kind, Recipe
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.merge import Part
from doconv_core.models.own_methods import deploying_method, fusing_methods
from doconv_core.models.report import (
    ALREADY,
    NOT_DIRECT,
    TIED,
    Change,
    Choice,
    FusingMethod,
)


class Site(NamedTuple):
    """A layer at its place.

    path: where it is met first. paths: all places. layer: itself, or an ordinary layer outside of
    the model that describes it, an operator of a graph; owner: then what has the graph, else None.
    """

    path: str
    paths: tuple[str, ...]
    layer: Any
    owner: Any = None


@dataclass
class Flow:
    """Who follows whom in a model's forward pass, as far as it was seen, by `id` of the layers.

    before: what a layer was called with, the layers that made it. after: what took its output.
    None stands among them for everything else: an operation, an argument, the model's output.
    unseen: of layers whose calls cannot be told, why.
    """

    before: dict[int, list[Any]] = field(default_factory=dict)
    after: dict[int, list[Any]] = field(default_factory=dict)
    unseen: dict[int, str] = field(default_factory=dict)


NO_PARTS = (
    "merge_branches=True is there in PyTorch and Keras. Here, call the method by which the model "
    "itself makes one convolution of branches, as deploy() does; or take its weights to PyTorch or "
    "Keras by export_state and load_state, and merge there."
)


class ModelView(ABC):
    """A model as the tools see it, made of a model; TypeError for what is none.

    `sites` is computed anew at each call: a tool changes the model between two of them.
    batch_norm: the type of the framework's batch norms. packages: where classes of layers come from
    that have no `fusing` methods: the framework's and the backend's.
    """

    model: Any
    batch_norm: type
    packages: tuple[str, ...] = ()

    @abstractmethod
    def sites(self) -> list[Site]:
        """Return every layer once, in the model's order."""

    @abstractmethod
    def below(self, layer: Any) -> list[Any]:
        """Return the layers inside a layer, at any depth."""

    def name_of(self, layer: Any) -> str:
        """Return the name of a layer's type."""
        return type(layer).__name__

    @abstractmethod
    def is_convolution(self, layer: Any, /) -> bool:
        """Return whether a layer is a convolution of any kind, in the framework's own sense."""

    @abstractmethod
    def obstacle(self, layer: Any) -> str | None:
        """Return why a convolution cannot be replaced, whatever it is to become; None where it can.

        Not asked of the layers of kinds.
        """

    @abstractmethod
    def outline(self, layer: Any) -> ConvSpec:
        """Return the sizes of an ordinary convolution."""

    @abstractmethod
    def holders(self, layer: Any) -> list[Any]:
        """Return the layers that have this weight as theirs; None for each other use of it."""

    def other_use(self, layer: Any) -> str | None:
        """Return how the model uses a convolution's weight other than by calling the layer.

        None where it does not, as far as that can be seen.
        """
        return None

    @abstractmethod
    def count(self) -> int:
        """Return the number of the model's parameters, as its framework counts them, each once."""

    def uncounted(self) -> int:
        """Return how many parameters `count` leaves out, as their shape is not known yet."""
        return 0

    @abstractmethod
    def copied(self, given_up: Sequence[Any] = ()) -> ModelView:
        """Return the view of a copy. given_up: parameters that the copy is to lose at once."""

    def check_ready(self, site: Site) -> None:
        """Raise ValueError, with the path, for a chosen layer whose weights are not there yet."""

    def check_known(self, site: Site, forms: Mapping[str, str]) -> None:
        """Raise NotFoldable for what has a kind's layers in it and is none: a compiled one, say."""

    def check_inplace(self) -> None:
        """Raise TypeError where the model itself cannot be changed."""

    def finish(self, *, changed: bool) -> None:
        """Leave the model as one in which nothing was ever replaced. changed: whether it was."""

    def settle(self) -> bool:
        """Take from a folded model what was for training alone; return whether there was any."""
        return False

    def warn_of_training(self, stacklevel: int) -> None:
        """Warn where a comparison with the folded model would tell of the mode, not of folding."""

    def fusing(self, changed: Sequence[Any]) -> list[FusingMethod]:
        """Return the methods that make other layers of parts which have one of these inside."""
        inside, found = set(map(id, changed)), []
        for path, _, layer, _ in self.sites():
            names = fusing_methods(type(layer), self.packages)
            if names and not inside.isdisjoint(map(id, (layer, *self.below(layer)))):
                found += [FusingMethod(path, self.name_of(layer), name) for name in names]
        return found

    def call_fusing(self) -> list[Change]:
        """Let parts of the model make other layers of their own, in place; return which did.

        From the outermost in; of each by one method. What that returns takes the part's place, if
        it is another layer.
        """
        found: list[Change] = []
        met: dict[int, Any] = {}  # by id, which stays theirs as long as they are kept
        waiting = self.sites()
        while waiting:
            site = waiting.pop(0)
            name = deploying_method(site.layer, self.packages)
            if id(site.layer) in met or name is None:
                continue
            kind = self.name_of(site.layer)
            made = self.call_own(site, name)
            met |= {id(each): each for each in (site.layer, made)}
            found.append(Change(site.path, kind, f"what its {name}() makes"))
            waiting = self.sites()
        return found

    @abstractmethod
    def call_own(self, site: Site, name: str) -> Any:
        """Call a layer's own method, and put the layer that it returns in the place; return that.

        Raises NotFoldable where the method does.
        """

    def check_parts(self) -> None:
        """Raise NotImplementedError where a backend does not tell a model's `parts`."""
        if type(self).parts is ModelView.parts:
            raise NotImplementedError(NO_PARTS)

    def parts(self) -> Sequence[Part]:
        """Return what has a forward pass of its own, those inside others before them."""
        raise NotImplementedError(NO_PARTS)

    # The rest is what batch-norm fusion asks.

    def is_batch_norm(self, layer: Any) -> bool:
        """Return whether a layer is a batch norm, of whatever class."""
        return isinstance(layer, self.batch_norm)

    @abstractmethod
    def norm_obstacle(self, norm: Any) -> str | None:
        """Return why a batch norm cannot be fused, wherever it stands; None where it can."""

    def takes_norm(self, layer: Any) -> bool:
        """Return whether a layer is of a kind that a batch norm behind it can become a part of."""
        return self.is_convolution(layer)

    def passes_on(self, layer: Any) -> bool:
        """Return whether a layer returns what it is given, and nobody watches."""
        return False

    @abstractmethod
    def flow(self) -> Flow:
        """Return who follows whom."""

    @abstractmethod
    def pair_obstacle(self, conv: Any, norm: Any) -> str | None:
        """Return why this convolution and the batch norm behind it cannot be fused."""

    @abstractmethod
    def fuse(self, conv: Any, norm: Any) -> str | None:
        """Fuse a batch norm into a convolution, in place; or return why that cannot be."""

    def fuse_ahead(self, norm: Any, conv: Any) -> str | None:
        """Fuse a batch norm into the convolution behind it, in place; or return why not."""
        return NOT_DIRECT


class Leave(Exception):
    """Why a layer is left after all. Raised by `LayerKind.prepare`, and where parts are read."""


class Folding(NamedTuple):
    """What a layer is to become. after: the name of its type then. what: for `LayerKind.fold`."""

    after: str
    what: Any


class LayerKind(ABC):
    """A kind's layers in one framework.

    kind: the core's. already, part, shared: why a convolution is left that is a layer of a kind, is
    inside one of this kind's, or shares its weight. shareable: whether layers that share one weight
    can be converted together. type_names: of the layers' types.
    state_types: of layers that are of a type of their own in states, which their `spec` says, and
    have the attributes of a convolution. kept: the form, if any, that leaves
    the parts of a layer as they are.
    """

    kind: Kind
    already: str = ALREADY
    part: str = ""
    shared: str = TIED
    shareable: bool = False
    type_names: frozenset[str] = frozenset()
    state_types: tuple[type, ...] = ()
    kept: str = ""

    @abstractmethod
    def owns(self, layer: Any) -> bool:
        """Return whether a layer is one of these, or of a subclass."""

    def replacement(self, layer: Any, options: Mapping[str, Any]) -> str:
        """Return the name of the type that takes an ordinary layer's place; `Leave` for none."""
        raise Leave(self.kind.instead)

    def realize(self, ordinary: Any, recipe: Recipe) -> tuple[Any, dict[str, Any]]:
        """Return the type of layer for a network's convolution, and what it takes beside its sizes.

        ordinary: the type that an ordinary one would have.
        """
        raise ValueError(f"networks have no convolutions of kind {self.kind.name!r} here.")

    def obstacle(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> str | None:
        """Return why a convolution is left that nothing else keeps from being replaced."""
        return self.kind.obstacle(view.outline(layer))

    def prepare(self, view: ModelView, layer: Any, options: Mapping[str, Any]) -> Any:
        """Return what `convert` needs, and change nothing.

        Raises TypeError or ValueError for options that give no layer; `Leave`.
        """
        raise Leave(self.kind.instead)

    def convert(self, view: ModelView, chosen: Sequence[tuple[Site, Any]]) -> None:
        """Replace layers, in place. chosen: with what was prepared of each."""

    def share(self, prepared: Any) -> float | None:
        """Return how much of the trained kernel a new layer has; None where that is not asked."""
        return None

    @abstractmethod
    def plan(self, view: ModelView, site: Site, form: str) -> Folding:
        """Return what a layer folds to, and change nothing.

        Raises NotFoldable, or ValueError where there is nothing to compute it of; `Leave`.
        """

    @abstractmethod
    def fold(self, view: ModelView, planned: Sequence[tuple[Site, Folding]]) -> None:
        """Fold layers, in place."""

    def orthonormal(self, layer: Any) -> Any | None:
        """Return the part of a layer whose weight is trained to have orthonormal rows, if any."""
        return None

    def choice(self, view: ModelView, site: Site) -> Choice | None:
        """Return what each form of a layer costs; None where there is no choice, or no telling."""
        return None

    def given_up(self, view: ModelView) -> list[Any]:
        """Return parameters that no folded layer has, and a copy need not hold first."""
        return []


class LayerKinds(dict[str, LayerKind]):
    """The kinds of layers that a framework has, by name, in the order in which they are asked."""

    def register(self, layers: LayerKind) -> LayerKind:
        """Let the tools know a kind's layers; return them."""
        self[layers.kind.name] = layers
        return layers
