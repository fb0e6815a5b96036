"""Folded dynamic group convolutions in PyTorch: compiled, in its operations, and exported."""

from __future__ import annotations

import pytest
from frameworks import need

need("torch")

import onnxruntime  # noqa: E402
import torch  # noqa: E402
from equal import assert_close  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

from doconv_torch import (  # noqa: E402
    DGConv2d,
    SkippingDGConv2d,
    fold,
    set_progress,
    skipping,
)

# (in, out, kernel, stride, padding, dilation, heads, gate factor), batch, height and width.
LAYERS = (
    ((16, 8, 1, 1, 0, 1, 4, 0.25), 1, (9, 11)),  # whole maps, two outputs of a head
    ((96, 36, 1, 1, 0, 1, 3, 0.5), 1, (5, 7)),  # outputs that no register's width divides
    ((300, 64, 1, 1, 0, 1, 1, 1.0), 1, (6, 6)),  # more channels than are gathered at a time
    ((24, 12, 3, 2, 1, 1, 3, 0.3), 3, (9, 8)),  # more images than threads
    ((24, 36, (5, 2), (3, 1), (2, 0), (2, 3), 3, 0.3), 2, (13, 12)),
    ((16, 8, 1, 2, 0, 1, 4, 0.25), 1, (7, 7)),
    ((32, 64, 3, 1, 1, 1, 2, 0.5), 1, (31, 29)),  # more places than are summed at a time
    ((32, 16, 3, 1, 1, 1, 2, 0.9), 1, (6, 6)),  # more kept than pays
    ((8, 8, 1, 1, 0, 1, 1, 0.01), 1, (3, 3)),  # none
)


def made(sizes, size=(0, 0), batch=1):
    torch.manual_seed(0)
    *sizes, heads, gate_factor = sizes
    layer = DGConv2d(*sizes, heads=heads, gate_factor=gate_factor)
    for norm in (layer.norm,):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    nn.init.normal_(layer.heads.saliency_bias, 1, 0.5)
    set_progress(layer, 1)
    return layer.eval(), torch.randn(batch, sizes[0], *size)


@pytest.fixture(params=["compiled", "operations"])
def form(request, monkeypatch):
    calls = []
    if request.param == "operations":
        monkeypatch.setattr(skipping, "_skipping", None)
        return calls
    assert skipping._skipping is not None
    skip = skipping._skipping.skip
    told = type("told", (), {"skip": staticmethod(lambda *given: (calls.append(1), skip(*given)))})
    monkeypatch.setattr(skipping, "_skipping", told)
    return calls


