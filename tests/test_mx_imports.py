"""Importing MXNet and GluonCV, alone and beside the other frameworks."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
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


STEPS = {
    "torch": "import torch, torch.nn; torch.zeros(1)",
    "tensorflow": "import tensorflow; tensorflow.zeros(1)",
    "gluoncv": "import sys, doconv_mx; before = sys.modules.get('torch', 0); "
    "assert doconv_mx.import_gluoncv() is doconv_mx.import_gluoncv(); "
    "assert sys.modules.get('torch', 0) is before; import gluoncv.model_zoo",
}


@pytest.mark.parametrize(
    "order",
    [
        ("gluoncv", "torch", "tensorflow"),
        ("torch", "gluoncv", "tensorflow"),
        ("tensorflow", "torch", "gluoncv"),
    ],
    ids="-".join,
)
def test_gluoncv_beside_the_other_frameworks(order):
    need("torch")
    need("tf")
    done = run("\n".join([*(STEPS[name] for name in order), "print('done')"]))
    assert done.stdout.split() == ["done"], done.stderr


def test_numpy_has_the_name_that_mxnet_takes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.bool is np.bool_
    assert doconv_mx.frameworks.import_mxnet() is mx
