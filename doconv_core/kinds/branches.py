"""Branches: a kernel that is a sum of scaled smaller kernels, `K = Σ s_b · pad(K_b)`.

Each branch has a scale for each output channel. The branch "kxk" is the trained kernel; the others
start at zero, so a layer starts as the ordinary one. Which there are, says `branches`: a name of
what a paper has, of `PRESETS`, or names of `BRANCHES`.
Source: OREPA, arXiv 2204.00826; ACNet, 1908.03930; RepVGG, 2101.03697; DBB, 2103.13425; ECBSR.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

from doconv_core.kinds.base import Shape, register
from doconv_core.kinds.rule import KERNEL, Fixed, Rule, RuleSpec, Step, Term
from doconv_core.maths.spec import is_sequence

KXK, IDENTITY, CHAIN = "kxk", "identity", "1x1-kxk"
FILTERS = {
    "1x1-sobelx": ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0)),
    "1x1-sobely": ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0)),
    "1x1-laplacian": ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0)),
}
ASYMMETRIC = {"1xk": "t", "kx1": "s"}  # the letters of their taps
BRANCHES = (KXK, "1x1", IDENTITY, "1xk", "kx1", CHAIN, "1x1-avg", *FILTERS)
PRESETS = {
    "repvgg": (KXK, "1x1", IDENTITY),
    "acnet": (KXK, "1xk", "kx1"),
    "dbb": (KXK, "1x1", CHAIN, "1x1-avg"),
    "ecb": (KXK, CHAIN, *FILTERS),
    "orepa": (KXK, "1x1", IDENTITY, CHAIN, "1x1-avg"),
}

DEFAULT = PRESETS["repvgg"]


def taps_of(branch: str, kernel_size: tuple[int, ...]) -> list[list[float]] | None:
    """Return which taps of the kernel each tap of a branch becomes, `(T, M)`.

    None where a kernel of this size has no such branch. The centre of an even size is the tap that
    "same" padding puts on the position. Layers ask while they compute, and torch.compile follows
    numbers, not arrays of NumPy.

    >>> taps_of("kx1", (2, 2))
    [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    """
    rank, taps = len(kernel_size), prod(kernel_size)
    centre = [(size - 1) // 2 for size in kernel_size]
    if branch in FILTERS:
        if rank != 2 or min(kernel_size) < 3:
            return None
        row, column, values = centre[0] - 1, centre[1] - 1, FILTERS[branch]
        filled = [0.0] * taps
        for y in range(3):
            for x in range(3):
                filled[(row + y) * kernel_size[1] + column + x] = values[y][x]
        return [filled]
    if branch == "1x1-avg":
        return [[1 / taps] * taps]
    whole = {"1xk": range(1, rank), "kx1": range(1)}.get(branch, range(0))
    kept = [0]  # the numbers of the taps, in their order
    for axis in range(rank):
        size = kernel_size[axis]
        there = range(size) if axis in whole else range(centre[axis], centre[axis] + 1)
        kept = [at * size + place for at in kept for place in there]
    if len(whole) and not 1 < len(kept) < taps:
        return None
    return [[float(at == place) for place in range(taps)] for at in kept]


def as_names(branches: Any) -> tuple[str, ...]:
    """Return the branches, in the order of `BRANCHES`, that a preset or names of them stand for.

    Raises ValueError for what is neither, and without the trained kernel.

    >>> as_names("acnet")
    ('kxk', '1xk', 'kx1')
    """
    names = PRESETS.get(branches) if isinstance(branches, str) else branches
    if names is None or not is_sequence(names) or any(n not in BRANCHES for n in names):
        raise ValueError(
            f"branches must be one of {', '.join(map(repr, PRESETS))}, or some of "
            f"{', '.join(map(repr, BRANCHES))}; received {branches!r}."
        )
    if KXK not in names or len({*names}) < len(names):
        raise ValueError(
            f"branches must have {KXK!r}, which is the trained kernel, and each name once; "
            f"received {branches!r}."
        )
    return tuple(name for name in BRANCHES if name in names)


@dataclass(frozen=True)
class BranchesSpec(RuleSpec):
    """The sizes, and branches: names of `BRANCHES`, "kxk" among them, or one of `PRESETS`.

    Branches that a kernel of these sizes cannot have are left out: "identity" where a group has
    other numbers of input and output channels, "1xk" and "kx1" of rank 1, filters of Sobel and
    Laplace but in two dimensions of three taps or more.
    """

    branches: tuple[str, ...] = DEFAULT

    def __post_init__(self) -> None:
        """Check the options; TypeError or ValueError for those that give no layer."""
        super().__post_init__()
        there = tuple(name for name in as_names(self.branches) if self._suits(name))
        object.__setattr__(self, "branches", there)

    def own_sizes(self) -> dict[str, int]:
        """Return the taps of the smaller kernels."""
        first, *rest = self.kernel_size
        return {"t": prod(rest), "s": first}

    def _suits(self, branch: str) -> bool:
        if branch == IDENTITY:
            return self.in_channels == self.out_channels
        return branch in (KXK, CHAIN) or taps_of(branch, self.kernel_size) is not None


def _entry(what: str, branch: str) -> str:
    return f"{what}_{branch.replace('-', '_')}"


class BranchesKind(Rule):
    """A sum of branches: weight, "kxk"; `weight_…` and `scale_…` of each; `weight_front_1x1_kxk`.

    The last is a residual around the identity, of the 1×1 kernel in front of the other.
    """

    name = "branches"
    about = "a sum of scaled smaller ones"
    arguments = (
        f"branches: one of {', '.join(PRESETS)}, or names of branches, kxk among them: ",
        f"{', '.join(BRANCHES[:7])},",
        f"{', '.join(BRANCHES[7:])}. The default is kxk, 1x1, identity.",
    )
    spec_type = BranchesSpec
    variants = MappingProxyType(
        {"branches": {}, "orepa": {"branches": "orepa"}, "ecb": {"branches": "ecb"}}
        | {f"branches_{name}": {"branches": name} for name in ("acnet", "dbb", "repvgg")}
    )
    constants = MappingProxyType(
        {_entry("scale", KXK): 1.0}
        | {_entry("weight", b): 0.0 for b in BRANCHES if b not in (KXK, IDENTITY)}
        | {_entry("scale", b): float(b != IDENTITY) for b in BRANCHES[1:]}
        | {_entry("weight_front", CHAIN): 0.0}
    )

    def kept(self, options: Mapping[str, Any], spec: BranchesSpec) -> dict[str, Any]:
        """Return the branches that are asked for: what suits is known with the channels."""
        return {"branches": as_names(options.get("branches") or DEFAULT)}

    def axes(self, spec: BranchesSpec) -> dict[str, str]:
        """Return the letters of each entry."""
        found = {"weight": "goim"}
        for branch in spec.branches:
            found[_entry("scale", branch)] = "go"
            if branch == CHAIN:
                found |= {_entry("weight", branch): "gohm", _entry("weight_front", branch): "ghi"}
            elif branch in ASYMMETRIC:
                found[_entry("weight", branch)] = f"goi{ASYMMETRIC[branch]}"
            elif branch not in (KXK, IDENTITY):
                found[_entry("weight", branch)] = "goi"
        return {name: found[name] for name in self.names if name in found}

    def fixed(self, spec: BranchesSpec) -> dict[str, Fixed]:
        """Return the taps of each smaller kernel, and the identity."""
        found = {"one": Fixed("oi")} if IDENTITY in spec.branches else {}
        for branch in ("1x1", *spec.branches):
            taps, letter = taps_of(branch, spec.kernel_size), ASYMMETRIC.get(branch)
            if branch not in (KXK, CHAIN) and taps is not None:
                values = taps if letter else taps[0]
                found[f"taps_{branch}"] = Fixed(f"{letter or ''}m", values=values)
        return found

    def steps(self, spec: BranchesSpec) -> tuple[Step, ...]:
        """Return the formula: each branch scaled, and the sum of all with their taps in place."""
        centre, steps, kernel = [], [], [Term("go,goim->goim", (_entry("scale", KXK), "weight"))]
        for branch in spec.branches:
            pair = _entry("scale", branch), _entry("weight", branch)
            if branch == "1x1":
                centre.append(Term("go,goi->goi", pair))
            elif branch == IDENTITY:
                centre.append(Term("go,oi->goi", (pair[0], "one")))
            elif branch == CHAIN:
                steps.append(Step(branch, (Term("go,gohm->gohm", pair),)))
                kernel.append(Term("gohm->goim", (branch,)))
                kernel.append(Term("gohm,ghi->goim", (branch, _entry("weight_front", branch))))
            elif branch != KXK:
                axes = f"goi{ASYMMETRIC.get(branch, '')}"
                steps.append(Step(branch, (Term(f"go,{axes}->{axes}", pair),)))
                taps = f"{ASYMMETRIC.get(branch, '')}m"
                kernel.append(Term(f"{axes},{taps}->goim", (branch, f"taps_{branch}")))
        if centre:
            steps.append(Step("centre", tuple(centre)))
            kernel.append(Term("goi,m->goim", ("centre", "taps_1x1")))
        return (*steps, Step(KERNEL, tuple(kernel)))

    def recognised(self, shapes: Mapping[str, Shape]) -> Any:
        """Return the sizes of a layer of which a file tells shapes alone; None for no such layer.

        Its branches are those of which it has entries.
        """
        outputs, inputs = shapes["weight"][:2]
        groups = shapes.get(_entry("weight_front", CHAIN), (inputs,))[0] // inputs or 1
        if _entry("scale", IDENTITY) in shapes:
            groups = outputs // inputs or 1
        there = [b for b in BRANCHES if _entry("scale", b) in shapes]
        return self.spec_of_shapes(shapes, groups, branches=there)


BRANCHED = register(BranchesKind())
