"""Dynamic group convolutions in Gluon: what only Gluon has."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from contract import check_refused
from equal import assert_close, assert_same
from frameworks import need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import DGConv2D, add_saliency_lasso, fold, set_progress  # noqa: E402, I001
import mxnet as mx  # noqa: E402
from adapters.mx import array  # noqa: E402
from mxnet import autograd  # noqa: E402
from mxnet.gluon import SymbolBlock, Trainer, nn  # noqa: E402

CPUS = [mx.cpu(0), mx.cpu(1)]
X = array(np.random.default_rng(0).standard_normal((4, 16, 6, 6)).astype("f4"))
BIAS = np.random.default_rng(2).permutation(64).reshape(4, 16).astype("f4")


def two(contexts=CPUS[:1], **options):
    """Return two layers, of which one has a kernel for each image and one a map for each head."""
    net, rng = nn.HybridSequential(), np.random.default_rng(1)
    net.add(DGConv2D(16, 64, 3, 2, 1, **options), DGConv2D(64, 8, 1, heads=2, **options))
    net.initialize(ctx=contexts)
    for block in net:
        for name in ("weight", "squeeze_weight", "saliency_weight", "saliency_bias"):
            parameter = getattr(block.heads, name)
            values = rng.standard_normal(parameter.shape) * 0.2 + name.endswith("bias")
            parameter.set_data(array(values.astype("f4")))
    set_progress(net, 0.5)
    return net


@pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always
@pytest.mark.parametrize("flags", [{}, {"static_alloc": True, "static_shape": True}])
def test_hybridized_exported_and_copied(flags, tmp_path):
    net, plain = two(), two()
    net.hybridize(**flags)
    for progress in (0.5, 1):  # which no graph has to be made anew for
        set_progress(net, progress)
        set_progress(plain, progress)
        assert_same(net(X), plain(X))
    net.export(str(tmp_path / "net"))
    files = (tmp_path / name for name in ("net-symbol.json", "net-0000.params"))
    symbol, parameters = map(str, files)
    loaded = SymbolBlock.imports(symbol, ["data"], parameters)
    for other in (loaded, copy.deepcopy(plain)):
        assert_same(other(X[:3]), plain(X[:3]))


def test_half_precision_graphs_infer_shapes_and_types():
    """Which MXNet's CPU cannot run."""
    net = two()
    net.cast("float16")
    symbol = net(mx.sym.var("data", dtype="float16"))
    assert symbol.infer_type()[1] == [np.float16]
    assert symbol.infer_shape(data=(2, 16, 6, 6))[1] == [(2, 8, 3, 3)]
    counter = net[0].heads.inactive.data()
    assert (counter.asscalar(), counter.dtype) == (8, np.float32)
    set_progress(net, 1)
    folded = fold(net).model
    assert folded[0].heads.skips()
    assert folded(mx.sym.var("data", dtype="float16")).infer_type()[1] == [np.float16]


@pytest.mark.parametrize("hybridized", [False, True])
def test_two_contexts_train_as_one(hybridized):
    """Both have the same part of the batch, so that the batch norms see what one context sees."""
    found = []
    for contexts in (CPUS[:1], CPUS):
        net = two(contexts)
        add_saliency_lasso(net, 0.5)
        net.hybridize(hybridized)
        trainer = Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1})
        batch = X[:2] if len(contexts) > 1 else mx.nd.concat(X[:2], X[:2], dim=0)
        with autograd.record():
            losses = [(net(batch.as_in_context(ctx)) ** 2).mean((1, 2, 3)) for ctx in contexts]
        autograd.backward(losses)
        trainer.step(4)
        set_progress(net, 1)
        found.append([p.list_data()[-1].asnumpy() for p in net.collect_params().values()])
    assert_close(found[1], found[0])


@pytest.mark.parametrize("hybridized", [False, True])
@pytest.mark.parametrize("sizes", [((3, 1), 1, (1, 1), 1), (3, 2, 5, (1, 2))], ids=str)
def test_folded_with_wide_padding_and_trained_after_an_evaluation(sizes, hybridized):
    made, found = DGConv2D(16, 8, *sizes, lasso=0.5), []
    made.initialize()
    made.heads.saliency_bias.set_data(array(BIAS))
    set_progress(made, 1)
    folded = fold(made).model
    assert folded.heads.skips()
    for layer in (made, folded):
        layer.hybridize(hybridized)
        output = layer(X).asnumpy()
        with autograd.record():
            loss = (layer(X) * 0).sum((1, 2, 3))
        loss.backward()  # of the lasso alone
        found.append((output, layer.heads.saliency_bias.grad().asnumpy()))
    assert found[0][1].any()
    for one, other in zip(*found, strict=True):
        assert_close(other, one)


def test_a_layer_without_values_is_refused():
    made = DGConv2D(16, 8, 1)
    message = "set_progress needs the values of '.*heads_inactive', which has none yet"
    check_refused((lambda: set_progress(made, 1), ValueError, message))
