"""Expansion: a kernel composed of a chain of wider convolutions, `K = R · Q · P`.

`P` is a 1×1 convolution to `r` times the input channels, `Q` one of the kernel's size, `R` a 1×1
convolution from `r` times the output channels. `W`, the trained kernel, is the first block of `Q`,
whose others start at zero; `P` and `R` start as an identity above `r - 1` scaled ones, of which the
residuals are trained. So a layer starts as the ordinary one. Without `P` it is the collapsible
block of SESR, whose identity is a part of `W` here.
Source: ExpandNets, arXiv 1811.10495; SESR, arXiv 2103.09404.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from doconv_core.kinds.base import Array, Shape, register
from doconv_core.kinds.rule import KERNEL, Rule, RuleSpec, Step, Term
from doconv_core.maths.spec import ConvSpec, as_integer

ENTRIES = {
    "weight": "goim",
    "first": "ghi",  # of P, its residual around the identity
    "last": "gop",  # of R
    "outer_inputs": "goam",  # of Q, what reads the further hidden inputs
    "outer_outputs": "gbim",  # what makes the further hidden outputs
    "outer": "gbam",  # both
    "first_outer": "gai",
    "last_outer": "gob",
}
ON_INPUTS = ("first", "outer_inputs", "outer", "first_outer")


@dataclass(frozen=True)
class ExpandSpec(RuleSpec):
    """The sizes, and ratio: r, how many times the channels there are inside, at least 2.

    expand_inputs: whether the inputs are expanded too, as in ExpandNets, and not in SESR.
    """

    ratio: int = 4
    expand_inputs: bool = True

    def __post_init__(self) -> None:
        """Check the options; TypeError or ValueError for those that give no layer."""
        super().__post_init__()
        object.__setattr__(self, "ratio", as_integer("ratio", self.ratio, least=2))
        if not isinstance(self.expand_inputs, bool):
            raise TypeError(
                f"expand_inputs must be True or False; received {self.expand_inputs!r}."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis by its letter."""
        known, more = super().sizes, self.ratio - 1
        return {**known, "a": more * known["i"], "b": more * known["o"]}


class ExpandKind(Rule):
    """Expansion: weight, and the further blocks of Q, the residuals of P and R."""

    name = "expand"
    spec_type = ExpandSpec
    constants = MappingProxyType(dict.fromkeys(list(ENTRIES)[1:], 0.0))

    def axes(self, spec: ExpandSpec) -> dict[str, str]:
        """Return the letters of each entry."""
        left = () if spec.expand_inputs else ON_INPUTS
        return {name: letters for name, letters in ENTRIES.items() if name not in left}

    def fixed(self, spec: ExpandSpec) -> dict[str, tuple[str, Array]]:
        """Return what the further blocks of P and R start as."""
        sizes, scale = spec.sizes, spec.ratio**-0.5
        inputs = scale * np.tile(np.eye(sizes["i"]), (spec.groups, spec.ratio - 1, 1))
        outputs = scale * np.tile(np.eye(sizes["o"]), (spec.groups, 1, spec.ratio - 1))
        return {"start_in": ("gai", inputs), "start_out": ("gob", outputs)}

    def steps(self, spec: ExpandSpec) -> tuple[Step, ...]:
        """Return the formula: Q by P, then R by that."""
        inner, outer = [Term("gpim->gpim", ("weight",))], [Term("gbim->gbim", ("outer_outputs",))]
        steps = []
        if spec.expand_inputs:
            steps = [Step("by_first", (Term("gai->gai", ("first_outer",)),
                                       Term("gai->gai", ("start_in",))))]  # fmt: skip
            inner += [Term("gphm,ghi->gpim", ("weight", "first")),
                      Term("gpam,gai->gpim", ("outer_inputs", "by_first"))]  # fmt: skip
            outer += [Term("gbhm,ghi->gbim", ("outer_outputs", "first")),
                      Term("gbam,gai->gbim", ("outer", "by_first"))]  # fmt: skip
        return (
            *steps, Step("inner", tuple(inner)), Step("outer_rows", tuple(outer)),
            Step("by_last", (Term("gob->gob", ("last_outer",)), Term("gob->gob", ("start_out",)))),
            Step(KERNEL, (Term("goim->goim", ("inner",)), Term("gop,gpim->goim", ("last", "inner")),
                          Term("gob,gbim->goim", ("by_last", "outer_rows")))),
        )  # fmt: skip

    def recognised(self, shapes: Mapping[str, Shape]) -> Any:
        """Return the sizes of a layer of which a file tells shapes alone; None for no such layer.

        The groups follow from `last`, `(O, O/g)`, the ratio from `outer_outputs`.
        """
        if not {"last", "outer_outputs"} <= shapes.keys():
            return None
        outputs, inputs, *size = shapes["weight"]
        groups, more = outputs // shapes["last"][1], shapes["outer_outputs"][0] // outputs
        conv = ConvSpec(inputs * groups, outputs, tuple(size), groups)
        spec = self.spec(conv, ratio=more + 1, expand_inputs="first" in shapes)
        own = {**self.entries(spec), "weight": shapes["weight"]}
        return spec if own == {name: tuple(shape) for name, shape in shapes.items()} else None


EXPAND = register(ExpandKind())
