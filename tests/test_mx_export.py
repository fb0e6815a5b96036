"""Folded Gluon models, exported and read again; a zoo's network from one end to the other."""

from __future__ import annotations

import json

import numpy as np
import pytest
from equal import close, same
from frameworks import fresh, need

need("mx")

# Before MXNet, which it makes importable.
from doconv_mx import (  # noqa: E402
    DGConv2D,
    export_state,
    fold,
    import_gluoncv,
    over_parameterize,
    set_progress,
    verify,
)

# isort: split
import mxnet as mx  # noqa: E402
from gluon_models import (  # noqa: E402
    MULTIPLIERS,
    built,
    chain,
    moved,
    outputs,
    step,
    trained_statistics,
)
from mxnet.gluon import SymbolBlock, Trainer, nn  # noqa: E402

from doconv_core import difference  # noqa: E402

IMPORTS = pytest.mark.filterwarnings("ignore:Cannot decide type:UserWarning")  # MXNet's, always


def exported(model, folder):
    """Return the files to which a model is exported that has run hybridized, and its operators."""
    folder.mkdir()
    model.export(str(folder / "net"))
    graph, values = folder / "net-symbol.json", folder / "net-0000.params"
    operators = [node["op"] for node in json.loads(graph.read_text())["nodes"]]
    return graph, values, operators


@IMPORTS
@MULTIPLIERS
@pytest.mark.parametrize("fuse", [False, True], ids=["batch norms kept", "batch norms fused"])
def test_a_folded_model_is_exported_as_an_ordinary_one(multiplier, fuse, tmp_path):
    plain = built(hybridized=True)
    model = moved(over_parameterize(plain, depth_multiplier=multiplier).model)
    folded = fold(model, fuse_batchnorm=fuse).model
    expected = outputs(folded)
    assert close(expected, outputs(model))
    graph, values, operators = exported(folded, tmp_path / "folded")
    content = graph.read_bytes() + values.read_bytes()
    assert not [word for word in (b"doconv", b"depthwise", b"batch_dot") if word in content]
    if fuse:
        assert "BatchNorm" not in operators
    else:
        assert operators == exported(plain, tmp_path / "plain")[2]
    again = SymbolBlock.imports(str(graph), ["data"], str(values))
    assert same(outputs(again), expected)


@IMPORTS
def test_a_folded_dynamic_group_convolution_is_exported(tmp_path):
    layer = DGConv2D(32, 64, 3, 2, 1)
    layer.initialize()
    set_progress(layer, 1)
    folded = fold(layer).model
    folded.hybridize()
    x = mx.nd.random.normal(shape=(2, 32, 7, 7))
    assert folded.heads.skips()
    assert close(folded(x).asnumpy(), layer(x).asnumpy())
    graph, values, _ = exported(folded, tmp_path / "folded")
    again = SymbolBlock.imports(str(graph), ["data"], str(values))
    assert close(again(x[:1]).asnumpy(), layer(x[:1]).asnumpy())
    with pytest.raises(ValueError, match="the model is folded, and drops as many channels as when"):
        set_progress(folded, 0)


# MXNet alone lacks a name that NumPy no longer has: see doconv_mx.frameworks.
PROGRAM = """
import sys, numpy
numpy.bool = numpy.bool_
import mxnet as mx
block = mx.gluon.SymbolBlock.imports(sys.argv[1], ["data"], sys.argv[2])
x = mx.nd.load(sys.argv[3])[0]
mx.nd.save(sys.argv[3], [block(x)])
assert not [name for name in sys.modules if name.startswith("doconv")]
"""


@pytest.mark.exhaustive
def test_an_exported_model_runs_where_this_package_is_not(tmp_path):
    model = chain(nn.Conv2D(6, 3), nn.BatchNorm(), nn.Activation("relu"), nn.Dense(3))
    model = moved(over_parameterize(built(model, hybridized=True)).model)
    folded = fold(model, fuse_batchnorm=True).model
    x = mx.nd.random.uniform(shape=(2, 4, 7, 8))
    expected = outputs(folded, x)
    graph, values, _ = exported(folded, tmp_path / "folded")
    arrays = str(tmp_path / "arrays")
    mx.nd.save(arrays, [x])
    fresh("-c", PROGRAM, graph, values, arrays, cwd=tmp_path)
    assert same([mx.nd.load(arrays)[0].asnumpy()], expected)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's exporter, of itself
def test_onnx_by_way_of_pytorch(tmp_path):
    """MXNet's own exporter needs a part of ONNX that is no longer there."""
    need("torch")
    import onnxruntime
    import torch

    from doconv_torch import load_state

    model = chain(nn.Conv2D(6, 3), nn.BatchNorm(), nn.Activation("relu"), nn.Dense(3))
    folded = fold(moved(over_parameterize(built(model)).model), fuse_batchnorm=True).model
    x = mx.nd.random.uniform(shape=(2, 4, 7, 8))
    modules = torch.nn.Conv2d(4, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(180, 3)
    twin = torch.nn.Sequential(*modules).eval()
    load_state(twin, export_state(folded), match="order")
    file, data = str(tmp_path / "net.onnx"), x.asnumpy()
    torch.onnx.export(twin, (torch.from_numpy(data),), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    found = session.run(None, {session.get_inputs()[0].name: data})[0]
    assert difference(found, outputs(folded, x)[0]).relative <= 1e-5


def zoo_model(name):
    import_gluoncv()
    from gluoncv.model_zoo import get_model

    model = get_model(name, pretrained=False, classes=4)
    mx.random.seed(0)
    model.initialize(mx.init.MSRAPrelu())
    return model


@IMPORTS
@pytest.mark.parametrize("name", ["cifar_resnet20_v2", "mobilenetv2_0.25"])
def test_a_network_of_the_zoo(name, tmp_path):
    model, x = zoo_model(name), mx.nd.random.uniform(shape=(2, 3, 32, 32))
    model.hybridize()
    outputs(model, x)
    trained_statistics(model)
    target, report = over_parameterize(model)
    assert report.changed
    assert verify(target, model, x) == (0.0, 0.0)
    trainer = Trainer(target.collect_params(), "sgd", {"learning_rate": 0.01})
    for _ in range(2):
        step(target, x)
        trainer.step(2)
    assert all(p.data().asnumpy().any() for p in target.collect_params(".*depthwise_w.*").values())
    folded = fold(target).model
    assert verify(folded, target, x) == (0.0, 0.0)
    fused, report = fold(target, fuse_batchnorm=True)
    assert verify(fused, target, x).relative <= 1e-5
    assert bool(report.left) == (name == "cifar_resnet20_v2")  # which normalizes before
    expected = outputs(fused, x)
    graph, values, _ = exported(fused, tmp_path / "fused")
    again = SymbolBlock.imports(str(graph), ["data"], str(values))
    assert np.array_equal(again(x).asnumpy(), expected[0])
