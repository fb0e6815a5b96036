"""Keras' training: its steps against the core's, on one device, two, and in two processes."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import one_test, refuses
from equal import assert_close, assert_same
from frameworks import fresh, need

need("tf")

import keras  # noqa: E402
import keras_training as small  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras_training import (  # noqa: E402
    DROPOUT,
    NORM,
    batch,
    engine_of,
    network,
    recipe_of,
    steps,
    tiny,
    train,
)

from doconv_core.training import reference  # noqa: E402
from doconv_core.training.optimizer import Moments, clipped, update  # noqa: E402
from doconv_tf import add_orthonormality, build, evaluate  # noqa: E402
from doconv_tf.optimizer import RecipeOptimizer  # noqa: E402
from doconv_tf.orthonormal import is_marked  # noqa: E402

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


@pytest.fixture(scope="module")
def expected():
    """What the core comes to, which knows neither devices nor processes."""
    return small.expected()


def check(found, expected):
    assert_close({name: found[name] for name in expected}, expected, ROUNDED)


def test_steps_are_the_cores_with_all_that_is_added_to_the_loss(expected):
    check(small.results(), expected)


def test_two_devices_come_to_what_one_does(expected, tmp_path):
    program = TESTS / "keras_training.py", tmp_path / "two.npz", "devices"
    told = fresh(*program, environment=ENVIRONMENT).stderr
    assert "iterator" not in told  # of a data set, which TensorFlow could not end with the process
    with np.load(tmp_path / "two.npz") as found:
        check(found, expected)


def test_two_processes_come_to_what_one_does(expected, tmp_path):
    """Of which the second has no image in a short batch, and fewer batches to evaluate."""
    cluster = {"worker": [f"localhost:{free_port()}" for _ in range(2)]}
    started = []
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        command = [sys.executable, TESTS / "keras_training.py", tmp_path / f"{index}.npz", "worker"]
        environment = {**os.environ, **ENVIRONMENT, "TF_CONFIG": json.dumps(config)}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    told = [process.communicate(timeout=300)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    for index in range(2):
        with np.load(tmp_path / f"{index}.npz") as found:
            check(found, expected)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def kept(engine):
    return {name: keras.ops.convert_to_numpy(each) for name, each in engine._kept().items()}


def test_what_is_saved_goes_on_to_the_same_bits(tmp_path):
    net, given = tiny(NORM, DROPOUT), recipe_of("nesterov", accumulate=2, average=0.5)
    whole, second = engine_of(net, given, seed=3), engine_of(net, given, build(net))
    for step, made in itertools.islice(steps(), 2):
        whole.train_step(step, made)
    whole.save(None)  # of a process that writes nothing
    whole.save(tmp_path)
    second.load(tmp_path)
    taken, again = [train(each, first=2) for each in (whole, second)]
    assert taken[2:] == again
    assert_same(kept(second), kept(whole))
    other = engine_of(net, recipe_of("nesterov", accumulate=2))
    with pytest.raises(ValueError, match=r"keras\.npz is of another model or recipe"):
        other.load(tmp_path)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_layers_compute_in_half_precision_while_they_are_trained(precision):
    """To the digits that it has; weights, the folded model and the given one are of float32."""
    net, given = tiny(), recipe_of(average=0.5)
    engine = engine_of(net, given, precision=precision)
    assert engine.model(batch(1, 0).images).dtype.name == precision
    engine.fitted.rules.scale.assign(2.0**6)  # with which nothing overflows here
    losses = [sums.loss / sums.images for sums in train(engine)]
    reached = reference.train(net, small.state_of(net), given, small.channels_first(steps()))
    assert_close(np.array(losses), reached.losses, 2e-2 if precision == "bfloat16" else 3e-3)
    assert {variable.dtype for variable in engine.model.trainable_variables} == {"float32"}
    folded, batches = engine.fold().model, [batch(4, 8), batch(3, 9)]
    assert {layer.compute_dtype for layer in folded._flatten_layers()} == {"float32"}
    verified = engine.verify(folded, batches)
    assert verified.relative < 1e-5
    assert engine.model(batch(1, 0).images).dtype.name == precision
    assert engine.evaluate(batches).loss == pytest.approx(verified.before.loss, rel=2e-2)
    engine.close()
    assert {layer.compute_dtype for layer in engine.model._flatten_layers()} == {"float32"}


def test_a_step_whose_gradient_overflows_is_left_out():
    engine = engine_of(tiny(), recipe_of(accumulate=2), precision="float16")
    rules, weights = engine.fitted.rules, engine.model.trainable_variables
    before = [keras.ops.convert_to_numpy(each) for each in weights]
    rules.scale.assign(2.0**127)
    train(engine, rows=(4,))
    assert_same([keras.ops.convert_to_numpy(each) for each in weights], before)
    assert (float(rules.scale.numpy()), float(rules.steps.numpy())) == (2.0**126, 0)
    rules.scale.assign(2.0**8)
    train(engine, rows=(4,))
    assert not any(np.array_equal(a, v.numpy()) for a, v in zip(before, weights, strict=True))
    assert float(rules.steps.numpy()) == 1
    assert float(rules.scale.numpy()) == 2.0**8


def test_a_model_is_given_back_as_it_was_but_for_its_weights():
    model = small.model_of(network(NORM))
    model.compile("adam", "mse")
    add_orthonormality(model, 0.25)
    optimizer, held = model.optimizer, [variable.value for variable in model.variables]
    engine = engine_of(None, recipe_of(), model, devices="CPU:0", precision="bfloat16")
    assert engine.devices.strategy is not None
    assert model.variables[0].value is not held[0]
    train(engine)
    trained = kept(engine)
    engine.close()
    engine.close()  # as often as one likes
    assert model.optimizer is optimizer
    assert not optimizer.variables or int(optimizer.iterations.numpy()) == 0
    assert all(v.value is former for v, former in zip(model.variables, held, strict=True))
    assert_same(
        [v.numpy() for v in model.weights],
        [trained[f"model.{n}"] for n in range(len(model.weights))],
    )
    assert {layer.dtype_policy.name for layer in model._flatten_layers()} == {"float32"}
    assert model.get_layer("heads").lasso == 1e-5
    alphas = {
        layer.kernel_regularizer.alpha for layer in model._flatten_layers() if is_marked(layer)
    }
    assert alphas == {0.25}
    model.fit(batch(4, 0).images, np.zeros((4, small.CLASSES)), verbose=0)


def test_an_evaluation_changes_nothing():
    model, rng = small.model_of(tiny(DROPOUT)), np.random.default_rng(0)
    before = [keras.ops.convert_to_numpy(each) for each in model.variables]
    data = rng.random((10, *small.SHAPE[1:], 2), np.float32), np.arange(10) % small.CLASSES
    found = evaluate(model, recipe_of(train_images=(), eval_images=()), data)
    assert (found["images"], found["top1"] <= found["top5"]) == (2, True)
    assert_same([keras.ops.convert_to_numpy(each) for each in model.variables], before)


def test_a_short_batch_is_not_compiled_anew():
    engine = engine_of(tiny(), recipe_of())
    train(engine)
    for _ in range(2):
        engine.evaluate([batch(4, 8), batch(3, 9)])
    assert [each.experimental_get_tracing_count() for each in engine._compiled.values()] == [1, 1]


SOFTMAX = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax", name="last")])


def in_a_scope():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        return build(network())


test_what_cannot_be_trained_is_refused = refuses(
    lambda given: engine_of(None, recipe_of(), given[0](), **given[1]),
    ((lambda: keras.Sequential([keras.layers.Dense(3)]), {}), ValueError, "is not built"),
    ((lambda: 3, {}), TypeError, "must be a keras.Layer; received int"),
    (
        (lambda: SOFTMAX, {}),
        ValueError, "must give logits, .*; 'last', its last layer, is a softmax",
    ),
    ((lambda: build(network()), {"precision": "half"}), ValueError, "received precision='half'"),
    ((lambda: build(network()), {"devices": 0}), ValueError, "from 1 to 1, .* cpu:0; received"),
    ((lambda: build(network()), {"devices": "tpu:0"}), ValueError, "no device 'tpu:0' here; there"),
    ((in_a_scope, {"devices": 1}), ValueError, "has its devices: leave devices out; received"),
)  # fmt: skip


def test_processes_that_the_model_was_not_made_for_are_refused(monkeypatch):
    cluster = {"cluster": {"chief": ["a:1"], "worker": ["b:1"]}, "task": {}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    with pytest.raises(
        ValueError, match=r"TF_CONFIG tells of 2 processes, .* make it in the scope"
    ):
        engine_of(network(), recipe_of())


def test_logits_of_other_classes_are_refused():
    engine = engine_of(network(), recipe_of())
    more = batch(2, 0)
    with pytest.raises(ValueError, match=r"with 8 classes for these data; it gave \(None, 7\)"):
        engine.evaluate([more._replace(targets=np.ones((2, 8), np.float32))])


JAX = """
import keras, doconv_tf
model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
try:
    doconv_tf.train(model, "digits", quiet=True)
except ValueError as error:
    print(error)
"""


def test_another_backend_of_keras_is_refused():
    told = fresh("-c", JAX, environment={"KERAS_BACKEND": "jax", **ENVIRONMENT}).stdout
    assert "Keras runs on jax; set KERAS_BACKEND=tensorflow" in told
