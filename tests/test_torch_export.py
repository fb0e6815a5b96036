"""PyTorch: folded models are exported as ordinary ones, and compute the same there."""

from __future__ import annotations

import io

import pytest
from frameworks import need

need("torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torch_models import images, network, trained  # noqa: E402

from doconv_torch import fold, over_parameterize, verify  # noqa: E402

FUSED = pytest.mark.parametrize("fuse_batchnorm", [False, True])


def models(fuse_batchnorm):
    """Return a trained over-parameterized model, and the folded one."""
    model = trained(over_parameterize(network().eval())[0])
    return model, fold(model, fuse_batchnorm=fuse_batchnorm)[0]


# PyTorch's own exporter still asks in a way that PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "fuse_batchnorm", [False, pytest.param(True, marks=pytest.mark.exhaustive)]
)
def test_onnx_in_its_runtime(fuse_batchnorm, tmp_path):
    model, folded = models(fuse_batchnorm)
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        folded, (images(),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    (name,) = (entry.name for entry in session.get_inputs())

    def run(x):
        return session.run(None, {name: x.numpy()})[0]

    for count in (2, 5):
        assert verify(model, run, images(count)).relative < 1e-5
    operations = [node.op_type for node in onnx.load(path).graph.node]
    assert operations.count("Conv") == 7
    assert not {"MatMul", "BatchNormalization", "Einsum"} & set(operations)


@FUSED
def test_torch_export(fuse_batchnorm):
    model, folded = models(fuse_batchnorm)
    program = torch.export.export(folded, (images(),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    assert b"depthwise" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert verify(model, loaded, images()).relative < 1e-6
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("conv" in target for target in called) == 7
    assert not any("bmm" in target for target in called)


# TorchScript as a whole is deprecated; users still have it.
@pytest.mark.filterwarnings("ignore:`torch.jit.(save|load)` is deprecated:DeprecationWarning")
@FUSED
@pytest.mark.parametrize(
    "compiler", [torch.jit.script, lambda model: torch.jit.trace(model, images())]
)
def test_torchscript(compiler, fuse_batchnorm):
    model, folded = models(fuse_batchnorm)
    buffer = io.BytesIO()
    torch.jit.save(compiler(folded), buffer)
    assert b"doconv" not in buffer.getvalue()
    buffer.seek(0)
    assert verify(model, torch.jit.load(buffer), images(5)).relative < 1e-6


def test_symbolic_traces_show_ordinary_layers():
    _, folded = models(True)
    graph = torch.fx.symbolic_trace(folded)
    called = [graph.get_submodule(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    assert [type(module) for module in called].count(nn.Conv2d) == 7


def test_profilers_count_an_ordinary_network():
    original = network().eval()
    model, folded = models(False)
    counts = []
    for each in (original, model, folded):
        with FlopCounterMode(display=False) as counter:
            each(images())
        counts.append(counter.get_total_flops())
    assert counts[2] == counts[0] < counts[1]
