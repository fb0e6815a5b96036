"""What `doconv convert` tells of what it has done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from doconv_core.cli.checkpoints import literal
from doconv_core.cli.errors import one_line
from doconv_core.cli.output import counted, print_json, print_table, size
from doconv_core.cli.planning import Plan
from doconv_core.cli.told import OUT, Required
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.models.report import place


def report(
    source: Path,
    target: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    required: Sequence[Required],
    assumed: Mapping[str, int],
    as_json: bool,
) -> None:
    """Print what was written, from what, and what else must hold for it to compute the same.

    required: of the networks. assumed: linear layers taken to be behind no flattened image, with
    the channels before them.
    """
    for name, channels in assumed.items():
        # Where it is seen by whoever reads neither table nor JSON.
        click.echo(one_line(_assumption(name, channels)), err=True)
    used = {name for entry in plan.entries for name in entry.sources}
    left_out = [name for name in checkpoint.entries if name not in used]
    left_out += checkpoint.others
    if as_json:
        names = ("name", "shape", "dtype", "sources", "how")
        entries = [{name: getattr(entry, name) for name in names} for entry in plan.entries]
        print_json(
            {
                "source": str(source),
                "target": str(target),
                "entries": entries,
                "left_out": left_out,
                "required": [each._asdict() for each in required],
                "no_image_assumed": dict(assumed),
            }
        )
        return
    rows = []
    for entry in plan.entries:
        sources = "the same" if entry.sources == (entry.name,) else ", ".join(entry.sources)
        origin = ": ".join(part for part in (sources, entry.how) if part)
        rows.append([entry.name, origin, size(entry.shape), entry.dtype])
    print_table(["entry", "from", "shape", "dtype"], rows, text_columns=3)
    click.echo()
    if left_out:
        click.echo(one_line(f"left out: {', '.join(left_out)}"))
    for network, what, layers in required:
        file = target if network == OUT else source
        click.echo(one_line(f"the network of {file} must have {what}: {', '.join(layers)}"))
    click.echo(one_line(f"{target}: {counted(len(plan.entries), 'array')} written"))


def _assumption(name: str, channels: int) -> str:
    return (
        f"assumed: the {channels} inputs of {place(name)} are the channels of the layer before it "
        "in the file, not a flattened image; if they are one, give its channels and size, "
        f"--flatten '{literal(name)}=CxHxW'"
    )
