"""PyTorch: whole models to BSConv, and folding the BSConv layers of whole models."""

from __future__ import annotations

import copy
import pickle
from fnmatch import fnmatchcase

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch_models import images, kinds, network, output  # noqa: E402

from doconv_core import BSConvReport, Converted, FoldReport, Left, NotFoldable, Report  # noqa: E402
from doconv_core.kinds.bsconv import (  # noqa: E402
    GROUPED,
    OVER_PARAMETERIZED,
    PART,
    SHARES,
    WEIGHT_BOUND,
)
from doconv_core.models.report import NOT_SELECTED, SUBCLASS  # noqa: E402
from doconv_torch import (  # noqa: E402
    BSConvS2d,
    BSConvU1d,
    BSConvU2d,
    DOConv2d,
    export_state,
    fold,
    load_state,
    orthonormality_loss,
    over_parameterize,
    to_bsconv,
    verify,
)

# What `network()` has that becomes a BSConv.
REPLACED = ["stem.0", "stages.0.conv1", "head.mix"]
FORMS = ["keep", "merge", "dense"]


def converted(variant="u", **options):
    torch.manual_seed(4)
    return to_bsconv(network().eval().double(), variant, **options).model


def test_the_report_tells_what_was_done():
    original = network()
    result = to_bsconv(original, "s", p=0.5)
    assert type(result) is Converted
    model, report = result
    assert type(report) is BSConvReport
    assert [change.path for change in report.changed] == REPLACED
    assert {change[1:] for change in report.changed} == {("Conv2d", "BSConvS2d")}
    assert [type(model.get_submodule(path)) for path in REPLACED] == [BSConvS2d] * 3
    assert report.parameters_before == sum(p.numel() for p in original.parameters())
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.parameters_after < report.parameters_before
    assert [path for path, _ in report.explained] == REPLACED
    assert all(0 < share < 1 for _, share in report.explained)
    assert "explained variance of the trained kernels" in str(report)
    size = "its kernel_size {} is not among kernel_sizes"
    assert report.left == (
        Left("stages.0.conv2", "Conv2d", size.format((1, 5))),
        Left("stages.1.conv1", "Conv2d", GROUPED),
        Left("stages.1.conv2", "Conv2d", size.format((1, 5))),
        Left("head.squeeze", "Conv2d", size.format((1, 1))),
    )
    assert original.stem[0].weight.shape == (8, 3, 3, 3)


@pytest.mark.parametrize("variant", ["u", "s"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_a_bsconv_already_is_found_again(variant, inplace):
    """A network of dense convolutions that are BSConvs in fact has its outputs unchanged."""
    dense = fold(converted(variant), form="dense").model
    expected, conv = output(dense, images(dtype=torch.float64)), dense.stem[0]
    model, report = to_bsconv(dense, variant, inplace=inplace)
    assert (model is dense) == inplace
    assert (model.stem[0] is conv) == inplace
    found = output(model, images(dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert [share for _, share in report.explained] == pytest.approx([1, 1, 1])


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


def test_a_shared_layer_stays_shared():
    conv = nn.Conv2d(4, 4, 3)
    model, report = to_bsconv(nn.Sequential(conv, conv))
    assert model[0] is model[1]
    assert len(report.changed) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["weights", "random"])
def test_dtypes_and_memory_formats_are_kept(dtype, start):
    model = network().to(dtype, memory_format=torch.channels_last)
    made, report = to_bsconv(model, with_bn=True, start=start, bn_options={"eps": 0.5})
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert made.stem[0].depthwise.weight.is_contiguous(memory_format=torch.channels_last)
    assert made.stem[0].batch_norm.eps == 0.5
    assert bool(report.explained) == (start == "weights")


def left(model, path="0", **options):
    return {entry.path: entry.reason for entry in to_bsconv(model, **options).report.left}[path]


def test_what_is_left_has_its_reason():
    with pytest.warns(UserWarning, match="the model has no convolution that could be replaced"):
        assert left(nn.Sequential(DOConv2d(4, 4, 3))) == OVER_PARAMETERIZED
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        assert left(nn.Sequential(type("Own", (nn.Conv2d,), {})(4, 4, 3))) == SUBCLASS
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        assert left(nn.Sequential(BSConvU2d(1, 1, 3)), "0.depthwise") == PART
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    assert left(model, "1", where="0") == NOT_SELECTED
    model[1].weight = model[0].weight
    model[2].weight.register_hook(lambda gradient: gradient)
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        assert left(model[2:], "2") == WEIGHT_BOUND
    assert left(nn.Sequential(*model[:2], nn.Conv2d(4, 4, 3)), "1") == SHARES


def test_ranks_are_chosen_by_kernel_size():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 5))
    made = to_bsconv(model, kernel_sizes=(3,)).model
    assert kinds(made)["0"] == "BSConvU1d"
    assert isinstance(made[0], BSConvU1d)
    assert kinds(made)["1"] == "Conv1d"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "x"}, ValueError, "variant must be one of 'u', 's'; received variant='x'"),
        ({"start": "zeros"}, ValueError, "start must be one of 'weights', 'random'"),
        ({"kernel_sizes": 3}, TypeError, "kernel_sizes must be a sequence of kernel sizes"),
        ({"variant": "s", "p": 0}, ValueError, "p must be above 0 and at most 1"),
        ({"min_mid_channels": 0}, ValueError, "min_mid_channels must be at least 1"),
        ({"bn_options": {"eps": 1}}, ValueError, "give with_bn=True as well"),
        ({"where": 3}, TypeError, "where must be None, a glob pattern or several"),
    ],
)
def test_bad_arguments_change_nothing(options, error, message):
    model = network()
    before = kinds(model)
    with pytest.raises(error, match=message):
        to_bsconv(model, **options, inplace=True)
    assert kinds(model) == before


