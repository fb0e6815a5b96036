"""`doconv evaluate`: how many images a trained network, in a run or a file, tells right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import click

from doconv_core.backends import available_backends
from doconv_core.cli.command import print_json, say
from doconv_core.cli.cost import OPTIONS, network_options
from doconv_core.cli.initial import checkpoint_of
from doconv_core.cli.options import json_option, set_option, source_argument
from doconv_core.cli.train import (
    backend_option,
    broken_option,
    data_dir_option,
    devices_option,
    image_shape,
    kind_option,
    load_file,
    of_kind,
    precision_option,
    recipe_option,
    refused,
    workers_option,
)
from doconv_core.files.checkpoint import open_checkpoint
from doconv_core.networks.names import with_kind
from doconv_core.state.file import State, read_state
from doconv_core.training import run as runs
from doconv_core.training.data import open_data
from doconv_core.training.recipe import DIGITS, Recipe, changed, default_recipe, from_json
from doconv_core.training.recipe import recipe as recipe_by_name


@click.command(short_help="Evaluate a trained network: top-1, top-5, images per second.")
@click.argument("subject", metavar="RUN|FILE", type=source_argument)
@click.option("--network", metavar="NAME", help="The network of a FILE that does not tell it.")
@backend_option
@click.option("--data", metavar="NAME", help="The images, if not those of the run, or digits.")
@data_dir_option
@broken_option
@click.option("--best", is_flag=True, help="The best checkpoint of a RUN, in place of the last.")
@kind_option
@recipe_option
@set_option
@devices_option
@precision_option
@workers_option
@network_options
@json_option
def evaluate(subject: Path, best: bool, as_json: bool, **given: Any) -> None:
    """Evaluate a network on the evaluation images of a data set.

    A RUN tells its network, images and backend; of a FILE, of any format that is read here, a
    canonical state may tell the network, and --network does; a kind with which it was trained, too,
    and --kind. Images are prepared as the recipe says: of the run, or of the network. Averaged
    weights are evaluated where the recipe averages.

    \b
    Examples:
      doconv evaluate run
      doconv evaluate run/folded.safetensors --backend tf
      doconv evaluate resnet18.params --network resnet18_v1 --backend torch --data folder
        --data-dir imagenet
    """  # noqa: D301
    with refused():
        job = _of_run(subject, given) if _is_run(subject) else _of_file(subject, given)
        data = open_data(job.data, job.data_dir, max_broken=job.max_broken)
        backend = available_backends()[job.backend].load()
        image = image_shape(data, job.recipe)
        model = backend.get_model(
            job.network, num_classes=len(data.classes), in_channels=image[0], input_shape=image,
            **job.options,
        )  # fmt: skip
        file = checkpoint_of(subject, best)
        if job.kind is not None:
            if file.suffix != ".safetensors":
                raise click.UsageError(
                    f"with --kind a FILE is a state, such as a run's folded.safetensors; received "
                    f"{file}."
                )
            model, _ = of_kind(backend, model, job.network, job.kind)
            model = _loaded(backend, model, read_state(file))
        elif load_file(backend, model, file, job.network, image, data, job.options) is not None:
            raise click.UsageError(
                f"{file} is of another number of classes than the {len(data.classes)} of the data."
            )
    with refused(ValueError):
        found = backend.evaluate(
            model, job.recipe, data, precision=given["precision"], devices=given["devices"],
            workers=given["workers"],
        )  # fmt: skip
    rate = found["images"] / found["seconds"]
    told = {
        "file": str(file), "network": job.network, "data": data.name, "images": found["images"],
        "top1": found["top1"], "top5": found["top5"], "loss": found["loss"],
        "images_per_second": rate,
    }  # fmt: skip
    if as_json:
        print_json(told)
        return
    say(
        f"{file}: {job.network} on {data.name}, {found['images']:,} images: "
        f"top-1 {100 * found['top1']:.2f} %, top-5 {100 * found['top5']:.2f} %, "
        f"loss {found['loss']:.4f}, {rate:,.0f} images per second"
    )


def _loaded(backend: Any, model: Any, state: State) -> Any:
    """Return a model of a kind with a state that is its own, or its folded one's."""
    if backend.export_state(model).layers.keys() != state.layers.keys():
        getattr(model, "eval", lambda: None)()  # PyTorch's is in training mode
        model, _ = backend.fold(model)
    backend.load_state(model, state)
    return model


class Job(NamedTuple):
    """What is evaluated on what."""

    network: str
    options: Mapping[str, Any]
    backend: str
    data: str
    data_dir: Any
    max_broken: int
    recipe: Recipe
    kind: str | None = None


def _is_run(subject: Path) -> bool:
    return (subject / runs.DESCRIBED).is_file()


def _of_run(subject: Path, given: Mapping[str, Any]) -> Job:
    """Return what the run tells, and options tell otherwise."""
    described = runs.open_run(subject).described
    told = described["notes"].get("job", {})
    network, kind = with_kind(given["network"] or described["network"] or "")
    if not network:
        raise click.UsageError(f"{subject} is a run of a model of your own; evaluate it in Python.")
    recipe = from_json(described["recipe"])
    if given["recipe_name"] is not None:
        recipe = recipe_by_name(given["recipe_name"])
    return Job(
        network, _options(given) or described["notes"].get("options", {}),
        given["backend"] or described["framework"], given["data"] or described["data"]["name"],
        given["data_dir"] or told.get("data_dir"),
        max(given["max_broken"], told.get("max_broken", 0)),
        changed(recipe, dict(given["changes"])), given["kind"] or kind or told.get("kind"),
    )  # fmt: skip


def _of_file(subject: Path, given: Mapping[str, Any]) -> Job:
    """Return what a canonical state tells of its network, and options of the rest."""
    with open_checkpoint(subject) as checkpoint:
        origin = checkpoint.origin or {}
    network = given["network"] or origin.get("network")
    if network != origin.get("network"):
        origin = {}  # of another one
    if network is None:
        raise click.UsageError(f"{subject} does not tell its network; give it with --network.")
    network, kind = with_kind(network)
    kind = given["kind"] or kind or origin.get("kind")
    if given["backend"] is None:
        raise click.UsageError("--backend is missing; a FILE is evaluated in any framework.")
    data = given["data"] or DIGITS
    name = given["recipe_name"]
    recipe = default_recipe(network, data) if name is None else recipe_by_name(name)
    options = _options(given) or _stored(subject, origin.get("options", "{}"))
    return Job(
        network, options, given["backend"], data, given["data_dir"],
        given["max_broken"], changed(recipe, dict(given["changes"])), kind,
    )  # fmt: skip


def _stored(subject: Path, text: str) -> dict[str, Any]:
    """Return the options of a network, as a state of a run has them."""
    with suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise click.UsageError(f"{subject} has options that are no JSON object: {text!r}.")


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in OPTIONS if given[name] is not None}
