"""PyTorch: which layers of a model are replaced, and what is left and said."""

from __future__ import annotations

import copy

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
import torch.ao.nn.qat  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402
from torch_models import images, network, trained  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402
from doconv_core.models.report import (  # noqa: E402
    COMPUTED,
    QUANTIZED,
    READ,
)
from doconv_torch import (  # noqa: E402
    DOConv2d,
    deploy,
    fold,
    over_parameterize,
    to_bsconv,
    verify,
)


def with_weight(weight):
    conv = nn.Conv2d(3, 4, 3)
    conv.weight = weight
    return conv


def frozen_as_buffer():
    conv = nn.Conv2d(3, 4, 3)
    weight = conv.weight.detach()
    del conv.weight
    conv.register_buffer("weight", weight)
    return conv


LEFT = {
    "lazy": (lambda: nn.LazyConv2d(4, 3), "lazy: call the model once, so that it takes its shape"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        "parametrized: its weight is computed from other parameters",
    ),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), COMPUTED),
    "pruned": (lambda: prune.l1_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5), COMPUTED),
    "buffer": (frozen_as_buffer, COMPUTED),
    "complex": (lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64), "its weight is torch.complex64"),
    "resized": (
        lambda: with_weight(nn.Parameter(torch.zeros(4, 3, 2, 2))),
        "its weight has shape (4, 3, 2, 2); expected (4, 3, 3, 3)",
    ),
    "scripted": (lambda: torch.jit.script(nn.Conv2d(3, 4, 3)), "compiled to TorchScript"),
    "traced": (
        lambda: torch.jit.trace(nn.Conv2d(3, 4, 3), images()),
        "compiled to TorchScript",
    ),
    "quantized": (lambda: torch.ao.nn.quantized.Conv2d(3, 4, 3), QUANTIZED),
    "in quantization-aware training": (
        lambda: torch.ao.nn.qat.Conv2d(
            3, 4, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig()
        ),
        QUANTIZED,
    ),
}


# PyTorch's own quantized layer uses what PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", LEFT)
def test_what_computes_something_else_is_left_and_reported(name):
    make, reason = LEFT[name]
    layer = make()
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), layer)
    before = layer.state_dict() if name != "lazy" else {}
    converted, report = over_parameterize(model, inplace=True)
    assert [change.path for change in report.changed] == ["0"]
    assert [(left.path, left.reason) for left in report.left] == [("1", reason)]
    assert converted[1] is layer
    for key, value in before.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(layer.state_dict()[key], value)


def test_a_lazy_layer_that_took_its_shape_is_an_ordinary_one():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    expected = model(images())
    converted, report = over_parameterize(model)
    assert [change.path for change in report.changed] == ["0"]
    assert torch.equal(converted(images()), expected)


def test_a_pruned_bias_goes_on_being_pruned():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    prune.l1_unstructured(model[0], "bias", 0.5)
    expected = model(images())
    over_parameterize(model, inplace=True)
    assert type(model[0]) is DOConv2d
    with torch.no_grad():
        model[0].bias_orig.add_(1)
    kept = model[0].bias_mask.bool()
    assert torch.equal(model(images())[:, ~kept], expected[:, ~kept])
    torch.testing.assert_close(model(images())[:, kept], expected[:, kept] + 1)


class Reading(nn.Module):
    """A model whose code does something with a convolution beside calling it."""

    def __init__(self, use, conv=nn.Conv2d):
        super().__init__()
        self.conv, self.other, self.use = conv(3, 4, 3), nn.Conv2d(4, 4, 3), use

    def forward(self, x):
        return self.use(self.conv, self.other(self.conv(x)))


@pytest.mark.parametrize(
    "use",
    [
        lambda conv, y: nn.functional.conv_transpose2d(y.relu(), conv.weight),
        lambda conv, y: y + conv.weight.detach().square().sum(),
        lambda conv, y: y * conv.weight.data[0, 0, 0, 0],
        lambda conv, y: y + sum(p.norm() for p in conv.parameters()),
        lambda conv, y: [y, conv.weight],
        lambda conv, y: 2 * y if nn.functional.conv2d(y, conv.weight.mT).sum() > 0 else y,
    ],
)
def test_a_weight_that_is_read_elsewhere_is_left_and_not_folded(use):
    model = Reading(use)
    _, report = over_parameterize(model)
    assert [change.path for change in report.changed] == ["other"]
    assert [(left.path, left.reason) for left in report.left] == [("conv", READ)]
    _, report = to_bsconv(model)
    assert [(left.path, left.reason) for left in report.left] == [("conv", READ)]
    with pytest.raises(NotFoldable, match="layer 'conv': the model's forward reads its weight"):
        fold(Reading(use, DOConv2d))
    fold(Reading(use, lambda *sizes: DOConv2d(*sizes[:2], 1)))  # without D, it is the kernel


@pytest.mark.parametrize(
    "use",
    [
        lambda conv, y: y.to(conv.weight.dtype).to(conv.weight.device),
        lambda conv, y: y / conv.weight.size(0) / conv.weight.shape[1] / conv.out_channels,
        lambda conv, y: y + conv.bias.sum(),
        lambda conv, y: y + conv.composed_kernel().sum() if isinstance(conv, DOConv2d) else y,
    ],
)
def test_other_uses_of_a_layer_are_none_of_its_weight(use):
    assert len(over_parameterize(Reading(use)).report.changed) == 2
    assert len(fold(Reading(use, DOConv2d)).report.changed) == 1