@pytest.mark.parametrize(("sizes", "batch", "size"), LAYERS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_both_forms_are_the_layer(form, sizes, batch, size, threads, request):
    layer, x = made(sizes, size, batch)
    folded = fold(layer).model
    expected = layer.double()(x.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            assert_close(folded(x).numpy(), expected.detach().numpy())
            heads, z = folded.heads, folded.relu(folded.norm(x))
            found = skipping.skipping(heads, z, int(heads.inactive))
    finally:
        torch.set_num_threads(before)
    assert_close(found.numpy(), expected.detach().numpy())
    assert len(form) == (request.node.callspec.params["form"] == "compiled")


def test_what_compiled_code_is_not_for(form):
    layer, x = made(LAYERS[0][0], (6, 6))
    folded, expected = fold(layer).model, layer(x)
    del form[:]
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(folded(x).sum(), x)
    (same,) = torch.autograd.grad(layer(x).sum(), x)
    assert_close(gradient.numpy(), same.numpy())
    with torch.inference_mode():
        assert_close(folded.double()(x.double()).numpy(), expected.detach().numpy())
        folded.float()
        with torch.autocast("cpu", torch.bfloat16):
            folded(x)
        assert not form
        with pytest.raises(RuntimeError, match="should contain 15 elements not 16"):
            folded(torch.zeros(1, 15, 6, 6))
        folded.heads.saliency_bias = nn.Parameter(torch.zeros(4, 8))
        with pytest.raises(RuntimeError):
            folded(x)


def test_a_parameter_that_changes_is_seen(form):
    layer, x = made(LAYERS[3][0], (9, 8))
    folded = fold(layer).model
    with torch.inference_mode():
        folded(x)
    for change in (
        lambda each: nn.init.constant_(each.heads.saliency_bias, 2),
        lambda each: set_progress(each, 0.3),
        lambda each: setattr(each.norm, "bias", nn.Parameter(torch.ones(24))),
        lambda each: each.load_state_dict(made(LAYERS[3][0])[0].state_dict()),
        lambda each: each.heads.weight.data.mul_(2),
    ):
        for each in (layer, folded):
            change(each)
        with torch.inference_mode():
            assert_close(folded(x).numpy(), layer(x).numpy())
            traced = torch.compile(folded, backend="eager", fullgraph=True)
            assert_close(traced(x).numpy(), layer(x).numpy())


@pytest.mark.parametrize("case", ["nan", "large", "order", "relu", "hooks", "fused", "empty"])
def test_odd_inputs_and_changed_layers_give_what_the_layer_does(form, case):
    layer, x = made(LAYERS[0][0], (6, 6), 2)
    x = torch.full((1, 16, 600, 600), 0.37) if case == "large" else x[:0] if case == "empty" else x
    x.view(-1)[:1] = float("nan") if case == "nan" else 1
    model, seen = nn.Sequential(nn.Conv2d(16, 16, 1), layer).eval(), []
    folded = fold(model, fuse_batchnorm=case == "fused").model
    assert type(folded[1].norm) is (nn.Identity if case == "fused" else nn.BatchNorm2d)
    with torch.inference_mode():
        folded(x)
        del form[:]
        if case == "order":  # the same memory, which a view of another order has now
            weight = folded[1].heads.weight
            weight.data = weight.data.as_strided(weight.shape, (16, 1, 1, 1))
            layer.heads.weight.data = weight.data
        if case == "relu":
            folded[1].relu = layer.relu = nn.Identity()
        if case == "hooks":
            folded[1].heads.register_forward_hook(lambda *_: seen.append(1))
        found, expected = folded(x), model.double()(x.double())
    assert torch.equal(found.isnan(), expected.isnan())
    if len(x):
        assert_close(found.nan_to_num().numpy(), expected.nan_to_num().numpy())
    assert len(seen) == (case == "hooks")
    is_compiled = skipping._skipping is not None and case in ("nan", "large", "fused")
    assert len(form) == is_compiled


def test_what_has_no_numbers_and_what_is_differentiated_forwards(form):
    layer, x = made(LAYERS[0][0], (6, 6))
    folded = fold(layer).model.requires_grad_(False)
    stacked = torch.func.stack_module_state([folded, folded])
    ensemble = torch.func.vmap(lambda of: torch.func.functional_call(folded, of, (x,)))
    assert_close(ensemble(stacked)[1].numpy(), layer(x).detach().numpy())
    tangents = []
    for each in (layer, folded):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangents.append(forward_ad.unpack_dual(each(dual)).tangent.detach().numpy())
    assert_close(*tangents)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert folded(mode.from_tensor(x)).shape == (1, 8, 6, 6)
    assert folded.to("meta")(x.to("meta")).shape == (1, 8, 6, 6)
    assert not form


# PyTorch's own exporter still asks in a way that PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("folds", [True, False])
def test_a_model_is_exported_for_any_batch(folds, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), made((32, 64, 3, 2, 1, 1, 4, 0.25))[0]).eval()
    folded, x = fold(model).model if folds else model, torch.randn(3, 3, 12, 12)
    assert isinstance(folded[1], SkippingDGConv2d) == folds
    expected = model(x).detach()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(folded, (x[:2],), dynamic_shapes=shapes)
    assert_close(program.module()(x).detach().numpy(), expected.numpy())
    path = tmp_path / "model.onnx"
    torch.onnx.export(folded, (x[:2],), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(found, expected.numpy())


def test_layers_that_compute_something_else_are_left():
    class Own(DGConv2d):
        pass

    hooked, other = DGConv2d(16, 8, 1), DGConv2d(16, 8, 1)
    hooked.norm.register_forward_hook(lambda *_: None)
    other.norm = nn.Identity()
    del other.relu
    model = nn.Sequential(Own(16, 8, 1), hooked, other).eval()
    report = fold(model).report
    reasons = [each.reason for each in report.left]
    assert not report.changed
    assert "subclass" in reasons[0]
    assert "hooks" in reasons[1]
    assert "its parts are norm Identity, heads DynamicHeads2d" in reasons[2]
