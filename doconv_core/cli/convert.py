"""`doconv convert`: a checkpoint of one framework as one of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import click

from doconv_core.atomic import format_by_suffix, replacing
from doconv_core.cli.command import (
    IMPOSSIBLE,
    Failure,
    check_form,
    check_target,
    counted,
    one_line,
    opened,
    print_json,
    print_table,
    progress,
    require_kernel_sizes,
    say,
    size,
    writing_to,
)
from doconv_core.cli.contents import NORMS, Contents
from doconv_core.cli.flattening import Flattenings, Images, Sizes
from doconv_core.cli.options import (
    KernelSizes,
    allow_option,
    flatten_option,
    force_option,
    json_option,
    kernel_size_option,
    literal,
    matches,
    source_argument,
    target_argument,
)
from doconv_core.cli.pairing import (
    OUT,
    Paired,
    Required,
    compare_metadata,
    pair_by_name,
    pair_by_order,
    print_side_by_side,
    required_of_target,
)
from doconv_core.cli.plan import Conversion, Plan, Step, write_file, write_state_like
from doconv_core.files.checkpoint import formats
from doconv_core.files.entries import KERAS, STATE
from doconv_core.files.folding import check_heads, check_understood
from doconv_core.files.layers import LINEAR, Layer
from doconv_core.models.report import place
from doconv_core.state.layers import CHANNELS_FIRST, LayerForm

Write = Callable[[Path, Plan, Step], None]
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
@allow_option
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
    allow: Sequence[str],
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
    if like is None and match != "name":
        raise click.UsageError("--match order pairs layers with those of --like, which is missing.")
    if like is not None and name is not None:
        raise click.UsageError("--to has no effect with --like, whose format OUT gets.")
    check_target(target, force)
    with ExitStack() as stack:
        contents = Contents(stack.enter_context(opened(source, kernel_sizes, allow)))
        layers = contents.copy_of_model(part)
        _check_used(layers, keep, drop, flattened)
        check_heads(source, _unsettled(layers, [*keep, *drop]))
        needed = [layer for layer in layers if contents.needs_kernel_size(layer, folded)]
        require_kernel_sizes(contents.checkpoint, needed)
        if folded:
            check_understood(source, _unsettled(layers, [*keep, *drop]))
        contents.check_plain(layers, drop)
        images = Images(flattened, ignored="flattening" in ignore)
        if like is None:
            framework, write = _target(target, name)
            found = flattenings(contents, contents, [(x, x) for x in layers], framework, images)
            conversion = Conversion(contents, folded, found, keras=False)
            plan = conversion.by_names(framework, layers, keep, drop)
            required = required_of_target(contents, layers)
        else:
            template = Contents(stack.enter_context(opened(like, (), allow)))
            check_form(target, template.checkpoint.module)
            paired = _paired(contents, _unsettled(layers, drop), template, match)
            framework = template.framework
            found = flattenings(contents, template, paired.both, framework, images)
            conversion = Conversion(contents, folded, found, keras=framework == KERAS)
            plan = conversion.like(template, paired)
            ignored = "geometry" in ignore
            required = compare_metadata(contents, template, paired.both, ignored)
            write = _writer_like(contents, template, paired)
        new = replacing(target, overwrite=force)
        with progress("converting") as step, writing_to(target), new as temporary:
            write(temporary, plan, step)
        assumed = found.assumed if found else {}
        beside = ((), ()) if like is None else template.checkpoint.beside
        _report(source, target, contents, plan, required, assumed, (like, *beside), as_json)


def _check_used(
    layers: Sequence[Layer], keep: Sequence[str], drop: Sequence[str], flattened: Sizes
) -> None:
    """Raise UsageError for a pattern that matches nothing, and so would have no effect."""
    entries = [name for layer in layers for name in layer.entries.values()]
    names = [layer.name for layer in layers if layer.kind in (LINEAR, *NORMS)]
    for option, patterns, there in (
        ("--keep", keep, entries),
        ("--drop", drop, entries),
        ("--flatten", [pattern for pattern, _ in flattened], names),
    ):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in there):
                what = "linear layer and no norm" if option == "--flatten" else "entry"
                some = ", ".join(map(repr, there[:3])) or "none"
                raise click.UsageError(
                    f"{option}: {pattern!r} matches no {what}; the file has such as {some}."
                )


def _target(target: Path, name: str | None) -> tuple[str, Write]:
    """Return the framework whose names OUT will have, and what writes it, without a template."""
    form = format_by_suffix(target.name) if name is None else formats()[name]
    if form is None:
        raise click.UsageError(f"the suffix of {target} tells no format; give it with --to.")
    check_form(target, form)
    if form.FRAMEWORK == KERAS:
        raise click.UsageError(
            f"{target}: a Keras file's names and layouts are those of one network; save it, as "
            "initialised, and give that file with --like."
        )
    return form.FRAMEWORK, partial(write_file, form=form)


def _writer_like(contents: Contents, template: Contents, paired: Paired) -> Write:
    """Return what writes a file of the template's format."""
    if template.framework == STATE:
        forms, known = dict(template.forms), contents.forms
        for layer, other in paired.both:
            if layer.path in known:
                forms[other.path] = _with_known(forms[other.path], known[layer.path])
        origin = contents.checkpoint.origin or {}
        return partial(write_state_like, forms=forms, origin=origin)
    file = template.checkpoint
    return partial(write_file, form=file.module, like=file)


