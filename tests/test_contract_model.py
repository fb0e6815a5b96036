"""The contract of whole models: on the same network every backend reports the same."""

from __future__ import annotations

import pytest
from frameworks import BACKENDS, adapter_of

from doconv_core import Change, Left, Report
from doconv_core.models.report import (
    ALREADY,
    NOT_DIRECT,
    NOT_SELECTED,
    ONE_TAP,
    REPLACED,
    SUBCLASS,
    TRANSPOSED,
    behind,
    fused_into,
)

# Layers by path, in the order in which they are called, and their kinds: an adapter makes them.
NETWORK = {
    "first_norm": "norm",
    "conv": "conv", "conv_norm": "norm",
    "relu": "relu", "relu_norm": "norm",
    "already": "do_conv", "already_norm": "norm",
    "unselected": "conv",
    "pointwise": "pointwise", "pointwise_norm": "norm",
    "transposed": "transposed", "transposed_norm": "norm",
    "own": "own", "own_norm": "norm",
    "patched": "patched", "patched_norm": "norm",
}  # fmt: skip


@pytest.fixture(params=BACKENDS)
def adapter(request):
    return adapter_of(request.param)


def expected(adapter, action, changed, left, found):
    """Return a report with the framework's names of types, and its own count of parameters."""
    types = adapter.types
    return Report(
        action,
        tuple(Change(path, types[old], types.get(new, new)) for path, old, new in changed),
        tuple(Left(path, types[kind], reason) for path, kind, reason in left),
        found.parameters_before,
        found.parameters_after,
    )


def over_parameterized(adapter):
    model = adapter.network(NETWORK)
    return adapter.package.over_parameterize(model, where=lambda path, layer: path != "unselected")


def test_what_is_over_parameterized_and_left_is_told_alike(adapter):
    _, report = over_parameterized(adapter)
    left = [
        ("already", "do_conv", ALREADY),
        ("unselected", "conv", NOT_SELECTED),
        ("pointwise", "conv", ONE_TAP),
        ("transposed", "transposed", TRANSPOSED),
        ("own", "own", SUBCLASS),
        ("patched", "conv", REPLACED),
    ]
    changed = [("conv", "conv", "do_conv")]
    assert report == expected(adapter, "over-parameterized", changed, left, report)


def test_what_is_folded_fused_and_left_is_told_alike(adapter):
    model, _ = over_parameterized(adapter)
    _, report = adapter.package.fold(model, fuse_batchnorm=True)
    fused = fused_into(adapter.types["conv"])
    changed = [
        ("conv", "do_conv", "conv"),
        ("conv_norm", "norm", fused),
        ("already", "do_conv", "conv"),
        ("already_norm", "norm", fused),
        ("pointwise_norm", "norm", fused),
    ]
    left = [
        ("first_norm", "norm", NOT_DIRECT),
        ("relu_norm", "norm", NOT_DIRECT),
        ("transposed_norm", "norm", behind(TRANSPOSED)),
        ("own_norm", "norm", behind(SUBCLASS)),
        ("patched_norm", "norm", behind(REPLACED)),
    ]
    assert report == expected(adapter, "folded", changed, left, report)


@pytest.mark.parametrize("action", ["export", "load"])
def test_a_layer_whose_forward_was_replaced_has_no_state(adapter, action):
    """It may compute something else, as a subclass may, which has none either."""
    package, model = adapter.package, adapter.network({"patched": "patched"})
    state = package.export_state(adapter.network({"patched": "conv"}))
    kind = adapter.types["conv"]
    with pytest.raises(TypeError, match=f"'patched' is a {kind} with .*; {REPLACED}"):
        package.export_state(model) if action == "export" else package.load_state(model, state)
    (layer,) = layers(model)
    if adapter.package.__name__ != "doconv_tf":  # in Keras a model of one layer has its name
        with pytest.raises(TypeError, match=f"^the model itself is a {kind} with"):
            package.export_state(layer)


def test_a_model_that_is_its_only_layer_is_named_so(adapter):
    message = "where matches no convolution: 'conv'; .* such as the model itself"
    layer = next(iter(layers(adapter.network({"conv": "conv"}))))
    with pytest.warns(UserWarning, match=message):
        adapter.package.over_parameterize(layer, where="conv")


def layers(model):
    """Return a model's layers, in whichever of the frameworks."""
    return getattr(model, "layers", model)
