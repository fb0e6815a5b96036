"""Networks by name: what `describe` and `list_models` of every package know.

A name is a family's own, then `_bsconvu` or `_bsconvs_pXdY` for a BSConv network, or `_doconv` for
one whose convolutions of more than one tap are over-parameterized. Behind other words, such as
`_branches`, `_orepa` or `_expand`, they are of another kind; behind a rule's, such as `_repvgg` or
`_dbb`, they are branches with batch norms, each in the place of a convolution and the batch norm
behind it. No list has such names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

from doconv_core.kinds.base import ComposedKind, Recipe, kinds, of_word, recipe
from doconv_core.kinds.normed import RULES, BranchedKind
from doconv_core.maths.spec import as_integer
from doconv_core.networks.families import FAMILIES, INTEGER, Build, Family, enumerated
from doconv_core.networks.nodes import ORDINARY, Conv, Network, Sequence, replaced
from doconv_core.networks.normed import with_branches

# What follows a family's own name, and what each family has of it; the first listed are the usual.
BSCONV = re.compile(f"(.+)_bsconv(?:(u)|s_p{INTEGER}d{INTEGER})")
LISTED = {
    "any": ("_bsconvu", "_bsconvs_p1d4"),
    "u": ("_bsconvu",),
    "s_p1d6": ("_bsconvs_p1d6",),
    "none": (),
}


def describe(
    name: str, *, num_classes: int | None = None, in_channels: int | None = None, **options: Any
) -> Network:
    """Return the network of this name, as data.

    num_classes: how many logits it gives; None for as many as the data set has that it is for,
    1000 of ImageNet, 100 of CIFAR, or 10 digits. in_channels: of its input; None for the data
    set's. options: of a dydensenet stages, growth, bottleneck and group_3x3, and of it and a
    dyresnet heads, squeeze_rate and gate_factor.
    Raises ValueError for a name that gives no network, with what is allowed and the nearest names,
    and for a number below 1; TypeError for what is no name or no integer, and for other options.

    >>> network = describe("mobilenetv1_w1d2_bsconvu", num_classes=10)
    >>> network.input_shape, [name for name, _ in network.body.children][:3]
    ((3, 224, 224), ['input_bn', 'stem', 'stage1'])
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string; received {name!r}.")
    try:
        family, build = _parsed(name)
    except _Unknown as error:
        nearest = enumerated(map(repr, _nearest(name, error.names)), "and")
        raise ValueError(
            f"{name!r} is no network: {error.reason}; the nearest are {nearest}."
        ) from None
    classes, (channels, *size) = family.dataset
    if num_classes is not None:
        classes = as_integer("num_classes", num_classes)
    if in_channels is not None:
        channels = as_integer("in_channels", in_channels)
    for option in options:
        if option not in family.options:
            taken = enumerated(family.options, "and") if family.options else "no options"
            raise TypeError(f"{name!r} takes {taken}; received {option}={options[option]!r}.")
    body = build(classes, **options)
    return Network(name, body, (channels, size[0], size[1]), family.start)


def known_name(name: object) -> str | None:
    """Return the name if there is a network of this name, or None."""
    if not isinstance(name, str):
        return None
    try:
        _parsed(name)
    except _Unknown:
        return None
    return name


def options_of(name: str) -> tuple[str, ...]:
    """Return the options that `describe` takes of this network; ValueError as there.

    >>> options_of("cifar_densenet86")
    ('stages', 'growth', 'bottleneck', 'group_3x3')
    """
    describe(name)
    return _parsed(name)[0].options


def with_kind(name: str) -> tuple[str, str | None]:
    """Return a name without that of branches with batch norms at its end, and their kind.

    None where it has no such end, or what it stands behind is no network's name.

    >>> with_kind("cifar_resnet20_repvgg"), with_kind("cifar_resnet20_doconv")
    (('cifar_resnet20', 'repvgg'), ('cifar_resnet20_doconv', None))
    """
    plain, _, word = name.rpartition("_")
    return (plain, word) if word in RULES and known_name(plain) is not None else (name, None)


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that match, family by family.

    pattern: as in a shell, such as "cifar_*_bsconvu". Of families with free numbers the usual
    are listed: `describe` knows other widths of MobileNets and wide ResNets, and other shares p.
    Raises TypeError for what is no string.

    >>> list_models("cifar_resnet20_bs*")
    ['cifar_resnet20_bsconvu', 'cifar_resnet20_bsconvs_p1d4']
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string; received {pattern!r}.")
    return [name for name in _all_names() if fnmatchcase(name, pattern)]


