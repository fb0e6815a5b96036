"""What a kind of layer is, and the register of kinds.

A kind takes the place of an ordinary convolution in training, and folds to ordinary layers again.
What is particular to one is in its own file here and in one of each backend; everything that works
on models, states, files, networks, costs and reports asks the kind. A new one is registered by
`register`, once in the core and once in each backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from doconv_core.maths.numeric import Array as Array
from doconv_core.maths.spec import ConvSpec, as_integer

Shape = tuple[int, ...]

ONE_TAP = "one tap, nothing to over-parameterize"
DENSE = "dense"  # the form that is one ordinary convolution


class Cost(NamedTuple):
    """parameters: weights and biases held. macs: multiply-accumulates of one forward pass.

    >>> Cost(parameters=10, macs=90).macs
    90
    """

    parameters: int
    macs: int


@dataclass(frozen=True)
class Recipe:
    """How a network's convolution is made. name: "conv" for an ordinary one, or a kind's word.

    A kind with options of its own has a subclass of this that holds them.
    """

    name: str = "conv"


@dataclass(frozen=True)
class ComposedRecipe(Recipe):
    """How a convolution is made whose kernel is composed. options: of its kind, by name."""

    options: tuple[tuple[str, Any], ...] = ()


class PartConv(NamedTuple):
    """An ordinary convolution that a layer is made of. depthwise: the one with the layer's taps.

    Any other is pointwise, without bias. orthonormal: whether training is to keep its weight's rows
    orthonormal.
    """

    name: str
    channels: int
    depthwise: bool = False
    orthonormal: bool = False


class PartNorm(NamedTuple):
    """A batch norm that a layer is made of."""

    name: str


class Kind(ABC):
    """A kind of layer, as data and rules.

    name: its word, as in `over_parameterize(kind=…)` and `fold(form={name: …})`. words: its words
    in networks, where it has several variants. variants: further words, which no list of networks
    has, with the options that they stand for. forms: what it can be folded to, the default first.
    exact: whether a layer that takes an ordinary one's place computes the same; instead: what to do
    where it does not. options: of `over_parameterize`, what it takes.
    """

    name: str
    words: tuple[str, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    forms: tuple[str, ...] = (DENSE,)
    exact: bool = True
    instead: str = ""
    options: tuple[str, ...] = ()

    def obstacle(self, conv: ConvSpec) -> str | None:
        """Return why an ordinary convolution of these sizes is left; None where it is not."""
        return None

    def check_taken(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError for options that the kind does not take, or that are none of their type.

        Raises ValueError for a value that suits no layer.
        """
        for name, value in options.items():
            if name not in self.options:
                raise TypeError(
                    f"over_parameterize of kind {self.name!r} takes "
                    f"{', '.join(self.options) or 'no options'}; received {name}={value!r}."
                )
        self.check_options(options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError for options that suit no layer."""

    def recipe(self, word: str, *args: Any, **options: Any) -> Recipe:
        """Return how a network's convolution of this kind is made; TypeError for other options."""
        return Recipe(word, *args, **options)


class ComposedKind(Kind):
    """A kind whose layer composes one kernel of several weights, and convolves with that.

    Sizes are a spec of the kind's own: a frozen dataclass, or `ConvSpec` itself. The first entry is
    `weight`; it is kept in the order of the framework's own kernels, the others are canonical in
    every framework. spec_type: the spec's class. names: of all entries that a layer may have.
    constants: of those that start as the same number throughout, which. A framework makes them so
    itself, and takes the kernel for `weight`, where that is what `start` does.
    """

    spec_type: type[Any] = ConvSpec
    names: tuple[str, ...] = ("weight",)
    constants: Mapping[str, float] = MappingProxyType({})

    def recipe(self, word: str, *args: Any, **options: Any) -> Recipe:
        """Return how a network's convolution of this kind is made; TypeError for other options."""
        options = {**self.variants.get(word, {}), **options}
        if not options:
            return super().recipe(word, *args)
        self.check_taken(options)
        return ComposedRecipe(word, tuple(sorted(options.items())), *args)

    def kept(self, options: Mapping[str, Any], spec: Any) -> dict[str, Any]:
        """Return the options that a layer keeps whose input channels are not known yet.

        spec: its sizes with other input channels.
        """
        return {name: getattr(spec, name) for name in options}

    def spec_by(self, recipe: Recipe, conv: ConvSpec) -> Any:
        """Return the sizes of a layer that a recipe of this kind says."""
        return self.spec(conv, **dict(getattr(recipe, "options", ())))

    @abstractmethod
    def spec(self, conv: ConvSpec, **options: Any) -> Any:
        """Return the sizes of a layer in the place of `conv`; ValueError where there is none."""

    @abstractmethod
    def entries(self, spec: Any) -> dict[str, Shape]:
        """Return the shapes of the weights that the kernel is composed of, canonical, by name."""

    @abstractmethod
    def compose(self, entries: Mapping[str, Array], spec: Any) -> Array:
        """Return the kernel, `(O, I/g, *kernel_size)`, in the weights' dtype."""

    @abstractmethod
    def gradient(
        self, entries: Mapping[str, Array], kernel_gradient: Array, spec: Any
    ) -> dict[str, Array]:
        """Return the gradient of a loss in each weight, from that in the kernel."""

    @abstractmethod
    def start(self, kernel: Array, spec: Any) -> dict[str, Array]:
        """Return the weights of a layer that takes the place of one with this kernel."""

    def recognised(self, shapes: Mapping[str, Shape]) -> Any:
        """Return the sizes of a layer of which a file tells shapes alone; None for no such layer.

        shapes: of the entries; the weight's with its spatial axes, `(O, I/g, *kernel_size)`. Where
        a composition differs with the groups, which this takes for one, a kind has its own.
        """
        outputs, inputs, *kernel_size = shapes["weight"]
        try:
            spec = self.spec(ConvSpec(inputs, outputs, tuple(kernel_size)))
        except (TypeError, ValueError):
            return None
        expected = self.entries(spec)
        fits = shapes.keys() == expected.keys() and all(
            shapes[name] == expected[name] for name in self.names[1:]
        )
        return spec if fits and prod(shapes["weight"]) == prod(expected["weight"]) else None

    def composition_macs(self, spec: Any) -> int:
        """Return the multiply-accumulates of composing the kernel once."""
        return prod(self.conv(spec).kernel_shape)

    def conv(self, spec: Any) -> ConvSpec:
        """Return the sizes of the ordinary convolution that a layer folds to."""
        return ConvSpec(spec.in_channels, spec.out_channels, spec.kernel_size, spec.groups)

    def parameter_shape(self, spec: Any) -> Shape:
        """Return the shape in which a layer keeps `weight`: the kernel's, where it has its size.

        So an ordinary convolution's file loads into the layer as it is.
        """
        own, kernel = self.entries(spec)["weight"], self.conv(spec).kernel_shape
        return kernel if prod(own) == prod(kernel) else own

    def training_cost(self, spec: Any, positions: int, *, bias: bool) -> Cost:
        """Return what a layer costs in training, its kernel composed once for the batch.

        positions: output positions of all images.
        """
        conv = self.conv(spec)
        kernel = prod(conv.kernel_shape) * as_integer("positions", positions)
        weights = sum(map(prod, self.entries(spec).values()))
        held = weights + (conv.out_channels if bias else 0)
        return Cost(held, kernel + self.composition_macs(spec))


class SeparableKind(Kind):
    """A kind whose layer is a sequence of ordinary layers, named as its `parts` are."""

    exact = False

    @abstractmethod
    def parts(self, recipe: Any, conv: ConvSpec, groups: int) -> tuple[PartConv | PartNorm, ...]:
        """Return the layers that one in the place of `conv` is made of; ValueError with groups.

        conv: its sizes without groups; groups: as the network has them, 0 for as many as channels.
        """


_KINDS: dict[str, Kind] = {}


AnyKind = TypeVar("AnyKind", bound=Kind)


def register(kind: AnyKind) -> AnyKind:
    """Let the tools know a kind; return it. Raises ValueError for a word that is another's."""
    for word in (kind.name, *kind.words, *kind.variants):
        other = of_word(word)
        if other is not None and other is not kind:
            raise ValueError(f"{word!r} is the word of {other!r}; a kind needs one of its own.")
    _KINDS[kind.name] = kind
    return kind


def kinds() -> dict[str, Kind]:
    """Return the registered kinds by name, in the order in which they were registered."""
    return dict(_KINDS)


def kind_named(name: Any) -> Kind:
    """Return the kind of this name; ValueError lists those that there are for another."""
    if not isinstance(name, str) or name not in _KINDS:
        raise ValueError(
            f"kind must be one of {', '.join(map(repr, _KINDS))}; received kind={name!r}."
        )
    return _KINDS[name]


def variant_named(name: Any) -> tuple[Kind, Mapping[str, Any]]:
    """Return the kind that has this name or variant, and the options that the variant stands for.

    ValueError lists those that there are for another.
    """
    known = {word: (kind, options) for kind in kinds().values()
             for word, options in {kind.name: {}, **kind.variants}.items()}  # fmt: skip
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"kind must be one of {', '.join(map(repr, known))}; received kind={name!r}."
        )
    return known[name]


