"""Which tests run: all but the long tail, or with `--exhaustive` that too; and what many use."""

from __future__ import annotations

import pytest
from frameworks import imported
from hypothesis import settings


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="also run the long tail: other Keras backends, import orders, sweeps, memory",
    )
    parser.addoption("--every", type=int, default=1, help="run every N-th of the tests alone")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "exhaustive: of the long tail, which --exhaustive and CI run too"
    )
    config.addinivalue_line(
        "markers", "brief: the beginning of a case of the long tail, which runs in its place there"
    )
    examples = 200 if config.getoption("--exhaustive") else 50
    settings.register_profile("properties", max_examples=examples, deadline=None)
    settings.load_profile("properties")


def pytest_collection_modifyitems(config, items):
    """Leave out the long tail unless it is asked for, or else what it has at greater length.

    What is left out is deselected, so that none is skipped.
    """
    items[:] = items[:: config.getoption("--every")]
    marker = "brief" if config.getoption("--exhaustive") else "exhaustive"
    left = [item for item in items if item.get_closest_marker(marker)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker(marker)]


@pytest.fixture
def keras():
    """Keras, or the test is skipped."""
    return imported("tf")


@pytest.fixture
def afresh(keras):
    """Keras names layers as in a new process, and draws the same numbers in each test."""
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture
def unprobed(monkeypatch):
    """Files of HDF5 are read without a process that tries them first, as the test wrote them."""
    monkeypatch.setattr("doconv_core.files.hdf5._probe", lambda path, stored: None)
