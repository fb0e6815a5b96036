"""The table of `docs/kinds.md`: every kind, what it computes, costs and gains.

Run: python benchmarks/kinds_table.py

What is measured comes from `docs/kinds_cost.json`, which `kinds_step.py` writes, and from
`docs/kinds_study.json`, which `evidence.py` writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from step_report import DOCS, put

COSTS, STUDY, PAGE = DOCS / "kinds_cost.json", DOCS / "kinds_study.json", DOCS / "kinds.md"


class Described(NamedTuple):
    """A row. call: of over_parameterize. published: the gain that a paper tells, and where."""

    call: str
    formula: str
    exact: str
    published: str
    options: dict[str, Any] | None = None


ALWAYS, IN_EVALUATION = "always", "in evaluation"
WITH_NORMS = {
    "repvgg": (
        "`BN(W) + BN(W₁) + BN(I)`",
        "ImageNet, of whole networks (2101.03697)",
    ),
    "mobileone": ("`Σ BN(Wⱼ) + BN(W₁) + BN(I)`", "ImageNet, of whole networks (2206.04040)"),
    "acnet": (
        "`BN(W) + BN(W₁ₖ) + BN(Wₖ₁)`",
        "CIFAR-10, + 0.3 to + 0.9 in its authors' repository (1908.03930)",
    ),
    "dbb": ("`BN(W) + BN(W₁) + BN(U BN(V)) + BN(avg BN(A))`", "ImageNet, up to + 1.9 (2103.13425)"),
    "qarepvgg": ("`BN(BN(W) + W₁ + I)`", "as RepVGG, and quantized (2212.01593)"),
    "replknet": ("`BN(W) + BN(small)`", "large kernels (2203.06717)"),
    "unireplknet": ("`BN(W) + Σ BN(dilated)`", "large kernels (2311.15599)"),
}
ROWS = {
    "doconv": Described(
        'kind="doconv"', "`K = W·(E + D)ᵀ`", ALWAYS,
        "[on ImageNet and CIFAR](data/README.md) (2006.12030)", {"kind": "doconv"},
    ),
    "branches": Described(
        'kind="branches"', "`K = s·W + s₁·pad(W₁) + s₀·I`", ALWAYS, "none without norms",
        {"kind": "branches"},
    ),
    "branches_acnet": Described(
        'kind="branches", branches="acnet"', "`s·W + s₁·pad(W₁ₖ) + s₂·pad(Wₖ₁)`", ALWAYS,
        "none without norms", {"kind": "branches", "branches": "acnet"},
    ),
    "branches_dbb": Described(
        'kind="branches", branches="dbb"', "`s·W + s₁·pad(W₁) + s₂·U·V + s₃·avg(A)`", ALWAYS,
        "none without norms", {"kind": "branches", "branches": "dbb"},
    ),
    "orepa": Described(
        'kind="branches", branches="orepa"', "DBB's sum + `s₀·I`", ALWAYS,
        "ImageNet, up to + 0.6 over branches on features (2204.00826)",
        {"kind": "branches", "branches": "orepa"},
    ),
    "ecb": Described(
        'kind="branches", branches="ecb"', "`s·W + s₁·U·V + Σ sᵢ·Aᵢ·Sobelᵢ`", ALWAYS,
        "super-resolution (ECBSR)", {"kind": "branches", "branches": "ecb"},
    ),
    "expand": Described(
        'kind="expand"', "`K = R·Q·P`", ALWAYS, "small networks, without one figure (1811.10495)",
        {"kind": "expand"},
    ),
    "sesr": Described(
        'kind="expand", expand_inputs=False', "`K = R·Q`", ALWAYS,
        "super-resolution (2103.09404)", {"kind": "expand", "expand_inputs": False},
    ),
    **{
        name: Described(
            f'kind="{name}"', formula, IN_EVALUATION, published,
            None if name.endswith("lknet") else {"kind": name},
        )
        for name, (formula, published) in WITH_NORMS.items()
    },
}  # fmt: skip
MEASURED = {name: row.options for name, row in ROWS.items() if row.options is not None}
HEAD = ("kind", "kernel", "folds exactly", "step", "memory", "folded", "published", "our study")


def table() -> str:
    """Return the table as Markdown."""
    costs, study = _read(COSTS).get("rows", {}), _read(STUDY)
    lines = [f"| {' | '.join(HEAD)} |", f"|{'-|' * len(HEAD)}"]
    for name, row in ROWS.items():
        cost = costs.get(name)
        step = _figure(cost, "step"), _figure(cost, "memory"), _figure(cost, "folded")
        cells = [f"`{row.call}`", row.formula, row.exact, *step, row.published]
        lines.append(f"| {' | '.join([*cells, study.get(name, '')])} |")
    for name, cost in costs.items():
        if name.startswith("features: "):
            step = _figure(cost, "step"), _figure(cost, "memory"), ""
            told = f"the branches of `{name.partition(': ')[2]}` on features, without norms"
            lines.append(f"| {' | '.join([told, '', '', *step, '', ''])} |")
    return "\n".join(lines)


def _figure(cost: dict[str, float] | None, name: str) -> str:
    return f"{cost[name]:.2f}" if cost and name in cost else ""


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def write() -> None:
    """Write the table into the page."""
    put(PAGE, table())


if __name__ == "__main__":
    write()
