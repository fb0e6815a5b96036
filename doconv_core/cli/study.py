"""`doconv study`: networks, kinds or recipes, compared over runs with the same seeds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from doconv_core.backends import available_backends
from doconv_core.cli.command import Failure, counted, say
from doconv_core.cli.cost import OPTIONS, network_options
from doconv_core.cli.options import target_argument
from doconv_core.networks.names import describe, options_of
from doconv_core.networks.shapes import for_input
from doconv_core.training import study as studies
from doconv_core.training.data import ImageData, batches, open_data
from doconv_core.training.recipe import Recipe, changed, default_recipe, from_json, recipe
from doconv_core.training.sharing import run_shared
from doconv_core.training.study import Arm, Study
from doconv_core.training.study_page import markdown, sentence, write

PLAIN = "plain"


@click.command(
    short_help="Compare networks, kinds or recipes over many seeds.",
    help=f"""Compare what is trained with the same seeds, and tell what it gains and what it costs.

    Each NETWORK is a name, with a recipe or changes of it behind an @ where it has its own. The
    first is the baseline. Runs of one seed begin with the same weights in the layers that they have
    in common, and see the same batches, so that each difference is that of a pair.

    Every run has a folder in DIR/{studies.RUNS}. The command goes on with what is not finished there, and
    several may work in one DIR, on one machine or on many that share it. Whatever is finished is
    in DIR/{studies.PAGE} and DIR/{studies.FOUND} then, and printed as a table. With --out alone, the study
    is the one that DIR holds.

    \b
    Examples:
      doconv study tutorial_pt tutorial_pt_doconv --backend torch --seeds 30 --out DIR
      doconv study cifar_resnet20 --kinds plain,doconv,bsconvu --backend torch --out DIR
      doconv study cifar_resnet20 cifar_resnet20@average=0.999 --backend torch --out DIR
      doconv study tutorial_pt_doconv tutorial_pt_doconv@mine.toml --backend tf --out DIR
      doconv study --out DIR --processes 2
    """,  # noqa: D301
)
@click.argument("networks", nargs=-1, metavar="[NETWORK[@RECIPE][@FIELD=VALUE]]...")
@click.option(
    "--out", required=True, type=target_argument, metavar="DIR", help="The study's folder."
)
@click.option("--backend", metavar="NAME", help="What trains: torch, tf or mx.")
@click.option("--data", metavar="NAME", help="As of `doconv train`.  [default: digits]")
@click.option("--data-dir", type=target_argument, metavar="D", help="Where the data is.")
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="How many.  [default: 30]")
@click.option(
    "--kinds", metavar="K,K", help=f"Of one NETWORK: {PLAIN}, or what follows its name after an _."
)
@click.option("--recipe", "recipe_name", metavar="RECIPE", help="Of all: its name, or a TOML file.")
@click.option("--set", "changes", multiple=True, metavar="FIELD=VALUE", help="Change all recipes.")
@click.option("--precision", metavar="TYPE", help="As of `doconv train`.  [default: float32]")
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
    help="How many work at once here, and divide the cores.",
)  # fmt: skip
@click.option("--left", is_flag=True, help="Run nothing: tell what is left, and how long it takes.")
@click.option("--one-of-several", is_flag=True, hidden=True, help="Leave the table to who began.")
@network_options
def study(
    networks: Sequence[str],
    out: Path,
    data_dir: Path | None,
    processes: int,
    left: bool,
    one_of_several: bool,
    **given: Any,
) -> None:
    """As the help text above has it."""
    try:
        asked = _asked(networks, out, data_dir, given)
        studies.begin(out, asked)
        if left:
            _tell_left(out, asked)
        elif processes > 1:
            _share(out, data_dir, processes)
        else:
            data = open_data(asked.data, data_dir)
            studies.work(out, asked, studies.trainer(asked, data), say)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    if one_of_several:
        return
    found = write(out, asked)
    click.echo(f"\n{markdown(found)}")
    say(f"{sentence(found)} {out}: {studies.PAGE}, {studies.FOUND}")


def _asked(
    networks: Sequence[str], out: Path, data_dir: Path | None, given: Mapping[str, Any]
) -> Study:
    """Return the study that is asked for, or with no networks the one that the folder holds."""
    named = {name: value for name, value in given.items() if value is not None and value != ()}
    if not networks:
        return _held(out, data_dir, named)
    if "backend" not in named:
        raise click.UsageError("--backend is missing: name what trains, such as torch.")
    check_backend(named["backend"])
    name = named.get("data", "digits")
    data = open_data(name, data_dir)
    arms = made_arms(_of_kinds(networks, named.pop("kinds", None)), data, named)
    seeds = range(named.get("seeds", 30))
    return Study(arms, seeds, named["backend"], name, named.get("precision", "float32"))


def _held(out: Path, data_dir: Path | None, named: Mapping[str, Any]) -> Study:
    """Return the study that a folder holds. Raises StudyError where it cannot be made again."""
    plan = studies.plan(out)
    others = [name for name in named if name != "seeds"]
    if others:
        raise click.UsageError(
            f"--{others[0].replace('_', '-')} needs the networks to be named, too; without any, "
            f"the study is the one that {out} holds."
        )
    check_backend(plan["backend"])
    data = open_data(plan["data"], data_dir)
    arms = [_arm_of(out, entry, data) for entry in plan["arms"]]
    seeds = range(named["seeds"]) if "seeds" in named else plan["seeds"]
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


def check_backend(name: str) -> None:
    """Raise UsageError for a backend that is not registered."""
    if name not in available_backends():
        raise click.UsageError(
            f"--backend must be one of {', '.join(available_backends())}; received {name!r}."
        )


def _of_kinds(networks: Sequence[str], kinds: str | None) -> list[str]:
    """Return the arms' texts: those of one network, where kinds of it are asked for."""
    if kinds is None:
        return list(networks)
    if len(networks) != 1:
        raise click.UsageError(f"--kinds is of one NETWORK; received {', '.join(networks)}.")
    name, at, rest = networks[0].partition("@")
    words = [word.strip() for word in kinds.split(",")]
    return [f"{name}{'' if word == PLAIN else f'_{word}'}{at}{rest}" for word in words]


