"""Libraries that only training needs: imported when they are used, and named where they lack."""

from __future__ import annotations

import logging
from importlib import import_module
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any


def needed(name: str) -> Any:
    """Return a module of a library of the extra `train`; ImportError says how to install it.

    >>> needed("json").loads("1")
    1
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"training needs {name.partition('.')[0]}, which is not installed. Install it with: "
            'python -m pip install "overconv[train]"'
        ) from error


def grain_module() -> Any:
    """Return grain, imported without what it logs on a profiler of JAX's, which is not used.

    The processes that it starts import it so, too.
    """
    ForkingPickler.register(SpawnProcess, _reduced)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return needed("grain")
    finally:
        logging.disable(disabled)


def _reduced(process: SpawnProcess) -> Any:
    """Return what a process that is started is made of there: of grain's, once grain is there."""
    reduced: Any = process.__reduce_ex__(2)
    return (_grains, *reduced[1:]) if process.name.startswith("grain-") else reduced


def _grains(cls: type[SpawnProcess]) -> SpawnProcess:
    grain_module()
    return cls.__new__(cls)
