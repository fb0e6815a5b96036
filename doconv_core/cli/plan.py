"""What a converted file will hold: each entry's name, and the values that it is made of.

Entries are those of a template, a file that was saved from the target network; or they have the
names of another framework, where the layers of both are named alike. PyTorch and Gluon, channels
first, keep every array in the same order of axes; Keras does not, and neither does it say by names
which array is which, but its files tell of most layers what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from pathlib import Path
from typing import NamedTuple, TypeAlias

from doconv_core.cli.command import IMPOSSIBLE, MISSING, Failure
from doconv_core.cli.contents import (
    COUNT,
    NORMS,
    Contents,
    as_prelus,
    slopes_of,
    state_names,
    weights_of,
)
from doconv_core.cli.flattening import Flattenings
from doconv_core.cli.options import literal, matches
from doconv_core.cli.pairing import Paired, family, sides
from doconv_core.files.checkpoint import Checkpoint, Format
from doconv_core.files.dynamic import INACTIVE, NAMES
from doconv_core.files.entries import GLUON, KERAS, PYTORCH, STATE, Entry, Lazy
from doconv_core.files.layers import (
    BATCH_NORM,
    CONVOLUTION,
    DYNAMIC,
    LINEAR,
    NORM,
    SLOPES,
    TRANSPOSED,
    Layer,
)
from doconv_core.kinds.base import ComposedKind
from doconv_core.maths.numeric import Array
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import place
from doconv_core.state.agreement import NEUTRAL, Values, fit_arrays
from doconv_core.state.file import State, write_state
from doconv_core.state.layers import LayerForm

Step = Callable[[int, int], None]
# The types that hold every number of a type.
HOLD = {
    "float16": {"float16", "float32", "float64"},
    "bfloat16": {"bfloat16", "float32", "float64"},
    "float32": {"float32", "float64"},
}
STATISTICS = {name: name for name in ("running_mean", "running_var")}
AFFINE = {
    PYTORCH: {"gamma": "weight", "beta": "bias"},
    GLUON: {"gamma": "gamma", "beta": "beta"},
}
COUNTED = {PYTORCH: ((), "int64"), GLUON: ((1,), "float32")}  # how many channels heads drop
SLOPE = {PYTORCH: "weight", GLUON: SLOPES}  # of a PReLU, which PyTorch's files do not tell


@dataclass(frozen=True)
class Planned:
    """An entry to be written. values: gives its array when it is its turn; dtype: stored as.

    sources: the entries that it comes from. how: what was done to them, where it is not plain.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], Array]
    sources: tuple[str, ...] = ()
    how: str = ""


Plan: TypeAlias = Sequence[Planned]  # all that is to be written, in its order


def _arrays(plan: Plan, step: Step) -> Lazy:
    """Return the arrays by name, each made when it is asked for. step: called with progress."""
    done = count()

    def made(entry: Planned) -> Array:
        step(next(done), len(plan))
        values = entry.values()
        assert values.shape == entry.shape, (entry.name, values.shape, entry.shape)
        return values

    return Lazy({entry.name: partial(made, entry) for entry in plan})


class Target(NamedTuple):
    """The layer that is written. entries: by their names in a state.

    like: the layer of a template. kind: of one that composes its kernel.
    """

    entries: dict[str, Entry]
    like: Layer | None = None
    kind: ComposedKind | None = None

    def planned(self, name: str, values: Values) -> Planned:
        """Return one of its entries, of these values."""
        entry = self.entries[name]

        def stored() -> Array:
            found = values.read()
            if name == "weight" and found.ndim > 1 and self.like is not None:
                found = self.like.stored(found)
            return found.reshape(entry.shape)

        return Planned(entry.name, entry.shape, entry.dtype, stored, values.sources, values.how)


