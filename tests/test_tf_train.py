"""Keras' training: its steps against the core's, on one device, two, and in two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import one_test
from equal import assert_close
from frameworks import fresh, need

need("tf")

import keras  # noqa: E402
import keras_training as small  # noqa: E402
from keras_training import NORM, engine_of, network, recipe_of, steps, train  # noqa: E402

from doconv_core.training import reference  # noqa: E402
from doconv_core.training.optimizer import Moments, clipped, update  # noqa: E402
from doconv_tf import export_state  # noqa: E402
from doconv_tf.optimizer import RecipeOptimizer  # noqa: E402

TESTS = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
# Of a dozen roundings of float32 in a step, and four steps.
ROUNDED = 2e-5
NAMES = {  # what variables of these roles are called in Keras
    "conv.weight": "kernel", "conv.bias": "bias", "bn.gamma": "gamma", "bn.beta": "beta",
    "conv.depthwise_weight": "d_kernel", "heads.saliency_bias": "saliency_bias",
}  # fmt: skip


@one_test
@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.1},
        {"optimizer": "nesterov", "weight_decay": 0.1, "decay_exempt": ("norms",)},
        {"momentum": 0, "weight_decay": 0.1, "decay_exempt": ("biases", "depthwise")},
        {"optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 0.5, "momentum": 0},
        {"optimizer": "adamw", "beta2": 0.9, "epsilon": 0.1, "decay_exempt": ("biases",)},
    ],
    ids=str,
)
def test_the_updates_are_the_cores_as_the_rate_changes(changes):
    given, rng = recipe_of(**changes), np.random.default_rng(0)
    weights = {name: rng.standard_normal(3) for name in NAMES}
    variables = [keras.Variable(weights[n], "float32", name=NAMES[n]) for n in weights]
    optimizer, moments = RecipeOptimizer.of(given), Moments()
    config = keras.optimizers.serialize(optimizer)
    optimizer = keras.optimizers.deserialize(config)
    assert keras.optimizers.serialize(optimizer) == config
    for rate in (0.1, 0.1, 0.01, 0.3):
        gradients = {name: rng.standard_normal(3) for name in weights}
        optimizer.learning_rate = rate
        optimizer.apply([keras.ops.cast(g, "float32") for g in gradients.values()], variables)
        gradients = clipped(gradients, given.clip_norm)
        weights, moments = update(given, weights, gradients, moments, rate)
    found = {n: keras.ops.convert_to_numpy(v) for n, v in zip(weights, variables, strict=True)}
    assert_close(found, weights, 1e-6)


CASES = {
    "sgd": {"clip_norm": 0.5, "decay_exempt": ("norms", "depthwise")},
    "nesterov": {"optimizer": "nesterov", "accumulate": 3, "average": 0.5},
    "adamw": {"optimizer": "adamw", "accumulate": 2, "average": 0.5, "average_of": "kernels"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_steps_are_the_cores_with_all_that_is_added_to_the_loss(changes):
    net, given = network(NORM), recipe_of(**changes)
    engine = engine_of(net, given)
    taken = train(engine)
    expected = reference.train(net, small.state_of(net), given, channels_first(steps()))
    assert [sums.images for sums in taken] == list(small.ROWS)
    losses = np.array([sums.loss / sums.images for sums in taken])
    assert_close(losses, expected.losses, ROUNDED)
    assert_close(arrays_of(engine.export_state()), arrays_of(expected.averaged), ROUNDED)
    engine.close()
    assert_close(arrays_of(export_state(engine.model)), arrays_of(expected.state), ROUNDED)


def arrays_of(state):
    """Return a state's arrays but for running variances, which are biased in Keras alone."""
    return {name: array for name, array in state.arrays.items() if "running_var" not in name}


@pytest.fixture(scope="module")
def alone():
    """What one device comes to, of what the others compute."""
    return small.results()


def test_two_devices_come_to_what_one_does(alone, tmp_path):
    fresh(TESTS / "keras_training.py", tmp_path / "two.npz", "devices", environment=ENVIRONMENT)
    check(tmp_path / "two.npz", alone)


def test_two_processes_come_to_what_one_does(alone, tmp_path):
    ports = [free_port() for _ in range(2)]
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    started = []
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        command = [sys.executable, TESTS / "keras_training.py", tmp_path / f"{index}.npz", "worker"]
        environment = {**os.environ, **ENVIRONMENT, "TF_CONFIG": json.dumps(config)}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    told = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    for index in range(2):
        check(tmp_path / f"{index}.npz", alone)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def check(file, expected):
    with np.load(file) as found:
        assert_close(dict(found), expected, ROUNDED)


def channels_first(given):
    for step, made in given:
        yield step, made._replace(images=np.moveaxis(made.images, -1, 1))
