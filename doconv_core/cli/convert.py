"""`doconv convert`: a checkpoint of one framework as one of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click

from doconv_core.atomic import replacing
from doconv_core.cli import writing
from doconv_core.cli.checkpoints import (
    check_target,
    force_option,
    json_option,
    kernel_size_option,
    literal,
    opened,
    require_kernel_sizes,
    source_argument,
    target_argument,
    writing_to,
)
from doconv_core.cli.errors import IMPOSSIBLE, Failure
from doconv_core.cli.flattening import Flattenings, Sizes, Told, fed_by_config, flatten_option
from doconv_core.cli.like import Template
from doconv_core.cli.listing import report
from doconv_core.cli.naming import Renaming, matches
from doconv_core.cli.output import progress
from doconv_core.cli.pairing import Paired, pair_by_name, pair_by_order, require_order
from doconv_core.cli.parse import KernelSizes
from doconv_core.cli.planning import Plan, needs_kernel_size
from doconv_core.cli.recognised import (
    GLUON,
    KERAS,
    STATE,
    framework_of,
    recognised_layers,
    seems_channels_last,
)
from doconv_core.cli.told import Required, compare_told, required_without_template
from doconv_core.files.checkpoint import Checkpoint
from doconv_core.files.entries import Layer
from doconv_core.files.folding import check_understood
from doconv_core.files.formats import formats
from doconv_core.models.report import place
from doconv_core.state.file import read_state
from doconv_core.state.layers import CHANNELS_FIRST

Write = Callable[[Path, Plan, writing.Step], None]
# What `--to` takes, of formats whose names and layouts are not those of one network.
TARGETS = ("pytorch", "safetensors", "gluon")


@click.command(short_help="Convert a checkpoint to another framework's.")
@click.argument("source", metavar="IN", type=source_argument)
@click.argument("target", metavar="OUT", type=target_argument)
@click.option(
    "--like", type=source_argument, metavar="FILE",
    help="A file saved from the network that OUT is for. OUT gets its names, order and layouts.",
)  # fmt: skip
@click.option(
    "--match", type=click.Choice(["name", "order"]), default="name", show_default=True,
    help="How the layers of IN are paired with those of --like.",
)  # fmt: skip
@click.option(
    "--to", "name", type=click.Choice(TARGETS), help="Format of OUT, where no suffix tells it."
)
@click.option("--fold", "folded", is_flag=True, help="Fold over-parameterized layers on the way.")
@click.option("--part", help="Of several copies of a model in IN, such as an average, which one.")
@flatten_option
@click.option(
    "--keep", multiple=True, metavar="GLOB",
    help="Entries to carry over under their own names, where nothing tells what they are.",
)  # fmt: skip
@click.option("--drop", multiple=True, metavar="GLOB", help="Entries to leave out.")
@click.option(
    "--ignore", multiple=True, type=click.Choice(["geometry", "flattening"]),
    help="geometry: strides, dilations and paddings need not agree where both files tell them. "
    "flattening: --flatten holds where the config of a Keras file tells otherwise.",
)  # fmt: skip
@kernel_size_option
@force_option
@json_option
def convert(
    source: Path,
    target: Path,
    like: Path | None,
    match: str,
    name: str | None,
    folded: bool,
    part: str | None,
    flattened: Sizes,
    keep: Sequence[str],
    drop: Sequence[str],
    ignore: Sequence[str],
    kernel_sizes: KernelSizes,
    force: bool,
    as_json: bool,
) -> None:
    """Write to OUT, as a file of another framework, the arrays in IN.

    Over-parameterized layers stay so, and those of the reference implementation become this
    package's; --fold makes ordinary ones of all. PyTorch and Gluon files differ in a few names;
    other targets need --like. Of strides, paddings and epsilons, which few files tell, what the
    network must have is listed: compare the outputs of the two networks.

    \b
    Examples:
      doconv convert model.pt model.params
      doconv convert model.params model.safetensors --fold
      doconv convert model.pt model.keras --like fresh.keras --match order
      doconv convert reference.pt model.pt
    """  # noqa: D301
    check_target(target, force)
    with ExitStack() as stack:
        checkpoint = stack.enter_context(opened(source, kernel_sizes))
        layers = _layers(checkpoint, part)
        needed = [layer for layer in layers if needs_kernel_size(checkpoint, layer, folded)]
        require_kernel_sizes(checkpoint, needed)
        if folded:
            check_understood(source, _unsettled(layers, [*keep, *drop]))
        images = Told(flattened, ignored="flattening" in ignore)
        _check_plain(checkpoint, layers, drop)
        if like is None:
            how = _by_names(checkpoint, layers, _target(target, name), folded, keep, drop, images)
        else:
            template = stack.enter_context(opened(like, ()))
            layers = _unsettled(layers, drop)
            how = _like(checkpoint, layers, template, folded, match, "geometry" in ignore, images)
        new = replacing(target, overwrite=force)
        with progress("converting") as step, writing_to(target), new as temporary:
            how.write(temporary, how.plan, step)
        report(source, target, checkpoint, how.plan, how.required, how.assumed, as_json)


class _Conversion(NamedTuple):
    """How IN becomes OUT. required, assumed: as `listing.report` tells them."""

    write: Write
    plan: Plan
    required: list[Required]
    assumed: dict[str, int]


def _by_names(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    target: tuple[str, Write],
    folded: bool,
    keep: Sequence[str],
    drop: Sequence[str],
    images: Told,
) -> _Conversion:
    """Return how a file becomes one by the names of the target's framework."""
    framework, write = target
    pairs = [(layer, layer) for layer in layers]
    flattenings = _flattenings(checkpoint, checkpoint, pairs, framework, images)
    renaming = Renaming(framework_of(checkpoint), framework, folded, keep, drop, flattenings)
    plan = renaming.plan(checkpoint, layers)
    required = required_without_template(checkpoint, layers)
    return _Conversion(write, plan, required, flattenings.assumed if flattenings else {})


