"""The imports of MXNet and GluonCV, which today's NumPy and PyTorch would otherwise break.

Both are at their last release, made for older versions of what they depend on. All that has to be
done about it, and why, stands here and nowhere else.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from doconv_core.backends import require_framework

# What the two packages warn of while they are imported. It concerns their authors alone, and with
# warnings as errors it would break the import. Messages are patterns for their beginnings.
_EXPECTED = (
    # mxnet.numpy looks up NumPy's financial functions, which NumPy 1.20 replaced by stubs.
    "In accordance with NEP 32, the function ",
    # Both compare version numbers with distutils.version, be it Python's or setuptools'.
    "distutils Version classes are deprecated",
    "The distutils package is deprecated",
)


def import_mxnet() -> ModuleType:
    """Import MXNet and return it; after this, `import mxnet` works as usual.

    MXNet takes `numpy.bool` for NumPy's Boolean scalar type when it is imported, and again in its
    `mx.np` functions. NumPy 1.24 to 1.26 lack the name, which NumPy 2 has again with this very
    meaning: it is set where it is missing, and stays.
    """
    if "bool" not in vars(np):  # hasattr would make NumPy warn
        vars(np)["bool"] = np.bool_
    with _expected_warnings():
        return import_module("mxnet")


def import_gluoncv() -> ModuleType:
    """Import GluonCV and return it; after this, `import gluoncv` works as usual.

    GluonCV refuses to be imported beside a PyTorch of 2.0 or newer, even for its MXNet half. So
    PyTorch looks absent meanwhile, whether it has been imported before or not; afterwards
    everything is as it was. Not to be called while another thread imports PyTorch.
    Raises ImportError where GluonCV is missing or has an unsupported version.

    >>> import_gluoncv().__name__
    'gluoncv'
    """
    require_framework("mx", "gluoncv")
    import_mxnet()
    with _expected_warnings(), _torch_hidden():
        return import_module("gluoncv")


@contextmanager
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message, DeprecationWarning)
        yield


@contextmanager
def _torch_hidden() -> Iterator[None]:
    """Let `import torch` raise ImportError, as Python does for a None in `sys.modules`."""
    modules: dict[str, Any] = sys.modules
    kept = {"torch": modules["torch"]} if "torch" in modules else {}
    modules["torch"] = None
    try:
        yield
    finally:
        if kept:
            modules.update(kept)
        else:
            del modules["torch"]
