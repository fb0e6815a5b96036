"""Which tests run: all but the long tail, or with `--exhaustive` that too; and what many use."""

from __future__ import annotations

import random
import re
import sys

import numpy as np
import pytest
from frameworks import imported
from hypothesis import settings


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="also run the long tail: other Keras backends, import orders, sweeps, memory",
    )
    parser.addoption(
        "--part", default="0/1", help="K/N: of the long tail, the K-th of N parts alone"
    )
    parser.addoption("--every", type=int, default=1, help="run every N-th of the tests alone")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "exhaustive: of the long tail, which --exhaustive and CI run too"
    )
    config.addinivalue_line(
        "markers", "brief: the beginning of a case of the long tail, which runs in its place there"
    )
    whole = config.getoption("--exhaustive") and config.getoption("--part") == "0/1"
    examples = 200 if whole else 50
    # Without the whole long tail, a run has the same examples as the one before it.
    settings.register_profile(
        "properties", max_examples=examples, deadline=None, derandomize=not whole
    )
    settings.load_profile("properties")


def pytest_collection_modifyitems(config, items):
    """Leave out the long tail unless it is asked for, or else what it has at greater length.

    What is left out is deselected, so that none is skipped. Every N-th test of the long tail is in
    one part, and the shorter form of those in other parts runs.
    """
    items[:] = items[:: config.getoption("--every")]
    told = config.getoption("--part")
    part, parts = map(int, told.split("/")) if re.fullmatch(r"\d+/\d+", told) else (0, 0)
    if part >= parts:
        raise pytest.UsageError(f"--part must be K/N with K below N, such as 0/4; received {told}")
    tail = [item for item in items if item.get_closest_marker("exhaustive")]
    brief = [item for item in items if item.get_closest_marker("brief")]
    chosen = set(tail[part::parts]) if config.getoption("--exhaustive") else set()
    left = {item for item in tail if item not in chosen}
    left.update(brief if chosen and not left else ())
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a seed of its own is the same in each run."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)
    if "mxnet" in sys.modules:
        sys.modules["mxnet"].random.seed(0)


@pytest.fixture
def keras():
    """Keras, or the test is skipped."""
    return imported("tf")


@pytest.fixture
def afresh(keras):
    """Keras names layers as in a new process."""
    keras.backend.clear_session(free_memory=False)


@pytest.fixture
def unprobed(monkeypatch):
    """Files of HDF5 are read without a process that tries them first, as the test wrote them."""
    monkeypatch.setattr("doconv_core.files.hdf5._probe", lambda path, stored: None)
