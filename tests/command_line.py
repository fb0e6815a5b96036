"""The command `doconv` in this process, what every run of it must keep to, and files for it."""

from __future__ import annotations

import json
import re

import numpy as np
from click.testing import CliRunner
from frameworks import fresh
from safetensors.numpy import save_file

from doconv_core.cli import doconv as command

# Exit codes, as the help text has them.
DIFFERENT, USAGE, BAD_FILE, IMPOSSIBLE, TARGET, MISSING = 1, 2, 3, 4, 5, 6


def doconv(*args, code=0, error=None, listing=False):
    """Run the command and return what it did; check its exit code and what it says of an error.

    Whatever fails says so in one line on stderr, in which `error` is found, and prints nothing
    else; with `listing`, a table stands before that line. An exception that is no user's fault is
    raised here.
    """
    done = CliRunner().invoke(command, list(map(str, args)), catch_exceptions=False)
    assert done.exit_code == code, done.output
    if error is not None:
        *before, line = done.stderr.splitlines()
        assert re.match("doconv.*: ", line), done.stderr
        assert re.search(error, line), done.stderr
        assert bool(before) == listing, done.stderr
        assert done.stdout == ""
    return done


# Runs commands one after the other, each in a copy of this process in which files may have so many
# bytes, and prints the exit code and all that each has printed. What takes long is imported before.
FULL_DISK = """
import importlib, json, os, resource, sys
from doconv_core.cli import main
for name in sys.argv[1:]:
    importlib.import_module(name)
for arguments, most in json.load(sys.stdin):
    read, write = os.pipe()
    if not os.fork():
        os.dup2(write, 1), os.dup2(write, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        sys.argv = ["doconv", *arguments]
        main()
    os.close(write)
    with open(read) as printed:
        told = printed.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), told]), flush=True)
"""


def on_a_full_disk(*runs, imports=("h5py",)):
    """Run commands, each given as its arguments and how many bytes a file may have there.

    Returns the exit code and what was printed, for each.
    """
    given = json.dumps([[list(map(str, arguments)), most] for arguments, most in runs])
    done = fresh("-c", FULL_DISK, *imports, input=given)
    return [json.loads(line) for line in done.stdout.splitlines()]


def state_dict(seed=0, *, moved=0.1, dtype="float32"):
    """Return a small network's arrays by PyTorch's names: all kinds, groups, and an S above M.

    moved: the standard deviation of every D.
    """
    rng = np.random.default_rng(seed)

    def random(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(dtype)

    return {
        "conv1.weight": random(8, 3, 3, 3),
        "conv1.depthwise_weight": random(3, 9, 9, scale=moved),
        "bn1.weight": random(8),
        "bn1.bias": random(8),
        "bn1.running_mean": random(8),
        "bn1.running_var": random(8) ** 2,
        "bn1.num_batches_tracked": np.array(7),
        "block.0.weight": random(8, 2, 2, 3),
        "block.0.bias": random(8),
        "block.0.depthwise_weight": random(8, 6, 6, scale=moved),
        "block.1.weight": random(8, 4, 10),
        "block.1.depthwise_weight": random(8, 9, 10, scale=moved),
        "pointwise.weight": random(6, 8, 1, 1),
        "fc.weight": random(5, 6),
        "fc.bias": random(5),
    }


# The one kernel size in it that a file does not tell.
KERNEL_SIZE = ("--kernel-size", "block.1=3x3")


def save(path, arrays):
    """Write arrays as safetensors, and return the path."""
    save_file(arrays, path)
    return path