def _with_known(form: LayerForm, known: LayerForm) -> LayerForm:
    """Return a layer's form with what another tells beyond the shapes, which agree."""
    norm = form.kind == known.kind == "batch_norm"
    return replace(
        form,
        spec=known.spec if norm else form.spec,
        geometry=form.geometry or known.geometry,
        flattening=known.flattening,
    )


def _unsettled(layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """Return the layers with an entry that matches none of the patterns."""
    if not patterns:
        return list(layers)
    return [
        layer
        for layer in layers
        if not all(matches(entry, patterns) for entry in layer.entries.values())
    ]


def _paired(contents: Contents, layers: Sequence[Layer], template: Contents, match: str) -> Paired:
    if match == "name":
        return pair_by_name(layers, template.copy_of_model(None))
    return paired_by_order(contents, layers, template)


def paired_by_order(contents: Contents, layers: Sequence[Layer], template: Contents) -> Paired:
    """Return the layers of two files paired by order; Failure, with both, where they differ."""
    there = template.copy_of_model(None)
    paired = pair_by_order(contents, layers, template, there)
    if paired.different is not None:
        number, text = paired.different
        print_side_by_side((contents.path, template.path), layers, there, number)
        raise Failure(
            f"{text}; layers can be paired by order only where kinds and sizes agree throughout.",
            IMPOSSIBLE,
        )
    return paired


def flattenings(
    contents: Contents,
    template: Contents,
    pairs: Sequence[tuple[Layer, Layer]],
    framework: str,
    images: Images,
) -> Flattenings | None:
    """Return what layers are behind, where IN and OUT order axes otherwise.

    pairs: layers with those of the template, which is IN itself where there is none.
    """
    layers = [layer for layer, _ in pairs]
    behind = _behind_images(contents, layers)
    if (contents.framework == KERAS) == (framework == KERAS):
        return None
    keras = contents if contents.framework == KERAS else template
    told = ((a.name, keras.fed.get((a if keras is contents else b).name)) for a, b in pairs)
    fed = {name: each for name, each in told if each is not None}
    images = images._replace(behind=behind, fed=fed, file=str(keras.path))
    return Flattenings(contents.checkpoint, layers, images, contents.ordered)


def _behind_images(contents: Contents, layers: Sequence[Layer]) -> set[str]:
    """Return the layers of a state that are behind a flattened image, of a size it does not tell.

    Raises Failure for a layer whose inputs may be in Keras' order.
    """
    behind = set()
    for layer in layers:
        form = contents.forms.get(layer.path)
        if form is None or form.flattening is None:
            continue
        if form.flattening != CHANNELS_FIRST:
            raise Failure(
                f"{contents.path}: nothing tells in which order the inputs of "
                f"{place(layer.name)} are; load the state in Python, with load_state.",
                IMPOSSIBLE,
            )
        behind.add(layer.name)
    return behind


def _report(
    source: Path,
    target: Path,
    contents: Contents,
    plan: Plan,
    required: Sequence[Required],
    assumed: Mapping[str, int],
    beside: tuple[Path | None, Sequence[str], Sequence[str]],
    as_json: bool,
) -> None:
    """Print what was written, from what, and what else must hold for it to compute the same.

    required: of the networks. assumed: linear layers taken to be behind no flattened image, with
    the channels before them. beside: a template, and what else of it OUT has, and has not.
    """
    like, kept, not_kept = beside
    for name, channels in assumed.items():
        # Where it is seen by whoever reads neither table nor JSON.
        click.echo(one_line(_assumption(name, channels)), err=True)
    used = {name for entry in plan for name in entry.sources}
    left_out = [name for name in contents.entries if name not in used]
    left_out += contents.checkpoint.others
    if as_json:
        names = ("name", "shape", "dtype", "sources", "how")
        print_json(
            {
                "source": str(source),
                "target": str(target),
                "entries": [{name: getattr(entry, name) for name in names} for entry in plan],
                "left_out": left_out,
                "required": [each._asdict() for each in required],
                "no_image_assumed": dict(assumed),
                "kept": list(kept),
                "not_kept": list(not_kept),
            }
        )
        return
    rows = []
    for entry in plan:
        sources = "the same" if entry.sources == (entry.name,) else ", ".join(entry.sources)
        origin = ": ".join(part for part in (sources, entry.how) if part)
        rows.append([entry.name, origin, size(entry.shape), entry.dtype])
    print_table(["entry", "from", "shape", "dtype"], rows, text_columns=3)
    click.echo()
    if left_out:
        say(f"left out: {', '.join(left_out)}")
    if kept:
        say(f"kept from {like}: {', '.join(kept)}")
    if not_kept:
        say(f"left out of {like}: {', '.join(not_kept)}")
    for network, what, layers in required:
        file = target if network == OUT else source
        say(f"the network of {file} must have {what}: {', '.join(layers)}")
    say(f"{target}: {counted(len(plan), 'array')} written")


def _assumption(name: str, channels: int) -> str:
    return (
        f"assumed: the {channels} inputs of {place(name)} are the channels of the layer before it "
        "in the file, not a flattened image; if they are one, give its channels and size, "
        f"--flatten '{literal(name)}=CxHxW'"
    )
