"""Dynamic group convolutions: the arrays and the counts of the source's own implementation.

`data/dgc_vectors.npz` has what that computed in float64: for each case its first state (`init`),
an input, the gradient at the output (`cotangent`), and what it made of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cases import refuses
from equal import assert_close

from doconv_core import StateError, count, describe, read_state, write_state
from doconv_core.kinds.dgc import DGConvSpec, dynamic_heads, from_source, inactive_channels
from doconv_core.networks.evaluate import evaluate, gradients
from doconv_core.networks.initialize import initialize
from doconv_core.networks.lowering import layers
from doconv_core.networks.nodes import (
    Activation,
    BatchNorm,
    Network,
    Residual,
    dynamic,
    sequence,
)
from doconv_core.state.file import State, entry

VECTORS = np.load(Path(__file__).parent / "data" / "dgc_vectors.npz")
LASSO = 1e-5
# Channels and the options of the layer; and how far the training is.
CASES = {
    "A_1x1_h4_g25_final": (32, {"channels": 64}, 0.8),
    "B_3x3_s2_h4_g45_mid": (
        24, {"channels": 16, "kernel_size": (3, 3), "stride": 2, "gate_factor": 0.45}, 0.5,
    ),
    "D_1x1_h1_noprune_early": (16, {"channels": 8, "heads": 1}, 1 / 12),
    "F_ties_h2_g50_final": (16, {"channels": 8, "heads": 2, "gate_factor": 0.5}, 0.9),
}  # fmt: skip
NORM = {
    "gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"
}  # fmt: skip
SHORTCUT = {"downsample.0": "shortcut.conv", "downsample.1.norm": "shortcut.bn"}


def network_of(name):
    """Return a case as a network, and its progress."""
    if name != "block":
        channels, options, progress = CASES[name]
        return _network(dynamic(lasso=LASSO, **options), channels, VECTORS[f"{name}/x"]), progress
    how = {"gate_factor": 0.45, "lasso": LASSO}
    body = sequence(
        ("conv1", dynamic(32, (3, 3), stride=2, **how)),
        ("bn1", BatchNorm()),
        ("relu1", Activation("relu")),
        ("conv2", dynamic(32, (3, 3), **how)),
        ("bn2", BatchNorm()),
    )
    shortcut = sequence(("conv", dynamic(32, stride=2, **how)), ("bn", BatchNorm()))
    block = sequence(("sum", Residual(body, shortcut)), ("relu", Activation("relu")))
    return _network(block, 16, VECTORS["block/x"]), 0.6


def _network(node, channels, x):
    return Network("case", sequence(("layer", node)), (channels, *x.shape[2:]))


def arrays_of(name, stage, network):
    """Return what the vectors have of one stage, by the names of the network's state."""
    place = f"{name}/{stage}/"
    theirs = {key.removeprefix(place): VECTORS[key] for key in VECTORS if key.startswith(place)}
    ours = from_source(theirs)
    for before, after in SHORTCUT.items():
        ours = {key.replace(before, after): array for key, array in ours.items()}
    found, root = {}, "layer.sum." if name == "block" else "layer."
    for path, form in layers(network).items():
        for key, shape in form.shapes.items():
            word = NORM[key] if form.kind == "batch_norm" else key
            array = ours.get(f"{path}.{word}".removeprefix(root))
            if array is not None:
                found[entry(path, key)] = array.reshape(shape)
    return found


def _together(arrays):
    """Return the arrays, a norm's as one: where another norm follows, gamma's gradient cancels."""
    found = {key: array for key, array in arrays.items() if not key.endswith((".gamma", ".beta"))}
    norms = {key.rpartition(".")[0] for key in arrays.keys() - found.keys()}
    both = {path: [arrays[f"{path}.{each}"] for each in ("gamma", "beta")] for path in norms}
    return {**found, **{path: np.stack(each) for path, each in both.items()}}


