"""BSConv layers, models with them and their loss in PyTorch: what the contract does not ask."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
from contract_bsconv import FORMS, in_form
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch_models import network, output  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402
from doconv_core.kinds.bsconv import SHARES, WEIGHT_BOUND  # noqa: E402
from doconv_torch import (  # noqa: E402
    BSConvS2d,
    BSConvU2d,
    DGConv2d,
    fold,
    mark_orthonormal,
    orthonormality_loss,
    saliency_lasso,
    to_bsconv,
    verify,
)


def layer(cls=BSConvS2d, **options):
    torch.manual_seed(0)
    return cls(8, 6, 3, padding=1, **options)


def x(**options):
    return torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(1), **options)


def two():
    torch.manual_seed(0)
    return nn.Sequential(BSConvS2d(8, 8, 3, padding=1), nn.ReLU(), BSConvS2d(8, 4, 3))


def test_the_layer_takes_the_place_of_the_ordinary_one():
    arguments = (8, 6, (3, 5), (2, 1), (1, 2), (1, 1), 1, False, "circular")
    made, plain = BSConvU2d(*arguments), nn.Conv2d(*arguments)
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode", "bias",
    ):  # fmt: skip
        assert getattr(made, name) == getattr(plain, name), name
    assert made(x()).shape == plain(x()).shape
    assert isinstance(made[0], nn.Conv2d)
    assert list(made[:1]._modules) == ["pointwise"]
    assert type(made[:1]) is nn.Sequential


def test_parts_have_the_options_of_their_layer():
    made = layer(with_bn=True, p=0.5, bn_options={"eps": 0.1, "momentum": 0.3}, dtype=torch.float64)
    names = ["pointwise1", "batch_norm1", "pointwise2", "batch_norm2", "depthwise"]
    assert list(made._modules) == names
    assert (made.batch_norm1.eps, made.batch_norm2.momentum) == (0.1, 0.3)
    assert made.pointwise1.out_channels == 4
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    assert layer(device="meta").depthwise.weight.is_meta


@pytest.mark.parametrize("cls", [BSConvU2d, BSConvS2d])
@pytest.mark.parametrize("with_bn", [False, True])
def test_pickles(cls, with_bn):
    made = layer(cls, with_bn=with_bn)
    other = pickle.loads(pickle.dumps(made))
    assert type(other) is cls
    assert other.spec == made.spec
    assert torch.equal(other.eval()(x()), made.eval()(x()))


def test_compiled_scripted_and_under_autocast():
    made = layer(with_bn=True)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x()), copy.deepcopy(made)(x()))
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x()).dtype == torch.bfloat16
    scripted = torch.jit.script(two())
    assert torch.equal(scripted(x()), two()(x()))
    with pytest.raises(NotFoldable, match=r"layer '0' is a BSConvS2d that was compiled to TorchSc"):
        fold(scripted, **in_form("merge"))


@pytest.mark.parametrize("form", FORMS)
def test_folding_keeps_the_mode_and_the_device(form):
    folded = layer().eval().fold(**in_form(form))
    assert not any(module.training for module in folded.modules())
    assert layer(device="meta").fold(**in_form(form)).state_dict().keys()


# The loss.


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_the_loss_sees_through_wrappers(wrap):
    model = two()
    loss = orthonormality_loss(wrap(model))
    assert torch.equal(loss, orthonormality_loss(model))
    loss.backward()
    assert model[0].pointwise1.weight.grad is not None


# One of two processes, which trains on its half of the batch.
PROCESS = """
import sys, torch, doconv_torch
from torch import distributed, nn