def _like(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    template: Checkpoint,
    folded: bool,
    match: str,
    ignore_geometry: bool,
    images: Told,
) -> _Conversion:
    """Return how a file becomes one like the template."""
    framework = framework_of(template)
    paired = _paired(checkpoint, layers, template, match)
    flattenings = _flattenings(checkpoint, template, paired.both, framework, images)
    plan = Template(checkpoint, template, folded, flattenings, framework == KERAS).plan(paired)
    required = compare_told(checkpoint, template, paired.both, ignore_geometry)
    write = _writer_like(checkpoint, template, framework, paired)
    return _Conversion(write, plan, required, flattenings.assumed if flattenings else {})


def _target(target: Path, name: str | None) -> tuple[str, Write]:
    """Return the framework whose names OUT will have, and what writes it, without a template."""
    known = formats()
    # The longest suffix: that of a sharded file ends in others'.
    by_suffix = {suffix: each for each in known.values() for suffix in each.SUFFIXES}
    fitting = [suffix for suffix in by_suffix if target.name.lower().endswith(suffix)]
    if name is None and not fitting:
        raise click.UsageError(f"the suffix of {target} tells no format; give it with --to.")
    form = by_suffix[max(fitting, key=len)] if name is None else known[name]
    if form.FRAMEWORK == KERAS:
        raise click.UsageError(
            f"{target}: a Keras file's names and layouts are those of one network; save it, as "
            "initialised, and give that file with --like."
        )
    return form.FRAMEWORK, partial(writing.write, form=form)


def _writer_like(
    checkpoint: Checkpoint, template: Checkpoint, framework: str, paired: Paired
) -> Write:
    """Return what writes a file of the template's format."""
    if framework == STATE:
        source = checkpoint.path if framework_of(checkpoint) == STATE else None
        paths = {other.path: layer.path for layer, other in paired.both}
        return partial(writing.write_state_like, template=template.path, source=source, paths=paths)
    return partial(writing.write, form=template.module, like=template)


