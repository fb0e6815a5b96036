"""Folded Keras models, exported: what runs them computes the same numbers, and finds no trace."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
from frameworks import fresh, need

need("tf")
if find_spec("tensorflow") is None:
    pytest.skip("these exports are TensorFlow's", allow_module_level=True)

import keras  # noqa: E402
import onnxruntime  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras_models import as_trained, filled, functional, images, sequential  # noqa: E402

from doconv_tf import fold, over_parameterize, verify  # noqa: E402

BOUND = 1e-5  # of kernels and fused constants in float32


def folded(make, fuse):
    """Return an over-parameterized model, as after training, and its folded one."""
    model = as_trained(over_parameterize(filled(make()))[0])
    return model, fold(model, fuse_batchnorm=fuse)[0]


def flat():
    """Return the model of two inputs with its outputs in a list: Keras exports no nested ones."""
    model = functional()
    return keras.Model(model.inputs, [model.output["scores"], *model.output["maps"]])


def assert_no_trace(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert b"doconv" not in path.read_bytes().lower(), path


@pytest.mark.parametrize("fuse", [False, True])
def test_saved_model(fuse, tmp_path):
    model, ordinary = folded(sequential, fuse)
    ordinary.export(tmp_path / "model", verbose=False)
    exported = tf.saved_model.load(tmp_path / "model")
    assert verify(model, exported.serve, images()).relative < BOUND
    assert_no_trace(tmp_path)


def test_saved_model_of_a_trained_model_has_no_optimizer(tmp_path):
    model, _ = over_parameterize(filled(sequential()))
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(images(), np.ones((2, 2), "float32"), verbose=0)
    for ordinary in (fold(model)[0], fold(model, inplace=True)[0]):
        ordinary.export(tmp_path / "model", verbose=False)
        exported = tf.saved_model.load(tmp_path / "model")
        assert len(exported.variables) == len(ordinary.variables)
        variables = tf.train.list_variables(str(tmp_path / "model" / "variables" / "variables"))
        assert not [name for name, _ in variables if "optimizer" in name]
        assert_no_trace(tmp_path)


# TensorFlow deprecates its own interpreter for a package that is not installed with it.
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
@pytest.mark.parametrize("fuse", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_tflite(fuse, tmp_path):
    model, ordinary = folded(sequential, fuse)
    content = tf.lite.TFLiteConverter.from_keras_model(ordinary).convert()
    (tmp_path / "model.tflite").write_bytes(content)
    interpreter = tf.lite.Interpreter(str(tmp_path / "model.tflite"))
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(inputs):
        interpreter.resize_tensor_input(source["index"], inputs.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(source["index"], inputs)
        interpreter.invoke()
        return interpreter.get_tensor(target["index"])

    assert verify(model, run, images()).relative < BOUND
    assert_no_trace(tmp_path)


# Keras' exporter asks NumPy for names that newer versions of NumPy will give another meaning.
@pytest.mark.filterwarnings("ignore:In the future `np.object` will be defined:FutureWarning")
@pytest.mark.parametrize("fuse", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_onnx(fuse, tmp_path):
    model, ordinary = folded(flat, fuse)
    inputs = {"a": images(seed=1), "b": images(seed=2)}
    ordinary([inputs["a"], inputs["b"]])  # Keras exports to ONNX what was called
    ordinary.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")

    def by_shape(outputs):
        return {str(value.shape): value for value in outputs}

    found = by_shape(session.run(None, inputs))
    expected = by_shape(map(np.asarray, model([inputs["a"], inputs["b"]])))
    assert len(expected) == 3
    assert verify(lambda _: expected, lambda _: found, None).relative < BOUND
    assert_no_trace(tmp_path)


EXPORT = """
import sys, warnings
import keras
with warnings.catch_warnings():  # PyTorch's tracer tells that it traces
    warnings.simplefilter("ignore")
    model = keras.saving.load_model(sys.argv[1])
    model(keras.ops.ones((1, *model.input_shape[1:])))
    model.export(sys.argv[2], format="onnx", verbose=False)
print(keras.backend.backend())
"""


@pytest.mark.exhaustive
def test_onnx_of_grouped_convolutions_by_way_of_pytorch(tmp_path):
    need("torch")
    model, ordinary = folded(sequential, True)
    ordinary.save(tmp_path / "model.keras")
    paths = [str(tmp_path / "model.keras"), str(tmp_path / "model.onnx")]
    done = fresh("-c", EXPORT, *paths, environment={"KERAS_BACKEND": "torch"})
    assert "torch" in done.stdout
    session = onnxruntime.InferenceSession(paths[1])
    name = session.get_inputs()[0].name
    x = images((1, 9, 9, 3))  # older versions of Keras export the size of batch that was called
    assert verify(model, lambda x: session.run(None, {name: x})[0], x).relative < BOUND
    assert_no_trace(tmp_path)
