"""`doconv train`: a network by name from images to a folded, verified model, in one run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from doconv_core.backends import available_backends
from doconv_core.cli.command import (
    DIVERGED,
    INTERRUPTED,
    TARGET,
    Failure,
    say,
)
from doconv_core.cli.cost import network_options
from doconv_core.cli.initial import Initial, state_from
from doconv_core.cli.options import set_option, source_argument
from doconv_core.kinds.base import of_word
from doconv_core.kinds.normed import BranchedKind
from doconv_core.models.report import Report
from doconv_core.networks import names
from doconv_core.networks.families import enumerated
from doconv_core.networks.initialize import initialize, with_new_kernels
from doconv_core.networks.nodes import Network
from doconv_core.networks.shapes import for_input
from doconv_core.training import run as runs
from doconv_core.training.claim import ClaimLost
from doconv_core.training.data import (
    DATA_SETS,
    BrokenImages,
    DataError,
    ImageData,
    batches,
    open_data,
)
from doconv_core.training.recipe import Recipe, changed, default_recipe, from_json
from doconv_core.training.recipe import recipe as recipe_by_name
from doconv_core.training.session import DiskFull, Interrupted, NotFinite

PRECISIONS = ("float32", "bfloat16", "float16")
# What may be other where a run is gone on with.
CHANGEABLE = ("data_dir", "max_broken", "devices", "checkpoint_every", "workers")


backend_option = click.option(
    "--backend", type=click.Choice([*available_backends()]), help="The framework."
)
data_option = click.option(
    "--data", default="digits", show_default=True, metavar="NAME",
    help=f"The images: {enumerated(DATA_SETS)}.",
)  # fmt: skip
data_dir_option = click.option(
    "--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Where the images are."
)
broken_option = click.option(
    "--max-broken", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
    help="How many unreadable images may be left out, in training for others.",
)  # fmt: skip
recipe_option = click.option(
    "--recipe", "recipe_name", metavar="NAME|FILE",
    help="Another recipe than the network's own; see doconv recipes.",
)  # fmt: skip
devices_option = click.option(
    "--devices", metavar="N|NAME", help="The device, such as cuda:1, or how many each with a part."
)
precision_option = click.option(
    "--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True,
    help="What is computed in; weights stay in float32.",
)  # fmt: skip
kind_option = click.option(
    "--kind", metavar="KIND",
    help="Of layers in the places of NETWORK's convolutions: doconv, branches, orepa, repvgg, …",
)  # fmt: skip
workers_option = click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True,
    help="Processes that read images.",
)  # fmt: skip


@click.command(short_help="Train a network, fold it, and verify what came of it.")
@click.argument("network", required=False)
@backend_option
@data_option
@data_dir_option
@broken_option
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="RUN",
    help="The folder that the run gets.",
)  # fmt: skip
@click.option(
    "--from", "start", type=source_argument, metavar="FILE|RUN",
    help="Start from the weights in a file, in place of new ones.",
)  # fmt: skip
@kind_option
@recipe_option
@set_option
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the first weights and of the batches.")  # fmt: skip
@devices_option
@precision_option
@click.option(
    "--checkpoint-every", type=click.IntRange(min=1), metavar="STEPS",
    help="Also make a checkpoint every so many steps, beside those after each epoch.",
)  # fmt: skip
@workers_option
@click.option("--resume", is_flag=True, help="Go on with the run in RUN, which tells the rest.")
@click.option("--force", is_flag=True, help="Replace the run in RUN.")
@network_options
@click.pass_context
def train(ctx: click.Context, /, **given: Any) -> None:
    """Train NETWORK by a recipe; then fold it, and verify the folded model on the evaluation data.

    Everything is in the folder RUN: the settings, the metrics of each epoch, checkpoints, and at
    the end the folded weights and a report. A run that was ended, however that came, goes on with
    --resume, and comes to the same weights.

    NETWORK is a name such as cifar_resnet20_doconv, as of doconv cost. Its weights are the same in
    every framework. Without --data it learns the digits of scikit-learn.

    \b
    Examples:
      doconv train cifar_resnet20_doconv --backend torch --out run
      doconv train cifar_resnet20_doconv --backend tf --data cifar100 --data-dir cifar --out run
      doconv train cifar_resnet20 --kind repvgg --backend torch --from plain.pt --out run
      doconv train --resume --out run
      doconv train resnet18_v1b_doconv --backend torch --data folder --data-dir imagenet
        --precision bfloat16 --workers 8 --set epochs=90 --out run
      torchrun --nproc-per-node 8 -m doconv_core.cli train resnet50_v1b --backend torch --out run
    """  # noqa: D301
    out, resume, force = given.pop("out"), given.pop("resume"), given.pop("force")
    if resume:
        _resume(ctx, out, force, given)
        return
    for name, flag in (("network", "NETWORK"), ("backend", "--backend")):
        if given[name] is None:
            raise click.UsageError(f"{flag} is missing; a run that is gone on with needs --resume.")
    with refused():
        runs.check_new(out, force)
        job = Job.of(given)
        recipe = _recipe(job, given["recipe_name"], given["changes"])
        if job.start is not None:
            recipe = replace(recipe, zero_last_gamma=False)
    _train(job, recipe, out, force=force)


class Job(NamedTuple):
    """What a run is told beside its recipe; kept in `run.json`, so that it can be gone on with."""

    network: str
    options: Mapping[str, Any]
    backend: str
    data: str
    data_dir: str | None
    max_broken: int
    start: str | None
    seed: int
    devices: str | None
    precision: str
    checkpoint_every: int | None
    workers: int
    kind: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Job:
        """Return what options say."""
        own = {name: given[name] for name in cls._fields if name != "options"}
        for name in ("data_dir", "start"):
            own[name] = None if own[name] is None else str(own[name])
        others = {*cls._fields, "recipe_name", "changes"}
        options = {n: v for n, v in given.items() if n not in others and v is not None}
        if own["kind"] is None:  # the same, and states of the plain network are taken
            own["network"], own["kind"] = names.with_kind(own["network"])
        return cls(**own, options=options)


def _recipe(job: Job, name: str | None, changes: Sequence[tuple[str, str]]) -> Recipe:
    chosen = default_recipe(job.network, job.data) if name is None else recipe_by_name(name)
    return changed(chosen, dict(changes))


def _resume(ctx: click.Context, out: Path, force: bool, given: Mapping[str, Any]) -> None:
    """Go on with the run in a folder, by what its `run.json` says."""
    named = [
        name
        for name in given
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    fixed = [name for name in named if name not in CHANGEABLE]
    if fixed or force:
        raise click.UsageError(
            "--resume takes all from the run but --data-dir, --max-broken, --devices, "
            "--checkpoint-every and --workers."
        )
    with refused():
        run = runs.open_run(out)
    told = run.described["notes"].get("job")
    if told is None:
        raise Failure(
            f"{out} was not begun by doconv train; go on with it in Python, by train(resume=True).",
            TARGET,
        )
    changes: dict[str, Any] = {n: given[n] for n in named}
    if "data_dir" in changes:
        changes["data_dir"] = str(changes["data_dir"])
    with refused():
        job = Job(**told)._replace(**changes)
        recipe = from_json(run.described["recipe"])
    _train(job, recipe, out, resume=True)


def _train(
    job: Job, recipe: Recipe, out: Path, *, resume: bool = False, force: bool = False
) -> None:
    with refused():
        data = open_data(job.data, job.data_dir, max_broken=job.max_broken)
        backend = available_backends()[job.backend].load()
        # What a framework may need around a model that several processes are to train.
        with getattr(backend, "cluster_scope", nullcontext)():
            model = _model(backend, job, recipe, data, fresh=not resume)
    with refused(ValueError), told_of_run():
        backend.train(
            model, recipe, data, run=out, seed=job.seed, resume=resume, force=force,
            precision=job.precision, devices=job.devices, checkpoint_every=job.checkpoint_every,
            workers=job.workers, notes={"job": job._asdict(), "options": dict(job.options)},
        )  # fmt: skip


def _model(backend: Any, job: Job, recipe: Recipe, data: ImageData, *, fresh: bool) -> Any:
    """Return the network for the data's images, with the weights that it starts from."""
    image = image_shape(data, recipe)
    model = backend.get_model(
        job.network, num_classes=len(data.classes), in_channels=image[0], input_shape=image,
        seed=job.seed, **job.options,
    )  # fmt: skip
    network = described(job.network, image, data, job.options)
    branched = isinstance(of_word(job.kind or ""), BranchedKind)
    found = None
    if job.start is not None and fresh:
        found = _found(Path(job.start), network, job.kind if branched else None)
        if found.kept is not None:
            say(f"{job.start} is of other classes: the layer {found.kept!r} starts anew")
        if not found.number:
            backend.load_state(model, found.state)
    if job.kind is None:
        return model
    model, report = of_kind(backend, model, job.network, job.kind)
    if fresh:
        say(f"{len(report.changed)} layers of kind {job.kind}, {len(report.left)} left")
    if fresh and branched:
        state = None if found is None or not found.number else found.state
        if state is None:  # new kernels are the seed's, as those of the network by name
            own = names.of_kind(network, job.kind)
            state = with_new_kernels(backend.export_state(model), own, job.seed)
        backend.load_state(model, state)
    return model


