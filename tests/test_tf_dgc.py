"""Dynamic group convolutions in Keras: what only Keras has."""

from __future__ import annotations

import numpy as np
import pytest
from contract import check_refused
from equal import as_array, assert_close, assert_same
from frameworks import need

from doconv_core.networks.nodes import GlobalPool, Network, dynamic, sequence
from doconv_core.networks.shapes import infer

need("tf")

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from adapters.tf import BACKEND, DOUBLE  # noqa: E402

import doconv_tf  # noqa: E402

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((8, 8, 8, 16)).astype("f4"), np.ones((8, 16), "f4")


def model(size=8, policy="float32", **options):
    layers = keras.layers
    return keras.Sequential([
        keras.Input((size, size, 16)),
        doconv_tf.DGConv2D(64, 3, padding="same", strides=2, dtype=policy, **options),
        doconv_tf.DGConv2D(16, 1, dtype=policy),
        layers.GlobalAveragePooling2D(),
    ])  # fmt: skip


def inactive(net):
    return [int(layer.heads.inactive) for layer in net.layers[:2]]


def values(net):
    return [np.asarray(variable) for variable in net.weights]


@pytest.mark.parametrize(("policy", "jit"), [("float32", True), ("mixed_float16", False)])
def test_fit_sets_the_progress_and_a_file_keeps_it(policy, jit, tmp_path):
    net, seen = model(policy=policy), []
    net.compile("sgd", "mse", jit_compile=jit and BACKEND != "torch")

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(inactive(self.model))

    told = [doconv_tf.ProgressCallback(), Watch()]
    history = net.fit(X, Y, batch_size=4, epochs=4, callbacks=told, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert [n for n, _ in seen] == [0, 1, 3, 5, 8, 10, 12, 12]
    assert inactive(net) == [12, 48]
    net.save(tmp_path / "net.keras")
    net.save_weights(tmp_path / "net.weights.h5")
    loaded, filled = keras.saving.load_model(tmp_path / "net.keras"), model(policy=policy)
    filled.load_weights(tmp_path / "net.weights.h5")
    for other in (loaded, filled):
        assert_same(values(other), values(net))
        assert_same(other(X), net(X))


def test_a_training_goes_on_where_a_file_has_it(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    def fit(net, *more, **options):
        if not net.compiled:
            net.compile("sgd", "mse")
        told = [doconv_tf.ProgressCallback(), *more]
        net.fit(X, Y, batch_size=8, epochs=4, callbacks=told, verbose=0, **options)

    layers = doconv_tf.DGConv2D(16, 1), keras.layers.GlobalAveragePooling2D()
    half = keras.Sequential([keras.Input(X.shape[1:]), *layers])
    whole = keras.models.clone_model(half)
    whole.set_weights(half.get_weights())
    fit(whole)
    fit(half, Stop())
    half.save(tmp_path / "half.keras")
    loaded = keras.saving.load_model(tmp_path / "half.keras")
    assert int(loaded.layers[0].heads.inactive) == 3
    fit(loaded, initial_epoch=2)
    assert_close(values(loaded), values(whole))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", DOUBLE])
def test_policies(policy):
    plain, net = model(), model(policy=policy)
    net.set_weights(plain.get_weights())
    assert_close(as_array(net(X)).astype("f4"), plain(X), 0.02)
    assert net.layers[1].compute_dtype == net.layers[1].heads.compute_dtype
    kept = keras.dtype_policies.get(policy).variable_dtype
    assert {variable.dtype for variable in net.weights} == {kept, "int32"}


def test_a_step_may_build_the_layer():
    net = keras.Sequential([doconv_tf.DGConv2D(16, 1), keras.layers.GlobalAveragePooling2D()])
    net.compile("sgd", "mse")
    net.fit(X, Y, batch_size=8, epochs=4, callbacks=[doconv_tf.ProgressCallback()], verbose=0)
    assert int(net.layers[0].heads.inactive) == 12


def test_images_of_unknown_size_and_channels_first_give_the_same():
    net = model()
    doconv_tf.set_progress(net, 0.5)
    net.layers[0].heads.saliency_bias.assign(RNG.standard_normal((4, 16)))
    anywhere = model(None)
    anywhere.set_weights(net.get_weights())
    assert_close(anywhere.predict(X, verbose=0), net(X))
    first = doconv_tf.DGConv2D(64, 3, (2, 2), "same", "channels_first")
    first.build((None, 16, 8, 8))
    first.set_weights(net.layers[0].get_weights())
    assert_close(np.moveaxis(as_array(first(np.moveaxis(X, -1, 1))), 1, -1), net.layers[0](X))


def test_the_lasso_is_in_the_losses_of_training():
    net = model(lasso=0)
    net(X, training=True)
    assert len(net.losses) == 1  # of the other layer
    doconv_tf.add_saliency_lasso(net, 0.1)
    net(X, training=True)
    assert [as_array(loss) > 0 for loss in net.losses] == [True, True]
    net(X)
    assert not net.losses


def test_a_description_becomes_the_layer():
    body = sequence(("conv", dynamic(8, (3, 3), stride=2)), ("pool", GlobalPool()))
    network = Network("n", body, (16, 9, 9))
    net = doconv_tf.build(network)
    assert type(net.get_layer("conv")) is doconv_tf.DGConv2D
    forms = {path: placed.form for path, placed in infer(network).items() if placed.form}
    layers = doconv_tf.export_state(net).layers
    assert layers.keys() == forms.keys()
    assert layers["conv.heads"] == forms["conv.heads"]


def test_what_gives_no_layer_is_refused():
    made = doconv_tf.DGConv2D(8, 1)
    check_refused(
        (lambda: doconv_tf.set_progress(made, 1), ValueError, "'heads' is not built; call the"),
        (
            lambda: doconv_tf.DGConv2D(8, 3, padding="same", around=1), ValueError,
            r"goes with padding='valid' alone; received around=\(1, 1\), padding='same'",
        ),
        (lambda: made.build((None, 4, 4, None)), ValueError, "input channels must be known"),
        (lambda: doconv_tf.add_saliency_lasso(made, -1), ValueError, "weight"),
    )  # fmt: skip


def test_a_folded_model_predicts_is_saved_and_exported(tmp_path):
    net = model()
    doconv_tf.set_progress(net, 1)
    folded, expected = doconv_tf.fold(net).model, as_array(net(X))
    assert [layer.heads.dropped for layer in folded.layers[:2]] == [12, 48]
    assert_close(folded.predict(X, verbose=0), expected)
    folded.save(tmp_path / "net.keras")
    again = keras.saving.load_model(tmp_path / "net.keras")
    assert type(again.layers[0]) is doconv_tf.SkippingDGConv2D
    assert_close(as_array(again(X)), expected)
    if BACKEND == "tensorflow":
        folded.export(tmp_path / "net", verbose=False)
        served = tf.saved_model.load(tmp_path / "net")  # whose variables live as long as it does
        assert_close(as_array(served.serve(X[:3])), expected[:3])
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            inside = model()
        inside.set_weights(net.get_weights())
        assert_close(as_array(doconv_tf.fold(inside).model(X)), expected)
    with pytest.raises(ValueError, match="the model is folded, and drops as many channels as when"):
        doconv_tf.set_progress(folded, 0)
