"""What was done to the layers of a model, and why some were left, in words that all backends use.

A layer's path is its names from the model's own
down, joined by dots; the model itself has the empty path.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from doconv_core.kinds.base import ONE_TAP as ONE_TAP
from doconv_core.kinds.base import Cost
from doconv_core.maths.numeric import Difference

# Why a convolution is left as it is, in the words that every backend uses. What one framework alone
# has is in that backend.
NOT_SELECTED = "not selected by where"
ALREADY = "over-parameterized already"
SUBCLASS = "a subclass, which may compute something else"
TRANSPOSED = "a transposed convolution"
QUANTIZED = "quantized"
REPLACED = "its forward pass was replaced, and may compute something else"
COMPUTED = "its weight is computed, not a parameter of its own"
NOT_PLAIN = "its weight is not a plain parameter"
READ = "its weight is also read other than by calling it"
TIED = "it shares a weight with what is not over-parameterized alike"

# Why a batch norm is not fused.
NOT_DIRECT = "does not directly follow an ordinary convolution"
OUTPUT = "its convolution's output is used elsewhere too"
SEVERAL = "it or its convolution is used in several places"
SHARED = "its parameters, or its convolution's, are used elsewhere too"
HOOKED = "it or its convolution has hooks, which would see other values"
AXIS = "normalizes another axis than the convolution's channels"
PADDED = "the convolution that it precedes pads with zeros, which it would shift"
NOT_FINITE = "the fused kernel would not be finite"


def behind(reason: str) -> str:
    """Return why a batch norm behind a convolution is left that is itself left for `reason`."""
    return f"the convolution before it is left as it is: {reason}"


def read_elsewhere(names: Iterable[str]) -> str:
    """Return why a batch norm is left of which the model reads these attributes."""
    return f"the model reads its {', '.join(sorted(names))} other than by calling it"


def fused_into(kind: str) -> str:
    """Return what a batch norm has become that is now a part of a convolution of this kind."""
    return f"fused into {kind}"


def own_method(cls: type, method: str, advice: str) -> str:
    """Return why a layer is not folded whose class has a method of its own."""
    return (
        f"{cls.__module__}.{cls.__qualname__} has a {method} of its own, so the convolution it "
        f"would be folded to might compute something else{advice}."
    )


def place(path: str) -> str:
    """Return how a message names the layer at `path`, be it the model itself."""
    return f"layer {path!r}" if path else "the model itself"


def listed(names: Iterable[str]) -> str:
    """Return names, quoted, in a row."""
    return ", ".join(map(repr, names))


class Change(NamedTuple):
    """A layer that was replaced. path: where it is. before, after: what it was and has become.

    >>> Change("stem.conv", "Conv2d", "DOConv2d").path
    'stem.conv'
    """

    path: str
    before: str
    after: str


class Left(NamedTuple):
    """A layer that was left as it was. path: where it is. kind: what it is. reason: why.

    >>> Left("head", "Conv2d", "one tap, nothing to over-parameterize").reason
    'one tap, nothing to over-parameterize'
    """

    path: str
    kind: str
    reason: str


class FusingMethod(NamedTuple):
    """A method by which a part of a model makes other layers of its own.

    path: where the part is. kind: its class. name: the method's.

    >>> FusingMethod("stages.0", "MobileOneBlock", "reparameterize").name
    'reparameterize'
    """

    path: str
    kind: str
    name: str


@dataclass(frozen=True)
class Report:
    """What a whole-model tool did; `str` tells it.

    action: in one word, such as "over-parameterized". changed, left: the layers that it replaced
    and left, in the model's order. parameters_before, parameters_after: the model's parameters, as
    its framework counts them, each once. uncounted: how many parameters are not in these numbers,
    as their shapes are not known before the model has run. fusing: methods of parts of the model
    that have such a layer inside, and may make other weights of its weight; they are for the folded
    model.

    >>> print(Report("folded", (Change("stem", "DOConv2d", "Conv2d"),), (), 305, 224))
    folded 1 layer, left 0; parameters: 305 before, 224 after (-26.56%)
      DOConv2d -> Conv2d (1)
        stem
    """

    action: str
    changed: tuple[Change, ...]
    left: tuple[Left, ...]
    parameters_before: int
    parameters_after: int
    uncounted: int = field(default=0, kw_only=True, compare=False)
    fusing: tuple[FusingMethod, ...] = field(default=(), kw_only=True)

    def __str__(self) -> str:
        """Return the report to read: layers by what became of them, and the parameters."""
        before, after = self.parameters_before, self.parameters_after
        share = f" ({(after - before) / before:+.2%})" if before and after != before else ""
        lines = [
            f"{self.action} {_counted(len(self.changed))}, left {len(self.left)}; parameters: "
            f"{before:,} before, {after:,} after{share}{self._uncounted()}"
        ]
        lines += grouped((f"{c.before} -> {c.after}", c.path) for c in self.changed)
        if self.left:
            lines.append("left as they were:")
            lines += grouped((f"{kind}: {reason}", path) for path, kind, reason in self.left)
        if self.fusing:
            lines.append("fold before you call what may read these layers' weights:")
            lines += grouped((f"{m.kind}.{m.name}", m.path) for m in self.fusing)
        return "\n".join(lines)

    def _uncounted(self) -> str:
        """Return what the first line says of parameters that are not counted."""
        if not self.uncounted:
            return ""
        return f", without {self.uncounted} whose shapes are known once the model has run"


def _counted(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def grouped(entries: Iterable[tuple[str, str]]) -> list[str]:
    """Return a report's lines for (heading, path): each heading once, with its paths below it."""
    groups: dict[str, list[str]] = {}
    for heading, path in entries:
        groups.setdefault(heading, []).append(path or "(the model itself)")
    lines = []
    for heading, paths in groups.items():
        lines.append(f"  {heading} ({len(paths)})")
        text = ", ".join(paths)
        lines.append(
            textwrap.fill(
                text, 100, initial_indent="    ", subsequent_indent="    ",
                break_long_words=False, break_on_hyphens=False,
            )
        )  # fmt: skip
    return lines


