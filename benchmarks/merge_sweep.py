"""Merge the branches of timm's networks that have some, and compare with timm's own way to do it.

Run: python benchmarks/merge_sweep.py [--only GLOB …] [--resume] [--docs]

Networks are those of timm's modules whose code has a `fuse`, `reparameterize` or
`switch_to_deploy`, the smallest first, with random weights and random statistics in their batch
norms, on small images where the network takes them. Prints for each how many convolutions it has,
how many `fold(merge_branches=True)` and `timm.utils.model.reparameterize_model` leave, and how far
each one's output is from the network's. Writes `results/merge_sweep.json`, and with --docs puts the
table into `docs/merging.md`; --resume keeps the rows that are there. Needs `pip install timm`. The
exit status is 1 if a row leaves more convolutions than timm's way, or differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from merge_rows import ALLOWED, Row, document, line
from step_report import DOCS, machine, put
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from doconv_core.atomic import write_json
from doconv_torch import fold

PAGE = DOCS / "merging.md"
OWN = re.compile(r"def (fuse|reparameterize|switch_to_deploy)\(")
SMALL = 96  # rows and columns of an image, where a network takes any size
ROUNDING = 1e-7  # of an input, in float32


def main() -> int:
    """Run the sweep, print and write; return the exit status."""
    options = _options()
    torch.set_num_threads(options.threads)
    out = Path(options.out) / "merge_sweep.json"
    rows = _recorded(out) if options.resume else {}
    for name in _names(options.only or ["*"]):
        if name not in rows:
            rows[name] = tried(name)
            print(line(rows[name]), flush=True)
            write_json(out, [asdict(row) for row in rows.values()])
    if options.docs:
        versions = [f"PyTorch {torch.__version__}", f"timm {timm.__version__}"]
        told = document([*rows.values()], "timm's")
        put(PAGE, f"{machine(options.threads, versions)}.\n\n{told}")
    failed = [row for row in rows.values() if not row.holds]
    print(f"{len(rows)} networks, {len(failed)} that do not hold.")
    for row in failed:
        print("Does not hold:", line(row), file=sys.stderr)
    return bool(failed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", metavar="GLOB", help="names like this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="only what has no row yet")
    parser.add_argument("--out", default="results", help="folder for the JSON file")
    parser.add_argument("--docs", action="store_true", help="write docs/merging.md's table")
    return parser.parse_args()


def _recorded(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    return {each["name"]: Row(**each) for each in json.loads(path.read_text(encoding="utf-8"))}


def _names(patterns: Sequence[str]) -> list[str]:
    """Return the names, those with fewest parameters first."""
    modules = timm.list_modules()
    own = [m for m in modules if OWN.search(inspect.getsource(sys.modules[f"timm.models.{m}"]))]
    names = [name for module in own for name in timm.list_models(module=module)]
    chosen = [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]
    return sorted(chosen, key=_parameters)


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def tried(name: str, wide: bool = False) -> Row:
    """Return what becomes of a network. wide: whether it is to be computed in float64."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
    x, expected = _images(model)
    if not wide and relative(output(model, x * (1 + ROUNDING)), expected) > ALLOWED:
        return tried(name, True)
    if wide:
        model, x = model.double(), x.double()
        expected = output(model, x)
    begin = time.perf_counter()
    folded, report = fold(model, merge_branches=True)
    seconds = time.perf_counter() - begin
    ours, found = convolutions(folded), output(folded, x)
    before = convolutions(model)
    del folded
    theirs = reparameterize_model(model, inplace=True)
    return Row(
        name, x.shape[-1], (before, ours, convolutions(theirs)),
        tuple(relative(each, expected) for each in (found, output(theirs, x))),
        sum(change.after.startswith("Conv") for change in report.changed), seconds,
        dict(Counter(each.reason for each in report.left)), wide,
    )  # fmt: skip


def _images(model: Any) -> tuple[Tensor, Tensor]:
    """Return an image, small where the network takes such, and its output."""
    config = model.default_cfg
    channels, size, _ = config["input_size"]
    if not config.get("fixed_input_size") and not config.get("min_input_size"):
        size = min(size, SMALL)
    x = torch.randn(1, channels, size, size)
    return x, output(model, x)


@torch.inference_mode()
def output(model: Any, x: Tensor) -> Tensor:
    """Return a network's output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model(x)
    return found if isinstance(found, Tensor) else torch.cat(list(found), -1)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, of the largest output."""
    return float((found - expected).abs().max() / expected.abs().max())


def convolutions(model: nn.Module) -> int:
    """Return how many convolutions a network has."""
    return sum(isinstance(module, _ConvNd) for module in model.modules())


if __name__ == "__main__":
    sys.exit(main())
