"""Whole models on Keras' other backends: a selection of the tests, each in a fresh process."""

from __future__ import annotations

import re

import pytest
from test_tf_backends import BACKENDS, TESTS, need_backend, run

FILES = [
    "test_tf_model.py", "test_tf_batchnorm.py", "test_tf_separable.py",
    "test_tf_bsconv.py", "test_contract_bsconv.py", "test_contract_bsconv_model.py",
]  # fmt: skip
CHOSEN = (
    "tf and (there_and_back or (inplace_gives and subclassed) or shared_layer or left "
    "or (takes_over and None) or stored_loaded "
    "or composed_kernel_is or may_be_a_do_layer or losses_once or fold_in_every)"
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_whole_models_and_separable_layers(backend):
    need_backend(backend)
    files = [str(TESTS / name) for name in FILES]
    done = run(backend, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-k", CHOSEN, *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 25
    assert "skipped" not in done.stdout
