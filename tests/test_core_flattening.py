"""What a model does to the order of a flattened image's numbers, told kind by kind of layer."""

from __future__ import annotations

import numpy as np
import pytest

from doconv_core.state.flattening import (
    FIRST,
    FLAT,
    KERAS_LAYERS,
    KERAS_OPERATIONS,
    LAST,
    OPEN,
    RULES,
    SAME,
    Fed,
    Trace,
    Value,
    channels_first,
    channels_last,
    given,
    image_size,
    kind_of,
    result,
)

CONV, FLATTEN = ("convolution", {"data_format": LAST}), ("flatten", {})


def behind(*layers, shape=(6, 6, 4)):
    """Return what a layer is given that stands behind these, each a kind and its config."""
    trace, value = Trace(), given({"batch_shape": [None, *shape]})
    for kind, config in layers:
        value = trace.call("", kind, config, [value])._replace(shape=config.get("shape"))
    trace.call("fc", "dense", {}, [value])
    return trace.fed()["fc"]


@pytest.mark.parametrize(
    ("layers", "image"),
    [
        ([(CONV[0], {**CONV[1], "shape": (6, 6, 5)}), FLATTEN], (5, 6, 6)),
        ([("convolution", {"data_format": FIRST, "shape": (5, 6, 6)}), FLATTEN], ()),
        ([CONV, ("global pooling", {})], ()),
        ([CONV, ("features last", {})], ()),
        ([CONV, ("elementwise", {"activation": "relu"})], ()),
        ([CONV, FLATTEN], None),  # of a size that is not known
        ([("what nobody knows", {})], None),
    ],
)
def test_a_layer_is_behind_an_image_that_is_flattened(layers, image):
    assert behind(*layers) == Fed(image)


@pytest.mark.parametrize(("order", "expected"), [(SAME, LAST), (FLAT, OPEN), (OPEN, OPEN)])
def test_what_is_spread_over_an_image_keeps_its_order_if_it_is_one_number_a_channel(
    order, expected
):
    image, factor = Value(LAST, (6, 6, 8)), Value(order, (8,))
    for values in ([image, factor], [factor, image]):
        assert result("merge", {}, values).order == expected


def test_what_becomes_an_image_is_noted_of_its_maker():
    trace = Trace()
    made = trace.call("fc", "dense", {}, [Value(SAME, (3,))])._replace(shape=(32,))
    made = trace.call("", "elementwise", {}, [made])
    trace.call("reshape", "reshape", {"target_shape": [4, 4, 2]}, [made])
    assert trace.fed()["fc"] == Fed((), outward=True)


def test_every_class_has_a_rule():
    assert {*KERAS_LAYERS.values()} == {*RULES}
    assert {*KERAS_OPERATIONS.values()} <= {*RULES}
    assert kind_of("Conv2DTranspose", "keras.layers") == "convolution"
    assert kind_of("Relu", "keras.src.ops.nn") == "elementwise"
    assert kind_of("Relu", "keras.layers") == kind_of("Own", "keras.layers") == ""


def test_both_orders_and_back():
    values = np.arange(2 * 30.0).reshape(2, 30)
    last = channels_last(values, (5, 3, 2))
    np.testing.assert_array_equal(
        last.reshape(2, 3, 2, 5), np.moveaxis(values.reshape(2, 5, 3, 2), 1, -1)
    )
    np.testing.assert_array_equal(channels_first(last, (5, 3, 2)), values)
    with pytest.raises(ValueError, match=r"the layer has 30 inputs; given \(5, 3, 3\)"):
        channels_first(values, (5, 3, 3))


@pytest.mark.parametrize(
    ("fed", "features", "size"),
    [
        (Fed((5, None, 6)), 180, (5, 36)),
        (Fed((5, 6, 6)), 360, (5, 72)),  # of a config that contradicts itself
        (Fed((7, None)), 180, None),
        (Fed((None, 6)), 180, None),
        (Fed(()), 180, ()),
        (Fed(None), 180, None),
        (None, 180, None),
    ],
)
def test_the_size_of_an_image_by_the_number_of_features(fed, features, size):
    assert image_size(fed, features) == size