def test_a_kernel_that_is_not_finite_is_named_before_anything_is_changed():
    model = network()
    nn.init.constant_(model.head["mix"].weight, float("nan"))
    before = kinds(model)
    with pytest.raises(ValueError, match=r"layer 'head.mix': kernel must be finite"):
        to_bsconv(model, inplace=True)
    assert kinds(model) == before
    assert len(to_bsconv(model, start="random").report.changed) == 3


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["u", "s"])
def test_models_fold_in_every_form(variant, form, inplace):
    original = converted(variant)
    expected = output(original, images(dtype=torch.float64))
    stem = original.stem[0]
    model, report = fold(original, form=form, inplace=inplace)
    assert (model.stem[0] is stem) == inplace
    found = output(model, images(dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert type(report) is FoldReport
    assert [change.path for change in report.changed] == REPLACED
    after = "Conv2d" if form == "dense" else "Sequential"
    assert {change[1:] for change in report.changed} == {(f"BSConv{variant.upper()}2d", after)}
    modules = {type(module).__module__ for module in model.modules()}
    assert not any(fnmatchcase(name, "doconv_*") for name in modules)
    assert len(report.choices) == 3
    forms = dict(zip(FORMS, report.choices[1].cost, strict=True))
    parameters = sum(p.numel() for p in model.stages[0].conv1.parameters())
    assert parameters == forms[form].parameters
    assert f"form={form!r}; each form's parameters" in str(report)


@pytest.mark.parametrize("form", FORMS)
def test_folding_twice_is_folding_once(form):
    once = fold(converted(), form=form).model
    again, report = fold(once, form=form)
    assert (type(report), report.changed) == (Report, ())
    assert verify(again, once, images(dtype=torch.float64)).absolute == 0


def test_merging_folds_batch_norms_that_a_dense_kernel_cannot():
    model = to_bsconv(network().eval().double(), "s", with_bn=True).model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, 0.5, 2)
    before = kinds(model)
    with pytest.raises(NotFoldable, match=r"layer 'stages.0.conv1': .* meets zero padding"):
        fold(model, form="dense", inplace=True)
    assert kinds(model) == before
    x = images(dtype=torch.float64)
    merged = fold(model, form="merge").model
    assert list(merged.stem[0]._modules) == ["pointwise", "depthwise"]
    assert verify(merged, model, x).relative <= 1e-12
    fused, report = fold(model, fuse_batchnorm=True)
    assert type(fused.stem[0].batch_norm1) is nn.Identity
    assert verify(fused, model, x).relative <= 1e-12
    assert "stem.0.batch_norm1" in [change.path for change in report.changed]
    with pytest.raises(NotFoldable, match=r"layer 'stem.0': its batch_norm1 .* in training mode"):
        fold(model.train(), form="merge")


def test_a_layer_of_ones_own_is_kept_and_not_folded():
    class Own(BSConvU2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Own(4, 4, 3))
    kept, report = fold(model)
    assert type(kept[0]) is Own
    assert report.left == (Left("0", "Own", SUBCLASS),)
    with pytest.raises(NotFoldable, match=r"layer '0': .*Own has a forward of its own"):
        fold(model, form="merge")
    with pytest.raises(ValueError, match="form must be one of 'keep', 'merge', 'dense'"):
        fold(model, form="deploy")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("multiplier", [None, 25])
def test_over_parameterized_depthwise_parts_fold(form, multiplier):
    model, report = over_parameterize(
        converted("s"), where="*.depthwise", depth_multiplier=multiplier
    )
    assert [change.path for change in report.changed] == [f"{path}.depthwise" for path in REPLACED]
    torch.manual_seed(5)
    for path in REPLACED:
        nn.init.normal_(model.get_submodule(path).depthwise.depthwise_weight, std=0.1)
    folded, report = fold(model, form=form)
    assert verify(folded, model, images(dtype=torch.float64)).relative <= 1e-12
    assert not any(isinstance(module, DOConv2d) for module in folded.modules())
    expected = [] if form == "dense" else [f"{path}.depthwise" for path in REPLACED]
    found = [change.path for change in report.changed if change.before == "DOConv2d"]
    assert found == expected


def test_exchanged_parts_are_kept_and_not_folded():
    model = nn.Sequential(BSConvU2d(4, 4, 3))
    model[0].depthwise = nn.AvgPool2d(3)
    expected = model(torch.ones(1, 4, 5, 5))
    kept, report = fold(model)
    assert torch.equal(kept(torch.ones(1, 4, 5, 5)), expected)
    assert [change.after for change in report.changed] == ["Sequential"]
    with pytest.raises(NotFoldable, match="its depthwise cannot be folded: it is a AvgPool2d"):
        fold(model, form="dense")


@pytest.mark.parametrize("form", FORMS)
def test_tied_pointwise_weights_fold(form):
    model = nn.Sequential(BSConvS2d(4, 4, 3), BSConvS2d(4, 4, 3)).double()
    model[1].pointwise1.weight = model[0].pointwise1.weight
    folded = fold(model, form=form).model
    assert verify(folded, model, torch.ones(1, 4, 6, 6).double()).relative <= 1e-12
    if form == "keep":
        assert folded[0].pointwise1.weight is folded[1].pointwise1.weight


def test_states_go_between_models():
    model = converted("s", with_bn=True)
    state = export_state(model)
    assert "stem.0.pointwise1.weight" in state.arrays
    assert state.arrays["stem.0.pointwise1.weight"].shape == (3, 3, 1)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    load_state(other, state)
    assert verify(other, model, images(dtype=torch.float64)).absolute == 0


def test_scripted_layers_compute_the_same_and_are_not_folded():
    model = nn.Sequential(BSConvS2d(4, 4, 3), nn.ReLU())
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(torch.ones(1, 4, 5, 5)), model(torch.ones(1, 4, 5, 5)))
    with pytest.raises(NotFoldable, match=r"layer '0' is a BSConvS2d that was compiled to TorchSc"):
        fold(scripted, form="merge")


def test_the_loss_of_a_converted_model_is_zero_at_first():
    model = converted("s")
    assert orthonormality_loss(model).item() <= 1e-12
    folded = fold(model).model
    with pytest.raises(ValueError, match="the Network has no weight to make orthonormal"):
        orthonormality_loss(folded)


@pytest.mark.parametrize("variant", ["u", "s"])
def test_a_residual_network_of_a_zoo(variant):
    model_provider = pytest.importorskip("pytorchcv.model_provider")
    torch.manual_seed(0)
    model = model_provider.get_model("resnet20_cifar10").eval()
    made, report = to_bsconv(model, variant)
    assert len(report.changed) == 19
    assert report.parameters_after < 0.2 * report.parameters_before
    x = torch.randn(2, 3, 32, 32)
    for form in FORMS:
        folded = fold(made, form=form, fuse_batchnorm=form != "keep").model
        assert verify(folded, made, x).relative <= 1e-5
