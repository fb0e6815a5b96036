"""One process for many networks of one zoo, and a new one where it dies.

Run as a script, it tries the networks that are named after the zoo, and prints a line for each.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import IO

from zoo_check import check
from zoo_networks import DRIVERS, ZOOS, Network
from zoo_row import Row

LIMIT = 900  # seconds for one network, after which it counts as hanging
_ROW = "zoo row: "  # what the lines begin with; networks print lines of their own


def tried(zoo: str, networks: Sequence[Network]) -> Iterator[Row]:
    """Yield what came of each network. A process that dies costs one row; another goes on.

    Networks that need the same environment share a process.
    """
    for _, group in groupby(networks, key=lambda network: dict(network.environment)):
        left = list(group)
        while left:
            with tempfile.TemporaryFile("w+") as errors:
                for row in _rows(zoo, left, errors):
                    left.pop(0)
                    yield row
                if left:
                    errors.seek(0)
                    said = errors.read().split()[-40:]
                    row = Row(zoo, left[0].name, left[0].shape, "")
                    row.problems.append(f"the process ended or hung: {' '.join(said)}")
                    left.pop(0)
                    yield row


def _rows(zoo: str, networks: Sequence[Network], errors: IO[str]) -> Iterator[Row]:
    command = [sys.executable, __file__, zoo, *(network.name for network in networks)]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": errors,
        "env": {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **networks[0].environment},
    }
    with subprocess.Popen(command, text=True, **options) as worker:
        timer = threading.Timer(LIMIT, worker.kill)
        try:
            timer.start()
            for line in worker.stdout or ():
                if line.startswith(_ROW):
                    timer.cancel()
                    yield Row(**json.loads(line.removeprefix(_ROW)))
                    timer = threading.Timer(LIMIT, worker.kill)
                    timer.start()
        finally:
            timer.cancel()
            worker.kill()


def main(zoo: str, *names: str) -> None:
    """Try the networks of one zoo in this process, and print a line for each."""
    driver = importlib.import_module(DRIVERS[zoo])
    networks = {network.name: network for network in ZOOS[zoo]}
    for name in names:
        row = check(zoo, driver, networks[name], driver.versions(networks[name]))
        print(f"\n{_ROW}{json.dumps(row.record())}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
