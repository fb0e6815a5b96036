"""Which layers a file holds, as far as the names and shapes of its entries tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from doconv_core.files.entries import (
    BATCH_NORM,
    CONVOLUTION,
    FLOATS,
    LINEAR,
    OTHER,
    D,
    Entry,
    Layer,
)
from doconv_core.files.reference import find_reference
from doconv_core.files.shapes import Sizes, canonical_shape, over_parameterized, unlike
from doconv_core.kinds.base import ComposedKind, kinds
from doconv_core.kinds.do_conv import DO_CONV

# What ends an entry's name, and the role that it has. Those of batch norms, by framework.
ROLES = {
    "weight": "weight", "gamma": "weight", "bias": "bias", "beta": "bias",
    "running_mean": "running_mean", "moving_mean": "running_mean",
    "running_var": "running_var", "moving_var": "running_var",
    "num_batches_tracked": "num_batches_tracked",
}  # fmt: skip


def find_layers(
    entries: Mapping[str, Entry],
    keys: Mapping[str, str],
    sizes: Sizes,
    *,
    part: str = "",
    separators: str = "./",
    framework: str = "",
    layouts: tuple[str, ...] = ("OI*",),
) -> tuple[Layer, ...]:
    """Return the layers of one copy of a model, in the order of their first entries.

    keys: the entries' names by their names within the copy. separators: what may stand before a
    role's name. framework: of the reference implementation, where it is known. layouts: which a
    weight may have; where several fit, the first, unless the file has a layer that only the other
    fits.
    """
    shapes = {key: entries[name] for key, name in keys.items()}
    found: dict[str, Layer] = {}
    taken: set[str] = set()
    reference = find_reference(shapes, separators, sizes, framework, part)
    own = [*_over_parameterized(shapes, sizes, part, layouts), *_composed(shapes, part, layouts[0])]
    for layer in [*reference, *own]:
        if not taken.isdisjoint(layer.entries.values()):
            continue
        found[next(iter(layer.entries.values()))] = layer
        taken.update(layer.entries.values())
    layout = next((a.layout for a in found.values() if a.layout != layouts[0]), layouts[0])
    for layer in _others(shapes, taken, separators, part, layout):
        found[next(iter(layer.entries.values()))] = layer
    ordered = [found[key] for key in shapes if key in found]
    return tuple(_named(layer, keys) for layer in ordered)


def _named(layer: Layer, keys: Mapping[str, str]) -> Layer:
    """Return the layer with the entries' names in the file in place of those within the copy."""
    entries = {role: keys[key] for role, key in layer.entries.items()}
    return Layer(**{**vars(layer), "entries": entries})


def _over_parameterized(
    shapes: Mapping[str, Entry], sizes: Sizes, part: str, layouts: tuple[str, ...]
) -> Iterator[Layer]:
    """Yield this package's over-parameterized layers.

    What stands before D's name need not end in a separator: an averaged copy of a model
    may have the dots taken out of its names.
    """
    ambiguous = []
    settled = ""
    for key, depthwise in shapes.items():
        if not key.endswith(D):
            continue
        prefix = key[: -len(D)]
        weight = shapes.get(f"{prefix}weight")
        if weight is None or len(depthwise.shape) != 3 or len(weight.shape) < 3:
            continue
        roles = ("weight", "bias", D)
        names = {f"{prefix}{role}": role for role in roles}
        found = {names[k]: k for k in shapes if k in names}
        fitting = [
            layer
            for layout in layouts
            if (layer := over_parameterized(_path(prefix), part, found, shapes, layout, sizes))
        ]
        if len(fitting) > 1:
            ambiguous.append(fitting)
        elif fitting:
            settled = settled or fitting[0].layout
            yield fitting[0]
    for fitting in ambiguous:
        same = [layer for layer in fitting if layer.layout == settled]
        layer = same[0] if same else fitting[0]
        note = "" if same else f"taken to be channels first: {layer.kernel_shape} fits both layouts"
        yield Layer(**{**vars(layer), "note": layer.note or note})