def _found(start: Path, network: Network, kind: str | None) -> Initial:
    """Return what a file is for a network, or for the same with its layers of a kind, if any."""
    networks = {network.name: network}
    if kind is not None:
        networks[f"{network.name}_{kind}"] = names.of_kind(network, kind)
    fresh = [replace(initialize(x), origin={"network": name}) for name, x in networks.items()]
    return state_from(start, *fresh)


def of_kind(backend: Any, model: Any, network: str, kind: str) -> tuple[Any, Report]:
    """Return a network with layers of a kind, and the report.

    ValueError where none of its layers becomes one.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model has no convolution")  # as the error says
        model, report = backend.over_parameterize(model, kind=kind, inplace=True)
    if not report.changed:
        reasons = "; ".join(dict.fromkeys(left.reason for left in report.left))
        raise ValueError(f"{network} has no layer that becomes one of kind {kind!r}: {reasons}.")
    return model, report


def image_shape(data: ImageData, recipe: Recipe) -> tuple[int, int, int]:
    """Return the shape of the images that a network is evaluated on, `(C, H, W)`."""
    one = replace(recipe, batch_size=1, accumulate=1)
    drawn = batches(data.val, len(data.classes), one, training=False, layout="NCHW")
    for batch in drawn:
        channels, height, width = batch.images.shape[1:]
        return channels, height, width
    raise ValueError(f"the data {data.name!r} have no image to evaluate on.")


def described(
    network: str, image: tuple[int, int, int], data: ImageData, options: Mapping[str, Any]
) -> Network:
    """Return a network by name for the data's classes and images."""
    classes = len(data.classes)
    found = names.describe(network, num_classes=classes, in_channels=image[0], **options)
    return for_input(found, image)


