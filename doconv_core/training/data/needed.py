"""Libraries that only training needs: imported when they are used, and named where they lack."""

from __future__ import annotations

import logging
from importlib import import_module
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
    """Return grain, imported without what it logs on a profiler of JAX's, which is not used."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return needed("grain")
    finally:
        logging.disable(disabled)
