"""Whole models and BSConv: which convolutions become one, and what the reports tell.

What every backend's `to_bsconv`, and its `fold` of BSConv layers, have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from doconv_core.kinds.bsconv import FORMS, VARIANTS, BSConvSpec, as_choice
from doconv_core.kinds.bsconv_cost import BSConvCost, bsconv_cost
from doconv_core.maths.spec import MAX_RANK, as_integer, is_sequence
from doconv_core.models.report import Report, grouped

KERNEL_SIZES = ((3, 3), (5, 5))
STARTS = ("weights", "random")

# Why a convolution does not become a BSConv.
GROUPED = "it has groups; a BSConv takes the place of a convolution with groups=1"
PART = "a part of a BSConv layer"
OVER_PARAMETERIZED = "over-parameterized; fold it first"
SHARES = "it shares a parameter with another layer"
BIAS_COMPUTED = "its bias is computed, not a parameter of its own"
WEIGHT_BOUND = "its weight has hooks, or a class of its own, and would be given up"


def other_size(kernel_size: tuple[int, ...]) -> str:
    """Return why a convolution of this kernel size is left."""
    return f"its kernel_size {kernel_size} is not among kernel_sizes"


def as_kernel_sizes(kernel_sizes: Any) -> frozenset[tuple[int, ...]]:
    """Return the kernel sizes that are meant, as tuples.

    kernel_sizes: a sequence whose entries are tuples of 1 to 3 integers, or an integer for that
    size in each number of dimensions. Raises TypeError or ValueError for anything else.
    """
    if not is_sequence(kernel_sizes) or not len(kernel_sizes):
        raise TypeError(
            "kernel_sizes must be a sequence of kernel sizes, such as ((3, 3), (5, 5)); received "
            f"kernel_sizes={kernel_sizes!r}."
        )
    sizes: set[tuple[int, ...]] = set()
    for n, entry in enumerate(kernel_sizes):
        name = f"kernel_sizes[{n}]"
        if not is_sequence(entry):
            sizes |= {(as_integer(name, entry),) * rank for rank in range(1, MAX_RANK + 1)}
        elif 1 <= len(entry) <= MAX_RANK:
            sizes.add(tuple(as_integer(f"{name}[{d}]", k) for d, k in enumerate(entry)))
        else:
            raise ValueError(
                f"{name} must have 1 to {MAX_RANK} entries; received {tuple(entry)!r}."
            )
    return frozenset(sizes)


def replacement(
    variant: str,
    kernel_sizes: Any,
    *,
    p: float,
    min_mid_channels: int,
    with_bn: bool,
    bn_options: Mapping[str, Any] | None,
    allowed: Iterable[str],
    start: str,
) -> tuple[frozenset[tuple[int, ...]], dict[str, Any]]:
    """Return the kernel sizes to replace, and the options that a layer's `from_conv` takes.

    The arguments of `to_bsconv`; allowed: the options that the framework's batch norm takes.
    Raises TypeError or ValueError for arguments that give no layer.
    """
    as_choice("variant", variant, VARIANTS)
    as_choice("start", start, STARTS)
    sizes = as_kernel_sizes(kernel_sizes)
    BSConvSpec(1, 1, (1,), variant, p, min_mid_channels, with_bn)
    batch_norm_options(with_bn, bn_options, allowed)
    options: dict[str, Any] = {"with_bn": with_bn, "bn_options": bn_options, "start": start}
    if variant == "s":
        options |= {"p": p, "min_mid_channels": min_mid_channels}
    return sizes, options


class Explained(NamedTuple):
    """How much of a layer's trained kernel its BSConv has.

    path: where the layer is. share: of the kernel's squared Frobenius norm, 0 to 1.
    """

    path: str
    share: float


@dataclass(frozen=True)
class BSConvReport(Report):
    """What `to_bsconv` did. explained: of each layer that started from its trained weights."""

    explained: tuple[Explained, ...] = ()

    def __str__(self) -> str:
        """Return the report to read: that of every tool, and the explained variance by layer."""
        lines = [super().__str__()]
        if self.explained:
            mean = sum(share for _, share in self.explained) / len(self.explained)
            lines.append(f"explained variance of the trained kernels, {mean:.1%} on average:")
            lines += [f"  {s:6.1%}  {p or '(the model itself)'}" for p, s in self.explained]
        return "\n".join(lines)


class Choice(NamedTuple):
    """What each form of a BSConv layer costs for one output position.

    path: where the layer is. kind: what it was. spec: its sizes. cost: of each form.
    """

    path: str
    kind: str
    spec: BSConvSpec
    cost: BSConvCost

    def __str__(self) -> str:
        """Return the layer's sizes and costs, on one line."""
        size = "x".join(map(str, self.spec.kernel_size))
        forms = "; ".join(
            f"{form} {cost.parameters:,} and {cost.macs:,}"
            for form, cost in zip(FORMS, self.cost, strict=True)
        )
        spec = self.spec
        return f"{self.kind} {spec.in_channels} -> {spec.out_channels}, {size}: {forms}"


def choice(path: str, kind: str, spec: BSConvSpec, stride: Iterable[int], *, bias: bool) -> Choice:
    """Return what each form of a BSConv layer costs for one output position.

    stride: of its depthwise convolution. The pointwise ones are computed at every position of the
    input, of which there are as many for each of the output as the product of the strides.
    """
    positions = 1
    for step in stride:
        positions *= step
    return Choice(path, kind, spec, bsconv_cost(spec, 1, input_positions=positions, bias=bias))


@dataclass(frozen=True)
class FoldReport(Report):
    """What `fold` did to a model with BSConv layers.

    bsconv: the form that they were folded to. choices: what each form of each costs.
    """

    bsconv: str = "keep"
    choices: tuple[Choice, ...] = ()

    def __str__(self) -> str:
        """Return the report to read: that of every tool, and the cost of every form."""
        lines = [super().__str__()]
        if self.choices:
            lines.append(
                "BSConv layers were folded "
                f"with bsconv={self.bsconv!r}; each form's parameters and "
                "multiply-accumulates of one output position:"
            )
            lines += grouped((str(each), each.path) for each in self.choices)
        return "\n".join(lines)


def as_form(bsconv: Any) -> str:
    """Return a form that BSConv layers can be folded to; ValueError lists them for another."""
    return as_choice("bsconv", bsconv, FORMS)


def batch_norm_options(
    with_bn: bool, options: Mapping[str, Any] | None, allowed: Iterable[str]
) -> dict[str, Any]:
    """Return the options of a BSConv's batch norms.

    allowed: the names that the framework's batch norm takes. Raises TypeError for other names and
    for what is no mapping, ValueError for options of batch norms that there are not.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(
            "bn_options must be a dict of the batch norm's arguments, such as {'momentum': 0.1}; "
            f"received bn_options={options!r}."
        )
    names = tuple(allowed)
    unknown = [name for name in options if name not in names]
    if unknown:
        raise TypeError(
            f"bn_options may have {', '.join(names)}; received {', '.join(map(repr, unknown))}."
        )
    if options and not with_bn:
        raise ValueError(
            f"bn_options={dict(options)!r} are for batch norms; give with_bn=True as well."
        )
    return dict(options)
