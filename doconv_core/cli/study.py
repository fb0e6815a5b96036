"""`doconv study`: networks, kinds or recipes, compared over runs with the same seeds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from doconv_core.cli.command import TARGET, Failure, counted, say
from doconv_core.cli.cost import OPTIONS, network_options
from doconv_core.cli.options import set_option, target_argument
from doconv_core.cli.train import (
    backend_option,
    broken_option,
    data_dir_option,
    data_option,
    image_shape,
    precision_option,
    recipe_option,
    refused,
    told_of_run,
)
from doconv_core.kinds.base import kinds as all_kinds
from doconv_core.kinds.base import variant_named
from doconv_core.networks.names import describe, known_name, options_of
from doconv_core.networks.shapes import for_input
from doconv_core.training import study as studies
from doconv_core.training.data import ImageData, open_data
from doconv_core.training.recipe import Recipe, changed, default_recipe, from_json, recipe
from doconv_core.training.sharing import run_shared
from doconv_core.training.study import Arm, Study
from doconv_core.training.study_page import markdown, sentence, write

Opened = Callable[[str], ImageData]  # a data set, by its name

PLAIN = "plain"
SEEDS = 30
CHANGEABLE = {"out", "data_dir", "max_broken", "seeds", "processes", "left", "one_of_several"}


@click.command(
    short_help="Compare networks, kinds or recipes over many seeds.",
    help="""Compare what is trained with the same seeds, and tell what it gains and what it costs.

    Each NETWORK is a name, with a +KIND behind it for over_parameterize of it, and a recipe or
    changes of it behind an @ where it has its own. The first is the baseline. Runs of one seed
    begin with the same weights in the layers that they have in common, and see the same batches,
    so that each difference is that of a pair.

    Every run has a folder in DIR. The command goes on with what is not finished there, and several
    may work in one DIR, on one machine or on many that share it. Whatever is finished is in
    study.html and study.json then, and printed as a table. With --out alone, the study is the one
    that DIR holds.

    \b
    Examples:
      doconv study tutorial_pt tutorial_pt_doconv --backend torch --seeds 30 --out DIR
      doconv study cifar_resnet20 --kinds plain,doconv,bsconvu --backend torch --out DIR
      doconv study cifar_resnet20 cifar_resnet20@average=0.999 --backend torch --out DIR
      doconv study tutorial_pt_doconv tutorial_pt_doconv@mine.toml --backend tf --out DIR
      doconv study cifar_resnet20 --kinds plain,orepa,expand,repvgg --backend torch --out DIR
      doconv study --out DIR --processes 2
    """,
)
@click.argument("networks", nargs=-1, metavar="[NETWORK[@RECIPE][@FIELD=VALUE]]...")
@click.option(
    "--out", required=True, type=target_argument, metavar="DIR", help="The study's folder."
)
@backend_option
@data_option
@data_dir_option
@broken_option
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="How many.  [default: 30]")
@click.option(
    "--kinds", metavar="K,K",
    help=f"Of one NETWORK: {PLAIN}, what follows its name after an _, or what may after a +.",
)  # fmt: skip
@recipe_option
@set_option
@precision_option
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="How many work at once here, and divide the cores.",
)  # fmt: skip
@click.option("--left", is_flag=True, help="Run nothing: tell what is left, and how long it takes.")
@click.option("--one-of-several", is_flag=True, hidden=True, help="Leave the table to who began.")
@network_options
@click.pass_context
def study(
    ctx: click.Context,
    /,
    networks: Sequence[str],
    out: Path,
    data_dir: Path | None,
    max_broken: int,
    processes: int,
    left: bool,
    one_of_several: bool,
    **given: Any,
) -> None:
    """As the help text above has it."""
    opened = partial(open_data, data_dir=data_dir, max_broken=max_broken)
    with refused(), told_of_run(), _of_folders():
        asked = _asked(networks, opened, given) if networks else _held(ctx, out, opened)
        studies.begin(out, asked)
        if left:
            _tell_left(out, asked)
        elif processes > 1:
            _share(out, data_dir, max_broken, processes)
        else:
            studies.work(out, asked, studies.trainer(asked, opened(asked.data)), say)
    if one_of_several:
        return
    found = write(out, asked)
    click.echo(f"\n{markdown(found)}")
    say(f"{sentence(found)} {out}: {studies.PAGE}, {studies.FOUND}")


@contextmanager
def _of_folders() -> Iterator[None]:
    """Tell of what is wrong with the study's folder."""
    try:
        yield
    except studies.StudyError as error:
        raise Failure(str(error), TARGET) from None


def _asked(networks: Sequence[str], opened: Opened, given: Mapping[str, Any]) -> Study:
    """Return the study that the options ask for."""
    if given["backend"] is None:
        raise click.UsageError("--backend is missing; a study that DIR holds needs --out alone.")
    data = opened(given["data"])
    arms = made_arms(_of_kinds(networks, given["kinds"]), data, given)
    seeds = range(given["seeds"] or SEEDS)
    return Study(arms, seeds, given["backend"], given["data"], given["precision"])