def of_kind(network: Network, word: str) -> Network:
    """Return a network whose convolutions of more than one tap have their kernels composed.

    word: a kind's, as `recipe` takes it. Of one with batch norms in its branches, those that it
    takes with the batch norm behind them; ValueError where there are none.
    """
    return replace(network, body=_changed(network.body, word))


def _changed(body: Sequence, word: str) -> Sequence:
    made, kind = recipe(word), of_word(word)
    if isinstance(kind, BranchedKind):
        return with_branches(body, kind)

    def change(conv: Conv) -> Conv:
        return replace(conv, kind=made) if prod(conv.kernel_size) > 1 else conv

    changed: Sequence = replaced(body, change)
    return changed


def _built(build: Build, kind: Recipe, word: str | None, classes: int, **options: Any) -> Sequence:
    """Return the nodes; with a word, convolutions are of its kind, as `of_kind` says."""
    body = build(classes, kind, **options)
    return body if word is None else _changed(body, word)


def _nearest(name: str, names: tuple[str, ...]) -> list[str]:
    """Return three names: those that only lack an ending first, such as a version's, or a dash.

    names: those of the name's family, or all.
    """
    given = re.sub("[^a-z0-9]", "", name.lower())
    begins = re.compile("[_.]*".join(given) + r"(?!\d)")
    alike = [each for each in (*names, *_all_names()) if given and begins.match(each)]
    close = get_close_matches(name.lower(), names, 3, 0)
    return list(dict.fromkeys([*sorted(alike, key=len), *close]))[:3]


class _Unknown(Exception):
    """There is no network of a name. names: of which the nearest are worth telling."""

    def __init__(self, reason: str, names: tuple[str, ...]) -> None:
        super().__init__(reason)
        self.reason, self.names = reason, names


def _parsed(name: str) -> tuple[Family, Callable[..., Sequence]]:
    """Return a name's family, and what builds the network, of the number of classes."""
    # The word of the kind that all convolutions are of, if the name ends with one.
    known = sorted((*_composed_words(listed=False), *RULES), key=len, reverse=True)
    word = next((word for word in known if name.endswith(f"_{word}")), None)
    plain = name if word is None else name.removesuffix(f"_{word}")
    suffix = BSCONV.fullmatch(plain)
    base = suffix[1] if suffix else plain
    for family in FAMILIES:
        found = re.fullmatch(family.pattern, base)
        if found is None:
            continue
        try:
            build = family.resolve(*found.groups())
            kind = _kind(family, suffix) if suffix else ORDINARY
            if kind != ORDINARY and word is not None and family.variants != "s_p1d6":
                raise ValueError("the convolutions within a BSConv are not over-parameterized")
        except ValueError as error:
            raise _Unknown(str(error), _names_of(family)) from None
        return family, partial(_built, build, kind, word)
    raise _Unknown("no family has such names", _all_names())


def _kind(family: Family, suffix: re.Match[str]) -> Recipe:
    """Return the kind that a suffix stands for, where the family has it."""
    is_u = suffix[2] is not None
    if not is_u and not 0 < int(suffix[3]) <= int(suffix[4]):
        raise ValueError("the share p of BSConv-S is X/Y in pXdY, above 0 and at most 1")
    allowed = family.variants
    told = suffix[0].removeprefix(suffix[1])
    if allowed != "any" and told not in LISTED[allowed]:
        but = f" but {enumerated(LISTED[allowed])}" if LISTED[allowed] else ""
        raise ValueError(f"{suffix[1]} has no BSConv variant{but}")
    if is_u:
        return recipe("bsconvu")
    return recipe("bsconvs", p=int(suffix[3]) / int(suffix[4]), with_bn=True)


def _composed_words(*, listed: bool = True) -> tuple[str, ...]:
    composed = [kind for kind in kinds().values() if isinstance(kind, ComposedKind)]
    more = () if listed else (word for kind in composed for word in kind.variants)
    return (*(word for kind in composed for word in kind.words), *more)


def _names_of(family: Family) -> tuple[str, ...]:
    suffixes = ("", *LISTED[family.variants], *(f"_{word}" for word in _composed_words()))
    return tuple(name + suffix for suffix in suffixes for name in family.usual)


def _all_names() -> tuple[str, ...]:
    return tuple(name for family in FAMILIES for name in _names_of(family))