@dataclass(frozen=True)
class Conversion:
    """How IN's layers become others. fold: whether over-parameterized ones are folded on the way.

    flattenings: what is behind flattened images, where the two files order axes otherwise; keras:
    whether it is OUT's channels that are last.
    """

    source: Contents
    fold: bool
    flattenings: Flattenings | None
    keras: bool

    def values(self, layer: Layer) -> dict[str, Values]:
        """Return a layer's arrays in the order of OUT's features."""
        found = self.source.values(layer, self.fold)
        if self.flattenings is None:
            return found
        return self.flattenings.reordered(layer, found, last=self.keras)

    def like(self, template: Contents, paired: Paired) -> Plan:
        """Return what to write: every entry of the template's layers, with IN's values.

        Raises Failure for a layer that only one of the two has, or that differs.
        """
        source = self.source
        for here, there, alone in (
            (source, template, paired.first), (template, source, paired.second)
        ):  # fmt: skip
            for layer in alone:
                raise Failure(
                    f"{place(layer.name)} is in {here.path}, but not in {there.path}; "
                    "--match order pairs layers of other names, --drop leaves out those of IN.",
                    IMPOSSIBLE,
                )
        order = {name: place for place, name in enumerate(template.entries)}
        plan = [e for a, b in paired.both for e in self._like(a, template, b)]
        return sorted(plan, key=lambda entry: order[entry.name])

    def _like(self, layer: Layer, template: Contents, other: Layer) -> list[Planned]:
        layer, other = as_prelus(layer, other)
        if family(layer) != family(other) or not _same_sizes(layer, other):
            raise _differs(self.source, layer, template, other)
        if other.origin.startswith("reference"):
            raise Failure(
                f"{template.path} has the reference implementation's layers, which are read here, "
                "not written; save it from a network of this package's layers.",
                IMPOSSIBLE,
            )
        entries = {n: template.entries[other.entries[r]] for n, r in state_names(other).items()}
        kind = other.composed
        target = Target(entries, other, kind)
        if layer.over_parameterized and not (other.over_parameterized or self.fold):
            raise Failure(
                f"{place(layer.name)} is over-parameterized in {self.source.path}, and ordinary "
                f"in {template.path}; --fold folds it.",
                IMPOSSIBLE,
            )
        values = self.values(layer)
        values.pop(COUNT if COUNT not in entries else "", None)
        if not _fits(values, target, layer.kind in NORMS):
            raise _differs(self.source, layer, template, other)
        words = sides(self.source.path, template.path)
        shapes = {name: entry.shape for name, entry in entries.items()}
        fitted = fit_arrays(values, shapes, words, kind, other.spec)
        for name, entry in entries.items():
            if name != INACTIVE:  # a small number, which every type holds
                self._check_digits(template, entry, fitted[name])
        return [target.planned(name, fitted[name]) for name in entries]

    def _check_digits(self, template: Contents, entry: Entry, values: Values) -> None:
        for source in values.sources:
            dtype = self.source.entries[source].dtype
            if entry.dtype not in HOLD.get(dtype, {dtype}):
                raise Failure(
                    f"the entry {source!r} is {dtype}, and would lose digits as {entry.dtype}, "
                    f"which {template.path} has.",
                    IMPOSSIBLE,
                )

    def by_names(
        self, framework: str, layers: Sequence[Layer], keep: Sequence[str], drop: Sequence[str]
    ) -> Plan:
        """Return what to write: every entry by its name in `framework`.

        keep, drop: glob patterns on the names of entries that no rule is for: whether to carry
        them over under their names, or leave them out. Raises Failure for an entry of which nothing
        tells what it is.
        """
        plan: list[Planned] = []
        unknown: list[str] = []
        for layer in layers:
            names, values = self._names(framework, layer), self.values(layer)
            for name, role in state_names(layer).items():
                entry = layer.entries[role]
                if matches(entry, drop) or (name == COUNT and COUNT not in names):
                    _leave_out(values, layer, name)
                elif name in values and name not in names:
                    names[name] = own_name(layer, role)
                    unknown += [entry] * (not matches(entry, keep))
            target = self._target(framework, layer, names, values)
            shapes = {name: entry.shape for name, entry in target.entries.items()}
            words = sides(self.source.path, self.source.path)
            fitted = fit_arrays(values, shapes, words)
            plan += [target.planned(name, fitted[name]) for name in target.entries]
        if unknown:
            raise _no_counterpart(self.source, unknown)
        _check_names(plan, framework)
        return plan

    def _names(self, framework: str, layer: Layer) -> dict[str, str]:
        """Return the name, within the layer, of each of its entries, where it is told."""
        if layer.kind == DYNAMIC:
            return {name: name for name in NAMES}
        if self.source.framework == framework:
            names = {name: own_name(layer, role) for name, role in state_names(layer).items()}
        elif layer.kind == BATCH_NORM:
            names = AFFINE[framework] | STATISTICS
            names |= {} if framework == GLUON else {COUNT: COUNT}
        elif layer.kind == NORM:
            names = dict(AFFINE[framework])
        elif layer.kind in (CONVOLUTION, LINEAR, TRANSPOSED):
            names = {"weight": "weight", "bias": "bias"}
        elif layer.is_prelu and self.source.framework in (GLUON, STATE, KERAS):
            self._check_slopes(layer, framework)
            names = {SLOPES: SLOPE[framework]}
        else:
            names = {}
        if layer.composed is not None:
            names |= {name: name for name in layer.composed.names}
        bias = layer.entries.get("bias")
        if layer.kind == LINEAR and bias and len(self.source.entries[bias].shape) != 1:
            del names["bias"]  # a layer norm over two axes looks like a linear layer, but for it
        return names

    def _check_slopes(self, layer: Layer, framework: str) -> None:
        shape = slopes_of(self.source.entries[layer.entries[SLOPES]].shape)
        if len(shape) > 1:
            raise Failure(
                f"{self.source.path}: {place(layer.name)} has a slope for each position, {shape}; "
                f"{framework} has one, or one for each channel: build it with shared_axes.",
                IMPOSSIBLE,
            )

    def _target(
        self, framework: str, layer: Layer, names: dict[str, str], values: Mapping[str, Values]
    ) -> Target:
        """Return the layer that is written, in the layout of PyTorch and Gluon."""
        shapes = {name: each.shape for name, each in values.items()}
        if layer.composed is not None and {*layer.composed.names} <= values.keys():
            same = prod(shapes["weight"]) == prod(layer.kernel_shape or ())
            shapes |= {"weight": layer.kernel_shape or ()} if same else {}
        dtypes = {name: each.dtype for name, each in values.items()}
        if layer.kind == DYNAMIC and INACTIVE in values:
            shapes[INACTIVE], dtypes[INACTIVE] = COUNTED[framework]
        if layer.kind == BATCH_NORM and framework == GLUON:  # whose batch norms always have both
            statistic = self.source.entries[layer.entries["running_mean"]]
            for name in (n for n in AFFINE[GLUON] if n not in state_names(layer)):
                names[name] = name
                shapes[name], dtypes[name] = statistic.shape, statistic.dtype
        return Target(
            {
                name: Entry(
                    self._full_name(framework, layer, names[name]),
                    shape,
                    "float32" if (dtypes[name], framework) == ("bfloat16", GLUON) else dtypes[name],
                )
                for name, shape in sorted(shapes.items(), key=lambda item: item[0] not in values)
            }
        )

    def _full_name(self, framework: str, layer: Layer, name: str) -> str:
        """Return an entry's name in the target; Gluon's older files have their own separator."""
        first = next(iter(layer.entries.values())).removeprefix("arg:").removeprefix("aux:")
        if self.source.framework == framework == GLUON and first.startswith(f"{layer.path}_"):
            return f"{layer.path}_{name}"
        return f"{layer.path}.{name}" if layer.path else name