def load_file(
    backend: Any,
    model: Any,
    file: Path,
    network: str,
    image: tuple[int, int, int],
    data: ImageData,
    options: Mapping[str, Any],
) -> str | None:
    """Load a file of any format into a network by name.

    Returns the last layer's path where the file is one of other classes, so that it stays as new.
    """
    found = _found(file, described(network, image, data, options), None)
    backend.load_state(model, found.state)
    return found.kept


@contextmanager
def refused(*kinds: type[Exception]) -> Iterator[None]:
    """Tell of what cannot be as wrong usage, in one line.

    kinds: of errors that say so, ValueError and TypeError if not given; more special ones, such as
    those of a damaged file, are left, but for those of data.
    """
    try:
        yield
    except runs.RunError as error:
        raise Failure(str(error), TARGET) from None
    except (ValueError, TypeError) as error:
        if type(error) not in (*(kinds or (ValueError, TypeError)), DataError, BrokenImages):
            raise
        raise click.UsageError(str(error)) from None


@contextmanager
def told_of_run() -> Iterator[None]:
    """Tell of a run that ends before its end, with the exit code that says how."""
    try:
        yield
    except Interrupted as error:
        raise Failure(str(error), INTERRUPTED) from None
    except (DiskFull, ClaimLost) as error:
        raise Failure(str(error), TARGET) from None
    except NotFinite as error:
        raise Failure(str(error), DIVERGED) from None
