"""Kinds whose kernel is a formula: the core's mathematics, and models of every framework."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from command_line import doconv
from equal import assert_close
from frameworks import BACKENDS, adapter_of, need

from doconv_core import ConvSpec, State, difference, read_state, write_state
from doconv_core.kinds.base import recipe
from doconv_core.kinds.branches import BRANCHED, BRANCHES, PRESETS
from doconv_core.kinds.expand import EXPAND

OPTIONS = (
    *((BRANCHED, {"branches": name}) for name in (*PRESETS, BRANCHES)),
    (EXPAND, {"ratio": 3}), (EXPAND, {"expand_inputs": False}),
)  # fmt: skip
IDS = [f"{kind.name}{n}" for n, (kind, _) in enumerate(OPTIONS)]
CONVS = (
    ConvSpec(4, 4, (3, 3), 2), ConvSpec(4, 6, (3, 5)), ConvSpec(4, 4, (3,)),
    ConvSpec(3, 3, (3, 3), 3), ConvSpec(2, 4, (2, 2, 3)), ConvSpec(2, 2, (1, 1)),
)  # fmt: skip


def drawn(kind, spec, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in kind.entries(spec).items()}


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_the_core_starts_at_the_kernel_and_knows_its_gradient(kind, options, conv):
    spec, rng = kind.spec(conv, **options), np.random.default_rng(1)
    kernel, toward = rng.standard_normal((2, *conv.kernel_shape))
    assert (kind.compose(kind.start(kernel, spec), spec) == kernel).all()
    entries, step = drawn(kind, spec), 1e-6
    for name, gradient in kind.gradient(entries, toward, spec).items():
        moved = rng.standard_normal(gradient.shape)
        ends = [
            kind.compose({**entries, name: entries[name] + sign * step * moved}, spec)
            for sign in (1, -1)
        ]
        numeric = ((ends[0] - ends[1]) * toward).sum() / (2 * step)
        assert (gradient * moved).sum() == pytest.approx(numeric, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("conv", CONVS[:-1], ids=str)
def test_shapes_in_a_file_tell_what_a_layer_is(kind, options, conv):
    spec = kind.spec(conv, **options)
    shapes = kind.entries(spec) | {"weight": conv.kernel_shape}
    found = kind.recognised(shapes)
    assert kind.entries(found) == kind.entries(spec)
    entries = drawn(kind, spec)
    assert_close(kind.compose(entries, found), kind.compose(entries, spec))
    assert kind.recognised(shapes | {"weight": (5, *conv.kernel_shape[1:])}) is None


def test_the_branches_of_papers_are_the_sums_that_they_are():
    """Each branch by a convolution of its own, in NumPy."""
    conv = ConvSpec(4, 4, (3, 3))
    spec = BRANCHED.spec(conv, branches=BRANCHES)
    e = {n: a.reshape(4, *a.shape[1:]) for n, a in drawn(BRANCHED, spec).items()}
    scaled = {b: e[f"scale_{b.replace('-', '_')}"][:, None, None, None] for b in BRANCHES}
    expected = scaled["kxk"] * e["weight"].reshape(4, 4, 3, 3)
    expected[:, :, 1:2, 1:2] += scaled["1x1"] * e["weight_1x1"][..., None, None]
    expected[:, :, 1:2, 1:2] += scaled["identity"] * np.eye(4)[..., None, None]
    expected[:, :, 1:2, :] += scaled["1xk"] * e["weight_1xk"][:, :, None]
    expected[:, :, :, 1:2] += scaled["kx1"] * e["weight_kx1"][..., None]
    second = e["weight_1x1_kxk"].reshape(4, 4, 3, 3)
    front = np.eye(4) + e["weight_front_1x1_kxk"]
    expected += scaled["1x1-kxk"] * np.einsum("ohyx,hi->oiyx", second, front)
    expected += scaled["1x1-avg"] * e["weight_1x1_avg"][..., None, None] / 9
    filters = {
        "sobelx": [[1, 0, -1], [2, 0, -2], [1, 0, -1]],
        "sobely": [[1, 2, 1], [0, 0, 0], [-1, -2, -1]],
        "laplacian": [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
    }
    for name, taps in filters.items():
        by = e[f"weight_1x1_{name}"][..., None, None] * np.array(taps)
        expected += scaled[f"1x1-{name}"] * by
    assert_close(BRANCHED.compose(drawn(BRANCHED, spec), spec), expected)


def test_expansion_is_a_product_of_three_kernels():
    spec = EXPAND.spec(ConvSpec(3, 2, (3, 1)), ratio=3)
    e, scale = drawn(EXPAND, spec), 3**-0.5
    more = e["weight_front_more"].reshape(2, 3, 3) + scale * np.eye(3)
    first = np.concatenate([np.eye(3) + e["weight_front"], *more])  # (h, i)
    more = e["weight_back_more"].reshape(2, 2, 2) + scale * np.eye(2)
    last = np.concatenate([np.eye(2) + e["weight_back"], *more], axis=1)  # (o, p)
    rows = np.concatenate([e["weight"], *e["weight_in"].reshape(2, 2, 3, 3)], axis=1)
    both = e["weight_both"].reshape(2, 2, 2, 3, 3)
    out = e["weight_out"].reshape(2, 2, 3, 3)
    below = [np.concatenate([out[k], both[0, k], both[1, k]], axis=1) for k in range(2)]
    middle = np.concatenate([rows, *below])  # (p, h, m)
    expected = np.einsum("op,phm,hi->oim", last, middle, first).reshape(2, 3, 3, 1)
    assert_close(EXPAND.compose(e, spec), expected)


IMPOSSIBLE = (
    ("branches", {"branches": "vgg"}, ValueError, "branches must be one of 'repvgg', .*'vgg'"),
    ("branches", {"branches": ("1x1",)}, ValueError, "branches must have 'kxk'"),
    ("branches", {"branches": ("kxk", "1x1", "1x1")}, ValueError, "each name once"),
    ("branches", {"branches": 3}, ValueError, "received 3"),
    ("branches", {"branches": [["kxk"]]}, ValueError, r"or some of .* received \[\['kxk'\]\]"),
    ("expand", {"ratio": 1}, ValueError, "ratio must be at least 2; received ratio=1"),
    ("expand", {"ratio": 2.5}, TypeError, "ratio must be an integer"),
    ("expand", {"expand_inputs": 1}, TypeError, "expand_inputs must be a boolean; received 1"),
    ("expand", {"depth_multiplier": 9}, TypeError, "takes ratio, expand_inputs; received depth"),
)


@pytest.mark.parametrize(("word", "options", "error", "message"), IMPOSSIBLE)
def test_options_that_give_no_layer_are_refused(word, options, error, message):
    with pytest.raises(error, match=message):
        recipe(word, **options)


def test_a_layer_of_another_kinds_options_is_refused():
    with pytest.raises(TypeError, match="of kind 'branches' takes branches; received ratio=2"):
        BRANCHED.spec(ConvSpec(1, 1, (3, 3)), ratio=2)


WORDS = {
    "orepa": {"kind": "branches", "branches": "orepa"},
    "ecb": {"kind": "branches", "branches": "ecb"},
    "expand": {"kind": "expand"},
    "sesr": {"kind": "expand", "expand_inputs": False},
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_trains_folds_and_travels(backend, word, tmp_path):
    need(backend)
    adapter = adapter_of(backend)
    models, package = importlib.import_module(f"adapters.{backend}_models"), adapter.package
    network = package.get_model("tutorial_pt", input_shape=(1, 12, 12), num_classes=5)
    shape = (2, 12, 12, 1) if backend == "tf" else (2, 1, 12, 12)
    x = models.array(np.random.default_rng(1).standard_normal(shape).astype("f4"))
    getattr(network, "eval", lambda: network)()
    model, report = package.over_parameterize(network, kind=word)
    assert len(report.changed) == 3
    assert package.verify(model, network, x).absolute == 0
    state, rng = package.export_state(model), np.random.default_rng(2)
    arrays = {
        name: a + 0.05 * rng.standard_normal(a.shape).astype("f4")
        for name, a in state.arrays.items()
    }
    trained = State(state.layers, arrays, state.origin)
    package.load_state(model, trained)
    folded, told = package.fold(model)
    assert len(told.changed) == 3
    assert package.verify(folded, model, x).relative <= 1e-5
    file = tmp_path / "state.safetensors"
    write_state(trained, file)
    other = package.get_model(f"tutorial_pt_{word}", input_shape=(1, 12, 12), num_classes=5)
    getattr(other, "eval", lambda: other)()
    assert package.verify(other, network, x).absolute == 0
    package.load_state(other, read_state(file))
    assert package.verify(other, model, x).relative <= 1e-6
    # The command folds the file to what the framework does.
    plain = tmp_path / "plain.safetensors"
    done = doconv("fold", file, plain)
    assert done.exit_code == 0, done.output
    expected = package.export_state(folded).arrays
    found = read_state(plain).arrays
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert difference(array, expected[name]).relative <= 1e-5, name


def test_pytorchs_files_are_folded_and_told_of(tmp_path):
    need("torch")
    import torch
    from torch import nn

    from doconv_torch import over_parameterize

    plain = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 6, (3, 5)))
    for options in WORDS.values():
        model, _ = over_parameterize(plain, **options)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        file, folded = tmp_path / "model.pt", tmp_path / "folded.pt"
        torch.save(model.state_dict(), file)
        shown = doconv("inspect", file)
        assert shown.exit_code == 0, shown.output
        assert shown.output.count(options["kind"]) >= 2
        done = doconv("fold", file, folded, "--force")
        assert done.exit_code == 0, done.output
        ordinary = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 6, (3, 5)))
        ordinary.load_state_dict(torch.load(folded))
        x = torch.randn(2, 4, 9, 9)
        with torch.no_grad():
            assert_close(ordinary(x).numpy(), model(x).numpy(), 1e-5)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_keras_files_of_depthwise_layers_are_folded(multiplier, tmp_path):
    need("tf")
    import keras

    from doconv_tf import over_parameterize, verify

    def network():
        layer = keras.layers.DepthwiseConv2D(3, depth_multiplier=multiplier)
        return keras.Sequential([keras.Input((9, 9, 4)), layer])

    for options in (*WORDS.values(), {"kind": "branches", "branches": "acnet"}):
        model, _ = over_parameterize(network(), **options)
        rng = np.random.default_rng(1)
        model.set_weights([0.3 * rng.standard_normal(w.shape) for w in model.weights])
        for ending in (".keras", ".weights.h5"):
            file, plain = tmp_path / f"model{ending}", tmp_path / f"plain{ending}"
            (model.save if ending == ".keras" else model.save_weights)(file)
            done = doconv("fold", file, plain, "--force")
            assert done.exit_code == 0, done.output
            folded = network()
            folded.load_weights(plain)
            assert verify(folded, model, np.ones((1, 9, 9, 4), "f4")).relative <= 1e-5


def test_gluon_does_not_fold_a_symbol_that_composes(tmp_path):
    need("mx")
    from doconv_core import NotFoldable
    from doconv_mx import fold, over_parameterize  # before MXNet, which needs its repairs

    import mxnet as mx  # isort: skip
    from mxnet.gluon import SymbolBlock, nn  # isort: skip

    for options in WORDS.values():
        plain = nn.Conv2D(4, 3, in_channels=4)
        plain.initialize()
        model, _ = over_parameterize(plain, **options)
        model.hybridize()
        model(mx.nd.ones((1, 4, 9, 9))).asnumpy()
        model.export(str(tmp_path / "model"))
        symbol = mx.sym.load(str(tmp_path / "model-symbol.json"))
        traced = SymbolBlock(symbol, mx.sym.var("data", dtype="float32"))
        with pytest.raises(NotFoldable, match="a symbol that composes kernels"):
            fold(traced)
