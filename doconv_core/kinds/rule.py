"""Kinds whose kernel is a formula of their entries: sums of products, written once as data.

Axis letters as everywhere in this project, and those of hidden channels: g group, o and i output
and input channel in the group, p and h hidden output and input channels, k and n copies of them,
m kernel tap, t and s taps of smaller kernels. An entry has the letters of its axes, and where the
first is g, keeps the first two as one axis, and more so that there are three at most, as orders in
memory such as PyTorch's channels_last are of kernels alone: weight, "goim", is `(O, I/g, M)`.

A formula is a few steps, each a sum of products of what stands before it. NumPy, every framework
and the gradient read the same steps, so a rule is its formula, its sizes and its starting values.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from doconv_core.kinds.base import ONE_TAP, Array, ComposedKind, Shape
from doconv_core.maths.numeric import shaped, widened
from doconv_core.maths.spec import ConvSpec

KERNEL = "kernel"  # the last step's name
ORDER = "gnkophitsm"  # in which canonical axes stand
KERAS_ORDER = "tsmhignkop"


@dataclass(frozen=True)
class RuleSpec:
    """The sizes of a layer of a rule: those of its ordinary convolution, and options of the rule.

    Fields and errors as in `ConvSpec`.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        """Store the sizes as `ConvSpec` has checked them."""
        conv = ConvSpec(self.in_channels, self.out_channels, self.kernel_size, self.groups)
        for each in fields(RuleSpec):
            object.__setattr__(self, each.name, getattr(conv, each.name))

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis by its letter."""
        outputs, inputs = self.out_channels // self.groups, self.in_channels // self.groups
        taps, own = prod(self.kernel_size), self.own_sizes()
        known = {"g": self.groups, "o": outputs, "p": outputs, "i": inputs, "h": inputs, "m": taps}
        return {**known, **own}

    def own_sizes(self) -> dict[str, int]:
        """Return the length of each further axis that a rule has."""
        # A method, as torch.compile cannot follow a property of super().
        return {}


class Term(NamedTuple):
    """A product. subscripts: as of `einsum`, of one or two factors. names: of the factors.

    A letter that the result lacks is summed over. One factor alone is broadcast to letters that it
    lacks, or has other letters of the same sizes.
    """

    subscripts: str
    names: tuple[str, ...]


class Fixed(NamedTuple):
    """A constant of a formula: an identity of two axes, scaled, or a small array.

    letters: of its axes. scale: of the identity. values: the array, nested lists, for another; its
    axes stand in the order of `ORDER` and of `KERAS_ORDER`.
    """

    letters: str
    scale: float = 1.0
    values: Sequence[Any] | None = None


class Step(NamedTuple):
    """What is a sum of products, by which name the steps behind it know it."""

    name: str
    terms: tuple[Term, ...]


# Adds a product to a sum, which is None at first: (sum, subscripts, sizes by letter, *factors).
AddProduct = Callable[..., Any]


class Rule(ComposedKind):
    """A kind whose kernel is what its `steps` say. The spec is a `RuleSpec`.

    constants: of all entries but weight, what they start as, in the order of their names. about,
    arguments: what a layer's docstring says of its kernel, and of the options.
    """

    spec_type: type[RuleSpec]
    about: str
    arguments: tuple[str, ...]

    def __init__(self) -> None:
        self.names = ("weight", *self.constants)
        own = [each.name for each in fields(self.spec_type)]
        self.options = tuple(own[len(fields(RuleSpec)) :])

    @abstractmethod
    def axes(self, spec: Any) -> dict[str, str]:
        """Return the letters of each entry's axes, by name, weight first."""

    @abstractmethod
    def steps(self, spec: Any) -> tuple[Step, ...]:
        """Return the formula; the last step is the kernel, "goim"."""

    def fixed(self, spec: Any) -> dict[str, Fixed]:
        """Return the constants of the formula by name."""
        return {}

    def told(self, name: str, ordinary: str, example: str, prepared: str = "") -> str:
        """Return the docstring of a layer of this name that stands in for an ordinary one.

        example: the arguments of one that is folded. prepared: what is done to it before.
        """
        lines = (
            f"A `{ordinary}` whose kernel is {self.about}, to be folded into one.",
            "",
            f"Takes `{ordinary}`'s arguments, and by keyword only:",
            *self.arguments,
            "Raises TypeError or ValueError for arguments that give no layer, before anything is",
            "created.",
            "",
            f">>> layer = {name}({example})",
            *([f">>> {prepared}"] if prepared else []),
            ">>> type(layer.fold()).__name__",
            f"'{ordinary.rpartition('.')[2]}'",
        )
        return "\n    ".join(lines) + "\n    "

    def base(self, shared: type[Any], word: str, module: str) -> type[Any]:
        """Return what a framework's layers of the kind share, whose names begin with this word.

        shared: what its layers of all such kinds do. module: in which they will have these names.
        """
        return type(f"_{word}", (shared,), {"kind": self, "__module__": module})

    def layer(
        self, base: type[Any], ordinary: type[Any], package: str, *told: str, **own: Any
    ) -> type[Any]:
        """Return the layer that stands in for an ordinary one. base: what `base` made.

        package: the ordinary one's. told: an example's parts, as of `told`. own: its attributes.
        """
        name = f"{base.__name__[1:]}{ordinary.__name__}"
        text = self.told(name, f"{package}.{ordinary.__name__}", *told)
        about = {"ordinary": ordinary, "__module__": base.__module__, "__doc__": text}
        return type(name, (base, ordinary), {**about, **own})

    def obstacle(self, conv: ConvSpec) -> str | None:
        """Return that a kernel of one tap has nothing to over-parameterize."""
        return ONE_TAP if conv.taps == 1 else None

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError for options that suit no layer."""
        self.spec(ConvSpec(1, 1, (3, 3)), **options)

    def spec(self, conv: ConvSpec, **options: Any) -> Any:
        """Return the sizes of a layer in the place of `conv`. None is an option's default."""
        unknown = [
            f"{name}={value!r}" for name, value in options.items() if name not in self.options
        ]
        if unknown:
            raise TypeError(
                f"a layer of kind {self.name!r} takes {', '.join(self.options) or 'no options'}; "
                f"received {', '.join(unknown)}."
            )
        given = {name: value for name, value in options.items() if value is not None}
        return self.spec_type(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups, **given
        )

    def entries(self, spec: Any) -> dict[str, Shape]:
        """Return the shapes of the entries by name; of one tap, the weight's alone."""
        if prod(spec.kernel_size) == 1:
            return {"weight": self.conv(spec).weight_shape}
        found = {}
        for name, letters in self.axes(spec).items():
            shape = tuple(spec.sizes[letter] for letter in letters)
            first = max(2, len(shape) - 2) if letters[0] == "g" else 1
            found[name] = (prod(shape[:first]), *shape[first:])
        return found

    def start(self, kernel: Array, spec: Any) -> dict[str, Array]:
        """Return the kernel as weight, and the other entries' constants."""
        shapes = self.entries(spec)
        weight = np.asarray(kernel).reshape(shapes.pop("weight"))
        others = {n: np.full(s, self.constants[n], weight.dtype) for n, s in shapes.items()}
        return {"weight": weight, **others}

    def compose(self, entries: Mapping[str, Array], spec: Any) -> Array:
        """Return the kernel; half types are composed in float32 and rounded once."""
        values = self._values(entries, spec)
        shape, dtype = self.conv(spec).kernel_shape, np.asarray(entries["weight"]).dtype
        if len(values) == 1:
            return np.array(entries["weight"]).reshape(shape)
        return self._evaluated(values, spec)[KERNEL].reshape(shape).astype(dtype)

    def gradient(
        self, entries: Mapping[str, Array], kernel_gradient: Array, spec: Any
    ) -> dict[str, Array]:
        """Return the gradient in each entry: each product's, back through the steps."""
        values = self._values(entries, spec)
        given = shaped("kernel_gradient", kernel_gradient, self.conv(spec).kernel_shape)
        if len(values) == 1:
            return {"weight": given.reshape(entries["weight"].shape)}
        known = self._evaluated(values, spec, kernel=False)
        letters = self.axes(spec)["weight"]
        toward = widened(given).reshape([spec.sizes[letter] for letter in letters])
        found = gradients(self, known, toward, spec, partial(np.einsum, optimize=True))
        return {n: found[n].reshape(e.shape).astype(e.dtype) for n, e in entries.items()}

    def spec_of_shapes(
        self, shapes: Mapping[str, Shape], groups: int, **options: Any
    ) -> Any | None:
        """Return the sizes with these groups and options, if the entries' shapes are theirs.

        shapes: as of `recognised`.
        """
        outputs, inputs, *size = shapes["weight"]
        try:
            spec = self.spec(ConvSpec(inputs * groups, outputs, (*size,), groups), **options)
        except (TypeError, ValueError):
            return None
        own = {**self.entries(spec), "weight": tuple(shapes["weight"])}
        return spec if own == {name: tuple(shape) for name, shape in shapes.items()} else None

    def composition_macs(self, spec: Any) -> int:
        """Return the multiply-accumulates of all products of two factors."""
        if prod(spec.kernel_size) == 1:
            return 0
        two = [t for s in self.steps(spec) for t in s.terms if len(t.names) == 2]
        return sum(prod(spec.sizes[x] for x in {*t.subscripts} - {*",->"}) for t in two)

    def _evaluated(
        self, values: Mapping[str, Array], spec: Any, kernel: bool = True
    ) -> dict[str, Array]:
        dtype = values["weight"].dtype
        made = partial(np.eye, dtype=dtype), partial(np.asarray, dtype=dtype)
        return evaluated(self, values, spec, _add_product, *made, kernel=kernel)

    def _values(self, entries: Mapping[str, Array], spec: Any) -> dict[str, Array]:
        """Return the entries with all their axes; ValueError for one that is of another shape."""
        values = {}
        for name, shape in self.entries(spec).items():
            if entries.get(name) is None:
                raise ValueError(f"{name} must have shape {shape}; received none.")
            values[name] = widened(shaped(name, entries[name], shape))
            if len(shape) and name in self.axes(spec):
                values[name] = values[name].reshape([spec.sizes[x] for x in self.axes(spec)[name]])
        return values


