"""Branches with batch norms in Gluon alone: hybridized blocks, contexts, trainers, symbols."""

from __future__ import annotations

import numpy as np
import pytest
from equal import assert_close
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
import doconv_mx as package  # noqa: E402

# isort: split
import mxnet as mx  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import SymbolBlock, Trainer, nn  # noqa: E402

from doconv_core import CheckpointError, NotFoldable, fold_checkpoint  # noqa: E402
from doconv_core.kinds.normed import KINDS, SUMMED  # noqa: E402
from doconv_core.models.normed import NO_NORM  # noqa: E402
from doconv_mx.bsconv import IN_A_SYMBOL  # noqa: E402
from doconv_mx.normed import LAST  # noqa: E402


def pair(conv=None, norm=None, ctx=None, dtype="float32"):
    model = nn.HybridSequential()
    model.add(conv or nn.Conv2D(4, 3, padding=1, in_channels=4))
    model.add(norm or nn.BatchNorm(in_channels=4), nn.Activation("relu"))
    mx.random.seed(0)
    model.cast(dtype)
    model.initialize(mx.init.Normal(0.5), ctx=ctx)
    return model


def image(dtype="float32"):
    values = np.random.default_rng(0).standard_normal((2, 4, 6, 5)).astype(dtype)
    return mx.nd.from_numpy(values)


def reason(model, kind="repvgg"):
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        report = package.over_parameterize(model, kind=kind).report
    return {path: told for path, _, told in report.left}["0"]


@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always
@pytest.mark.parametrize("kind", ["repvgg", "dbb", "qarepvgg"])
def test_hybridized_and_exported_layers_compute_the_same(kind, tmp_path):
    model, x = pair(), image()
    model.hybridize()
    made = package.over_parameterize(model, kind=kind).model
    for parameter in made.collect_params(".*norm.*gamma").values():
        parameter.set_data(mx.nd.random.uniform(0.5, 2, parameter.shape))
    hybridized = made(x).asnumpy()
    made.hybridize(active=False)
    assert_close(hybridized, made(x))
    made.hybridize()
    made(x)
    made.export(str(tmp_path / "model"))
    loaded = SymbolBlock.imports(
        str(tmp_path / "model-symbol.json"), ["data"], str(tmp_path / "model-0000.params")
    )
    assert_close(loaded(x), hybridized)
    with autograd.record():
        loss = (made(x) ** 2).sum()
    loss.backward()
    gradients = [
        p.grad().asnumpy() for p in made.collect_params().values() if p.grad_req == "write"
    ]
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    folded = package.fold(made).model
    assert_close(folded(x), made(x))
    assert type(folded[1]) is nn.Dropout
    with mx.util.np_shape(True):
        assert_close(folded(x), made(x))


def test_a_trainer_goes_on_with_what_was_trained():
    model, x = pair(), image()
    trainer = Trainer(model.collect_params(), "sgd", {"learning_rate": 0.1})
    conv, norm = model[0], model[1]
    kept = (conv.weight, conv.bias, norm.gamma, norm.beta, norm.running_mean, norm.running_var)
    made = package.over_parameterize(model, kind="repvgg", inplace=True).model
    layer = made[0]
    assert layer is conv
    dense, own = layer.dense_conv, layer.dense_norm
    taken = (dense.weight, dense.bias, own.gamma, own.beta, own.running_mean, own.running_var)
    assert all(one is other for one, other in zip(taken, kept, strict=True))
    before = own.gamma.data().asnumpy()
    with autograd.record():
        loss = (made(x) ** 2).sum()
    loss.backward()
    trainer.step(1)
    assert not np.array_equal(own.gamma.data().asnumpy(), before)
    names = [*made.collect_params()]
    assert len(names) == len({*names})
    assert any(name.endswith("identity_norm_gamma") for name in names)


def test_each_context_has_statistics_of_its_own():
    contexts = [mx.cpu(0), mx.cpu(1)]
    model = pair(ctx=contexts)
    for number, context in enumerate(contexts):
        model[1].running_mean.data(context)[:] = number + 0.5
    for kind in ("repvgg", "qarepvgg"):
        made = package.over_parameterize(model, kind=kind).model
        folded = package.fold(made).model
        for context in contexts:
            x = image().as_in_context(context)
            assert_close(made(x), model(x))
            assert_close(folded(x), model(x))