def own_name(layer: Layer, role: str) -> str:
    """Return an entry's name within its layer, as its file has it; the reference's W is renamed."""
    if layer.kind == CONVOLUTION and role == "weight":
        return "weight"
    name = layer.entries[role].removeprefix("arg:").removeprefix("aux:")
    start = name.rfind(layer.path) if layer.path else -1
    ending = name[start + len(layer.path) :] if start >= 0 else name.rpartition(".")[2]
    return ending.lstrip("._/")


def _leave_out(values: dict[str, Values], layer: Layer, name: str) -> None:
    """Take an entry away; W takes what composes with it along, which alone cannot go."""
    own = weights_of(layer)
    composed = layer.kind == CONVOLUTION and name in own
    for each in (own if name == "weight" else ()) if composed else (name,):
        values.pop(each, None)


def _fits(values: Mapping[str, Values], target: Target, norm: bool) -> bool:
    """Return whether a layer's arrays are those of the target, or can become them."""
    optional = set(NEUTRAL) if norm else set()
    missing = target.entries.keys() - values.keys() - optional
    shapes = {name: each.shape for name, each in values.items()}
    if missing and target.kind is not None:
        spec = target.like.spec if target.like is not None else None
        if spec is None:  # the template does not tell its kernel's size
            return False
        shapes |= target.kind.entries(spec)
    if target.entries.keys() - shapes.keys() - optional:
        return False
    if shapes.keys() - target.entries.keys() - optional:
        return False
    return all(
        prod(shapes[name]) == prod(entry.shape)
        if name in ("weight", INACTIVE)
        else shapes[name] == (slopes_of(entry.shape) if name == SLOPES else entry.shape)
        for name, entry in target.entries.items()
        if name in shapes
    )