Model = TypeVar("Model")

if TYPE_CHECKING:

    class _Converted(NamedTuple, Generic[Model]):
        model: Model
        report: Report

else:  # a generic one, as of Python 3.11, is one of any model before

    class _Converted(NamedTuple):
        model: Any
        report: Report


class Converted(_Converted[Model]):
    """What the whole-model tools return. model: the new one, or with `inplace` the one given.

    Type checkers know the model's type by it: `Converted[torch.nn.Sequential]`.

    >>> model, report = Converted("the new model", Report("folded", (), (), 0, 0))
    >>> print(report)
    folded 0 layers, left 0; parameters: 0 before, 0 after
    """

    __slots__ = ()


class Explained(NamedTuple):
    """How much of a layer's kernel the layer that replaced it started with.

    path: where the layer is. share: of the kernel's squared Frobenius norm, 0 to 1.

    >>> Explained("stem", 0.75).share
    0.75
    """

    path: str
    share: float


@dataclass(frozen=True)
class BSConvReport(Report):
    """What `to_bsconv` did. explained: of each layer that started from its former weights.

    >>> change, explained = Change("stem", "Conv2d", "BSConvU2d"), Explained("stem", 0.75)
    >>> print(BSConvReport("replaced", (change,), (), 224, 64, (explained,)))
    replaced 1 layer, left 0; parameters: 224 before, 64 after (-71.43%)
      Conv2d -> BSConvU2d (1)
        stem
    explained variance of the kernels before, 75.0% on average:
       75.0%  stem
    """

    explained: tuple[Explained, ...] = ()

    def __str__(self) -> str:
        """Return the report to read: that of every tool, and the explained variance by layer."""
        lines = [super().__str__()]
        if self.explained:
            mean = sum(share for _, share in self.explained) / len(self.explained)
            lines.append(f"explained variance of the kernels before, {mean:.1%} on average:")
            lines += [f"  {s:6.1%}  {p or '(the model itself)'}" for p, s in self.explained]
        return "\n".join(lines)


class Choice(NamedTuple):
    """What each form of a layer costs for one output position.

    path: where the layer is. kind: what it was. spec: its sizes. cost: of each form, by its name.
    """

    path: str
    kind: str
    spec: Any
    cost: Any

    def __str__(self) -> str:
        """Return the layer's sizes and costs, on one line."""
        size = "x".join(map(str, self.spec.kernel_size))
        costs: Mapping[str, Cost] = self.cost._asdict()
        forms = "; ".join(
            f"{form} {cost.parameters:,} and {cost.macs:,}" for form, cost in costs.items()
        )
        spec = self.spec
        return f"{self.kind} {spec.in_channels} -> {spec.out_channels}, {size}: {forms}"


@dataclass(frozen=True)
class FoldReport(Report):
    """What `fold` did to a model with layers that can be folded to several forms.

    forms: the one that each kind was folded to, by the kind's name. choices: what each form of each
    layer costs.

    >>> report = FoldReport("folded", (), (), 64, 64, forms={"doconv": "dense", "bsconv": "keep"})
    >>> report.forms["bsconv"]
    'keep'
    """

    forms: Mapping[str, str] = field(default_factory=dict)
    choices: tuple[Choice, ...] = ()

    def __str__(self) -> str:
        """Return the report to read: that of every tool, and the cost of every form."""
        lines = [super().__str__()]
        if self.choices:
            chosen = ", ".join(f"{kind} with form={form!r}" for kind, form in self.forms.items())
            lines.append(
                f"folded {chosen}; each form's parameters and multiply-accumulates of one output "
                "position:"
            )
            lines += grouped((str(each), each.path) for each in self.choices)
        return "\n".join(lines)


@dataclass(frozen=True)
class DeployReport(Report):
    """What `deploy` did. difference: of the outputs before and after; None without inputs.

    >>> print(DeployReport("deployed", (), (), 8, 8, difference=Difference(0.0, 0.0)))
    deployed 0 layers, left 0; parameters: 8 before, 8 after
    outputs differ by at most 0, 0 of the largest
    """

    difference: Difference | None = None

    def __str__(self) -> str:
        """Return the report to read: that of every tool, and how far the outputs differ."""
        if self.difference is None:
            return f"{super().__str__()}\nnot verified, as no inputs were given"
        absolute, relative = self.difference
        return (
            f"{super().__str__()}\noutputs differ by at most {absolute:.2g}, {relative:.2g} of the "
            "largest"
        )
