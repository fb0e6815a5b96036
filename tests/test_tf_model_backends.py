"""Whole models on Keras' other backends: a selection of the tests, each in a fresh process."""

from __future__ import annotations

import re

import pytest
from test_tf_backends import BACKENDS, TESTS, need_backend, run

FILES = [
    "test_tf_model.py", "test_tf_batchnorm.py", "test_tf_separable.py", "test_contract_fusion.py",
    "test_tf_bsconv.py", "test_contract_bsconv.py", "test_contract_bsconv_model.py",
    "test_tf_merge.py",
]  # fmt: skip
# Of the names of tests; "and" stands in one where the name of a case narrows it.
CHOSEN = [
    "there_and_back and nested", "there_and_back and subclassed", "inplace_gives and subclassed",
    "shared_layer", "left_with_the_reason",
    "are_left", "what_is_left", "takes_over", "composes_as_the_core", "fused_or_left and pair",
    "fused_kernel_is", "stored_loaded", "composed_kernel_is", "may_be_a_do_layer", "losses_once",
    "fold_in_every", "become_one_convolution", "test_channels_first",
    "branches_that_stay", "test_in_place",
]  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_whole_models_and_separable_layers(backend):
    need_backend(backend)
    files = [str(TESTS / name) for name in FILES]
    chosen = ["-k", "tf and (" + " or ".join(f"({one})" for one in CHOSEN) + ")"]
    done = run(backend, "-m", "pytest", "-v", "-n0", "-p", "no:cacheprovider", *chosen, *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.findall(r"::(.+) PASSED", done.stdout)
    assert len(passed) > 25
    for one in CHOSEN:
        words = one.split(" and ")
        assert any(all(word in name for word in words) for name in passed), one
    assert "skipped" not in done.stdout