def of_word(word: str) -> Kind | None:
    """Return the kind that has this word, its name or its word in networks; None for none."""
    known = _KINDS.values()
    return next((k for k in known if word in (k.name, *k.words, *k.variants)), None)


def composed_by(recipe: Recipe, conv: ConvSpec) -> ComposedKind | None:
    """Return the kind that composes the kernel of a network's convolution; None for an ordinary."""
    kind = of_word(recipe.name)
    return kind if isinstance(kind, ComposedKind) and kind.obstacle(conv) is None else None


def words() -> tuple[str, ...]:
    """Return the words of networks' convolutions, that of the ordinary ones first."""
    return ("conv", *(word for kind in _KINDS.values() for word in kind.words))


def recipe(word: str = "conv", /, *args: Any, **options: Any) -> Recipe:
    """Return how a network's convolution is made: "conv" for an ordinary one, or a kind's word.

    Raises ValueError for another word, TypeError for options that the kind does not take.
    """
    if word == "conv" and not (args or options):
        return Recipe()
    kind = of_word(word)
    if kind is None or word not in (*kind.words, *kind.variants):
        variants = (variant for each in _KINDS.values() for variant in each.variants)
        known = ", ".join((*words(), *variants))
        raise ValueError(f"name must be one of {known}; received {word!r}.")
    return kind.recipe(word, *args, **options)