class Branches(nn.Module):
    """Two branches that become one convolution, as RepVGG's and MobileOne's do."""

    fused = True  # no method

    def __init__(self):
        super().__init__()
        self.conv, self.point = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) if self.point is None else self.conv(x) + self.point(x)

    def switch_to_deploy(self):
        kernel = self.conv.weight + nn.functional.pad(self.point.weight, [1] * 4)
        self.conv.weight = nn.Parameter(kernel.detach())
        self.conv.bias = nn.Parameter((self.conv.bias + self.point.bias).detach())
        self.point = None


class Fusible(nn.Sequential):
    """A model that fuses its own parts, and has a part that is none of it."""

    def fuse(self):
        """Do so."""


def test_methods_that_make_other_layers_are_named():
    model = Fusible(Branches(), nn.ModuleList([Branches()]))
    _, report = over_parameterize(model, where="0.*")
    assert report.fusing == (("", "Fusible", "fuse"), ("0", "Branches", "switch_to_deploy"))
    assert str(report).endswith(
        "fold before you call what may read these layers' weights:\n"
        "  Fusible.fuse (1)\n    (the model itself)\n  Branches.switch_to_deploy (1)\n    0"
    )
    assert over_parameterize(nn.Sequential(nn.Conv2d(3, 3, 3))).report.fusing == ()


class Returning(Branches):
    """One whose method returns what takes its place, as timm's `fuse` does."""

    def fuse(self):
        self.switch_to_deploy()
        return self.conv


def test_deploying_does_everything_in_the_right_order():
    parts = Branches(), nn.BatchNorm2d(3), Returning(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model = network(lambda: nn.Sequential(nn.Sequential(*parts))).eval()
    model = trained(over_parameterize(model)[0])
    before = copy.deepcopy(model.state_dict())
    deployed, report = deploy(model, images())
    assert report.difference == verify(model, deployed, images())
    assert report.difference.relative < 1e-5
    assert [(c.path, c.after) for c in report.changed] == [
        ("0.0.conv", "Conv2d"), ("0.2.conv", "Conv2d"), ("0.3", "Conv2d"),
        ("0.0", "what its switch_to_deploy() makes"), ("0.2", "what its fuse() makes"),
        ("0.1", "fused into Conv2d"), ("0.4", "fused into Conv2d"),
    ]  # fmt: skip
    assert type(deployed[0][2]) is nn.Conv2d
    assert str(report).splitlines()[-1].startswith("outputs differ by at most ")
    assert str(deploy(model).report).endswith("not verified, as no inputs were given")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = deploy(deployed[0][3:].eval(), torch.zeros(1, 3, 5, 5)).report
    assert (again.changed, again.difference) == ((), (0, 0))


class Wrong(Branches):
    def switch_to_deploy(self):
        self.point = None


class Failing(Branches):
    def switch_to_deploy(self):
        raise KeyError("conv")


def test_what_deploying_cannot_do_right_is_said():
    with pytest.raises(ValueError, match="deploy takes a model in evaluation mode"):
        deploy(Branches())
    with pytest.raises(NotFoldable, match=r"layer '0': Failing\.switch_to_deploy\(\) raised Key"):
        deploy(nn.Sequential(Failing()).eval())
    with pytest.warns(UserWarning, match="the deployed model differs by .* of the largest output"):
        report = deploy(Wrong().eval(), images()).report
    assert report.difference.relative > 0.02


class Marked(nn.Parameter):
    """A user's own class of parameters."""


def test_a_weight_that_is_more_than_a_parameter():
    hooked, classed, noted = (nn.Conv2d(3, 4, 3) for _ in range(3))
    hooked.weight.register_post_accumulate_grad_hook(lambda p: None)
    classed.weight = Marked(classed.weight.detach())
    noted.weight.note = "no decay"
    model = nn.ModuleList([hooked, classed, noted])
    _, report = over_parameterize(model, depth_multiplier=12, inplace=True)
    assert [change.path for change in report.changed] == ["2"]
    assert {left.reason for left in report.left} == {
        "its weight has hooks, or a class of its own, for its present shape: S = M would keep it"
    }
    assert noted.weight.note == "no decay"
    over_parameterize(model, inplace=True)
    assert type(classed) is DOConv2d
    assert type(classed.weight) is Marked


@pytest.mark.parametrize("trained", [False, True])
def test_models_with_the_old_weight_norm_are_copied(trained):
    with pytest.warns(FutureWarning, match="is deprecated in favor of"):
        normed = nn.utils.weight_norm(nn.Conv2d(3, 3, 3))
    model = nn.Sequential(nn.Conv2d(3, 3, 3), normed)
    if trained:
        model(images()).sum().backward()
    expected, own = model(images()), normed.weight
    converted, report = over_parameterize(model)
    assert normed.weight is own
    assert [(left.path, left.reason) for left in report.left] == [("1", COMPUTED)]
    assert torch.equal(converted(images()), expected)
    folded, _ = fold(converted)
    assert torch.equal(folded(images()), expected)
    with torch.no_grad():
        folded[1].weight_g.mul_(2)
    assert not torch.equal(folded(images()), expected)
    assert torch.equal(model(images()), expected)


def test_a_model_that_pytorch_does_not_copy_is_refused():
    normed = parametrizations.weight_norm(nn.Conv2d(3, 3, 3))
    model = nn.Sequential(nn.Conv2d(3, 3, 3), normed)
    model.cache = [model[1].weight]  # no leaf of a graph: PyTorch does not copy it
    with pytest.raises(TypeError, match=r"cannot be copied .*; with inplace=True it is converted"):
        over_parameterize(model)
    over_parameterize(model, inplace=True)
    assert type(model[0]) is DOConv2d