def _same_sizes(layer: Layer, other: Layer) -> bool:
    groups = _groups(layer), _groups(other)
    if None not in groups and groups[0] != groups[1]:
        return False
    shapes = layer.kernel_shape, other.kernel_shape
    return None in shapes or shapes[0] == shapes[1]


def _groups(layer: Layer) -> int | None:
    return layer.spec.groups if isinstance(layer.spec, ConvSpec) else None


def _differs(source: Contents, layer: Layer, template: Contents, other: Layer) -> Failure:
    return Failure(
        f"{place(layer.name)} in {source.path}, {_described(layer)}, is another than "
        f"{other.name!r} in {template.path}, {_described(other)}.",
        IMPOSSIBLE,
    )


def _described(layer: Layer) -> str:
    shape = "" if layer.kernel_shape is None else f" {layer.kernel_shape}"
    shape += f" in {groups} groups" if (groups := _groups(layer) or 1) > 1 else ""
    return f"{layer.kind}{shape} with {', '.join(layer.entries)}"


def _check_names(plan: Plan, framework: str) -> None:
    seen: dict[str, Planned] = {}
    for entry in plan:
        other = seen.setdefault(entry.name, entry)
        if other is not entry:
            both = " and ".join(repr(each.sources[0]) for each in (other, entry) if each.sources)
            raise Failure(f"the entries {both} would both be named {entry.name!r}.", IMPOSSIBLE)
        if framework == GLUON and not entry.shape:
            raise Failure(
                f"the entry {entry.name!r} has no dimension, which Gluon's files lack; --drop "
                f"'{literal(entry.sources[0])}' leaves it out.",
                IMPOSSIBLE,
            )


def _no_counterpart(source: Contents, unknown: list[str]) -> Failure:
    name = unknown[0]
    entry = source.entries[name]
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return Failure(
        f"{source.path}: nothing tells what the entry {name!r}, {entry.dtype} {entry.shape},"
        f"{more} would be in the other framework; --keep '{literal(name)}' carries it over under "
        f"its name, --drop '{literal(name)}' leaves it out.",
        IMPOSSIBLE,
    )


WORDS = {GLUON: "Gluon's"}  # files of a format, in a sentence


def write_file(
    path: Path, plan: Plan, step: Step, *, form: Format, like: Checkpoint | None = None
) -> None:
    """Write a file of a format. like: one whose form it is to have.

    Raises Failure for an entry of a type that these files lack, or that is not written here, and
    where what writes them is not installed.
    """
    for entry in plan:
        if entry.dtype not in form.TYPES:
            name = entry.sources[0] if entry.sources else entry.name
            raise Failure(
                f"the entry {name!r} is {entry.dtype}, which is not written to "
                f"{WORDS.get(form.NAME, form.NAME)} files; --drop '{literal(name)}' leaves it out.",
                IMPOSSIBLE,
            )
    entries = [Entry(entry.name, entry.shape, entry.dtype) for entry in plan]
    try:
        form.write(path, entries, _arrays(plan, step), like)
    except ImportError as error:
        raise Failure(f"a {form.NAME} file cannot be written: {error}", MISSING) from error


def write_state_like(
    path: Path,
    plan: Plan,
    step: Step,
    forms: Mapping[str, LayerForm],
    origin: Mapping[str, str],
) -> None:
    """Write a canonical state of these layers. origin: who has trained it, if that is known."""
    dtypes = {entry.name: entry.dtype for entry in plan}
    arrays = {name: array.astype(dtypes[name]) for name, array in _arrays(plan, step).items()}
    write_state(State(forms, arrays, origin), path)
