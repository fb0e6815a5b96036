"""Work shared by processes of this machine, each of which is the same command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress

# How the frameworks are told how many threads to compute with.
THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


def run_shared(command: Sequence[str], processes: int) -> list[int]:
    """Run a command in several processes at once, and return their exit codes.

    The cores are divided among them, unless the environment says how many threads there are to be.
    Whatever ends this process ends them.

    >>> import sys
    >>> run_shared([sys.executable, "-c", "pass"], 2)
    [0, 0]
    """
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {**dict.fromkeys(THREADS, threads), **os.environ}
    running: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(processes):
            running.append(subprocess.Popen(command, env=environment))
        return [process.wait() for process in running]
    except BaseException:
        for process in running:
            with suppress(ProcessLookupError):
                process.terminate()
        for process in running:
            process.wait()
        raise