def evaluated(
    rule: Rule,
    values: Mapping[str, Any],
    spec: Any,
    add_product: AddProduct,
    identity: Callable[[int], Any],
    array: Callable[[Sequence[Any]], Any],
    order: str = ORDER,
    kernel: bool = True,
) -> dict[str, Any]:
    """Return the values and what every step is, by name.

    identity, array: return a unit matrix of a size, a value of nested lists. order: in which the
    axes of all values and results stand. kernel: whether the last step is computed too.
    """
    known = dict(values)
    for name, (letters, scale, given) in rule.fixed(spec).items():
        if given is None:
            known[name] = scale * identity(spec.sizes[letters[0]])
        else:
            known[name] = array(given)
    for name, terms in rule.steps(spec):
        if name == KERNEL and not kernel:
            break
        total = None
        for subscripts, factors in terms:
            told = in_order(subscripts, order)
            total = add_product(total, told, spec.sizes, *(known[factor] for factor in factors))
        known[name] = total
    return known


def gradients(
    rule: Rule,
    known: Mapping[str, Any],
    gradient: Any,
    spec: Any,
    einsum: Callable[..., Any],
    without: Container[str] = (),
) -> dict[str, Any]:
    """Return the entries' gradients from the kernel's, "goim": each product's, back by the steps.

    known: as of `evaluated`; the kernel itself is not asked for. without: entries whose gradients
    are not needed.
    """
    sums, constant = {KERNEL: gradient}, rule.fixed(spec)
    for step, terms in reversed(rule.steps(spec)):
        given = sums.pop(step)
        for subscripts, factors in terms:
            inputs, result = in_order(subscripts, ORDER).split("->")
            letters = inputs.split(",")
            for at, name in enumerate(factors):
                if name in constant or name in without:
                    continue
                part = given
                if len(factors) == 2:
                    back = f"{result},{letters[1 - at]}->{letters[at]}"
                    part = einsum(back, given, known[factors[1 - at]])
                sums[name] = sums[name] + part if name in sums else part
    return sums


