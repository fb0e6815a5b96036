"""Measure how long BSConvs take in inference in each form that they fold to, in PyTorch on the CPU.

Run: python benchmarks/bsconv_inference.py [--quick] [--docs]

In one process, by turns: the ordinary convolution, or network, and the BSConv folded as "keep",
"merge" and "dense", with the batch norms of every network fused. Prints a table of ratios to the
first, writes `results/bsconv_inference.json`, and with --docs puts the table into `docs/bsconv.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from step_measure import Row, Way, measure
from step_report import DOCS, machine, put
from torch import Tensor, nn
from tqdm import tqdm

from doconv_core import NotFoldable
from doconv_core.atomic import write_json
from doconv_core.kinds.bsconv import FORMS, BSConvRecipe
from doconv_core.networks.names import describe
from doconv_core.networks.nodes import Conv, Network, replaced
from doconv_torch import BSConvS2d, BSConvU2d, build, fold, verify

# Channels, and rows and columns, of layers with as many operations each; networks and their inputs.
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
NETWORKS = (("cifar_resnet20", 32), ("resnet18", 224))
QUICK = slice(1)
PAGE = DOCS / "bsconv.md"


class Case(NamedTuple):
    """A BSConv layer or network, the ordinary one that it stands for, and an input of both."""

    what: str
    name: str
    model: nn.Module
    ordinary: nn.Module
    x: Tensor


def main() -> None:
    """Measure, print and write."""
    options = _options()
    if options.docs and options.quick:
        raise SystemExit("--docs is for a whole run, without --quick.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [*layers(options.batch, options.quick), *networks(options.batch, options.quick)]
    rows = [measured(case, options.patience) for case in tqdm(cases, unit="row", disable=None)]
    described = machine(options.threads, [f"PyTorch {torch.__version__}"])
    described = f"{described}; batches of {options.batch}"
    print(table(rows))
    out = Path(options.out) / "bsconv_inference.json"
    write_json(out, {"machine": described, "rows": [row._asdict() for row in rows]})
    print(f"Written: {out}")
    if options.docs:
        put(PAGE, f"{described}.\n\n{table(rows)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size of layers, one of networks")
    parser.add_argument("--batch", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=5, help="seconds for each row")
    parser.add_argument("--out", default="results", help="folder for the JSON file")
    parser.add_argument("--docs", action="store_true", help="write docs/bsconv.md's table")
    return parser.parse_args()


def layers(batch: int, quick: bool) -> Iterator[Case]:
    """Yield a BSConv of each variant for each size, without batch norms."""
    for channels, size in LAYERS[QUICK] if quick else LAYERS:
        x = torch.randn(batch, channels, size, size)
        arguments = (channels, channels, 3, 1, 1)
        ordinary = nn.Conv2d(*arguments)
        for name, cls in (("BSConv-U", BSConvU2d), ("BSConv-S", BSConvS2d)):
            case = f"{name} {channels}→{channels} @{size}²"
            yield Case("layer", case, cls(*arguments), ordinary, x)


def networks(batch: int, quick: bool) -> Iterator[Case]:
    """Yield the networks: BSConv-U, BSConv-S, and that without batch norms in its BSConvs."""
    for name, size in NETWORKS[QUICK] if quick else NETWORKS:
        x = torch.randn(batch, 3, size, size)
        ordinary = build(describe(name)).eval()
        for suffix in ("_bsconvu", "_bsconvs_p1d4"):
            network = describe(name + suffix)
            yield Case("network", network.name, build(network).eval(), ordinary, x)
        bare = build(without_inner_norms(network)).eval()
        yield Case("network", f"{network.name}, no inner batch norms", bare, ordinary, x)


def without_inner_norms(network: Network) -> Network:
    """Return the network without batch norms between the convolutions of its BSConvs."""

    def change(conv: Conv) -> Conv:
        if not isinstance(conv.kind, BSConvRecipe):
            return conv
        return replace(conv, kind=replace(conv.kind, with_bn=False))

    return replace(network, body=replaced(network.body, change))


def measured(case: Case, patience: float) -> Row:
    """Measure the ordinary layer or network, and every form that the BSConv one folds to."""
    ways = {"ordinary": way(fold(case.ordinary, fuse_batchnorm=True).model, case.x)}
    for form in FORMS:
        try:
            folded = fold(case.model, form=form, fuse_batchnorm=True).model
        except NotFoldable:  # batch norms between convolutions that pad with zeros
            continue
        found = verify(folded, case.model, case.x).relative
        if found > 1e-4:
            raise SystemExit(f"{case.name}: {form!r} differs by {found}.")
        ways[form] = way(folded, case.x)
    return measure("PyTorch", case.what, case.name, ways, patience)


def way(model: nn.Module, x: Tensor) -> Way:
    """Return a function that calls the model in inference mode."""
    model.eval()

    @torch.inference_mode()
    def call() -> Tensor:
        return model(x)

    return call


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table: the ordinary one's time, and the forms' ratios to it."""
    lines = [f"| | ordinary | {' | '.join(FORMS)} |", f"|-|-|{'-|' * len(FORMS)}"]
    for row in rows:
        time = f"{1000 * row.seconds['ordinary']:.3g} ms"
        cells = [
            f"{row.ratios[form]:.2f} ± {row.spread[form]:.2f}" if form in row.ratios else "-"
            for form in FORMS
        ]
        lines.append(f"| {row.case} | {time} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