def _held(ctx: click.Context, out: Path, opened: Opened) -> Study:
    """Return the study that a folder holds. Raises StudyError where it cannot be made again."""
    for name in ctx.params.keys() - CHANGEABLE:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                "without a NETWORK the study is the one that DIR holds, which takes no option but "
                "--out, --data-dir, --max-broken, --seeds, --processes and --left."
            )
    plan = studies.plan(out)
    data = opened(plan["data"])
    arms = [_arm_of(out, entry, data) for entry in plan["arms"]]
    asked = ctx.params["seeds"]
    seeds = plan["seeds"] if asked is None else range(asked)
    return Study(arms, seeds, plan["backend"], plan["data"], plan["precision"])


def _arm_of(out: Path, entry: Mapping[str, Any], data: ImageData) -> Arm:
    made = made_arm(
        entry["name"], entry["network"], from_json(entry["recipe"]), entry["options"], data
    )
    if made.described() != entry:
        raise studies.StudyError(
            f"{out} was begun with another version of {entry['network']}, or on other data; name "
            "another folder."
        )
    return made


def _of_kinds(networks: Sequence[str], kinds: str | None) -> list[str]:
    """Return the arms' texts: those of one network, where kinds of it are asked for."""
    if kinds is None:
        return list(networks)
    if len(networks) != 1:
        raise click.UsageError(f"--kinds is of one NETWORK; received {', '.join(networks)}.")
    name, at, rest = networks[0].partition("@")
    words = [word.strip() for word in kinds.split(",")]
    return [f"{_of_kind(name, word)}{at}{rest}" for word in words]


def _of_kind(name: str, word: str) -> str:
    """Return what a network of a kind is called: by its own name, if there is one."""
    if word == PLAIN:
        return name
    own = known_name(f"{name}_{word}") is None and word in all_kinds()
    return f"{name}+{word}" if own else f"{name}_{word}"


def made_arms(texts: Sequence[str], data: ImageData, given: Mapping[str, Any]) -> list[Arm]:
    """Return the arms that texts stand for. given: the command's options.

    Without a recipe of its own or for all, an arm has that of the first's family.
    Raises ValueError for what is none.
    """
    names = [text.partition("@")[0].partition("+")[0] for text in texts]
    taken = {name: {*options_of(name)} for name in names}
    options = {n: given[n] for n in OPTIONS if given[n] is not None}
    for option in options:
        if not any(option in each for each in taken.values()):
            flag = f"--{option.replace('_', '-')}"
            raise ValueError(f"{flag} is of none of the networks {', '.join(names)}.")
    told = given["recipe_name"]
    usual = default_recipe(names[0], given["data"]) if told is None else recipe(told)
    arms = []
    for text, name in zip(texts, names, strict=True):
        own = {n: v for n, v in options.items() if n in taken[name]}
        made = _recipe_of(text.split("@")[1:], usual, dict(given["changes"]))
        arms.append(made_arm(text, name, made, own, data))
    return arms


def _recipe_of(parts: Sequence[str], usual: Recipe, for_all: Mapping[str, str]) -> Recipe:
    """Return an arm's recipe. parts: of its text, each a recipe's name or a change."""
    made, own = usual, {}
    for part in parts:
        name, equals, value = part.partition("=")
        if equals:
            own[name.strip()] = value
        else:
            made = recipe(part)
    return changed(made, {**for_all, **own})


def made_arm(
    text: str, name: str, made: Recipe, options: Mapping[str, Any], data: ImageData
) -> Arm:
    """Return an arm of a network by its name, for the images that the recipe makes of the data."""
    network = describe(name, num_classes=len(data.classes), in_channels=data.channels, **options)
    kind = text.partition("@")[0].partition("+")[2]
    if kind:
        variant_named(kind)
    return Arm(text, for_input(network, image_shape(data, made)), made, options, kind)


def _share(out: Path, data_dir: Path | None, max_broken: int, processes: int) -> None:
    """Do the study in several processes. Raises Failure where one of them fails."""
    command = [
        sys.executable, "-m", "doconv_core.cli", "study", "--one-of-several", "--out", str(out),
        "--max-broken", str(max_broken),
    ]  # fmt: skip
    if data_dir is not None:
        command += ["--data-dir", str(data_dir)]
    codes = [code for code in run_shared(command, processes) if code]
    if codes:
        raise Failure(f"{counted(len(codes), 'process')} failed; see above.", codes[0])


def _tell_left(out: Path, asked: Study) -> None:
    runs, seconds = studies.left(out, asked)
    when = "" if seconds != seconds else f", about {seconds / 60:.1f} minutes of one process"
    say(f"{counted(runs, 'run')} left{when}")
