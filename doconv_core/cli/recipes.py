"""`doconv recipes`: which recipes go by a name, and what is in one."""

from __future__ import annotations

from collections.abc import Sequence

import click

from doconv_core.cli.command import print_json, print_table
from doconv_core.cli.options import json_option, set_option
from doconv_core.training.fields import ADAMW
from doconv_core.training.recipe import Recipe, changed, recipe, to_json, to_toml
from doconv_core.training.recipe import recipes as names_of_recipes


@click.command(short_help="List recipes for training, or show one.")
@click.argument("name", metavar="[NAME|FILE.toml]", required=False)
@set_option
@json_option
def recipes(name: str | None, changes: Sequence[tuple[str, str]], as_json: bool) -> None:
    """List the recipes that networks can be trained by, or show one, as TOML.

    What is shown of one can be saved, changed, and given in place of a name. FILE.toml is such a
    file. --set changes a field; the entries of a list have commas between them, and what may lack
    can be none.

    \b
    Examples:
      doconv recipes bsconv_cifar
      doconv recipes bsconv_cifar --set epochs=20 --set milestones=10,15 > mine.toml
      doconv recipes mine.toml --json
    """  # noqa: D301
    if name is None:
        if changes:
            raise click.UsageError("--set changes one recipe; give its name.")
        _list(as_json)
        return
    made = recipe_of(name, changes)
    if as_json:
        print_json(to_json(made))
    else:
        click.echo(to_toml(made), nl=False)


def recipe_of(name: str, changes: Sequence[tuple[str, str]]) -> Recipe:
    """Return the recipe of a name or a file with changes of `--set`; UsageError for no recipe."""
    try:
        return changed(recipe(name), dict(changes))
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None


def _list(as_json: bool) -> None:
    every = [recipe(name) for name in names_of_recipes()]
    if as_json:
        print_json({"recipes": [to_json(each) for each in every]})
        return
    print_table(
        ["recipe", "optimizer", "schedule", "epochs", "batch", "rate", "momentum", "decay"],
        [
            [
                each.name, each.optimizer, each.schedule, str(each.epochs), str(each.batch_size),
                f"{each.learning_rate:g}", "" if each.optimizer == ADAMW else f"{each.momentum:g}",
                f"{each.weight_decay:g}",
            ]
            for each in every
        ],
        text_columns=3,
    )  # fmt: skip