@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always
def test_what_is_left_and_why():
    assert "has no values yet" in reason(pair_without_values())
    assert reason(pair(nn.Conv2D(4, 3, in_channels=4, activation="relu"))) == NO_NORM
    last = nn.Conv2D(4, 3, padding=1, in_channels=4, layout="NHWC")
    assert LAST in reason(pair(last, nn.BatchNorm(axis=3, in_channels=4)), "dbb")
    assert "normalizes another axis" in reason(pair(norm=nn.BatchNorm(axis=2, in_channels=6)))
    own = type("Own", (nn.BatchNorm,), {})
    assert "a subclass" in reason(pair(norm=own(in_channels=4)))
    hooked = pair()
    hooked[1].register_forward_hook(lambda *_: None)
    assert "has hooks, which would see other values" in reason(hooked)

    x = mx.sym.var("data")
    block = SymbolBlock(mx.sym.BatchNorm(mx.sym.Convolution(x, kernel=(3, 3), num_filter=4)), x)
    block.initialize()
    block(image())
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        (left,) = package.over_parameterize(block, kind="repvgg").report.left
    assert left.reason == IN_A_SYMBOL


def pair_without_values():
    model = nn.HybridSequential()
    model.add(nn.Conv2D(4, 3), nn.BatchNorm())
    model.initialize()
    return model


def test_channels_last_are_kept():
    last = nn.Conv2D(4, 3, padding=1, in_channels=4, layout="NHWC", use_bias=False)
    model = pair(last, nn.BatchNorm(axis=3, in_channels=4))
    made = package.over_parameterize(model, kind="repvgg").model
    folded = package.fold(made).model[0]
    assert_close(folded.weight.data() * (1 + 1e-5) ** 0.5, last.weight.data())
    assert folded._kwargs["layout"] == "NHWC"


def test_fixed_gammas_and_other_dtypes():
    for options in ({"scale": False}, {"center": False}, {"use_global_stats": True}):
        model, x = pair(norm=nn.BatchNorm(in_channels=4, **options), dtype="float64"), image("f8")
        for kind in ("repvgg", "dbb", "qarepvgg"):
            made = package.over_parameterize(model, kind=kind).model
            assert_close(made(x), model(x), 1e-12)
            folded = package.fold(made).model
            assert_close(folded(x), model(x), 1e-12)
            assert np.dtype(folded[0].weight.dtype) == np.float64


def test_what_was_exchanged_is_not_folded():
    def exchanged(name, part):
        part.initialize()
        layer = package.NormedConv2D(4, 4, 3, padding=1)
        layer.initialize()
        layer.register_child(part, name)
        vars(layer)[name] = part
        return layer

    conv = nn.Conv2D
    for name, part, message in (
        ("pointwise_conv", conv(4, 3, in_channels=4), "pointwise_conv is not as its rule makes it"),
        (
            "pointwise_conv", nn.Conv1D(4, 1, in_channels=4),
            "it is a Conv1D; expected a mxnet.gluon.nn.Conv2D of layout NCHW",
        ),
        ("pointwise_conv", conv(4, 1, in_channels=4, activation="relu"), "as its rule makes it"),
        ("dense_norm", conv(4, 1, in_channels=4), "it is a Conv2D; expected a batch norm"),
        ("more", nn.Dense(1, in_units=1), "its parts are .*, more; expected dense_conv"),
    ):  # fmt: skip
        with pytest.raises(NotFoldable, match=message):
            exchanged(name, part).fold()
    with pytest.raises(ValueError, match=r"NormedConv2D\.fold needs the values of "):
        package.NormedConv2D(4, 4, 3).fold()
    with pytest.raises(ValueError, match="in_channels of a NormedConv2D must be given"):
        package.NormedConv2D(0, 4, 3)
    with pytest.raises(ValueError, match="takes no activation, which would stand before"):
        package.NormedConv2D(4, 4, 3, activation="relu")


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS if kind.name not in SUMMED])
def test_a_file_is_folded_as_the_layer_is(kind, tmp_path):
    file, size = tmp_path / "in.params", 9 if "replk" in kind else 3
    model = nn.HybridSequential()
    model.add(package.NormedConv2D(4, 4, size, padding=size // 2, rule=kind), nn.Dense(2))
    model.initialize()
    model(image())
    rng = np.random.default_rng(0)
    for parameter in model.collect_params().values():
        parameter.set_data(mx.nd.array(rng.uniform(0.5, 2, parameter.shape)))
    model.save_parameters(str(file))
    (change,) = fold_checkpoint(file, tmp_path / "out.params").changed
    assert change.before.startswith(f"{kind} block of ")
    package.fold(model).model.save_parameters(str(file))
    assert_close(mx.nd.load(str(tmp_path / "out.params")), mx.nd.load(str(file)), 1e-6)


def test_a_file_of_a_channels_last_layer_is_refused(tmp_path):
    layer = package.NormedConv2D(3, 4, 3, padding=1, layout="NHWC")
    layer.initialize()
    layer.save_parameters(str(tmp_path / "in.params"))
    message = "named like a repvgg layer, but the kernel .* of pointwise_conv is not"
    with pytest.raises(CheckpointError, match=message):
        fold_checkpoint(tmp_path / "in.params", tmp_path / "out.params")