def _composed(shapes: Mapping[str, Entry], part: str, layout: str) -> Iterator[Layer]:
    """Yield the layers of the other kinds that compose a kernel, by the names of their entries."""
    for kind in kinds().values():
        if not isinstance(kind, ComposedKind) or kind is DO_CONV:
            continue
        for key in (key for key in shapes if key.endswith(kind.names[1])):
            prefix = key.removesuffix(kind.names[1])
            found = {r: prefix + r for r in (*kind.names, "bias") if prefix + r in shapes}
            if (prefix and prefix[-1] not in "./") or not {*kind.names} <= found.keys():
                continue
            own = {role: shapes[name].shape for role, name in found.items() if role != "bias"}
            own["weight"] = canonical_shape(own["weight"], layout)
            spec = kind.recognised(own)
            if spec is not None and all(shapes[name].dtype in FLOATS for name in found.values()):
                yield Layer(
                    _path(prefix), CONVOLUTION, found, "doconv", part, over_parameterized=True,
                    spec=spec, kernel_shape=kind.conv(spec).kernel_shape, layout=layout,
                    composed=kind.name,
                )  # fmt: skip


def _others(
    shapes: Mapping[str, Entry], taken: set[str], separators: str, part: str, layout: str
) -> Iterator[Layer]:
    groups: dict[str, dict[str, str]] = {}
    for key in shapes:
        if key not in taken:
            prefix, role = _split(key, separators)
            roles = groups.setdefault(prefix, {})
            # Another entry may have the role already, such as gamma's; then this has its own name.
            name = key[len(prefix) :]
            roles[name if role in roles else role] = key
    for prefix, roles in groups.items():
        yield _ordinary(prefix, part, roles, shapes, layout)


def _ordinary(
    prefix: str, part: str, roles: dict[str, str], shapes: Mapping[str, Entry], layout: str
) -> Layer:
    path = _path(prefix)
    weight = shapes[roles["weight"]].shape if "weight" in roles else ()
    named = next((key for key in roles.values() if key.endswith(D)), None)
    if named is not None and not _is_depthwise(named, roles, shapes, layout):
        return _named_alike(prefix, part, roles, shapes, named)
    if "running_mean" in roles:
        return Layer(path, BATCH_NORM, roles, part=part)
    if 3 <= len(weight) <= 5 and shapes[roles["weight"]].dtype in FLOATS:
        kernel = (weight[0], weight[-1], *weight[1:-1]) if layout == "O*I" else weight
        return Layer(path, CONVOLUTION, roles, part=part, kernel_shape=kernel, layout=layout)
    if len(weight) == 2:
        return Layer(path, LINEAR, roles, part=part, kernel_shape=weight)
    return Layer(path, OTHER, roles, part=part)


def _is_depthwise(
    named: str, roles: Mapping[str, str], shapes: Mapping[str, Entry], layout: str
) -> bool:
    """Return whether an entry named as a D is the weight of a convolution named `…_depthwise`.

    So it is in the flat names of Gluon, where a convolution of one channel a group is named so, and
    no layer by the name before it has a weight.
    """
    shape = shapes[named].shape
    beside = f"{named[: -len(D)]}weight"
    if roles.get("weight") != named or beside in shapes or len(shape) < 3:
        return False
    return shape[-1 if layout == "O*I" else 1] == 1


def _named_alike(
    prefix: str, part: str, roles: dict[str, str], shapes: Mapping[str, Entry], named: str
) -> Layer:
    """Return a layer that has an entry named as a D is, and that is none of this package's.

    A D has three axes. So four are those of a depthwise convolution; anything else is not known.
    """
    rest = {role: shapes[key] for role, key in roles.items() if key != named}
    note = unlike({named[len(prefix) :]: shapes[named], **rest})
    origin = "" if len(shapes[named].shape) > 3 else "doconv"
    return Layer(_path(prefix), OTHER, roles, origin, part, note=note)


def _split(key: str, separators: str) -> tuple[str, str]:
    """Return what stands before an entry's own name, with the separator, and its role."""
    for ending, role in ROLES.items():
        prefix = key[: -len(ending)]
        if key.endswith(ending) and (not prefix or prefix[-1] in separators):
            return prefix, role
    cut = max(key.rfind(separator) for separator in "./") + 1
    return key[:cut], key[cut:]


def _path(prefix: str) -> str:
    return prefix.rstrip("./_")
