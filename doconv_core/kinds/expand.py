"""Expansion: a kernel composed of a chain of wider convolutions, `K = R · Q · P`.

`P` is a 1×1 convolution to `r` times the input channels, `Q` one of the kernel's size, `R` a 1×1
convolution from `r` times the output channels. The first block of `Q` is the trained kernel, its
other blocks start at zero. `P` and `R` start as an identity above `r - 1` scaled ones, of which the
residuals are trained. So a layer starts as the ordinary one. Without `P` it is the collapsible
block of SESR, whose identity is a part of the kernel here.
Source: ExpandNets, arXiv 1811.10495; SESR, arXiv 2103.09404.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from doconv_core.kinds.base import Shape, register
from doconv_core.kinds.rule import KERNEL, Fixed, Rule, RuleSpec, Step, Term
from doconv_core.maths.spec import as_integer

# Blocks of Q: weight reads the first hidden inputs for the first hidden outputs. n and k count the
# other blocks of hidden inputs and outputs. front, back:
# residuals of P's and R's blocks.
ENTRIES = {
    "weight": "goim", "weight_back": "gop", "weight_back_more": "gkop", "weight_out": "gkpim",
    "weight_front": "ghi", "weight_front_more": "gnhi", "weight_in": "gnphm",
    "weight_both": "gnkphm",
}  # fmt: skip
ON_INPUTS = ("weight_front", "weight_front_more", "weight_in", "weight_both")


@dataclass(frozen=True)
class ExpandSpec(RuleSpec):
    """The sizes, and ratio: r, how many times the channels there are inside, at least 2.

    expand_inputs: whether the inputs are expanded too, as in ExpandNets, and not in SESR.
    """

    ratio: int = 2
    expand_inputs: bool = True

    def __post_init__(self) -> None:
        """Check the options; TypeError or ValueError for those that give no layer."""
        super().__post_init__()
        object.__setattr__(self, "ratio", as_integer("ratio", self.ratio, least=2))
        if not isinstance(self.expand_inputs, bool):
            raise TypeError(f"expand_inputs must be a boolean; received {self.expand_inputs!r}.")

    def own_sizes(self) -> dict[str, int]:
        """Return how many further copies of the channels there are inside."""
        return {"n": self.ratio - 1, "k": self.ratio - 1}


class ExpandKind(Rule):
    """Expansion: weight, and the further blocks of Q, the residuals of P and R."""

    name = "expand"
    about = "that of a chain of wider ones"
    arguments = (
        "ratio: how many times the channels the chain has inside, an integer of at least 2.",
        "expand_inputs: whether the inputs are expanded too, as in ExpandNets; not so in SESR.",
    )
    spec_type = ExpandSpec
    variants = MappingProxyType({"expand": {}, "sesr": {"expand_inputs": False}})
    constants = MappingProxyType(dict.fromkeys(list(ENTRIES)[1:], 0.0))

    def axes(self, spec: ExpandSpec) -> dict[str, str]:
        """Return the letters of each entry."""
        left = () if spec.expand_inputs else ON_INPUTS
        return {name: letters for name, letters in ENTRIES.items() if name not in left}

    def fixed(self, spec: ExpandSpec) -> dict[str, Fixed]:
        """Return what each further block of P and R starts as."""
        scale = spec.ratio**-0.5
        return {"start_first": Fixed("hi", scale), "start_last": Fixed("op", scale)}

    def steps(self, spec: ExpandSpec) -> tuple[Step, ...]:
        """Return the formula: Q by P, then R by that."""
        inner, outer = [Term("goim->gpim", ("weight",))], [Term("gkpim->gkpim", ("weight_out",))]
        steps = [_sum("by_last", "gkop", "weight_back_more", "op", "start_last")]
        if spec.expand_inputs:
            steps.append(_sum("by_first", "gnhi", "weight_front_more", "hi", "start_first"))
            inner += [Term("gphm,ghi->gpim", ("weight", "weight_front")),
                      Term("gnphm,gnhi->gpim", ("weight_in", "by_first"))]  # fmt: skip
            outer += [Term("gkphm,ghi->gkpim", ("weight_out", "weight_front")),
                      Term("gnkphm,gnhi->gkpim", ("weight_both", "by_first"))]  # fmt: skip
        kernel = (
            Term("gpim->goim", ("inner",)), Term("gop,gpim->goim", ("weight_back", "inner")),
            Term("gkop,gkpim->goim", ("by_last", "outer")),
        )  # fmt: skip
        return (*steps, Step("inner", (*inner,)), Step("outer", (*outer,)), Step(KERNEL, kernel))

    def recognised(self, shapes: Mapping[str, Shape]) -> Any:
        """Return the sizes of a layer of which a file tells shapes alone; None for no such layer.

        The groups follow from `weight_back`, `(O, O/g)`, the ratio from `weight_out`.
        """
        if not {"weight_back", "weight_out"} <= shapes.keys():
            return None
        outputs = shapes["weight"][0]
        groups = outputs // shapes["weight_back"][1] or 1
        ratio, expand_inputs = shapes["weight_out"][0] // outputs + 1, "weight_front" in shapes
        return self.spec_of_shapes(shapes, groups, ratio=ratio, expand_inputs=expand_inputs)


def _sum(name: str, letters: str, entry: str, of_start: str, start: str) -> Step:
    terms = Term(f"{letters}->{letters}", (entry,)), Term(f"{of_start}->{letters}", (start,))
    return Step(name, terms)


EXPAND = register(ExpandKind())