def in_order(subscripts: str, order: str) -> str:
    """Return subscripts in which the axes of every factor and of the result stand in this order.

    >>> in_order("go,goim->goim", KERAS_ORDER)
    'go,migo->migo'
    """
    inputs, result = subscripts.split("->")
    parts = ["".join(sorted(part, key=order.index)) for part in (*inputs.split(","), result)]
    return f"{','.join(parts[:-1])}->{parts[-1]}"


def broadcast(subscripts: str, sizes: Mapping[str, int]) -> list[list[int]] | None:
    """Return the shapes in which factors are multiplied elementwise; None where sums are asked for.

    >>> broadcast("go,goim->goim", {"g": 1, "o": 2, "i": 3, "m": 9})
    [[1, 2, 1, 1], [1, 2, 3, 9]]
    """
    inputs, result = subscripts.split("->")
    parts = inputs.split(",")
    if len(parts) == 1 and len(inputs) == len(result):
        return [[sizes[x] for x in result]]
    if not set(inputs) - {","} <= set(result):
        return None
    return [[sizes[x] if x in part else 1 for x in result] for part in parts]


def _add_product(
    total: Array | None, subscripts: str, sizes: Mapping[str, int], *factors: Array
) -> Array:
    """Return the sum and a product of arrays, or a single one that is broadcast."""
    shapes = broadcast(subscripts, sizes)
    if shapes is None:
        product: Array = np.einsum(subscripts, *factors, optimize=True)
    else:
        parts = [each.reshape(shape) for each, shape in zip(factors, shapes, strict=True)]
        product = parts[0] * parts[1] if parts[1:] else parts[0]
    found: Array = product if total is None else total + product
    return found