@pytest.mark.parametrize("name", [*CASES, "block"])
def test_layers_are_those_of_the_source(name):
    network, progress = network_of(name)
    x, cotangent = VECTORS[f"{name}/x"], VECTORS[f"{name}/cotangent"]
    arrays = arrays_of(name, "init", network)
    if name != "block":
        out = VECTORS[f"{name}/eval_before/out"]
        assert_close(evaluate(network, State(layers(network), arrays), x), out, 1e-12)
    after = arrays_of(name, "after", network)
    trained = {key: array for key, array in after.items() if key.endswith("inactive")}
    for key, array in trained.items():
        channels, share = (
            len(arrays[key.replace("heads.inactive", "norm.gamma")]),
            (layers(network)[key.removesuffix(".inactive")].spec.gate_factor),
        )
        assert inactive_channels(channels, share, progress) == array
    state = State(layers(network), {**arrays, **trained})
    out = evaluate(network, state, x, training=True)
    assert_close(out, VECTORS[f"{name}/train/out"], 1e-12)
    found = gradients(network, state, x, cotangent, training=True)
    assert_close(found.x, VECTORS[f"{name}/train/grad/x"], 1e-12)
    expected = arrays_of(name, "train/grad", network)
    assert found.parameters.keys() == expected.keys()
    assert_close(_together(found.parameters), _together(expected), 1e-12)
    state = State(layers(network), {**arrays, **after})
    end = "eval/out" if name == "block" else "eval_after/out"
    assert_close(evaluate(network, state, x), VECTORS[f"{name}/{end}"], 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_saliencies_and_choices_are_those_of_the_source(name):
    network, _ = network_of(name)
    heads, x = network.body.children[0][1].children[-1][1], VECTORS[f"{name}/x"]
    arrays = {**arrays_of(name, "init", network), "layer.heads.inactive": np.zeros(())}
    norm = {key: arrays[f"layer.norm.{key}"] for key in NORM}
    z = Activation("relu").step(BatchNorm().step(x, norm, {}, True).output, {}, {}, True).output
    own = {key.removeprefix("layer.heads."): array for key, array in arrays.items()}
    own["inactive"] = VECTORS[f"{name}/train/inactive"].reshape(())
    how = {"stride": heads.stride, "padding": heads.conv.pads}
    found = dynamic_heads(z, own, heads.spec(x.shape[1:]), **how)
    assert_close(found.saliency, VECTORS[f"{name}/train/saliency"], 1e-12)
    assert_close(found.lasso, VECTORS[f"{name}/train/lasso"].reshape(()), 1e-12)
    assert (found.active == VECTORS[f"{name}/train/mask"]).all()


def test_the_schedule_is_that_of_the_source():
    table = [
        [
            [inactive_channels(int(channels), share, p) for p in VECTORS["schedule/progress"]]
            for share in VECTORS["schedule/gate_factor"]
        ]
        for channels in VECTORS["schedule/channels"]
    ]
    assert (np.array(table) == VECTORS["schedule/inactive"]).all()


TINY = {"num_classes": 10, "stages": (2, 2, 2), "growth": (4, 8, 16)}


@pytest.mark.parametrize(
    ("name", "options", "parameters", "flops", "dense", "kept", "selectors"),
    [
        ("dydensenet74", {}, 24060664, 549273592, 1000308736, 250077184, 12137984),
        ("dyresnet18", {}, 12335144, 890396782.4, 1695547392, 765334528, 637952),
        ("dyresnet18", {"gate_factor": 0.25}, 12335144, 551287304, 1695547392, 423886848, 637952),
        ("cifar_dydensenet86", {}, 4336900, 71109208, 148635648, 37158912, 2813216),
        ("cifar_dydensenet86", {"num_classes": 10, "heads": 2}, 2858202, 69580804, 148635648,
         37158912, 1406608),
        ("cifar_dydensenet86", {"num_classes": 10, "squeeze_rate": 8}, 7032362, 73807774,
         148635648, 37158912, 5580768),
        ("cifar_dydensenet86", TINY, 19370, 1520190, 983040, 245760, 4880),
        ("cifar_dydensenet86", {"num_classes": 10, "gate_factor": 1}, 4264810, 182513854,
         148635648, 148635648, 2813216),
        ("cifar_densenet86", {"num_classes": 10}, 1451594, 177293130, 0, 0, 0),
        ("densenet74", {}, 11922680, 1280591816, 0, 0, 0),
        ("resnet18_v1b", {}, 11689512, 1818213864, 0, 0, 0),
    ],
)  # fmt: skip
def test_counts_are_those_of_the_source(name, options, parameters, flops, dense, kept, selectors):
    cost = count(name, **options)
    assert (cost.parameters, cost.dgc_flops) == (parameters, flops)
    heads = cost.heads
    assert (heads.dense, heads.kept, heads.parameters) == (dense, kept, selectors)


def test_networks_start_as_the_source_says():
    state = initialize(describe("cifar_dydensenet86", num_classes=10, **{
        key: TINY[key] for key in ("stages", "growth")
    }))  # fmt: skip
    block = "denseblock_3.denselayer_2.new"
    weight = state.arrays[f"{block}.conv_2.conv.weight"]  # a grouped one counts all its outputs
    assert abs(weight.std() / (2 / (9 * 16)) ** 0.5 - 1) < 0.1
    weight = state.arrays[f"{block}.conv_1.heads.weight"]
    assert abs(weight.std() / (2 / 16) ** 0.5 - 1) < 0.1  # 64 of four heads
    squeeze = state.arrays[f"{block}.conv_1.heads.squeeze_weight"]
    assert abs(squeeze.std() / (2 / squeeze.shape[-1]) ** 0.5 - 1) < 0.1
    assert (state.arrays[f"{block}.conv_1.heads.saliency_bias"] == 1).all()
    assert not state.arrays["classifier.bias"].any()
    assert abs(state.arrays["classifier.weight"]).max() <= 64**-0.5


def test_a_state_keeps_the_heads(tmp_path):
    network = Network("case", sequence(("layer", dynamic(8))), (16, 4, 4))
    state = initialize(network)
    write_state(state, tmp_path / "x.safetensors")
    found = read_state(tmp_path / "x.safetensors")
    assert found.layers == state.layers
    assert found.arrays["layer.heads.inactive"].shape == ()


@pytest.mark.parametrize("dropped", [-1, 2.5, 13, np.nan, np.inf])
def test_a_state_that_drops_no_number_of_channels_is_refused(dropped):
    state = initialize(Network("case", sequence(("layer", dynamic(8))), (16, 4, 4)))
    arrays = {**state.arrays, "layer.heads.inactive": np.array(dropped, "f4")}
    told = r"heads' drops \S+ of 16 channels, (which is no number|but gate_factor=.* most 12)"
    with pytest.raises(StateError, match=told):
        State(state.layers, arrays)


test_what_gives_no_layer_is_refused = refuses(
    lambda call: call(),
    (lambda: DGConvSpec(30, 64, (1, 1)), ValueError, "in_channels must be divisible by heads; rec"),
    (lambda: DGConvSpec(32, 30, (1, 1)), ValueError, "out_channels must be divisible by heads; r"),
    (lambda: DGConvSpec(4, 4, (1, 1)), ValueError, "squeeze_rate must be at most 9 for 4 channels"),
    (
        lambda: DGConvSpec(80, 4, (1,), squeeze_rate=90),
        ValueError,
        "squeeze_rate must be at most 80",
    ),
    (lambda: DGConvSpec(32, 64, (1, 1), gate_factor=0), ValueError, "gate_factor, the share of ch"),
    (lambda: DGConvSpec(32, 64, (1, 1), gate_factor=1.5), ValueError, "at most 1; received gate_f"),
    (lambda: DGConvSpec(32, 64, (1, 1), heads=0), ValueError, "heads must be at least 1; received"),
    (lambda: inactive_channels(8, 0.5, 2), ValueError, "progress is the share of the training tha"),
    (lambda: dynamic_heads(np.ones((1, 8, 3)), {}, DGConvSpec(8, 8, (1,))), ValueError, "weight"),
    (
        lambda: from_source({"headconv_1.fc2.bias": np.ones(3)}),
        ValueError,
        "must be of heads 0 to ",
    ),
    (lambda: describe("dyresnet18", stages=(1,)), TypeError, "'dyresnet18' takes heads, squeeze_r"),
    (lambda: describe("resnet18", heads=2), TypeError, "'resnet18' takes no options; received hea"),
    (lambda: describe("dydensenet74", stages=(1, 2)), ValueError, "stages and growth must have as"),
    (lambda: describe("dydensenet74", growth=8), TypeError, "growth must be integers, one for eac"),
)
