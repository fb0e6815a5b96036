"""Keras' other backends: the whole contract, Keras' own tests, and a selection of those of models.

Each backend does all in one fresh process, since to import two frameworks takes longest.
"""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from contract import CASES
from frameworks import fresh, need

TESTS = Path(__file__).parent
BACKENDS = ["tensorflow", "jax", "torch"]
EVERY = {"jax": 12, "torch": 2}
FILES = [
    "test_contract.py",
    "test_tf.py",
    "test_tf_models.py",
    "test_tf_state.py",
    "test_contract_dgc.py",
    "test_tf_dgc.py",
]
MODEL_FILES = [
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

# Loads a model that another backend has stored, and runs pytest, once with each list of arguments.
PROGRAM = """
import json, sys, doconv_tf, keras, numpy, pytest
results = numpy.load(f"{sys.argv[1]}/results.npz")
model = keras.saving.load_model(f"{sys.argv[1]}/model.keras")
y = keras.ops.convert_to_numpy(model(results["x"]))
assert abs(y - results["y"]).max() <= 1e-5 * abs(results["y"]).max(), abs(y - results["y"]).max()
print(keras.backend.backend())
for arguments in json.load(sys.stdin):
    print("begin", flush=True)
    status = pytest.main(arguments)
    if status:
        sys.exit(status)
"""


def run(backend, *arguments, **options):
    """Run Python with Keras on `backend`, and return the finished process."""
    environment = {"KERAS_BACKEND": backend, "PYTEST_ADDOPTS": ""}
    if backend == "jax":
        # Most of JAX's time goes into optimizing operations that run once; without, it is half.
        flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", flags)
    return fresh(*arguments, environment=environment, cwd=TESTS.parent, **options)


def need_backend(backend):
    need("tf")
    if find_spec(backend) is None:
        message = f"Keras cannot run on {backend}, which is not installed"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


def arguments(backend):
    """Return those of pytest for the tests of layers, and for those of models."""
    # JAX compiles each operation of each size: a twelfth of the cases takes long enough, and
    # with PyTorch a half.
    layers = ["-k", "tf and not saved_model", "--every", str(EVERY[backend])]
    models = ["-k", "tf and (" + " or ".join(f"({one})" for one in CHOSEN) + ")"]
    return [
        ["-v", "-n0", "-p", "no:cacheprovider", *chosen, *(str(TESTS / name) for name in files)]
        for chosen, files in ((layers, FILES), (models, MODEL_FILES))
    ]


def store(folder):
    """Store a model, and what it gives for an input, on this process's backend."""
    import keras

    import doconv_tf

    assert keras.backend.backend() == BACKENDS[0]
    keras.utils.set_random_seed(0)
    several = {"groups": 2, "depth_multiplier": 12, "depthwise_initializer": "normal"}
    twice = {"depth_multiplier": 2, "d_initializer": "normal"}
    layers = [doconv_tf.DOConv2D(6, 3, **several), doconv_tf.DODepthwiseConv2D(3, **twice)]
    model = keras.Sequential([keras.Input((7, 8, 4)), *layers])
    model.save(folder / "model.keras")
    x = np.random.default_rng(0).standard_normal((2, 7, 8, 4)).astype("float32")
    np.savez(folder / "results.npz", x=x, y=keras.ops.convert_to_numpy(model(x)))


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_stored_model_loads_and_the_tests_of_layers_and_models_pass(backend, tmp_path):
    need_backend(backend)
    store(tmp_path)
    done = run(backend, "-c", PROGRAM, tmp_path, input=json.dumps(arguments(backend)))
    loaded, layers, models = done.stdout.split("begin\n")
    assert loaded.split() == [backend]
    assert "skipped" not in done.stdout
    passed = re.search(r"(\d+) passed", layers)
    assert int(passed[1]) > 2 * len(CASES) // EVERY[backend]
    passed = re.findall(r"::(.+) PASSED", models)
    assert len(passed) > 25
    for one in CHOSEN:
        words = one.split(" and ")
        assert any(all(word in name for word in words) for name in passed), one


WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Without())
try:
    import doconv_tf
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_backend_is_named_with_what_to_install(backend):
    need("tf")
    told = run(backend, "-c", WITHOUT.format(missing=backend)).stdout
    assert f"Keras needs {backend}, which is not installed" in told
    assert 'python -m pip install "overconv[tf]"' in told
