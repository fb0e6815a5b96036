"""The heads of dynamic group convolutions in files: this package's, and those of their source.

The source's implementation keeps the arrays of each head, such as `headconv_0.conv.weight`, and
beside them `_inactive_channels`; a layer here has one array of all heads.
Source: Dynamic Group Convolution, arXiv 2007.04242, its implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from doconv_core.files.entries import FLOATS, Array, Entry
from doconv_core.kinds.dgc import SOURCE, from_source

Shape = tuple[int, ...]

NAMES = ("weight", "squeeze_weight", "saliency_weight", "saliency_bias", "inactive")
WEIGHT, SQUEEZE, *_, INACTIVE = NAMES
OF_HEAD = dict(zip(("conv.weight", "fc1.weight", "fc2.weight", "fc2.bias"), NAMES, strict=False))
COUNTER = "_inactive_channels"


def find_heads(names: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what stands before the names of each layer's heads, and the entries by their own.

    Of this package's, all have to be there, as others have such names, too.
    """
    found: dict[str, dict[str, str]] = {}
    known = {*names}
    for key in names:
        part, own = SOURCE.fullmatch(key), key.removesuffix(SQUEEZE)
        if part is not None:
            found.setdefault(part[1], {})[key.removeprefix(part[1])] = key
        elif own != key and known >= {own + name for name in NAMES}:
            found[own] = {name: own + name for name in NAMES}
    for prefix, roles in found.items():
        counter = {COUNTER: prefix + COUNTER} if prefix + COUNTER in known else {}
        yield prefix, roles | counter


def is_of_source(roles: Iterable[str]) -> bool:
    """Return whether entries with these roles are the heads of the source's implementation."""
    return any(map(SOURCE.fullmatch, roles))


def parts(roles: Iterable[str]) -> dict[str, list[str]]:
    """Return which roles make up each array of heads, by its name in a state."""
    found: dict[str, list[str]] = {}
    for role in roles:
        part = SOURCE.fullmatch(role)
        name = OF_HEAD[part[3]] if part else role.replace(COUNTER, INACTIVE)
        found.setdefault(name, []).append(role)
    return found


def shape_of(name: str, entries: Mapping[str, Entry]) -> Shape:
    """Return the shape of an array of heads, of whose entries by role these are."""
    roles = parts(entries)[name]
    shape = entries[roles[0]].shape
    if name == INACTIVE:  # of one axis where a format has none without
        return ()
    if not is_of_source(roles):
        return shape
    return (len(roles) * shape[0], *shape[1:]) if name == WEIGHT else (len(roles), *shape)


def kernel_of(entries: Mapping[str, Entry]) -> Shape | None:
    """Return the shape of the kernel of heads; None where these entries, by role, make no heads.

    The axes of the weight, and so the kernel's, are in the order of a state.
    """
    by_name = parts(entries)
    if {*by_name} != {*NAMES}:
        return None
    for name, roles in by_name.items():
        numbers = {int(part[2]) for part in map(SOURCE.fullmatch, roles) if part}
        shapes = {entries[role].shape for role in roles}
        plain = all(entries[role].dtype in FLOATS for role in roles) or name == INACTIVE
        if numbers != {*range(len(numbers))} or len(shapes) > 1 or not plain:
            return None
    if entries[by_name[INACTIVE][0]].size != 1 or len(entries[by_name[WEIGHT][0]].shape) < 3:
        return None
    kernel, squeeze, rate, bias, _ = (shape_of(name, entries) for name in NAMES)
    outputs, channels, *_ = kernel
    heads, squeezed = (*squeeze, 0, 0)[:2]
    fits = [squeeze, rate, bias] == [
        (heads, squeezed, channels), (heads, channels, squeezed), (heads, channels)
    ]  # fmt: skip
    return kernel if fits and heads and outputs % heads == 0 else None


def unlike_heads(entries: Mapping[str, Entry]) -> str:
    """Return the note on entries, by role, that are named like the source's heads and are none."""
    told = []
    for roles in parts(entries).values():
        shapes = dict.fromkeys(entries[role].shape for role in roles)
        sizes = " and ".join(map(str, shapes))
        told.append(f"{len(roles)} of {roles[0].partition('.')[2] or roles[0]} {sizes}")
    return (
        "named like the heads of a dynamic group convolution, but its entries make none: "
        f"{', '.join(told)}"
    )


def read_heads(name: str, entries: Mapping[str, str], read: Callable[[str], Array]) -> Array:
    """Return an array of heads. entries: the layer's, by role. read: gives an entry's values."""
    arrays = {role: read(entries[role]) for role in parts(entries)[name]}
    (array,) = from_source(arrays).values()
    return array.reshape(()) if name == INACTIVE else array