def _layers(checkpoint: Checkpoint, part: str | None) -> list[Layer]:
    """Return the layers of one copy of the model, the first unless another is asked for."""
    parts = checkpoint.parts
    if part is not None and part not in parts:
        raise click.UsageError(
            f"{checkpoint.path} has no part {part!r}; it has {', '.join(map(repr, parts))}."
        )
    chosen = parts[0] if part is None and parts else part
    layers = [layer for layer in recognised_layers(checkpoint) if layer.part == chosen]
    for layer in layers:
        if framework_of(checkpoint) == GLUON and seems_channels_last(layer):
            raise Failure(
                f"{checkpoint.path}: the kernel {layer.kernel_shape} of {place(layer.name)} looks "
                "like one of a channels-last network, which the file does not tell; load it in "
                "Gluon, and carry it over with export_state.",
                IMPOSSIBLE,
            )
    return layers


def _unsettled(layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """Return the layers with an entry that matches none of the patterns."""
    return [
        layer
        for layer in layers
        if not all(matches(entry, patterns) for entry in layer.entries.values())
    ]


def _check_plain(checkpoint: Checkpoint, layers: Sequence[Layer], drop: Sequence[str]) -> None:
    """Raise Failure for an entry that is no plain array and is not to be left out."""
    for name in (name for layer in layers for name in layer.entries.values()):
        entry = checkpoint.entries[name]
        if not entry.is_plain and not matches(name, drop):
            raise Failure(
                f"{checkpoint.path}: the entry {name!r} is {entry.dtype}, no plain array, and is "
                f"not converted; --drop '{literal(name)}' leaves it out.",
                IMPOSSIBLE,
            )


def _flattenings(
    checkpoint: Checkpoint,
    template: Checkpoint,
    pairs: Sequence[tuple[Layer, Layer]],
    framework: str,
    images: Told,
) -> Flattenings | None:
    """Return what layers are behind, where IN and OUT order axes otherwise.

    pairs: layers with those of the template, which is IN itself where there is none.
    """
    source, layers = framework_of(checkpoint), [layer for layer, _ in pairs]
    if source == STATE:
        images = images._replace(behind=_behind_images(checkpoint, layers))
    if (source == KERAS) == (framework == KERAS):
        return None
    keras = checkpoint if source == KERAS else template
    fed = fed_by_config(keras, [pair[keras is not checkpoint] for pair in pairs])
    named = {layer.name: fed[number] for number, layer in enumerate(layers) if number in fed}
    images = images._replace(fed=named, file=str(keras.path))
    return Flattenings(checkpoint, layers, images, checkpoint.ordered)


def _behind_images(checkpoint: Checkpoint, layers: Sequence[Layer]) -> set[str]:
    """Return the layers of a state that are behind a flattened image, of a size it does not tell.

    Raises Failure for a layer whose inputs may be in Keras' order.
    """
    forms = read_state(checkpoint.path).layers
    for layer in layers:
        form = forms.get(layer.path)
        if form is not None and form.flattening not in (None, CHANNELS_FIRST):
            raise Failure(
                f"{checkpoint.path}: nothing tells in which order the inputs of "
                f"{place(layer.name)} are; load the state in Python, with load_state.",
                IMPOSSIBLE,
            )
    found = {path for path, form in forms.items() if form.flattening == CHANNELS_FIRST}
    return {layer.name for layer in layers if layer.path in found}


def _paired(
    checkpoint: Checkpoint, layers: Sequence[Layer], template: Checkpoint, match: str
) -> Paired:
    there = _layers(template, None)
    if match == "name":
        return pair_by_name(layers, there)
    require_order(checkpoint, template)
    return pair_by_order(checkpoint, layers, template, there)
