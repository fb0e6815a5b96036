"""Which names each family has, and what network each of them stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import partial
from typing import NamedTuple, TypeAlias

from doconv_core.kinds.base import Recipe
from doconv_core.networks import (
    gluon_mobilenet,
    gluon_resnet,
    mobilenetv1,
    mobilenetv2,
    mobilenetv3,
    preresnet,
    resnet,
    tutorials,
)
from doconv_core.networks.nodes import Sequence

# Of the number of classes and the kind of the convolutions that have another in a BSConv network.
Build: TypeAlias = Callable[[int, Recipe], Sequence]
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
    or "none".
    """

    pattern: str
    resolve: Callable[..., Build]
    usual: tuple[str, ...]
    dataset: Dataset
    variants: str = "none"


def listed(values: Iterable[object], last: str = "or") -> str:
    """Return "1, 2 or 3"."""
    *most, final = map(str, values)
    return f"{', '.join(most)} {last} {final}" if most else final


def _residual(name: str, build: Callable[..., Sequence], *, cifar: bool) -> Family:
    prefix = f"cifar_{name}" if cifar else name
    depths = tuple(resnet.CIFAR_UNITS if cifar else resnet.UNITS)

    def resolve(depth: str) -> Build:
        if int(depth) not in depths:
            raise ValueError(f"the depth of a {prefix} is {listed(depths)}")
        return partial(build, int(depth), cifar=cifar)

    usual = tuple(f"{prefix}{depth}" for depth in depths)
    return Family(f"{prefix}{INTEGER}", resolve, usual, CIFAR if cifar else IMAGENET, "any")


def _wide() -> Family:
    factors = {16: (1, 2, 4, 8, 10, 12), 28: (1, 2, 3, 4, 8, 10, 12), 40: (1, 2, 3, 4, 8, 10)}

    def resolve(depth: str, factor: str) -> Build:
        if int(depth) not in preresnet.WIDE_UNITS:
            raise ValueError(f"the depth of a cifar_wrn is {listed(preresnet.WIDE_UNITS)}")
        if int(factor) == 0:
            raise ValueError("the factor K of a cifar_wrnN_K is at least 1")
        return partial(preresnet.wide, int(depth), int(factor))

    usual = tuple(f"cifar_wrn{depth}_{k}" for depth, ks in factors.items() for k in ks)
    return Family(f"cifar_wrn{INTEGER}_{INTEGER}", resolve, usual, CIFAR, "any")


def _mobilenet(
    name: str,
    build: Callable[..., Sequence],
    widths: Iterable[str],
    least: Fraction,
    variants: str,
    *,
    cifar: bool,
) -> Family:
    prefix = f"cifar_{name}" if cifar else name

    def resolve(numerator: str, denominator: str | None) -> Build:
        below = int(denominator or 1)
        width = Fraction(int(numerator), below) if below else Fraction(0)
        if width < least:
            raise ValueError(
                f"the width of a {prefix} is wX or wXdY, for X or X/Y times the channels, of at "
                f"least {least}, or layers have none"
            )
        return partial(build, width, cifar=cifar)

    usual = tuple(f"{prefix}_{width}" for width in widths)
    return Family(f"{prefix}_{WIDTH}", resolve, usual, CIFAR if cifar else IMAGENET, variants)


def _mobilenets(*, cifar: bool) -> list[Family]:
    make = partial(_mobilenet, cifar=cifar)
    widths, v3_widths = ("w1", "w3d4", "w1d2", "w1d4"), ("w1", "w3d4", "w1d2", "w7d20")
    found = [
        make("mobilenetv1", mobilenetv1.mobilenetv1, widths, mobilenetv1.LEAST, "u"),
        make("mobilenetv2", mobilenetv2.mobilenetv2, widths, mobilenetv2.LEAST, "s_p1d6"),
    ]
    for size, least in mobilenetv3.LEAST.items():
        build = partial(mobilenetv3.mobilenetv3, size)
        found.append(make(f"mobilenetv3_{size}", build, v3_widths, least, "s_p1d6"))
    return found


def _fixed(networks: Mapping[str, Callable[[int], Sequence]], dataset: Dataset) -> Family:
    """Return a family of these names alone, which has no kinds of convolutions to choose."""

    def resolve(name: str) -> Build:
        return lambda classes, kind: networks[name](classes)

    pattern = f"({'|'.join(map(re.escape, networks))})"
    return Family(pattern, resolve, tuple(networks), dataset)


def _gluon_resnets() -> dict[str, Callable[[int], Sequence]]:
    builds: dict[str, Callable[..., Sequence]] = {
        "v1": gluon_resnet.resnet_v1,
        "v1b": gluon_resnet.resnet_v1b,
        "v2": gluon_resnet.resnet_v2,
    }
    found: dict[str, Callable[[int], Sequence]] = {
        f"resnet{depth}_{version}": partial(build, depth)
        for version, build in builds.items()
        for depth in gluon_resnet.UNITS
    }
    for depth, cardinality, width in ((50, 32, 4), (101, 32, 4), (101, 64, 4)):
        build = partial(gluon_resnet.resnext, depth, cardinality, width)
        found[f"resnext{depth}_{cardinality}x{width}d"] = build
    return found


def _gluon_mobilenets() -> dict[str, Callable[[int], Sequence]]:
    builds: dict[str, Callable[..., Sequence]] = {
        "mobilenet": gluon_mobilenet.v1,
        "mobilenetv2_": gluon_mobilenet.v2,
    }
    found: dict[str, Callable[[int], Sequence]] = {
        f"{name}{width}": partial(build, Fraction(width))
        for name, build in builds.items()
        for width in gluon_mobilenet.WIDTHS
    }
    sizes = ("large", "small")
    return found | {f"mobilenetv3_{size}": partial(gluon_mobilenet.v3, size) for size in sizes}


FAMILIES = (
    _residual("resnet", resnet.resnet, cifar=False),
    _residual("preresnet", preresnet.preresnet, cifar=False),
    *_mobilenets(cifar=False),
    _residual("resnet", resnet.resnet, cifar=True),
    _residual("preresnet", preresnet.preresnet, cifar=True),
    _wide(),
    *_mobilenets(cifar=True),
    _fixed({"plain18": gluon_resnet.plain}, IMAGENET),
    _fixed(_gluon_resnets(), IMAGENET),
    _fixed(_gluon_mobilenets(), IMAGENET),
    _fixed(
        {
            "tutorial_pt": tutorials.pytorch,
            "tutorial_tf": tutorials.tensorflow,
            "tutorial_gluon": tutorials.gluon,
        },
        DIGITS,
    ),
)
