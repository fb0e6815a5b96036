"""Measure what each kind of layer costs in training, beside plain convolutions, in PyTorch.

Run: python benchmarks/kinds_step.py [--only NAME …] [--batch 16] [--size 224] [--docs]

A training step of a ResNet-18 with SGD and momentum, its peak memory, and a call of the folded
network, each kind by turns with the plain one; and the same branches computed on features, by a
convolution each, as papers draw them. With --docs `docs/kinds_cost.json` is written, and the table
of `docs/kinds.md` anew.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import kinds_table
import step_measure
import torch
from pytorchcv import model_provider
from step_measure import measure
from step_report import DOCS, machine
from step_torch import _model_step, peak
from torch import Tensor, nn

from doconv_core.atomic import write_json
from doconv_core.kinds.branches import PRESETS
from doconv_torch import fold, over_parameterize

COSTS = DOCS / "kinds_cost.json"


class Case(NamedTuple):
    """Which batch of which size."""

    batch: int
    size: int


class OnFeatures(nn.Module):
    """A 3×3 convolution and branches beside it, each a convolution of its own, without norms."""

    def __init__(self, conv: nn.Conv2d, branches: tuple[str, ...]) -> None:
        super().__init__()
        inputs, outputs = conv.in_channels, conv.out_channels
        strided = {"stride": conv.stride, "bias": False}
        ones = nn.Conv2d(inputs, outputs, 1, **strided)
        chain = nn.Sequential(
            nn.Conv2d(inputs, inputs, 1, bias=False),
            nn.Conv2d(inputs, outputs, 3, padding=1, **strided),
        )
        average = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.AvgPool2d(3, conv.stride, 1)
        )
        made: dict[str, Any] = {"kxk": conv, "1x1": ones, "1x1-kxk": chain, "1x1-avg": average}
        self.branches = nn.ModuleList(made[name] for name in branches if name in made)
        same = inputs == outputs and conv.stride == (1, 1)
        self.identity = "identity" in branches and same

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches."""
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total + x if self.identity else total


def on_features(model: nn.Module, branches: tuple[str, ...]) -> nn.Module:
    """Return a copy of the model whose 3×3 convolutions have branches on features."""
    made = copy.deepcopy(model)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.kernel_size == (3, 3):
                setattr(parent, name, OnFeatures(child, branches))
    return made


def ways() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Return how each row's network is made of the plain one, by the row's name."""
    made: dict[str, Callable[[nn.Module], nn.Module]] = {}
    for name, options in kinds_table.MEASURED.items():
        made[name] = lambda model, options=options: over_parameterize(model, **options)[0]
    for preset in ("repvgg", "dbb"):
        made[f"features: {preset}"] = lambda m, preset=preset: on_features(m, PRESETS[preset])
    return made


def measured(name: str, make: Any, case: Case, patience: float) -> dict[str, Any]:
    """Return the ratios of one way to the plain network: step, memory, folded call."""
    torch.manual_seed(0)
    plain = model_provider.get_model("resnet18")
    plain.features.final_pool = nn.AdaptiveAvgPool2d(1)
    model = make(plain)
    folded = None if name.startswith("features") else fold(copy.deepcopy(model).eval())[0]
    steps = {"plain": _model_step(plain, case), name: _model_step(model, case)}
    step = measure("PyTorch", "step", name, steps, patience)
    found = {"step": step.ratios[name], "step_spread": step.spread[name]}
    memory = {}
    for each, run in steps.items():
        gc.collect()
        memory[each] = peak(run)
    found["memory"] = memory[name] / memory["plain"]
    if folded is not None:
        x = torch.randn(case.batch, 3, case.size, case.size)
        calls = {"plain": _call(plain.eval(), x), "folded": _call(folded.eval(), x)}
        call = measure("PyTorch", "folded", name, calls, patience / 2)
        found |= {"folded": call.ratios["folded"], "folded_spread": call.spread["folded"]}
    return found


def _call(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(ways())}")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=60, help="seconds for each row")
    parser.add_argument("--rounds", type=int, default=7, help="at least, for each row")
    parser.add_argument("--docs", action="store_true", help="write docs/kinds.md's table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    step_measure.least_rounds = options.rounds
    case, found = Case(options.batch, options.size), {}
    for name, make in ways().items():
        if options.only and name not in options.only:
            continue
        found[name] = measured(name, make, case, options.patience)
        print(f"{name}: {told(found[name])}", flush=True)
    if options.docs:
        known = json.loads(COSTS.read_text(encoding="utf-8")) if COSTS.exists() else {"rows": {}}
        about = {
            "machine": machine(options.threads, [f"PyTorch {torch.__version__}"]),
            "step": f"ResNet-18, {case.batch}×{case.size}²",
        }
        write_json(COSTS, {**about, "rows": {**known["rows"], **found}})
        kinds_table.write()


def told(row: Mapping[str, float]) -> str:
    """Return a row's figures."""
    folded = f", folded {row['folded']:.3f} ± {row['folded_spread']:.3f}" if "folded" in row else ""
    return f"step {row['step']:.3f} ± {row['step_spread']:.3f}, memory {row['memory']:.3f}{folded}"


if __name__ == "__main__":
    main()
