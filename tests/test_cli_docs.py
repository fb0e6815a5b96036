"""`docs/command.md`: its examples run, and print what is shown; its tables are complete."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from command_line import KERNEL_SIZE, doconv, save, state_dict
from frameworks import need

from doconv_core import describe, write_state
from doconv_core.cli import command as errors
from doconv_core.cli.command import SUBCOMMANDS
from doconv_core.networks.initialize import initialize

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "command.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TIME = re.compile(r"[\d,.]+(?= s$| images per second)", re.MULTILINE)
NUMBER = re.compile(r"-?[\d,]+\.?\d*(?:e[+-]\d+)?")


def commands(block):
    """Yield each command of a block, and what is shown below it."""
    for part in block.split("$ ")[1:]:
        line, _, shown = part.partition("\n")
        yield shlex.split(line), shown


def until_tail(args):
    """Return the arguments before "| tail -n N", and N; or all, and 0, which is for all lines."""
    if "|" not in args:
        return args, 0
    *args, pipe, program, option, lines = args
    assert (pipe, program, option) == ("|", "tail", "-n")
    return args, int(lines)


def same(found, shown):
    """Whether two texts are the same, numbers up to 1 %, as their last digits are a machine's.

    Times and speeds are any.
    """
    found, shown = TIME.sub("time", found), TIME.sub("time", shown)
    if NUMBER.sub("#", found).split() != NUMBER.sub("#", shown).split():
        return False
    pairs = zip(NUMBER.findall(found), NUMBER.findall(shown), strict=True)
    plain = [[float(n.replace(",", "") or 0) for n in pair] for pair in pairs]
    return all(math.isclose(a, b, rel_tol=0.01) for a, b in plain)


def run_sessions(text, folder, monkeypatch):
    """Run a text's examples and sessions in their order, and return the subcommands that it ran."""
    for backend in ("torch", "tf", "mx"):
        need(backend)
    monkeypatch.chdir(folder)
    ran = []
    blocks = re.findall(r"^```(python|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "example", "exec"), {})
            continue
        for (name, *args), shown in commands(block):
            assert name == "doconv"
            args, lines = until_tail(args)
            printed = "\n".join(doconv(*args).stdout.splitlines()[-lines:])
            assert same(printed, shown), printed
            ran.append(args[0])
    return ran


def test_sessions_print_what_is_shown(tmp_path, monkeypatch):
    assert {*run_sessions(TEXT, tmp_path, monkeypatch)} == {*SUBCOMMANDS}


def test_the_readme_shows_the_command(tmp_path, monkeypatch):
    section = re.search(r"^## In the shell\n.*?^## ", README, re.DOTALL | re.MULTILINE)[0]
    ran = run_sessions(section, tmp_path, monkeypatch)
    assert ran == ["inspect", "fold", "convert", "verify"]


def keys_of(command):
    """Return the keys that the document gives for a command's JSON object, those of parts too."""
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| {command} |"))
    return set(re.findall(r"`([a-z_0-9]+)`", row.split("|", 2)[2])) - {"null"}


def all_keys(value):
    """Return the keys of an object and of the objects in it; roles and names are no keys."""
    found = set()
    if isinstance(value, dict):
        found |= value.keys()
        for key, inner in value.items():
            found |= all_keys([*inner.values()] if key == "entries" and isinstance(inner, dict)
                              else inner)  # fmt: skip
    elif isinstance(value, list):
        for inner in value:
            found |= all_keys(inner)
    return found


@pytest.mark.parametrize(
    ("row", "args"),
    [
        ("`inspect`", ["inspect", "model"]),
        ("`fold`", ["fold", "model", "folded", *KERNEL_SIZE]),
        ("`convert`", ["convert", "model", "model.params"]),
        ("`cost` of a file", ["cost", "model", *KERNEL_SIZE]),
        ("`cost` of a network", ["cost", "tutorial_pt"]),
        ("`verify`", ["verify", "model", "model", *KERNEL_SIZE]),
        ("`evaluate`", ["evaluate", "state", "--backend", "torch", "--network", "tutorial_pt"]),
        ("`recipes`", ["recipes"]),
    ],
)
def test_the_keys_of_json_are_told(row, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("model", state_dict())
    write_state(initialize(describe("tutorial_pt")), "state")
    found = all_keys(json.loads(doconv(*args, "--json").stdout))
    # What folding leaves has a reason where there is any, and what a network must have has keys
    # where files tell any; blocks of branches have theirs (tests/test_branched_files.py); of costs,
    # the forms are told once.
    told = keys_of(row) | (keys_of("`cost` of a layer") if "cost" in row else set())
    assert found <= told
    # branch_macs is with --kind (tests/test_cli_cost_network.py).
    only_where_any = {"kind", "reason", "network", "what", "layers", "family", "folds_to"}
    only_where_any |= {"branch_macs"}
    assert keys_of(row) - found <= only_where_any


def test_the_readme_shows_networks_by_name(tmp_path, monkeypatch):
    section = re.search(r"^## Networks by name\n.*?^## ", README, re.DOTALL | re.MULTILINE)[0]
    assert "cost" in run_sessions(section, tmp_path, monkeypatch)


def test_the_exit_codes_are_told():
    table = TEXT.partition("## Exit codes")[2].partition("## JSON")[0]
    told = set(map(int, re.findall(r"^\| (\d+) \|", table, re.MULTILINE)))
    assert told == {
        0, errors.DIFFERENT, errors.USAGE, errors.BAD_FILE, errors.IMPOSSIBLE, errors.TARGET,
        errors.MISSING, errors.DIVERGED, errors.CRASH,
    }  # fmt: skip
