"""Print how far networks of timm that are folded from their files are from the trained ones.

Each network has random weights and a batch's statistics, and its state dict is saved.
`fold_checkpoint` folds the file, timm's own `reparameterize_model` makes the deployed network, and
that loads all of the folded file, strictly. Differences are of the outputs, relative to the
largest, beside what timm's own folding gives. All is float64, as a deep network of random weights
makes much of a last bit: in float32 some differ from themselves. timm is no requirement of this
project: `pip install timm`.

    python benchmarks/branched_files.py
    python benchmarks/branched_files.py --doconv repvgg_a0 mobileone_s0
    python benchmarks/branched_files.py --all

The exit status is 1 where one differs by more than 1e-5, or does not load.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import timm
import torch
from timm.models import reparameterize_model
from torch import nn

from doconv_core import difference, fold_checkpoint
from doconv_torch import over_parameterize

ALLOWED, SIZE = 1e-5, (3, 128, 128)
FAMILIES = ("repvgg_*", "mobileone_*", "fastvit_*", "lcnetv2_*", "ghostnetv3_*", "repghostnet_*")
# One of each kind of block, with groups, depthwise, squeeze-and-excitation and attention.
NETWORKS = (
    "repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "mobileone_s0", "mobileone_s4", "fastvit_t8",
    "fastvit_sa12", "fastvit_mci0", "lcnetv2_small", "ghostnetv3_100", "repghostnet_050",
)  # fmt: skip


def network(name: str, doconv: bool) -> nn.Module:
    """Return a network with numbers as of a training, in evaluation mode."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=10).double()
    if doconv:
        model = over_parameterize(model).model
    norms = [x for x in model.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
        for path, parameter in model.named_parameters():
            if path.endswith("depthwise_weight"):
                nn.init.normal_(parameter, std=0.05)
            elif "layer_scale" in path:
                nn.init.uniform_(parameter, 0.2, 0.8)
        model(torch.randn(4, *SIZE, dtype=torch.float64))
        for norm in norms:
            norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    return model.eval()


def compared(name: str, doconv: bool, folder: Path) -> tuple[int, float, float | None]:
    """Return how many blocks are folded, and how far apart the outputs are: ours and timm's."""
    model = network(name, doconv)
    trained, folded = folder / "trained.pt", folder / "folded.pt"
    torch.save({"state_dict": model.state_dict()}, trained)
    report = fold_checkpoint(trained, folded, overwrite=True)
    deployed = reparameterize_model(network(name, False)).eval()
    with torch.no_grad():
        x = torch.randn(2, *SIZE, dtype=torch.float64)
        expected = model(x).numpy()
        theirs = None if doconv else difference(deployed(x).numpy(), expected).relative
        deployed.load_state_dict(torch.load(folded, weights_only=True)["state_dict"])
        ours = difference(deployed(x).numpy(), expected).relative
    blocks = sum(" block of " in change.before for change in report.changed)
    return blocks, ours, theirs


def main() -> int:
    """Print a line for each network; 1 where one is too far from what was trained."""
    parser = argparse.ArgumentParser(description="Networks of timm, folded from their files.")
    parser.add_argument("--all", action="store_true", help="all names of timm's that have blocks")
    parser.add_argument("--doconv", action="store_true", help="over-parameterize them before")
    parser.add_argument("names", nargs="*", help="networks, in place of a selection")
    told = parser.parse_args()
    names = told.names or (timm.list_models(list(FAMILIES)) if told.all else NETWORKS)
    print(f"timm {timm.__version__}\n{'network':20}{'blocks':>8}{'folded file':>14}{'timm':>12}")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            blocks, ours, theirs = compared(name, told.doconv, Path(folder))
            beside = "" if theirs is None else f"{theirs:.2g}"
            print(f"{name:20}{blocks:8}{ours:14.2g}{beside:>12}", flush=True)
            worst = max(worst, ours)
    print(f"{len(names)} networks; the largest difference is {worst:.2g}")
    return int(not worst <= ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