def made_arms(texts: Sequence[str], data: ImageData, named: Mapping[str, Any]) -> list[Arm]:
    """Return the arms that texts stand for. named: what was given as options.

    Without a recipe of its own or for all, an arm has that of the first's family.
    Raises ValueError for what is none.
    """
    names = [text.partition("@")[0] for text in texts]
    taken = {name: {*options_of(name)} for name in names}
    options = {n: v for n, v in named.items() if n in OPTIONS}
    for option in options:
        if not any(option in each for each in taken.values()):
            flag = f"--{option.replace('_', '-')}"
            raise ValueError(f"{flag} is of none of the networks {', '.join(names)}.")
    for_all = _changes(named.get("changes", ()))
    told = named.get("recipe_name")
    usual = default_recipe(names[0], data.name) if told is None else recipe(told)
    arms = []
    for text, name in zip(texts, names, strict=True):
        own = {n: v for n, v in options.items() if n in taken[name]}
        made = _recipe_of(text.split("@")[1:], usual, for_all)
        arms.append(made_arm(text, name, made, own, data))
    return arms


def _recipe_of(parts: Sequence[str], usual: Recipe, for_all: Mapping[str, str]) -> Recipe:
    made = usual
    for part in parts:
        if "=" not in part:
            made = recipe(part)
    own = _changes([part for part in parts if "=" in part])
    return changed(made, {**for_all, **own})


def _changes(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"a change of a recipe is FIELD=VALUE; received {name!r}.")
    return {name.strip(): value for name, _, value in pairs}


def made_arm(
    text: str, name: str, made: Recipe, options: Mapping[str, Any], data: ImageData
) -> Arm:
    """Return an arm of a network by its name, for the images that the recipe makes of the data's."""
    classes = len(data.classes)
    network = describe(name, num_classes=classes, in_channels=data.channels, **options)
    first = next(iter(batches(data.val, classes, made, training=False)))
    _, channels, height, width = first.images.shape
    return Arm(text, for_input(network, (channels, height, width)), made, options)


def _share(out: Path, data_dir: Path | None, processes: int) -> None:
    """Do the study in several processes. Raises Failure where one of them fails."""
    command = [
        sys.executable,
        "-m",
        "doconv_core.cli",
        "study",
        "--one-of-several",
        "--out",
        str(out),
    ]
    if data_dir is not None:
        command += ["--data-dir", str(data_dir)]
    codes = [code for code in run_shared(command, processes) if code]
    if codes:
        raise Failure(f"{counted(len(codes), 'process')} failed; see above.", codes[0])


def _tell_left(out: Path, asked: Study) -> None:
    runs, seconds = studies.left(out, asked)
    when = "" if seconds != seconds else f", about {seconds / 60:.1f} minutes of one process"
    say(f"{counted(runs, 'run')} left{when}")