rank, folder, losses = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
store = distributed.FileStore(f"{folder}/store", 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
for name in losses:
    model, x = torch.load(f"{folder}/{name}.pt", weights_only=False)
    wrapped, loss = nn.parallel.DistributedDataParallel(model), getattr(doconv_torch, name)
    (wrapped(x.chunk(2)[rank]).square().mean() + loss(wrapped, 0.1)).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{name}-{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.exhaustive
def test_two_processes_have_the_gradient_of_one(tmp_path):
    # The second of equal halves, whose batch norms have what the whole's have.
    given = {
        orthonormality_loss: (two(), x()),
        saliency_lasso: (DGConv2d(8, 12, 3), x().repeat(2, 1, 1, 1)),
    }
    for loss, problem in given.items():
        torch.save(problem, tmp_path / f"{loss.__name__}.pt")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    names = [loss.__name__ for loss in given]
    called = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen([*called, str(rank), tmp_path, *names], env=environment)
        for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    for loss, (model, inputs) in given.items():
        (model(inputs).square().mean() + loss(model, 0.1)).backward()
        for rank in range(2):
            found = torch.load(tmp_path / f"{loss.__name__}-{rank}.pt")
            for gradient, parameter in zip(found, model.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad)


def test_the_loss_is_computed_in_float32_under_autocast():
    model, inputs = two(), x()
    expected = orthonormality_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs)
        assert torch.equal(orthonormality_loss(model), expected)


def test_the_loss_is_compiled_with_the_step():
    model = two()

    def step(inputs):
        return model(inputs).mean() + orthonormality_loss(model)

    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(compiled(x()), step(x()))


def test_a_marked_convolution_that_becomes_a_bsconv_u_counts_no_more():
    model = nn.Sequential(mark_orthonormal(nn.Conv2d(6, 4, 1)), two())
    replaced = to_bsconv(model, kernel_sizes=(1,)).model
    assert isinstance(replaced[0], BSConvU2d)
    assert torch.equal(orthonormality_loss(replaced), orthonormality_loss(model[1]))


# Whole models.


def test_trained_weights_are_a_better_start_than_random_ones():
    torch.manual_seed(0)
    x = torch.randn(256, 3, 8, 8)
    target = (x[:, 0].mean((1, 2)) > x[:, 1].mean((1, 2))).long()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    with torch.no_grad():
        expected = model(x)
        far = {
            start: (to_bsconv(model, start=start).model(x) - expected).square().mean().item()
            for start in ("weights", "random")
        }
    assert far["weights"] < far["random"] / 2


def test_the_layer_keeps_what_is_not_its_weight():
    model = network()
    conv, seen = model.stem[0], []
    conv.register_forward_hook(lambda *_: seen.append(1))
    conv.tag = "mine"
    bias = conv.bias
    model.stem[0].requires_grad_(False)
    to_bsconv(model.eval(), inplace=True)
    output(model)
    made = model.stem[0]
    assert (made is conv, made.tag, seen) == (True, "mine", [1])
    assert made.depthwise.bias is bias
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert not any(module.training for module in made.modules())
    assert (made.stride, made.padding_mode) == ((2, 2), "reflect")
    assert "weight" not in dict(made.named_parameters(recurse=False))
    conv._forward_hooks.clear()
    assert type(pickle.loads(pickle.dumps(model)).stem[0]) is BSConvU2d


def test_dtypes_and_memory_formats_are_kept():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for start in ("weights", "random"):
            model = network().to(dtype, memory_format=torch.channels_last)
            made, report = to_bsconv(model, with_bn=True, start=start, bn_options={"eps": 0.5})
            assert {p.dtype for p in made.parameters()} == {dtype}
            weight = made.stem[0].depthwise.weight
            assert weight.is_contiguous(memory_format=torch.channels_last), dtype
            assert made.stem[0].batch_norm.eps == 0.5
            assert bool(report.explained) == (start == "weights"), start


def test_shared_and_bound_weights_are_left():
    def left(model):
        return {entry.path: entry.reason for entry in to_bsconv(model).report.left}

    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    assert left(model) == {"0": SHARES, "1": SHARES}
    model[2].weight.register_hook(lambda gradient: gradient)
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        assert left(model[2:]) == {"2": WEIGHT_BOUND}
    shared, report = to_bsconv(nn.Sequential(model[0], model[0]))
    assert (shared[0] is shared[1], len(report.changed)) == (True, 1)


def test_a_batch_norm_in_training_mode_is_not_merged():
    model = to_bsconv(network(), "s", with_bn=True).model.train()
    with pytest.raises(NotFoldable, match=r"layer 'stem.0': its batch_norm1 .* in training mode"):
        fold(model, **in_form("merge"))


def test_exchanged_parts_are_kept_and_not_folded():
    model = nn.Sequential(BSConvU2d(4, 4, 3))
    model[0].depthwise = nn.AvgPool2d(3)
    expected = model(torch.ones(1, 4, 5, 5))
    kept, report = fold(model)
    assert torch.equal(kept(torch.ones(1, 4, 5, 5)), expected)
    assert [change.after for change in report.changed] == ["Sequential"]
    with pytest.raises(NotFoldable, match="its depthwise cannot be folded: it is a AvgPool2d"):
        fold(model, **in_form("dense"))


def test_tied_pointwise_weights_fold():
    model = nn.Sequential(BSConvS2d(4, 4, 3), BSConvS2d(4, 4, 3)).double()
    model[1].pointwise1.weight = model[0].pointwise1.weight
    for form in FORMS:
        folded = fold(model, **in_form(form)).model
        assert verify(folded, model, torch.ones(1, 4, 6, 6).double()).relative <= 1e-12, form
        tied = form == "keep" and folded[0].pointwise1.weight is folded[1].pointwise1.weight
        assert tied == (form == "keep")


@pytest.mark.parametrize("variant", [pytest.param("u", marks=pytest.mark.exhaustive), "s"])
def test_a_residual_network_of_a_zoo(variant):
    model_provider = pytest.importorskip("pytorchcv.model_provider")
    torch.manual_seed(0)
    model = model_provider.get_model("resnet20_cifar10").eval()
    made, report = to_bsconv(model, variant)
    assert len(report.changed) == 19
    assert report.parameters_after < 0.2 * report.parameters_before
    x = torch.randn(2, 3, 32, 32)
    for form in FORMS:
        folded = fold(made, fuse_batchnorm=form != "keep", **in_form(form)).model
        assert verify(folded, made, x).relative <= 1e-5, form
        assert not any("doconv" in type(module).__module__ for module in folded.modules())
