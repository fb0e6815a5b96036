"""Importing MXNet and GluonCV, alone and beside the other frameworks."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
import doconv_mx  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402


def run(code, *options):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_imports_raise_no_warning():
    done = run("import doconv_mx; print(doconv_mx.import_gluoncv().__name__)", "-W", "error")
    assert done.stdout.split() == ["gluoncv"], done.stderr


def test_numpy_has_the_name_that_mxnet_takes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.bool is np.bool_
    assert doconv_mx.frameworks.import_mxnet() is mx
