"""Keras' files with layers that look like this package's, and that cannot be folded: refused."""

from __future__ import annotations

import functools
import io
import json
import zipfile

import pytest
from checkpoint_files import numbers, refused
from frameworks import need

need("tf")

import h5py  # noqa: E402
import keras  # noqa: E402

from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint  # noqa: E402
from doconv_tf import (  # noqa: E402
    DOConv2D,
    DODepthwiseConv2D,
    DOSeparableConv2D,
)

layers = keras.layers


pytestmark = pytest.mark.usefixtures("afresh", "unprobed")


@keras.saving.register_keras_serializable(package="tests")
class Halved(DOSeparableConv2D):
    """What computes something else than a layer of this package."""

    def call(self, x):
        return 0.5 * super().call(x)


@keras.saving.register_keras_serializable(package="tests")
class HalvedConv(DOConv2D):
    """What computes something else than a layer of this package."""

    def call(self, x):
        return 0.5 * super().call(x)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.keras"


@pytest.mark.parametrize("layer", [Halved, HalvedConv])
def test_subclasses_are_refused(layer, file):
    weights = file.with_name("model.weights.h5")
    model = keras.Sequential([keras.Input((6, 6, 2)), layer(3, 3, name="half")])
    model.save(file)
    model.save_weights(weights)
    refused(file, rf"layer 'half.*': it is a {layer.__name__}, which may compute something else")
    refused(weights, r"layer 'half.*': it is a halved\w*, which may compute something else")


def rewritten(file, **changes):
    """Rewrite members of an archive: `changes` give the new content for the old, by the stem."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            change = changes.get(name.partition(".")[0], bytes)
            archive.writestr(name, change(data))


@pytest.mark.parametrize("layer", [layers.ReLU, lambda **kw: layers.Dense(2, **kw)])
def test_a_class_of_this_package_that_is_not_known_is_refused(file, layer):
    def later(text):
        config = json.loads(text)
        node = config["config"]["layers"][1]
        node |= {"class_name": "DOLater", "registered_name": "doconv>DOLater", "module": None}
        return json.dumps(config).encode()

    def deeper(text):
        return b'{"class_name": "Model", "config": {"cells": [[' + text + b"]]}}"

    keras.Sequential([keras.Input((4,)), layer(name="later")]).save(file)
    for change in (later, deeper):
        rewritten(file, config=change)
        refused(file, r"layer 'later' is a DOLater of this package's, which is not known here")


def without_d(group):
    del group["depthwise_kernel"]


def with_other(name, *shape):
    def change(group):
        if name in group:
            del group[name]
        group[name] = numbers(*shape)

    return change


DAMAGED = {
    "no D where S > M": (DODepthwiseConv2D, without_d),
    "no D of a separable layer where S > M": (DOSeparableConv2D, without_d),
    "D of other channels": (DOSeparableConv2D, with_other("depthwise_kernel", 3, 9, 10)),
    "D of two axes": (DODepthwiseConv2D, with_other("depthwise_kernel", 2, 90)),
    "D of more taps than S": (DOConv2D, with_other("depthwise_kernel", 2, 11, 10)),
    "a pointwise kernel of two taps": (DOSeparableConv2D, with_other("1", 2, 1, 2, 3)),
    "a pointwise kernel of one rank less": (DOSeparableConv2D, with_other("1", 1, 2, 3)),
    "a bias of other size": (DOSeparableConv2D, with_other("2", 4)),
    "an entry more": (DOSeparableConv2D, with_other("3", 3)),
    "an entry more of a convolution": (DOConv2D, with_other("2", 3)),
    "no W": (DOConv2D, lambda group: group.__delitem__("0")),
    "a kernel of another rank": (DOConv2D, with_other("0", 1, 2, 5, 2, 3)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return what gives the content of a file of a model of one layer, which is made once."""
    folder = tmp_path_factory.mktemp("saved")

    @functools.cache
    def content(make, kind):
        kept = {"d_multiplier": 10} if make is not DOConv2D else {"depth_multiplier": 10}
        first = () if make is DODepthwiseConv2D else (3,)
        model = keras.Sequential([keras.Input((6, 6, 2)), make(*first, 3, **kept, name="layer")])
        file = folder / f"model.{kind}"
        model.save(file) if kind == "keras" else model.save_weights(file)
        return file.read_bytes()

    return content


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("kind", ["keras", "weights.h5"])
def test_entries_that_make_no_layer_are_refused(tmp_path, saved, case, kind):
    make, change = DAMAGED[case]
    file = tmp_path / f"model.{kind}"
    file.write_bytes(saved(make, kind))

    def changed(content):
        stored = io.BytesIO(content)
        with h5py.File(stored, "a") as opened:
            (group,) = opened["layers"].values()
            change(group["vars"])
        return stored.getvalue()

    if kind == "keras":
        rewritten(file, model=changed)
    else:
        file.write_bytes(changed(file.read_bytes()))
    refused(file, r"layer 'layer.*': named like an over-parameterized layer, but its entries make")
    with open_checkpoint(file) as checkpoint:
        (found,) = (layer for layer in checkpoint.layers if layer.note)
        assert (found.kind, found.over_parameterized) == ("other", False)


def test_an_ordinary_depthwise_kernel_under_ds_name_is_left(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    with h5py.File(source, "w") as file:
        file["layers/mine/vars/0"], file["layers/mine/vars/depthwise_kernel"] = (
            numbers(3), numbers(3, 3, 4, 1)
        )  # fmt: skip
    report = fold_checkpoint(source, target)
    assert (report.changed, [left.path for left in report.left]) == ((), ["mine"])
    with h5py.File(target) as file:
        assert {*file["layers/mine/vars"]} == {"0", "depthwise_kernel"}


def test_older_files_of_ordinary_layers_are_opened(tmp_path):
    ordinary = [keras.Input((9, 3)), layers.SeparableConv1D(4, 3), layers.DepthwiseConv1D(2)]
    keras.Sequential(ordinary).save(tmp_path / "old.h5")
    assert fold_checkpoint(tmp_path / "old.h5", tmp_path / "out.h5").changed == ()
