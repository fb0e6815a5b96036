"""Which names each family has, and what network each of them stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import partial
from typing import NamedTuple, TypeAlias

from doconv_core.networks import dynamic, mobilenets, resnets, tutorials
from doconv_core.networks.nodes import FAN_IN, FAN_OUT, Sequence

# Of the number of classes, the kind of the convolutions that have another in a BSConv network, and
# the family's options.
Build: TypeAlias = Callable[..., Sequence]
INTEGER = "(0|[1-9][0-9]{0,8})"
WIDTH = f"w{INTEGER}(?:d{INTEGER})?"


class Dataset(NamedTuple):
    """What a network is for. classes: their number. image: `(C, H, W)`."""

    classes: int
    image: tuple[int, int, int]


IMAGENET = Dataset(1000, (3, 224, 224))
CIFAR = Dataset(100, (3, 32, 32))
DIGITS = Dataset(10, (1, 28, 28))


class Family(NamedTuple):
    """The names of one family, without suffixes.

    pattern: a regular expression that a name matches as a whole. resolve: what builds the network,
    of what the pattern's groups match; its ValueError tells which numbers there are. usual: the
    names that are listed. dataset: what its networks are for, unless told otherwise. variants:
    which of BSConv's it has: "any", "u" (BSConv-U alone), "s_p1d6" (BSConv-S with p = 1/6 alone)
    or "none". options: what `describe` takes of it by keyword. start: as of `Network`.
    """

    pattern: str
    resolve: Callable[..., Build]
    usual: tuple[str, ...]
    dataset: Dataset
    variants: str = "none"
    options: tuple[str, ...] = ()
    start: str = FAN_IN


def enumerated(values: Iterable[object], last: str = "or") -> str:
    """Return "1, 2 or 3"."""
    *most, final = map(str, values)
    return f"{', '.join(most)} {last} {final}" if most else final


def _residual(name: str, build: Callable[..., Sequence], *, cifar: bool) -> Family:
    prefix = f"{'cifar_' * cifar}{name}"
    depths = tuple(resnets.CIFAR_UNITS if cifar else resnets.UNITS)

    def resolve(depth: str) -> Build:
        if int(depth) not in depths:
            raise ValueError(f"the depth of a {prefix} is {enumerated(depths)}")
        return partial(build, int(depth), cifar=cifar)

    usual = tuple(f"{prefix}{depth}" for depth in depths)
    return Family(f"{prefix}{INTEGER}", resolve, usual, CIFAR if cifar else IMAGENET, "any")


def _wide() -> Family:
    factors = {16: (1, 2, 4, 8, 10, 12), 28: (1, 2, 3, 4, 8, 10, 12), 40: (1, 2, 3, 4, 8, 10)}

    def resolve(depth: str, factor: str) -> Build:
        if int(depth) not in resnets.WIDE_UNITS:
            raise ValueError(f"the depth of a cifar_wrn is {enumerated(resnets.WIDE_UNITS)}")
        if int(factor) == 0:
            raise ValueError("the factor K of a cifar_wrnN_K is at least 1")
        return partial(resnets.wide, int(depth), int(factor))

    usual = tuple(f"cifar_wrn{depth}_{k}" for depth, ks in factors.items() for k in ks)
    return Family(f"cifar_wrn{INTEGER}_{INTEGER}", resolve, usual, CIFAR, "any")


def _mobilenet(
    version: str, build: Callable[..., Sequence], usual: Iterable[str], variants: str, cifar: bool
) -> Family:
    prefix, least = f"{'cifar_' * cifar}mobilenet{version}", mobilenets.LEAST[version]

    def resolve(numerator: str, denominator: str | None) -> Build:
        below = int(denominator or 1)
        width = Fraction(int(numerator), below) if below else Fraction(0)
        if width < least:
            raise ValueError(
                f"the width of a {prefix} is wX or wXdY, for X or X/Y times the channels, of at "
                f"least {least}, or layers have none"
            )
        return partial(build, width, cifar=cifar)

    names = tuple(f"{prefix}_{width}" for width in usual)
    return Family(f"{prefix}_{WIDTH}", resolve, names, CIFAR if cifar else IMAGENET, variants)


def _mobilenets(*, cifar: bool) -> list[Family]:
    usual, v3_usual = ("w1", "w3d4", "w1d2", "w1d4"), ("w1", "w3d4", "w1d2", "w7d20")
    found = [_mobilenet("v1", mobilenets.v1, usual, "u", cifar)]
    for version, table in mobilenets.TABLES.items():
        widths = usual if version == "v2" else v3_usual
        build = partial(mobilenets.inverted, table)
        found.append(_mobilenet(version, build, widths, "s_p1d6", cifar))
    return found


def _dynamic(
    prefix: str,
    depths: Iterable[int],
    build: Callable[..., Sequence],
    options: tuple[str, ...],
    *,
    cifar: bool,
    **own: bool,
) -> Family:
    prefix, depths = f"{'cifar_' * cifar}{prefix}", tuple(depths)

    def resolve(depth: str) -> Build:
        if int(depth) not in depths:
            raise ValueError(f"the depth of a {prefix} is {enumerated(depths)}")
        return partial(build, int(depth), cifar=cifar, **own)

    usual = tuple(f"{prefix}{depth}" for depth in depths)
    dataset = CIFAR if cifar else IMAGENET
    return Family(f"{prefix}{INTEGER}", resolve, usual, dataset, "none", options, FAN_OUT)


def _dynamics(*, cifar: bool) -> list[Family]:
    depths = dynamic.CIFAR_DENSENETS if cifar else dynamic.DENSENETS
    plain, own = dynamic.DENSENET_OPTIONS, dynamic.SELECTOR
    build = dynamic.densenet
    return [
        _dynamic("dydensenet", depths, build, plain + own, cifar=cifar, dynamic_groups=True),
        _dynamic("densenet", depths, build, plain, cifar=cifar, dynamic_groups=False),
        _dynamic("dyresnet", (18,), dynamic.resnet, own, cifar=cifar),
    ]


def _fixed(networks: Mapping[str, Callable[[int], Sequence]], dataset: Dataset) -> Family:
    """Return a family of these names alone, which has no kinds of convolutions to choose."""

    def resolve(name: str) -> Build:
        return lambda classes, kind: networks[name](classes)

    pattern = f"({'|'.join(map(re.escape, networks))})"
    return Family(pattern, resolve, tuple(networks), dataset)


GLUON_RESNETS: Mapping[str, Callable[[int], Sequence]] = {
    f"resnet{depth}_{version}": partial(build, depth)
    for version, build in resnets.GLUON_VERSIONS.items()
    for depth in resnets.GLUON_UNITS
} | {
    f"resnext{depth}_{groups}x{width}d": partial(resnets.resnext, depth, groups, width)
    for depth, groups, width in ((50, 32, 4), (101, 32, 4), (101, 64, 4))
}
GLUON_MOBILENETS: Mapping[str, Callable[[int], Sequence]] = {
    f"{name}{width}": partial(build, Fraction(width))
    for name, build in (("mobilenet", mobilenets.gluon_v1), ("mobilenetv2_", mobilenets.gluon_v2))
    for width in mobilenets.GLUON_WIDTHS
} | {
    "mobilenetv3_large": partial(mobilenets.gluon_v3, mobilenets.V3_LARGE),
    "mobilenetv3_small": partial(mobilenets.gluon_v3, mobilenets.V3_SMALL),
}

FAMILIES = (
    _residual("resnet", resnets.resnet, cifar=False),
    _residual("preresnet", resnets.preresnet, cifar=False),
    *_mobilenets(cifar=False),
    *_dynamics(cifar=False),
    _residual("resnet", resnets.resnet, cifar=True),
    _residual("preresnet", resnets.preresnet, cifar=True),
    _wide(),
    *_mobilenets(cifar=True),
    *_dynamics(cifar=True),
    _fixed({"plain18": resnets.plain}, IMAGENET),
    _fixed(GLUON_RESNETS, IMAGENET),
    _fixed(GLUON_MOBILENETS, IMAGENET),
    _fixed(tutorials.TUTORIALS, DIGITS),
)
