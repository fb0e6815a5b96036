"""`doconv fold`: a checkpoint with every over-parameterized layer folded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from doconv_core.cli.command import (
    check_form,
    check_target,
    opened,
    print_json,
    print_report,
    progress,
    require_kernel_sizes,
    say,
    writing_to,
)
from doconv_core.cli.options import (
    KernelSizes,
    allow_option,
    epsilon_option,
    force_option,
    json_option,
    kernel_size_option,
    source_argument,
    target_argument,
)


@click.command(short_help="Fold a checkpoint's over-parameterized layers.")
@click.argument("source", metavar="IN", type=source_argument)
@click.argument("target", metavar="OUT", type=target_argument)
@kernel_size_option
@allow_option
@epsilon_option
@force_option
@json_option
def fold(
    source: Path,
    target: Path,
    kernel_sizes: KernelSizes,
    allow: Sequence[str],
    epsilon: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write to OUT what is in IN, with every over-parameterized layer folded.

    Names, order and everything else in the file stay. OUT has the format of IN, and may be IN, with
    --force. A kernel that is not finite is refused. Blocks of branches in training checkpoints of
    RepVGG, MobileOne, FastViT and others of timm's networks become the convolutions that their
    deployed networks have, and this package's layers of branches ordinary ones. What of their batch
    norms the file does not tell is in the report, and --epsilon says it.

    \b
    Examples:
      doconv fold model.pt folded.pt
      doconv fold model.pt model.pt --force
      doconv fold reference.pt folded.pt --kernel-size 'conv1*=1x3'
      doconv fold repvgg-train.pth repvgg-deploy.pth
    """  # noqa: D301
    check_target(target, force)
    before = source.stat().st_size  # IN may be OUT
    with opened(source, kernel_sizes, allow, epsilon) as checkpoint:
        check_form(target, checkpoint.module)
        require_kernel_sizes(checkpoint, checkpoint.layers)
        with progress("folding") as step, writing_to(target):
            report = checkpoint.fold(target, overwrite=force, progress=step)
    if as_json:
        print_json(
            {
                "source": str(source),
                "target": str(target),
                "changed": [change._asdict() for change in report.changed],
                "left": [left._asdict() for left in report.left],
                "parameters_before": report.parameters_before,
                "parameters_after": report.parameters_after,
                "bytes_before": before,
                "bytes_after": target.stat().st_size,
            }
        )
        return
    print_report(report)
    say(f"{target}: {target.stat().st_size:,} bytes; {source} had {before:,}")
