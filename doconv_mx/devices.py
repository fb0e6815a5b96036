"""Where Gluon trains: the devices of a process, and the other processes."""

from __future__ import annotations

import os
import re
from typing import Any

import mxnet as mx
import numpy as np

NAME = re.compile(r"(cpu|gpu)(?::(\d+))?")
SYNCHRONOUS = "dist_sync"  # the kvstore that adds up the gradients of all workers

# It would take leave of the other processes if it were collected.
_joined: list[Any] = []


def contexts_of(devices: str | int | None) -> list[mx.Context]:
    """Return the devices that are meant; ValueError for others than are here.

    devices: names such as "gpu:0,gpu:1" or "cpu"; or how many, of GPUs if there are any; None for
    one.
    """
    gpus = mx.context.num_gpus()
    kind = "gpu" if gpus else "cpu"
    text = str(1 if devices is None else devices)
    if text.isdigit() and not 1 <= int(text) <= max(gpus, 1):
        raise ValueError(
            f"devices must be at least 1, and there are {gpus} GPUs here; received "
            f"devices={devices}."
        )
    names = [f"{kind}:{n}" for n in range(int(text))] if text.isdigit() else text.split(",")
    found = []
    for name in map(str.strip, names):
        match = NAME.fullmatch(name)
        number = int(match[2] or 0) if match else 0
        if match is None or (match[1] == "gpu" and number >= gpus):
            here = ", ".join(["cpu:0 and so on", *(f"gpu:{n}" for n in range(gpus))])
            raise ValueError(f"there is no device {name!r} here; there is {here}.")
        found.append(mx.Context(match[1], number))
    if len(set(found)) < len(found):
        raise ValueError(f"devices must be named once each; received devices={devices!r}.")
    return found


def join_processes() -> Any:
    """Return the kvstore that joins the other workers; None where this is the only one.

    Its environment is the one that MXNet's launchers set, such as DMLC_ROLE and DMLC_NUM_WORKER.
    Raises RuntimeError for the second time: the store of a process serves one training.
    """
    workers = int(os.environ.get("DMLC_NUM_WORKER", "1"))
    if workers == 1 or os.environ.get("DMLC_ROLE") != "worker":
        return None
    if _joined:
        raise RuntimeError(
            "MXNet's workers join once: begin the scheduler, the servers and the workers anew for "
            "another training."
        )
    _joined.append(mx.kv.create(SYNCHRONOUS))
    return _joined[0]


def seed_of(seed: int, step: int, process: int) -> int:
    """Return the seed of MXNet's random numbers for a step, of 31 bits."""
    words = np.random.SeedSequence((seed, step, process)).generate_state(1)
    return int(words[0]) & 0x7FFFFFFF
