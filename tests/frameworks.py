"""Which frameworks are here. A missing one skips its tests, except in CI, where it fails them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import ModuleType

import pytest

# TensorFlow computes dilated transposed convolutions with oneDNN alone, which it leaves off on
# processors without AVX-512, unless asked for. Asked before it is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# Where there is a process of tests for each core, none is to take more of them. NumPy reads it when
# it is imported, and would wait in each product of matrices for a core that another has.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from doconv_core import require_framework

BACKENDS = {"torch": "torch", "tf": "keras", "mx": "mxnet"}


def need(backend: str) -> None:
    """Go on if the backend's framework is installed and supported; else skip, or fail in CI."""
    try:
        require_framework(backend, BACKENDS[backend])
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(f"in CI every framework must be there: {error}")
        pytest.skip(str(error), allow_module_level=True)


def is_here(backend: str) -> bool:
    """Whether `need` goes on; in CI it fails where not."""
    try:
        need(backend)
    except pytest.skip.Exception:
        return False
    return True


def imported(backend: str) -> ModuleType:
    """Return the backend's framework, which the backend imports, as some need its help for that."""
    need(backend)
    importlib.import_module(f"doconv_{backend}")
    return importlib.import_module(BACKENDS[backend])


def adapter_of(backend: str) -> ModuleType:
    """Return the backend's adapter to the contract."""
    need(backend)
    return importlib.import_module(f"adapters.{backend}")


def fresh(
    *arguments: object, status: int = 0, environment: dict[str, str] | None = None, **options
):
    """Run Python in a process of its own; return it finished, with what it printed as text.

    status: how it has to exit. environment: more of its variables. options: of subprocess.run.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == status, done.stdout[-5000:] + done.stderr
    return done
